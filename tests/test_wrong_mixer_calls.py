"""What a mixer cannot be built with or called with is refused, by name and with what would do."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import mixers
from mixers import registry, state

WRONG: dict[str, tuple[type[Exception], str, Any]] = {
    "mixer": (ValueError, "no mixer 'hgm'; did you mean 'hgrn'", lambda: mixers.build("hgm", dim=8)),
    "option": (
        TypeError,
        "hgrn: no option 'expnd'; did you mean 'expand'",
        lambda: mixers.build("hgrn", dim=8, expnd=2),
    ),
    "value": (
        ValueError,
        "norm is 'batch', expected one of 'layer', 'rms'",
        lambda: mixers.build("hgrn", dim=8, norm="batch"),
    ),
    "dim": (ValueError, "hgrn: dim is 0", lambda: mixers.build("hgrn", dim=0)),
    "heads": (
        ValueError,
        "rglru: dim is 8, which heads = 3 does not divide",
        lambda: mixers.build("rglru", 8, heads=3),
    ),
    "bound": (ValueError, "lower_bound is 1.5", lambda: mixers.build("hgrn", 8, lower_bound=1.5)),
    "bound shape": (
        ValueError,
        r"lower_bound has shape \[3\], expected \[8\]",
        lambda: mixers.build("hgrn", 8, lower_bound=torch.zeros(3)),
    ),
    "width": (
        ValueError,
        "axis dim is 9 in x but 8 in the layer",
        lambda: mixers.build("hgrn", 8)(torch.zeros(1, 2, 9)),
    ),
    "axes": (
        ValueError,
        r"x has 2 axes \[2, 8\], expected \[B, T, 8\]",
        lambda: mixers.build("hgrn", 8)(torch.zeros(2, 8)),
    ),
    "integers": (TypeError, "x is torch.int64", lambda: mixers.build("hgrn", 8)(torch.zeros(1, 2, 8).long())),
    "batch": (
        ValueError,
        "axis batch is 3 in state but 2 in x",
        lambda: (m := mixers.build("hgrn", 8))(torch.zeros(2, 2, 8), m.init_state(3)),
    ),
    "bidirectional state": (
        ValueError,
        "a bidirectional mixer has no state",
        lambda: mixers.build("hgrn", 8, bidirectional=True)(torch.zeros(2, 2, 8), {"h": torch.zeros(2, 8, 2)}),
    ),
    "packed": (
        ValueError,
        "axis B is 2, but packed sequences",
        lambda: mixers.build("hgrn", 8)(torch.zeros(2, 2, 8), cu_seqlens=torch.tensor([0, 2])),
    ),
    "weights of another dtype": (
        TypeError,
        "HGRN: x is torch.bfloat16, but its weights are torch.float32",
        lambda: mixers.build("hgrn", 8)(torch.zeros(1, 2, 8).bfloat16()),
    ),
    "weights elsewhere": (
        ValueError,
        "Attention: its weights are on cpu, but x is on meta",
        lambda: mixers.build("attention", 8)(torch.zeros(1, 2, 8, device="meta")),
    ),
    "numpy": (TypeError, "x is a ndarray", lambda: mixers.build("hgrn", 8)(torch.zeros(1, 2, 8).numpy())),
    "a list": (
        TypeError,
        "cu_seqlens is a list, expected a tensor",
        lambda: mixers.build("hgrn", 8)(torch.zeros(1, 2, 8), cu_seqlens=[0, 2]),  # type: ignore[arg-type]
    ),
    "another mixer's state": (
        ValueError,
        r"GLA: state has \['h'\], but here 'S' belongs to it",
        lambda: mixers.build("gla", 8)(torch.zeros(2, 2, 8), mixers.build("hgrn", 8).init_state(2)),
    ),
    "a state with more": (
        ValueError,
        "Attention: state has 'log_decays', but here",
        lambda: mixers.build("attention", 8)(
            torch.zeros(2, 2, 8), mixers.build("forgetting_attention", 8).init_state(2)
        ),
    ),
    "a state of other sizes": (
        ValueError,
        r"GLA: state 'S' is \[2, 1, 2, 4\], expected \[batch, 1, 4, 8\]",
        lambda: mixers.build("gla", 8)(torch.zeros(2, 2, 8), mixers.build("gla", 4).init_state(2)),
    ),
    "a cache of other heads": (
        ValueError,
        r"Attention: state 'keys' is \[2, 3, 2, 4\], expected \[batch, any, 1, 8\]",
        lambda: mixers.build("attention", 8)(
            torch.zeros(2, 2, 8), mixers.build("attention", 8, heads=2)(torch.zeros(2, 3, 8))[1]
        ),
    ),
    "a state without its tensor": (
        TypeError,
        "GLA: state 'S' is a NoneType, expected a tensor",
        lambda: mixers.build("gla", 8)(torch.zeros(2, 2, 8), {"S": None}),
    ),
    "a state of one number": (
        ValueError,
        "HGRN: a tensor of the state is a single number, expected axis batch of 2",
        lambda: mixers.build("hgrn", 8)(torch.zeros(2, 2, 8), {"h": torch.tensor(0.0)}),
    ),
    "a count that was cast": (
        TypeError,
        "Attention: state 'length' is torch.bfloat16, expected an integer dtype",
        lambda: (m := mixers.build("attention", 8))(
            torch.zeros(2, 2, 8), state.apply(torch.Tensor.bfloat16, m.init_state(2))
        ),
    ),
    "a state of integers": (
        TypeError,
        "GatedConv: state 'conv' is torch.int64, expected a floating-point dtype",
        lambda: (m := mixers.build("gated_conv", 8))(
            torch.zeros(2, 2, 8), state.apply(torch.Tensor.long, m.init_state(2))
        ),
    ),
    "a state elsewhere": (
        ValueError,
        "RetNet: state 'S' is on meta, but x is on cpu",
        lambda: (m := mixers.build("retnet", 8))(torch.zeros(2, 2, 8), state.to(m.init_state(2), "meta")),
    ),
    "borders elsewhere": (
        ValueError,
        "MLSTM: cu_seqlens is on meta, but x is on cpu",
        lambda: mixers.build("mlstm", 8)(
            torch.zeros(1, 2, 8), cu_seqlens=torch.zeros(2, dtype=torch.int64, device="meta")
        ),
    ),
    "a stack's state": (
        ValueError,
        r"Stack: state has \[0\], but here 1 belongs to it",
        lambda: mixers.Stack(8, ["hgrn", "gla"])(torch.zeros(2, 2, 8), mixers.Stack(8, ["hgrn"]).init_state(2)),
    ),
    "backend": (
        ValueError,
        "hgru: no backend 'nativ'; there are auto, naive",
        lambda: mixers.build("hgrn", 8, backend="nativ"),
    ),
    "option of another type": (TypeError, "gla: heads is 2.0, expected int or None", lambda: mixers.GLA(8, heads=2.0)),
    "a word for a flag": (
        TypeError,
        "hgrn: complex is 'no', expected bool",
        lambda: mixers.build("hgrn", 8, complex="no"),
    ),
    "a flag for a number": (
        TypeError,
        "hgrn: expand is True, expected int",
        lambda: mixers.build("hgrn", 8, expand=True),
    ),
    "stack": (ValueError, "expected a list of mixers' names", lambda: mixers.Stack(8, "hgrn")),
    "a stack of layers": (
        TypeError,
        "Stack: layers has a HGRN, expected mixers' names",
        lambda: mixers.Stack(8, [mixers.build("hgrn", 8)]),  # type: ignore[list-item]
    ),
    "no channels between": (ValueError, "Stack: glu_width is 0", lambda: mixers.Stack(8, ["hgrn"], glu_width=0)),
    "stack options": (
        ValueError,
        "options for 'mingru', which is not among",
        lambda: mixers.Stack(8, ["hgrn"], options={"mingru": {}}),
    ),
    "names clash": (
        ValueError,
        "'hgrn' is already registered by mixers.hgrn.HGRN",
        lambda: registry.register(name="hgrn")(mixers.MinGRU),
    ),
    "no mixer": (TypeError, "is not a subclass of SequenceMixer", lambda: registry.register(name="linear")(nn.Linear)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name: str) -> None:
    error, message, call = WRONG[name]
    with pytest.raises(error, match=message):
        call()


def test_what_casts_before_a_linear_map_is_left_alone() -> None:
    layer, x = mixers.build("mingru", 8), torch.zeros(1, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
        layer(x.bfloat16())
    for linear in layer.children():
        linear.register_forward_pre_hook(lambda module, given: (given[0].to(module.weight.dtype),))
    layer(x.bfloat16())


@pytest.mark.parametrize("name", mixers.names())
def test_options_out_of_range_are_refused(name: str) -> None:
    """Numbers below what an option may be are named, in place of an error from somewhere within."""
    for option, parameter in list(inspect.signature(registry.get(name).__init__).parameters.items())[2:]:
        kinds = str(parameter.annotation)
        if kinds.startswith(("int", "float")) and option != "forget_bias":
            with pytest.raises(ValueError, match=option):
                mixers.build(name, 12, **{option: -1})


@pytest.mark.parametrize("name", mixers.names())
def test_borders_of_packed_sequences_are_checked(name: str) -> None:
    layer, x = mixers.build(name, 12), torch.randn(1, 7, 12)
    for borders in ([0, 6], [1, 7], [0, 9], [0, 5, 3, 7]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            layer(x, cu_seqlens=torch.tensor(borders))
