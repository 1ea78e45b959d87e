"""What people do with layers beside calling them: no memory at first, parts exchanged, pickles, states that are cut out
of others, and numbers that are not finite."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mixers
from mixers import state


@pytest.mark.parametrize("name", mixers.names())
def test_memory_that_nobody_wrote_gets_initial_values(name: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(mixers.Stack(12, [name]), nn.Linear(12, 3))
    model.apply(reset)
    assert all(tensor.is_meta for tensor in model.parameters())
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(torch.nan if tensor.is_floating_point() else 1)
    model.apply(reset)
    torch.manual_seed(0)
    expected = mixers.Stack(12, [name]).state_dict()
    torch.manual_seed(0)
    model[0].reset_parameters()
    torch.testing.assert_close(model[0].state_dict(), expected, rtol=0, atol=0)
    assert model[0](torch.randn(2, 3, 12))[0].isfinite().all()


def reset(module: nn.Module) -> None:
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


@pytest.mark.parametrize("name", mixers.names())
def test_16_bits_may_be_the_default_dtype(name: str) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = mixers.build(name, 12)
    finally:
        torch.set_default_dtype(torch.float32)
    # s4d and others make some of theirs in float32 all the same
    assert any(parameter.dtype == torch.bfloat16 for parameter in layer.parameters())
    assert all(parameter.isfinite().all() for parameter in layer.parameters())


def test_tensors_of_others_are_not_reset() -> None:
    layer = mixers.build("hgrn", 12)
    layer.i_proj = nn.Sequential(layer.i_proj)
    with pytest.raises(ValueError, match=r"HGRN: cannot reset i_proj\.0\.bias, .*: not what building a HGRN"):
        layer.reset_parameters()


class Adapted(nn.Module):
    """A linear map with a low-rank change beside it, and no weight of its own."""

    def __init__(self, whole: nn.Linear) -> None:
        super().__init__()
        self.whole, self.down = whole, nn.Linear(whole.in_features, 1, bias=False)
        self.up = nn.Linear(1, whole.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(x) + self.up(self.down(x))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        self.whole.weight += self.up.weight @ self.down.weight
        return self.whole


def _exchanged(module: nn.Module, kind: type[nn.Module], other: Callable[[Any], nn.Module]) -> None:
    for name, child in module.named_children():
        if type(child) is kind:
            setattr(module, name, other(child))
        else:
            _exchanged(child, kind, other)


@pytest.mark.parametrize("name", mixers.names())
def test_what_stands_in_a_projections_place_is_called(name: str) -> None:
    torch.manual_seed(0)
    layer, x = mixers.build(name, 12).double(), torch.randn(2, 5, 12).double()
    _exchanged(layer, nn.Linear, lambda linear: Adapted(linear).double())
    found, states = layer(x), layer.init_state(2)
    tokens, after = [], states
    with torch.no_grad():
        for token in x.split(1, 1):
            y, after = layer(token, after)
            tokens.append(y)
    assert state.leaves(states)[0].dtype == torch.float64
    _exchanged(layer, Adapted, Adapted.merged)
    y, last = layer(x)
    torch.testing.assert_close((found[0], torch.cat(tokens, 1)), (y, y))
    torch.testing.assert_close(layer.comparable(after), layer.comparable(last))


@pytest.mark.parametrize("name", mixers.names())
def test_layers_are_pickled(name: str) -> None:
    layer, x = mixers.build(name, 12), torch.randn(1, 3, 12)
    again = pickle.loads(pickle.dumps(layer))
    torch.testing.assert_close(again(x)[0], layer(x)[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", mixers.names())
def test_numbers_of_a_state_may_lie_apart(name: str) -> None:
    torch.manual_seed(0)
    layer, x = mixers.build(name, 12), torch.randn(6, 6, 12)
    _, after = layer(x[:, :4])
    every_other = state.apply(lambda tensor: tensor[::2], after)
    once = state.apply(lambda tensor: tensor[:1].expand(3, *tensor.shape[1:]), after)
    with torch.no_grad():
        for length in (1, 2):
            expected = layer(x[:, 4 : 4 + length], after)[0]
            torch.testing.assert_close(layer(x[::2, 4 : 4 + length], every_other)[0], expected[::2])
            torch.testing.assert_close(layer(x[:1, 4 : 4 + length].expand(3, -1, -1), once)[0][2:], expected[:1])


@pytest.mark.parametrize("name", mixers.names())
def test_what_is_not_finite_stays_in_its_sequence(name: str) -> None:
    torch.manual_seed(0)
    layer, x, cu_seqlens = mixers.build(name, 12), torch.randn(1, 9, 12), torch.tensor([0, 3, 6, 9])
    y, after = layer(x, cu_seqlens=cu_seqlens)
    for n in range(3):
        others = torch.tensor([m for m in range(3) if m != n])
        for number in (torch.nan, torch.inf):
            spoilt = x.clone()
            spoilt[0, 3 * n + 1] = number
            found, last = layer(spoilt, cu_seqlens=cu_seqlens)
            assert found.view(3, 3, 12)[n, 1:].isnan().any()
            torch.testing.assert_close(found.view(3, 3, 12)[others], y.view(3, 3, 12)[others])
            for one, two in zip(*(layer.comparable(state.select(each, others)) for each in (last, after))):
                torch.testing.assert_close(one, two)
