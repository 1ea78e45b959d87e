"""One token of the mixers on the delta rules in one call is what their ops make of it, and only where it may be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mixers
from kernels import jit_cpp
from kernels.delta_rule.step import SOURCE, step
from mixers import delta

ALONE: dict[str, dict[str, Any]] = {
    "deltanet": {"dim": 36, "heads": 3, "expand_v": 1.5, "gate": True, "conv_bias": True, "negative_eigenvalues": True},
    "gated_deltanet": {"dim": 48, "heads": 2, "value_heads": 6, "head_dim": 9, "short_conv": 0, "gate": False},
    "kda": {"dim": 68, "heads": 1, "expand_v": 2.0, "rank": 3, "short_conv": 2, "gate_bias": True},
}


def one_call(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the tokens that are done in one call."""
    if reason := jit_cpp.reason(SOURCE):
        pytest.skip(reason)
    done = []

    def counted(qkv: Tensor, *args: Any, **options: Any) -> Any:
        done.append(tuple(qkv.shape))
        return step(qkv, *args, **options)

    monkeypatch.setattr(delta, "step", counted)
    return done


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ALONE)
def test_tokens_in_one_call_each(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are held to the whole sequence in float64; numbers in 16 bits are rounded where they are projected."""
    torch.manual_seed(0)
    layer = mixers.build(name, **ALONE[name])
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        layer.to(dtype)
        exact = mixers.build(name, **ALONE[name]).double()
        exact.load_state_dict(layer.state_dict())
        x = torch.randn(3, 6, layer.dim).to(dtype)
        expected, after = exact(x.double())
        done, ys, state = one_call(monkeypatch), [], None
        for t in range(x.shape[1]):
            y, state = layer(x[:, t : t + 1], state)
            ys.append(y)
    assert len(done) == x.shape[1]
    share = (4 if dtype.itemsize == 2 else 16) * torch.finfo(dtype).eps
    for found, value in ((torch.cat(ys, 1), expected), *((state[key], after[key]) for key in after)):
        assert (found.double() - value).abs().max() <= share * value.abs().max()
    like = layer(x[:, :2])[1]
    assert {key: (t.dtype, t.shape) for key, t in state.items()} == {k: (t.dtype, t.shape) for k, t in like.items()}


def test_what_is_not_done_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever wants a gradient, is watched, named, mixed or packed; and no tensor is read that has another size."""
    layer, x, done = mixers.build("kda", 16, heads=2), torch.randn(2, 1, 16), one_call(monkeypatch)
    layer(x)
    with torch.no_grad():
        state = layer(x)[1]
        assert len(done) == 1
        layer(torch.randn(2, 2, 16))
        layer(x[:1], cu_seqlens=torch.tensor([0, 1]))
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        layer(x, {**state, "conv": state["conv"].bfloat16()})
        mixers.build("kda", 16, heads=2, backend="naive")(x)
        for part in (layer.qkv, layer.norm):
            seen: list[str] = []
            with part.register_forward_hook(lambda *_, seen=seen: seen.append("called")):
                layer(x)
            assert seen == ["called"]
        assert len(done) == 1
        for wrong in ({**state, "S": state["S"][:, :, :4]}, {**state, "conv": state["conv"][:, :2]}):
            with pytest.raises(ValueError, match=r"KDA: state '(S|conv)'"):
                layer(x, wrong)
