"""The Triton scan compiled for GPUs that are not there. See test_triton_compile.py."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton_cases import TARGETS, check_resources, distinct

from kernels import triton_aot
from kernels.problem import Problem
from kernels.scan import triton as backend
from kernels.scan.triton_kernels import scan_forward
from kernels.triton_launch import CONSTANTS

DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float64": (torch.float64, torch.float64),
    "mixed": (torch.float32, torch.bfloat16),
}
# A multiple of 8 and of nothing larger
WIDTH = 1000


def problem(
    direction: str, dtypes: str, width: int = WIDTH, batch: int = 16, length: int = 2048, pairs: bool = False,
    **options: bool,
) -> Problem:  # fmt: skip
    named = {"a": DTYPES[dtypes][0], "x" if direction == "forward" else "h": DTYPES[dtypes][1]}
    plain = {"reverse": False, "packed": False, "initial_state": False}
    sizes = {"B": batch, "T": length, "D": width, "N": batch}
    if options.get("packed"):
        sizes["B"] = 1
    return Problem("scan", direction, torch.device("cuda"), named, sizes, {**plain, "pairs": pairs, **options})


def check(found: triton_aot.Compiled, posed: Problem, split: bool = False) -> None:
    """No spills, a quarter of the warps resident, 16 bytes at a time; on NVIDIA all streams by asynchronous copies."""
    check_resources(found)
    states = posed.options["initial_state"] + (posed.direction == "backward" and posed.options["initial_state"])
    # The state before a chunk, and of the bounds of packed sequences one more, to find the chunk
    states += split
    if found.kernel == "scan_chunks":
        assert sum(count for width, count in found.loads.items() if width < 16) <= 3, found
        assert sum(found.stores.values()) <= 4, found
        return
    # Narrower are only the rows of states, in one or two pieces, and the two bounds of a packed sequence
    narrow_loads = sum(count for width, count in found.loads.items() if width < 16)
    assert narrow_loads <= 2 * states + (2 + split) * posed.options["packed"], found
    narrow_stores = sum(count for width, count in found.stores.items() if width < 16)
    assert narrow_stores <= (2 if posed.direction == "forward" or states else 0), found
    assert found.stores[16] >= 1, found
    streams = found.loads[16]
    if found.target.startswith("sm_"):
        # States of wide numbers, too, may be read by 16 bytes, but not asynchronously
        assert streams - 4 * states <= found.asynchronous, found
        assert found.asynchronous >= 4, found


def compiled(posed: Problem, config: dict[str, int], target: str) -> None:
    assert backend.cannot(posed) == []
    found = backend.compile_for(target, posed, config)
    assert len(found) == (3 if "split" in config else 1)
    for kernel in found:
        check(kernel, posed, "split" in config)


REPRESENTATIVE = [
    ("bfloat16", {}),
    ("float32", {"pairs": True, "packed": True, "initial_state": True}),
]


# Carried with one warp, with four, and with other tiles; split
CONFIGS = {name: place for place, name in enumerate(("narrow", "wide", "other", "split"))}


def one(direction: str, dtypes: str, config: str, target: str, **options: Any) -> None:
    posed = problem(direction, dtypes, **options)
    configs = backend.configs(posed)
    assert [config.get("split", 0) for config in configs] == [0, 0, 0, 64, 256]
    compiled(posed, configs[CONFIGS[config]], target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("config", ["narrow", "wide", "other"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtypes, options", REPRESENTATIVE, ids=str)
def test_every_config(dtypes: str, options: dict[str, bool], direction: str, config: str, target: str) -> None:
    one(direction, dtypes, config, target, **options)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_time_split_over_programs(direction: str, target: str) -> None:
    one(direction, "bfloat16", "split", target)
    if target == "sm_80":
        one(direction, "float32", "split", target, **REPRESENTATIVE[1][1])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_default_config_in_other_dtypes(direction: str, target: str) -> None:
    one(direction, "float32", "narrow", target)
    one(direction, "float64", "narrow", target, reverse=True)


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
@pytest.mark.parametrize("config", ["narrow", "other"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_float32_decays_beside_bfloat16(direction: str, config: str, target: str) -> None:
    one(direction, "mixed", config, target)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_the_cross_product(dtypes: str, direction: str, target: str) -> None:
    everything = {"initial_state": True, "packed": True, "reverse": True}
    flags: list[dict[str, bool]] = [{}, {"initial_state": True}, everything]
    for pairs, options in itertools.product((False, True), flags):
        posed = problem(direction, dtypes, pairs=pairs, **options)
        for config in distinct(backend.configs(posed)):
            compiled(posed, config, target)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_odd_widths_compile_without_spills_and_with_narrow_loads(direction: str, target: str) -> None:
    posed = problem(direction, "bfloat16", width=WIDTH + 1)
    (found,) = backend.compile_for(target, posed, backend.configs(posed)[0])
    assert found.spills == 0
    assert max(found.loads) < 16


def test_a_width_of_its_own_per_dtype() -> None:
    posed = problem("forward", "float32", width=WIDTH + 4)
    (found,) = backend.compile_for("sm_90", posed, backend.configs(posed)[0])
    assert found.loads == {16: found.asynchronous}


def test_spills_are_seen() -> None:
    posed = problem("forward", "float32", pairs=True)
    few = {name: torch.empty(8, device="meta") for name in ("a", "x", "h", "final")}
    numbers = dict.fromkeys(("T", "W", "N", "a_b", "a_t", "x_b", "x_t", "h_b"), 8)
    constants = {"UNIT": 8, "REVERSE": False, "PAIRS": True, "TWO": True, "STATE": CONSTANTS[torch.float32]}
    constants |= {"BT": 32, "BD": 64, "STAGES": 2, "initial": None, "entering": None, "cu_seqlens": None}
    constants |= {"C": None, "PIECES": False}
    squeezed = triton_aot.compile_kernel(scan_forward, few | numbers | constants, "sm_90", num_warps=1, maxnreg=32)
    assert squeezed.registers <= 32
    assert squeezed.spills > 0
    with pytest.raises(AssertionError):
        check(squeezed, posed)


class _AbsentH100:
    """As much of a driver as Triton asks before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.mark.parametrize("packed, split", [(False, {}), (True, {}), (True, {"split": 8})])
