"""What an op's tensors must look like, and the problem they pose, without the tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

SEQUENCE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def state_dtype(sequence: torch.dtype) -> torch.dtype:
    """The dtype of states and accumulators: float64 for float64, float32 for everything narrower."""
    return torch.float64 if sequence == torch.float64 else torch.float32


@dataclass(frozen=True)
class Arg:
    """One tensor of an op: its name, its axes, and the rule that its dtype follows.

    axes: letters, or a letter less a number, such as "W-1", which may be 0; the letter is an axis of an earlier tensor.
    role "sequence": one dtype for all of them, any of SEQUENCE_DTYPES; "decay" (and weights): the sequence dtype or the
    state dtype; "state": the state dtype; "index": int64. `pairs`: may carry a trailing axis of 2 (real and imaginary
    part). `differentiable`: False for an output that only the backward pass needs, and through which none runs.
    `nothing`: rows of it leave a state of zeros as it is.
    """

    name: str
    axes: str
    role: str = "sequence"
    optional: bool = False
    pairs: bool = False
    differentiable: bool = True
    nothing: float = 0.0

    @property
    def letters(self) -> tuple[str, ...]:
        return tuple(self.axes.split())


def size_of(axis: str, sizes: Mapping[str, int]) -> int:
    """The size of an axis: of a letter's, or of a letter's less a number."""
    letter, _, less = axis.partition("-")
    return sizes[letter] - int(less or 0)


@dataclass(frozen=True)
class Problem:
    """Everything that a backend may base a decision on: sizes, dtypes, device and options, but no values."""

    op: str
    direction: str
    device: torch.device
    dtypes: Mapping[str, torch.dtype]
    sizes: Mapping[str, int]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        sizes = " ".join(f"{k}={v}" for k, v in self.sizes.items())
        options = " ".join(k if v is True else f"{k}={v}" for k, v in self.options.items() if v)
        return f"{self.op} {self.direction} [{sizes}] {self.dtype_name} {self.device}{' ' if options else ''}{options}"

    def __hash__(self) -> int:
        return hash(str(self))

    @property
    def dtype_name(self) -> str:
        """The dtype, or "float32+bfloat16" where arguments differ; without states, which follow from the sequences."""
        names = dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in self.dtypes.values())
        return "+".join(names)


def check(op: str, args: Sequence[Arg], tensors: Sequence[Tensor | None], cu_seqlens: Tensor | None) -> dict[str, int]:
    """The sizes of the axes, or an error that names the op, the axis and both values.

    Raises:
        TypeError: a tensor is missing or has the wrong dtype.
        ValueError: a shape or a device does not fit.
    """
    sizes: dict[str, int] = {}
    origin: dict[str, str] = {}
    present = [(arg, tensor) for arg, tensor in zip(args, tensors) if tensor is not None]
    missing = [arg.name for arg, tensor in zip(args, tensors) if tensor is None and not arg.optional]
    if missing:
        raise TypeError(f"{op}: {missing[0]} is missing")
    _check_devices(op, present, cu_seqlens)
    _check_dtypes(op, present)
    pairs = any(arg.pairs and tensor.ndim == len(arg.letters) + 1 for arg, tensor in present)
    for arg, tensor in present:
        letters = arg.letters + (("pair",) if pairs and arg.pairs else ())
        if tensor.ndim != len(letters):
            raise ValueError(
                f"{op}: {arg.name} has {tensor.ndim} axes {_shape(tensor)}, expected [{', '.join(letters)}]"
            )
        for letter, size in zip(letters, tensor.shape):
            if letter == "N":
                _check_batch(op, arg, tensor, size, sizes, cu_seqlens)
                continue
            if "-" in letter:
                whole = letter.partition("-")[0]
                if size != size_of(letter, sizes):
                    whole = f"axis {whole} is {sizes[whole]} in {origin[whole]}"
                    raise ValueError(f"{op}: axis {letter} is {size} in {arg.name} but {whole}")
                continue
            if letter == "pair" and size != 2:
                raise ValueError(f"{op}: axis pair is {size} in {arg.name}, expected 2 (real and imaginary part)")
            if size == 0:
                raise ValueError(f"{op}: axis {letter} is 0 in {arg.name}, expected at least 1")
            if sizes.setdefault(letter, size) != size:
                raise ValueError(f"{op}: axis {letter} is {sizes[letter]} in {origin[letter]} but {size} in {arg.name}")
            origin.setdefault(letter, arg.name)
    sizes.pop("pair", None)
    if cu_seqlens is not None and sizes["B"] != 1:
        raise ValueError(f"{op}: axis B is {sizes['B']}, but packed sequences (cu_seqlens) need B = 1")
    sizes["N"] = sizes["B"] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return sizes


def _check_batch(
    op: str, arg: Arg, tensor: Tensor, size: int, sizes: dict[str, int], cu_seqlens: Tensor | None
) -> None:
    expected = sizes["B"] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if size != expected:
        what = "the batch B" if cu_seqlens is None else "the number of packed sequences (len(cu_seqlens) - 1)"
        raise ValueError(f"{op}: axis N is {size} in {arg.name} but {what} is {expected}")


def _check_devices(op: str, present: Sequence[tuple[Arg, Tensor]], cu_seqlens: Tensor | None) -> None:
    first, device = present[0][0].name, present[0][1].device
    for name, tensor in [(arg.name, tensor) for arg, tensor in present] + [("cu_seqlens", cu_seqlens)]:
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{op}: {first} is on {device} but {name} is on {tensor.device}")
    if cu_seqlens is not None:
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: cu_seqlens is {_dtype(cu_seqlens)}, expected int32 or int64")
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
            raise ValueError(f"{op}: cu_seqlens has shape {_shape(cu_seqlens)}, expected [N + 1] with N >= 1")


def _check_dtypes(op: str, present: Sequence[tuple[Arg, Tensor]]) -> None:
    first, sequence = next((arg.name, tensor.dtype) for arg, tensor in present if arg.role == "sequence")
    for arg, tensor in present:
        if arg.role != "index" and not tensor.dtype.is_floating_point:
            raise TypeError(f"{op}: {arg.name} is {_dtype(tensor)}, expected a floating-point dtype")
    if sequence not in SEQUENCE_DTYPES:
        raise TypeError(f"{op}: {first} is {sequence}, expected one of {', '.join(map(str, SEQUENCE_DTYPES))}")
    allowed = {
        "sequence": (sequence,),
        "decay": (sequence, state_dtype(sequence)),
        "state": (state_dtype(sequence),),
        "index": (torch.int64,),
    }
    for arg, tensor in present:
        if tensor.dtype not in allowed[arg.role]:
            expected = " or ".join(dict.fromkeys(str(d).removeprefix("torch.") for d in allowed[arg.role]))
            raise TypeError(
                f"{op}: {arg.name} is {_dtype(tensor)} but {first} is {str(sequence).removeprefix('torch.')}, "
                f"so {arg.name} must be {expected}"
            )


def number(op: str, name: str, value: float) -> float:
    """An option that is a number; TypeError for a tensor, which may want a gradient."""
    if isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} is a tensor, expected a number; nothing is learned of it")
    return float(value)


def check_cu_seqlens(op: str, cu_seqlens: Tensor, length: int) -> None:
    """Raises ValueError unless cu_seqlens rises from 0 to `length`. Reads its values: for CPU tensors only."""
    values = cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != length:
        raise ValueError(f"{op}: cu_seqlens goes from {values[0]} to {values[-1]}, but axis T goes from 0 to {length}")
    for n, (start, end) in enumerate(pairwise(values)):
        if end < start:
            raise ValueError(f"{op}: cu_seqlens falls from {start} to {end} at sequence {n}; it must not fall")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
