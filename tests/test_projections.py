"""Several projections in one call: they are those of the modules, and only plain modules are not called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import mixers
from kernels import jit_cpp
from kernels.problem import state_dtype
from kernels.projections import ROWS, SERIAL_SIZE, SOURCE
from mixers import projections
from mixers.projections import project, project_each

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
needs_compiler = pytest.mark.skipif(jit_cpp.reason(SOURCE) is not None, reason="no C++ compiler")


def _maps(width: int, outputs: tuple[int, ...], *, bias: bool = True, dtype: torch.dtype = torch.float32) -> list:
    return [nn.Linear(width, n, bias=bias).to(dtype) for n in outputs]


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many maps each native call has computed."""
    calls: list[int] = []
    real = projections.linear_maps

    def counting(maps: list) -> list[Tensor]:
        calls.append(len(maps))
        return real(maps)

    monkeypatch.setattr(projections, "linear_maps", counting)
    return calls


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_native_projection_is_the_product(native: list[int], dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    tiny, ulp = torch.finfo(state_dtype(dtype)).eps, torch.finfo(dtype).eps
    for width in (1, 7, 16, 33, 130):
        maps = _maps(width, (1, 5, 66, width), bias=bias, dtype=dtype)
        for rows in (1, ROWS):
            x = torch.randn(rows, 1, width).to(dtype)
            with torch.no_grad():
                found = project(x, *maps)
            for y, m in zip(found, maps):
                exact, size = nn.Linear(width, 1).double(), nn.Linear(width, 1).double()
                exact.weight, size.weight = (nn.Parameter(w) for w in (m.weight.double(), m.weight.double().abs()))
                exact.bias = size.bias = None
                if m.bias is not None:
                    exact.bias, size.bias = nn.Parameter(m.bias.double()), nn.Parameter(m.bias.double().abs())
                want = exact(x.double())
                # so many sums, each rounded, of numbers of that size, and one rounding more
                bound = (width + 1) * tiny * size(x.double().abs()) + ulp * want.abs() + torch.finfo(dtype).tiny
                assert y.shape == want.shape
                assert y.dtype == dtype
                assert ((y.double() - want).abs() <= bound).all()
    assert len(native) == 10


@needs_compiler
def test_bits_depend_neither_on_threads_nor_on_the_other_maps(native: list[int]) -> None:
    torch.manual_seed(0)
    maps, x, threads = _maps(200, (SERIAL_SIZE // 200, 131, 7)), torch.randn(1, 1, 200), torch.get_num_threads()
    with torch.no_grad():
        together = project(x, *maps)
        try:
            torch.set_num_threads(1 if threads > 1 else 2)
            for y, m in zip(together, maps):
                assert torch.equal(y, project(x, m)[0])
        finally:
            torch.set_num_threads(threads)
    assert native == [3, 1, 1, 1]


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _hooked(m: nn.Linear) -> nn.Module:
    m.register_forward_hook(lambda _, __, y: 2 * y)
    return m


def _hooked_before(m: nn.Linear) -> nn.Module:
    m.register_forward_pre_hook(lambda _, x: 2 * x[0])
    return m


def _wrapped(m: nn.Linear) -> nn.Module:
    forward = m.forward
    m.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]
    return m


def _parametrised(m: nn.Linear) -> nn.Module:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    torch.nn.utils.parametrize.register_parametrization(m, "weight", Twice())
    return m


OTHERS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "subclass": lambda m: Doubled(m.in_features, m.out_features),
    "sequence": lambda m: nn.Sequential(m, nn.ReLU()),
    "hook": _hooked,
    "hook before": _hooked_before,
    "forward of its own": _wrapped,
    "parametrised": _parametrised,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_plain_linear_map_is_called(native: list[int], name: str) -> None:
    plain, other = nn.Linear(8, 8), OTHERS[name](nn.Linear(8, 8))
    x = torch.randn(1, 1, 8)
    with torch.no_grad():
        nothing, found, y = project(x, None, other, plain)
        assert nothing is None
        assert torch.equal(found, other(x))
        assert torch.allclose(y, plain(x), atol=1e-6)
    assert len(native) == 1


def test_modules_are_called_wherever_one_call_would_not_do(native: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    m, x = nn.Linear(8, 6), torch.randn(1, 1, 8)
    (y,) = project(x, m)
    assert y.requires_grad
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert project(x, m)[0].dtype == torch.bfloat16
        assert project(torch.randn(1, ROWS + 1, 8), m)[0].shape == (1, ROWS + 1, 6)
        apart = torch.randn(1, 8, ROWS).mT
        assert torch.equal(project(apart, m)[0], m(apart))
        assert project(x.to("meta"), nn.Linear(8, 6, device="meta"))[0].is_meta
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            project(torch.randn(1, 1, 7), m)
        with pytest.raises(RuntimeError, match="dtype"):
            project(x.double(), m)
        short = nn.Linear(8, 6)
        short.bias = nn.Parameter(torch.zeros(5))
        with pytest.raises(RuntimeError, match="expand"):
            project(x, short)
        seen: list[nn.Module] = []
        handle = register_module_forward_hook(lambda module, _, __: seen.append(module))
        try:
            project(x, m)
        finally:
            handle.remove()
        assert seen == [m]
        monkeypatch.setattr("kernels.jit_cpp.reason", lambda source: "no compiler")
        assert torch.equal(project(x, m)[0], m(x))
    assert not native


def test_a_compiled_step_holds_the_modules(native: list[int]) -> None:
    layer, x = mixers.build("hgrn", 8, complex=False).eval(), torch.randn(1, 1, 8)
    with torch.no_grad():
        state = layer.init_state(1)
        want, _ = layer(x, state)
        count = len(native)
        compiled, _ = torch.compile(layer, fullgraph=True, backend="eager")(x, state)
    assert len(native) == count
    torch.testing.assert_close(compiled, want)


@needs_compiler
def test_each_map_of_a_row_of_its_own(native: list[int]) -> None:
    torch.manual_seed(0)
    maps, rows = _maps(8, (6, 8, 70), bias=True, dtype=torch.float64), torch.randn(3, 1, 1, 8).double().unbind()
    other = nn.Sequential(nn.Linear(5, 3)).double(), torch.randn(1, 1, 5).double()
    pairs = [*zip(rows, maps), (rows[0].expand(1, 3, 8), maps[0]), (other[1], other[0]), (rows[1][..., ::1], maps[1])]
    with torch.no_grad():
        for found, (x, m) in zip(project_each(pairs), pairs, strict=True):
            assert torch.allclose(found, m(x), rtol=1e-12, atol=1e-12)
    # what has other rows is computed by its module
    assert native == [5]


@needs_compiler
def test_sequences_of_maps_go_step_by_step(native: list[int]) -> None:
    torch.manual_seed(0)
    x, up = torch.randn(1, 1, 8), nn.Linear(3, 5)
    maps = [nn.Linear(8, 4), nn.Sequential(nn.Linear(8, 3), up), nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2))]
    with torch.no_grad():
        found = project(x, *maps, nn.Sequential())
        torch.testing.assert_close(found, [*(m(x) for m in maps), x])
        # the first of each together; then rows of different widths
        assert native == [3, 2]
        for watched in (up, maps[1]):
            handle = watched.register_forward_hook(lambda module, given, y: y + 1)
            torch.testing.assert_close(project(x, *maps)[1], found[1] + 1)
            handle.remove()
