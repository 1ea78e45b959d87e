"""Attention beside recurrent ops on a GPU, for as many tokens at every length: a part of benchmarks/gpu.py."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from gpu_report import Report
from gpu_subjects import EIGHTH, Subject, heads, options, posed
from peers import Subject as Timed
from sizes import accelerated
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.agreement import Inputs


def beside_attention(report: Report, given: argparse.Namespace) -> None:
    """Attention and recurrent ops of 16 heads of 64, or as wide, without states: forward, and forward + backward."""
    subjects = {
        "scan": Subject("scan", "scan", {"D": 1024}, {"initial_state": False}),
        "gla per head": Subject("", "gla", heads(64, 1), {"initial_state": False, **EIGHTH}),
        "gla per key": Subject("", "gla", heads(64), {"initial_state": False, **EIGHTH}),
        "delta_rule": Subject("", "delta_rule", heads(64), {"initial_state": False, "log_decay": False, **EIGHTH}),
    }
    for length in given.lengths:
        batch = max(1, given.tokens // length)
        sized = argparse.Namespace(**{**vars(given), "batch": batch, "length": length})
        for name, (function, tensors) in functions(subjects, sized):
            for direction in ("forward", "forward+backward"):
                if report.over:
                    return
                if not report.mine():
                    continue
                what = f"{name} {direction} [{batch}, {length}] bfloat16"
                try:
                    seconds = report.seconds(Timed(function, tensors).run(direction))
                except Exception as error:
                    report.add(f"  {what:60} {type(error).__name__}: {error}", kind="error", what=what)
                    continue
                report.add(f"  {what:60} {1e6 * seconds:10.1f} µs", kind="attention", what=what, seconds=seconds)


def functions(
    subjects: Mapping[str, Subject], given: argparse.Namespace
) -> Iterator[tuple[str, tuple[Callable[..., Tensor], list[Tensor]]]]:
    q, k, v = (
        torch.randn(given.batch, 16, given.length, 64, device=given.device, dtype=torch.bfloat16) for _ in range(3)
    )

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if accelerated(given.device) else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    yield "flash attention", (attention, [q, k, v])
    for name, subject in subjects.items():
        inputs = posed(subject, given, torch.bfloat16, "forward")
        yield name, of(inputs)


def of(inputs: Inputs) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The op's first output as a function of the tensors that are there."""
    op, there = inputs.op, [n for n, t in enumerate(inputs.tensors) if t is not None]

    def function(*tensors: Tensor) -> Tensor:
        every: list[Tensor | None] = [None] * len(op.inputs)
        for place, tensor in zip(there, tensors):
            every[place] = tensor
        return op(*every, None, *options(op, inputs), "auto")[0]

    return function, [t for t in inputs.tensors if t is not None]