def test_a_launch_compiles_what_compile_for_compiles(
    packed: bool, split: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []

    def warm_up(launch: backend.Launch, device: torch.device) -> None:
        compiled = launch.kernel.warmup(**launch.arguments, grid=(launch.programs,), num_warps=launch.num_warps)
        launched.append((launch, compiled.src))

    monkeypatch.setattr(backend.Launch, "__call__", warm_up)
    a, x, dh = torch.rand(3, 1, 19, WIDTH, dtype=torch.bfloat16)
    cu_seqlens, initial = torch.tensor([0, 3, 19]), torch.rand(2, WIDTH)
    rest = (initial, cu_seqlens) if packed else (None, None)
    config = {"BT": 4, "num_warps": 1, "num_stages": 2, **split}
    needs = (True, True, packed)
    monkeypatch.setattr(triton.runtime.driver, "_active", _AbsentH100())
    h, final = backend.forward(a, x, *rest, reverse=False, config=config)
    dfinal = final if packed else None
    backend.backward(dh, dfinal, a, h, *rest, reverse=False, needs=needs, config=config)
    monkeypatch.undo()
    assert len(launched) == (6 if split else 2)
    for launch, source in launched:
        expected = triton_aot.specialize(launch.kernel, launch.arguments, nvidia=True)
        assert source.signature == expected.signature
        assert source.constants == expected.constants
        assert {i: found for i, found in source.attrs.items() if found} == expected.attrs


def test_many_columns_come_with_more_warps() -> None:
    few, many = problem("forward", "bfloat16"), problem("forward", "bfloat16", batch=512)
    assert backend.configs(few)[0]["num_warps"] == 1
    assert backend.configs(many)[0]["num_warps"] == 4
    assert all(config in backend.configs(few) for config in backend.configs(many))


def test_few_columns_and_long_sequences_come_with_time_split() -> None:
    def first(length: int, batch: int, **options: bool) -> int:
        posed = problem("forward", "bfloat16", batch=batch, length=length, **options)
        return backend.configs(posed)[0].get("split", 0)

    # 16 programs of a warp for a sequence
    assert [first(length, 8) for length in (512, 1024, 2**14, 2**15, 2**17)] == [0, 64, 64, 256, 256]
    assert [first(2**17, batch) for batch in (8, 9)] == [256, 0]
    # Packed sequences are as long as they are on average
    assert [first(2**13, batch, packed=True) for batch in (8, 9)] == [64, 0]
    assert first(2**12, 8, packed=True) == 0


def test_what_it_cannot_do_and_unknown_targets_are_named() -> None:
    posed = problem("forward", "float32")
    on_cpu = Problem(posed.op, posed.direction, torch.device("cpu"), posed.dtypes, posed.sizes, posed.options)
    assert backend.cannot(on_cpu) == ["needs a CUDA or HIP device, the tensors are on cpu"]
    huge = problem("forward", "float32", width=2**29, pairs=True)
    assert backend.cannot(huge) == [f"rows of {2**30} numbers; at most {2**30 - 1}"]
    with pytest.raises(ValueError, match="no target 'hopper'; a target is sm_80"):
        backend.compile_for("hopper", posed, backend.configs(posed)[0])
