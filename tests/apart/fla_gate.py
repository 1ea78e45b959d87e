"""flash-linear-attention's kernels as candidates of ours, in the interpreter. See test_fla.py."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton_cases import size
from triton_interpreter import counting

import autotune
from kernels import foreign
from kernels.agreement import Expected, Inputs, draw, pose
from kernels.catalogue import OPS
from kernels.explain import explain
from kernels.foreign import Kernel
from kernels.tuning import tune

CPU = torch.device("cpu")
BEFORE = set(sys.modules)
MODULES = {name: importlib.import_module(f"kernels.{name}.fla") for name in ("hgru", "gla", "delta_rule")}
IMPORTED = {name.partition(".")[0] for name in set(sys.modules) - BEFORE}


class Range:
    """range(), for kernels: its numbers are tensors there, and have .to(dtype); the interpreter's are Python's."""

    def __init__(self, *bounds: Any) -> None:
        self.numbers = range(*(int(b.handle.data.item()) if isinstance(b, tl.tensor) else int(b) for b in bounds))

    def __iter__(self) -> Iterator[Any]:
        return (tl.full([], number, tl.int32) for number in self.numbers)


@pytest.fixture(autouse=True, scope="session")
def _their_package() -> Iterator[None]:
    """Their modules as they are, one config a kernel: their autotuner asks a GPU's driver to time several.

    These packages import everything that there is; empty ones in their place save most of a minute.
    """
    root = Path(next(iter(importlib.util.find_spec("fla").submodule_search_locations)))  # type: ignore[union-attr, arg-type]
    for name in ("fla", "fla.ops", "fla.modules", "fla.modules.norm"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        package.__version__ = "0"  # type: ignore[attr-defined]
        sys.modules[name] = package
    make = triton.runtime.autotuner.Autotuner.__init__

    def one_config(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.configs = self.configs[:1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.autotuner.Autotuner, "__init__", one_config)
        # it imports torch's compiler
        patch.setattr(torch.compiler, "disable", lambda function: function)
        for module in MODULES.values():
            for kernel in module.KERNELS:
                importlib.import_module(kernel.path.partition(":")[0])
        for name, module in list(sys.modules.items()):
            if name.startswith("fla.ops."):
                patch.setattr(module, "range", Range, raising=False)
        yield


def test_nothing_of_theirs_is_imported_before_it_is_called() -> None:
    assert IMPORTED.isdisjoint({"fla", "transformers"})


def posed(op: str, direction: str, dtype: torch.dtype = torch.float32, packed: bool = False, **facts: Any) -> Inputs:
    sizes = {"B": 1 if packed else 2, "T": facts.pop("T", 3), "H": 2, "K": 5, "V": 3, "D": 5, "J": facts.pop("J", 5)}
    if packed:
        sizes["N"] = 4
    return draw(OPS[op], pose(OPS[op], direction, sizes, dtype=dtype, device=CPU, packed=packed, **facts))


def differences(inputs: Inputs, only: str = "") -> dict[str, str | None]:
    """What is wrong with each kernel that fits."""
    backend, expected = inputs.op.backend("fla"), Expected.of(inputs)
    assert backend.cannot(inputs.problem) == []
    found: dict[str, str | None] = {}
    for config in backend.configs(inputs.problem):
        if only in config["kernel"]:
            try:
                found[config["kernel"]] = expected.difference(inputs.call(backend, config)())
            except RuntimeError as error:
                found[config["kernel"]] = str(error)
    return found


def facts_of(kernel: Kernel) -> list[dict[str, Any]]:
    values = {"none": {"log_decay": False}, "head": {"J": 1}, "key": {"J": 5}}
    return [values[decays] for decays in kernel.decays] or [{}]


EVERY = [
    pytest.param(op, kernel, facts, direction, id=f"{kernel.name}-{n}-{direction}")
    for op, module in MODULES.items()
    for kernel in module.KERNELS
    for n, facts in enumerate(facts_of(kernel))
    for direction in ("forward", *(["backward"] if kernel.gradients else []))
    if not kernel.narrow and (kernel.name != "chunk_hgrn" or direction == "forward")
]


@pytest.mark.long
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("op", "kernel", "facts", "direction"), EVERY)
def test_every_kernel_is_right(op: str, kernel: Kernel, facts: dict[str, Any], direction: str, packed: bool) -> None:
    if packed and not kernel.packed:
        pytest.skip("takes no packed sequences")
    # a chunk of theirs and a bit, where they are shorter for short sequences
    assert differences(posed(op, direction, packed=packed, T=19, **facts), kernel.name) == {kernel.name: None}


@pytest.mark.long
def test_what_is_kept_in_16_bits_on_the_way_is_refused() -> None:
    # the interpreter computes with the bits of bfloat16
    inputs = posed("delta_rule", "backward", torch.float16, T=149, log_decay=False)
    assert "is off by" in (differences(inputs, "chunk_delta_rule")["chunk_delta_rule"] or "")


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "times"), [(torch.float32, 2.1), (torch.bfloat16, 4.5)], ids=str)
def test_how_many_times_the_least_bytes_their_chunked_hgrn_moves(dtype: torch.dtype, times: float) -> None:
    """Forward, the casts around its kernels included; docs/derivations/scan.md has it beside ours."""
    theirs = foreign.function("fla.ops.hgrn:chunk_hgrn")
    x, g = torch.randn(1, 512, 64).to(dtype), -torch.rand(1, 512, 64).to(dtype)
    with counting() as traffic:
        h, _ = theirs(x=x, g=g)
    assert (traffic.moved + traffic.outside) / size(x, g, h) == pytest.approx(times, abs=0.05)


@pytest.mark.parametrize(
    ("op", "only", "facts"),
    [
        ("gla", "fused_recurrent_gla", {"packed": True}),
        ("gla", "chunk_simple_gla", {"J": 1}),
        ("delta_rule", "fused_recurrent_delta_rule", {"log_decay": False}),
    ],
)
def test_one_kernel_of_each_kind_is_right(op: str, only: str, facts: dict[str, Any]) -> None:
    assert differences(posed(op, "backward", **facts), only) == {only: None}


def test_the_gate_admits_their_recurrent_hgrn_and_refuses_their_chunked_one(tmp_path: Path) -> None:
    """A backward pass that drops the gradient of the final state, and returns none for the initial state."""
    op = OPS["hgru"]
    # their kernels beside the loop: ours have tests of their own
    object.__setattr__(op, "backends", tuple(b for b in op.backends if b.name in ("naive", "fla")))
    assert differences(posed("hgru", "forward")) == {"fused_recurrent_hgrn": None, "chunk_hgrn": None}
    for initial_state, reason in ((True, "chunk_hgrn returns no gradient of initial_state"), (False, "di is off by ")):
        problem = posed("hgru", "backward", T=2, initial_state=initial_state).problem
        with autotune.using(tmp_path / f"{initial_state}.jsonl"):
            # in this process, whose interpreter was repaired; it ends long before
            tune(op, problem, seconds=1000, isolate=False)
            text = str(explain(op, problem))
        lines = {line.split(":")[0].split(" version")[0].strip(): line for line in text.splitlines()[1:]}
        print(text)
        assert " µs" in lines["fla kernel=fused_recurrent_hgrn"]
        assert reason in lines["fla kernel=chunk_hgrn"]
        assert op.choose(problem).config.get("kernel") != "chunk_hgrn"
