"""What benchmarks/gpu.py times, and its tensors."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from sizes import drawn

from kernels.agreement import Inputs, pose
from kernels.catalogue import OPS
from kernels.op import Op


@dataclass(frozen=True)
class Subject:
    """An op with sizes beside B and T. case: of libraries.CASES, "" if nobody has the same."""

    name: str
    op: str
    sizes: Mapping[str, int]
    facts: Mapping[str, Any] = field(default_factory=dict)
    case: str = ""


def heads(keys: int, decays: int = 0) -> dict[str, int]:
    return {"H": 1024 // keys, "K": keys, "V": keys, "J": decays or keys}


WIDE = {"D": 2048}
EIGHTH = {"scale": 64**-0.5}
SUBJECTS = (
    Subject("scan", "scan", WIDE, {}, "scan"),
    Subject("scan complex", "scan", WIDE, {"pairs": True}),
    Subject("hgru", "hgru", WIDE, {"activation": "positive", "lower_bound": False}),
    Subject("gated_norm", "gated_norm", {"H": 1, "V": 2048}, {"bias": False}, "gated_norm"),
    Subject("short_conv", "short_conv", {**WIDE, "W": 4}, {}, "short_conv"),
    Subject("gla per head", "gla", heads(64, 1), EIGHTH, "gla per head"),
    Subject("gla per key", "gla", heads(64), EIGHTH, "gla per key"),
    Subject("gla per head K=V=128", "gla", heads(128, 1), {"scale": 128**-0.5}, "gla per head"),
    Subject("gla per key K=V=128", "gla", heads(128), {"scale": 128**-0.5}, "gla per key"),
    Subject("delta_rule", "delta_rule", heads(64), {"log_decay": False, **EIGHTH}, "delta_rule"),
    Subject("delta_rule per head", "delta_rule", heads(64, 1), EIGHTH, "delta_rule per head"),
    Subject("dplr", "dplr", heads(64), {}, "dplr per key"),
    Subject("selective_scan", "selective_scan", {**WIDE, "K": 16}),
)


def posed(subject: Subject, given: argparse.Namespace, dtype: torch.dtype, direction: str) -> Inputs:
    """Its tensors; a backward pass gets its residuals from the backend's own forward pass."""
    op = OPS[subject.op]
    sizes = {**subject.sizes, "B": given.batch, "N": given.batch, "T": given.length}
    forward, problem = (
        pose(op, part, sizes, dtype=dtype, device=given.device, **subject.facts) for part in ("forward", direction)
    )
    inputs = drawn(op, forward)
    if direction == "forward":
        return inputs
    with torch.no_grad():
        outputs = op(*inputs.tensors, None, *options(op, inputs), given.backend)
    known = dict(zip((arg.name for arg in (*op.inputs, *op.outputs)), (*inputs.tensors, *outputs)))
    gradients = [torch.randn_like(known[arg.name]) if arg.differentiable else None for arg in op.outputs]
    return Inputs(op, problem, (*gradients, *(known[name] for name in op.residuals)), None)


def options(op: Op, inputs: Inputs) -> list[Any]:
    return [inputs.problem.options[name] for name in op.options]
