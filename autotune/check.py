"""What is compared before a candidate is timed: its results with the reference's, and its bits with its own."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Outputs = Any


class Prepared(NamedTuple):
    """What a candidate's `prepare` makes. run: the call that is compared and timed; others: what other calls of the
    candidate returned, to be compared once."""

    run: Callable[[], Outputs]
    others: Outputs = None


@dataclass(frozen=True)
class Failure:
    """Why a candidate must not be run. status: "wrong", "error", or "" where nothing was learnt that is worth a record.
    limit_s: see Record."""

    status: str
    message: str
    limit_s: float | None = None


# Called with what a candidate's call returned, its other results and the reference's: None, or what differs.
Agree = Callable[[Outputs, Outputs, Outputs], str | None]


def check(
    prepare: Callable[[], Prepared], expected: Outputs, agree: Agree
) -> tuple[Callable[[], Outputs], list[int]] | Failure:
    """The call and the checksums of what it returns if the candidate is right, else what is wrong with it."""
    try:
        run, others = prepare()
        # A copy: the second call may write into the same buffers.
        first = _copy(run())
    except Exception as error:
        return Failure("error", described(error))
    try:
        difference = agree(first, others, expected)
    except Exception as error:
        return Failure("wrong", f"cannot be compared with the reference: {described(error)}")
    if difference is not None:
        return Failure("wrong", difference)
    del others
    try:
        second = run()
        same = same_bits(first, second)
    except Exception as error:
        return Failure("error", f"at the second call: {described(error)}")
    if not same:
        return Failure("wrong", "not deterministic: two calls with the same inputs gave different bits")
    return run, checksums(first)


def same_bits(a: Outputs, b: Outputs) -> bool:
    """Whether two results are equal bit for bit: NaN equals the same NaN, 0.0 is not -0.0."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        return alike and torch.equal(_bytes(a), _bytes(b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b))
    if isinstance(a, float) and isinstance(b, float):
        return struct.pack("d", a) == struct.pack("d", b)
    return type(a) is type(b) and bool(a == b)


def checksums(outputs: Outputs) -> list[int]:
    """A number for every tensor in the outputs, which changes when one of its bits does; read once, nothing is kept."""
    if isinstance(outputs, Tensor):
        flat = _bytes(outputs)
        if flat.storage_offset() % 4:
            flat = flat.clone()
        whole = flat.numel() // 4 * 4
        words = flat[:whole].view(torch.int32).sum(dtype=torch.int32)
        return [int(words) + (int(flat[whole:].sum()) << 32)]
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    if isinstance(outputs, (tuple, list)):
        return [number for each in outputs for number in checksums(each)]
    return []


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _copy(outputs: Outputs) -> Outputs:
    if isinstance(outputs, Tensor):
        return outputs.detach().clone()
    if isinstance(outputs, Mapping):
        return {name: _copy(value) for name, value in outputs.items()}
    if isinstance(outputs, (tuple, list)):
        copies = [_copy(value) for value in outputs]
        # A named tuple takes its fields one by one.
        return type(outputs)(*copies) if hasattr(outputs, "_fields") else type(outputs)(copies)
    return outputs


def described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
