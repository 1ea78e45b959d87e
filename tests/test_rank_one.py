"""The delta rule and dplr in C++: several tiles and groups of columns, threads, layouts in memory, hard decays."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import jit_cpp, pool, rank_one
from kernels.agreement import Expected, Inputs, draw, pose
from kernels.catalogue import OPS
from kernels.delta_rule import native
from kernels.op import Op

pytestmark = [
    pytest.mark.usefixtures("nan_filled"),
    pytest.mark.skipif(jit_cpp.reason(native.SOURCE) is not None, reason="no compiler"),
]

CPU = torch.device("cpu")
NAMES = ("delta_rule", "dplr")
# one head, whose tiles are shared out among threads; many, each with several tiles; a state that fills the cache
SIZES = (
    {"B": 1, "T": 37, "H": 1, "K": 19, "V": 70},
    {"B": 3, "T": 18, "H": 3, "K": 5, "V": 150},
    {"B": 2, "T": 5, "H": 4, "K": 260, "V": 33},
)

# takes as much scratch as it is told
SCRATCH = """
#include "{work}"
extern "C" int take(const int64_t* fields) {{
    auto nothing = [](int64_t, float*, int64_t) {{}};
    return unless_out_of_memory([&] {{ parallel_with_scratch<float>(2, 2, fields[0], nothing); }});
}}
"""


def inputs_of(op: Op, direction: str, sizes: dict[str, int], dtype: torch.dtype, J: int, packed: bool) -> Inputs:
    facts = {"packed": True} if packed else {}
    sizes = {**sizes, "J": J, "B": 1, "N": 4} if packed else {**sizes, "J": J}
    return draw(op, pose(op, direction, sizes, dtype=dtype, device=CPU, **facts))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_tiles_agree_and_threads_change_no_bit(
    name: str, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_one, "SERIAL_SIZE", 0)
    op, threads = OPS[name], torch.get_num_threads()
    for direction in ("forward", "backward"):
        for dtype, J, packed in ((torch.float32, 1, True), (torch.float64, sizes["K"], False)):
            inputs = inputs_of(op, direction, sizes, dtype, J, packed)
            run = inputs.call(op.backend("native"), {})
            found = []
            try:
                for count in (1, 2):
                    torch.set_num_threads(count)
                    found.append(run())
            finally:
                torch.set_num_threads(threads)
            wrong = Expected.of(inputs).difference(found[0])
            assert wrong is None, f"{wrong} ({inputs.problem})"
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(*found))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_layouts_change_no_bit(name: str) -> None:
    """Heads before rows, parts of one projection, and columns apart, which are copied."""
    inputs = inputs_of(OPS[name], "backward", {"B": 2, "T": 20, "H": 3, "K": 8, "V": 5}, torch.bfloat16, 8, False)

    def moved(x: Tensor | None) -> list[Tensor | None]:
        if x is None or x.ndim < 3:
            return [x] * 3
        wider = torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]]
        return [x.transpose(1, 2).contiguous().transpose(1, 2), wider, x.transpose(1, -1).contiguous().transpose(1, -1)]

    expected = inputs.call(OPS[name].backend("native"), {})()
    for tensors in zip(*map(moved, inputs.tensors)):
        found = Inputs(inputs.op, inputs.problem, tensors, None).call(OPS[name].backend("native"), {})()
        for got, right in zip(found, expected):
            assert got is not None
            assert got.is_contiguous()
            torch.testing.assert_close(got, right, rtol=0, atol=0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_hard_decays(name: str, packed: bool) -> None:
    """Among decays of 1 some of 0, of 1e-30 and of ½; betas of 0, 1 and 2."""
    hard = torch.tensor([-math.inf, math.log(1e-30), math.log(0.5), 0.0, 0.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    for direction in ("forward", "backward"):
        inputs = inputs_of(OPS[name], direction, {"B": 2, "T": 50, "H": 2, "K": 6, "V": 5}, torch.float32, 6, packed)
        tensors = dict(zip(OPS[name].names(direction), inputs.tensors))
        for what, values in (("log_decay", hard), ("beta", torch.tensor([0.0, 1.0, 2.0]))):
            if (given := tensors.get(what)) is not None:
                given.copy_(values[torch.randint(len(values), given.shape, generator=generator)])
        wrong = Expected.of(inputs).difference(inputs.call(OPS[name].backend("native"), {})())
        assert wrong is None, f"{wrong} ({inputs.problem})"


@pytest.mark.parametrize("name", NAMES)
def test_kept_states_fill_their_room(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The states that the backward pass keeps lie in a tensor that is as large as those of its largest part."""
    monkeypatch.setattr(rank_one, "SERIAL_SIZE", math.inf)
    rooms: list[Tensor] = []

    def room(*shape: int, dtype: torch.dtype) -> Tensor:
        behind = torch.full((math.prod(shape) + 64,), math.nan, dtype=dtype)
        rooms.append(behind)
        return behind[:-64].view(shape)

    monkeypatch.setattr(pool, "empty", room)
    for sizes in SIZES:
        for dtype, packed in ((torch.float32, True), (torch.float64, False)):
            inputs_of(OPS[name], "backward", sizes, dtype, sizes["K"], packed).call(OPS[name].backend("native"), {})()
            *_, last = rooms
            assert last[-64:].isnan().all()
            assert not last[-65].isnan()


def test_what_there_is_no_memory_for_raises(tmp_path: Path) -> None:
    source = tmp_path / "native.cpp"
    source.write_text(SCRATCH.format(work=Path(jit_cpp.__file__).parent / "work.h"))
    take = jit_cpp.load(source).checked_function("take", 1)
    take(1 << 10)
    with pytest.raises(MemoryError, match="take: out of memory"):
        take(1 << 55)
    with pytest.raises(RuntimeError, match="memory"):
        pool.empty(1 << 55, dtype=torch.float32)
