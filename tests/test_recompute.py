"""Layers that keep only the states between chunks of time: the same numbers from less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import mixers
from mixers import checks, recompute
from mixers.state import leaves

KINDS: dict[str, dict[str, Any]] = {
    "complex": {"lower_bound": 0.3},
    "real, short_conv": {"complex": False, "short_conv": 4},
    "bidirectional": {"bidirectional": True},
}


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "CHUNK", 8)
    monkeypatch.setattr(recompute, "CHUNK_OF_A_SEQUENCE", 1)


def pair(options: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """A layer that keeps everything, and the same that does not."""
    torch.manual_seed(0)
    kept = mixers.build("hgrn", 6, **options).double()
    less = mixers.build("hgrn", 6, recompute=True, **options).double()
    less.load_state_dict(kept.state_dict())
    return kept, less


def results(layer: nn.Module, x: Tensor, state: Any, cu_seqlens: Tensor | None = None) -> list[Tensor]:
    """y, the state after it, and the gradients of a loss on both."""
    x = x.clone().requires_grad_()
    state = None if state is None else {name: part.clone().requires_grad_() for name, part in state.items()}
    y, after = layer(x, state, cu_seqlens=cu_seqlens)
    inputs = [x, *leaves(state), *layer.parameters()]
    loss = sum((part * part.cos()).sum() for part in (y, *leaves(after)))
    return [y, *leaves(after), *torch.autograd.grad(loss, inputs)]


def random_state(layer: nn.Module, batch: int) -> Any:
    if not layer.causal:
        return None
    return {name: torch.randn_like(part) for name, part in layer.init_state(batch).items()}


@pytest.mark.parametrize("cu_seqlens", [None, [0, 0, 3, 21, 24, 24, 29]], ids=["batch", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_numbers(kind: str, cu_seqlens: list[int] | None) -> None:
    kept, less = pair(KINDS[kind])
    x = torch.randn(2 if cu_seqlens is None else 1, 29, 6, dtype=torch.float64)
    borders = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    state = random_state(kept, len(x) if cu_seqlens is None else len(cu_seqlens) - 1)
    expected = results(kept, x, state, borders)
    torch.testing.assert_close(results(less, x, state, borders), expected, rtol=1e-12, atol=1e-12)


def test_bounds_shared_by_a_stack() -> None:
    torch.manual_seed(0)
    kept, less = (mixers.Stack(6, ["hgrn", "hgrn"], options={"hgrn": {"recompute": r}}) for r in (False, True))
    less.load_state_dict(kept.state_dict())
    x = torch.randn(1, 20, 6)
    gradients = [torch.autograd.grad(m(x)[0].square().sum(), m.bounds.weight)[0] for m in (less, kept)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("borders", [[0, 3, 30], [1, 3, 29], [0, 20, 11, 29]])
def test_borders_outside_the_rows_are_refused(borders: list[int]) -> None:
    _, less = pair({})
    with pytest.raises(ValueError, match="cu_seqlens"):
        less(torch.zeros(1, 29, 6, dtype=torch.float64), cu_seqlens=torch.tensor(borders))


def saved_numbers(layer: nn.Module, x: Tensor) -> tuple[float, Tensor]:
    """Numbers of x's dtype that the graph holds for each token and channel, without parameters; and y."""
    own, seen = {p.untyped_storage().data_ptr() for p in layer.parameters()}, {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)[0]
    return sum(seen.values()) / x.nbytes, y


@pytest.mark.parametrize(("complex", "numbers"), [(False, (6, 4)), (True, (12, 6))])
def test_what_is_kept(complex: bool, numbers: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The constants in HGRN's docstring, and one state in float64 for every chunk."""
    monkeypatch.setattr(recompute, "CHUNK", 64)
    x = torch.randn(1, 640, 6, dtype=torch.float64, requires_grad=True)
    for layer, expected in zip(pair({"complex": complex}), numbers):
        found = saved_numbers(layer, x)[0]
        assert expected <= found <= expected + (2 if complex else 1) / 64 + 0.01


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def test_no_projection_is_made_again() -> None:
    _, less = pair({})
    y, _ = less(torch.randn(1, 8, 6, dtype=torch.float64, requires_grad=True))
    with Products() as products:
        y.sum().backward()
    # the gradients of input and weight of the four projections
    assert products.count == 8


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_torchs_checkpoint(reentrant: bool) -> None:
    kept, less = pair({})
    x = torch.randn(2, 29, 6, dtype=torch.float64)

    class Checkpointed(nn.Module):
        def forward(self, x: Tensor, state: Any = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Any]:
            return checkpoint(less, x, state, use_reentrant=reentrant)

        def parameters(self, recurse: bool = True) -> Any:
            return less.parameters(recurse)

    gradients = []
    for layer in (kept, Checkpointed()):
        inside = x.clone().requires_grad_()
        numbers, y = saved_numbers(layer, inside)
        # not torch.autograd.grad, which the reentrant mode refuses
        (y * y.cos()).sum().backward()
        gradients.append([inside.grad, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    # x alone
    assert numbers == 1


def test_second_gradients() -> None:
    _, less = pair({"complex": False})
    x = torch.randn(1, 10, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: less(x)[0][..., :2], x, fast_mode=True)


@pytest.mark.parametrize("law", ["gradients_arrive", "splitting", "autocast", "compiles", "exports"])
def test_laws(law: str) -> None:
    checks.check(law, lambda dim: mixers.build("hgrn", dim, recompute=True), checks.Case(length=33, dim=12))
