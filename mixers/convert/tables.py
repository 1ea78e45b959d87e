"""The tables: which tensors of ours are which of theirs, mixer by mixer and source by source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """How one tensor of ours is stored in theirs; either function undoes the other and moves numbers only."""

    ours: Callable[[Any, list[Tensor]], Tensor]
    theirs: Callable[[Any, Tensor], list[Tensor]]


class Row(NamedTuple):
    """One tensor of ours, the names of theirs that hold its numbers, and for which mixers that is so."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout
    when: Callable[[Any], bool] = lambda mixer: True


class Source(NamedTuple):
    """One layer of theirs beside one mixer of ours.

    options: a mixer built otherwise is another function. usual: what theirs is by default and ours is not, which names
    and shapes show. alone: tensors of ours (or modules that have them) that theirs gets from outside. aliases: other
    names of theirs for the same tensor; written is the name on the right.
    """

    rows: tuple[Row, ...]
    options: Mapping[str, Any] = {}
    usual: Mapping[str, Any] = {}
    alone: tuple[str, ...] = ()
    aliases: Mapping[str, str] = {}


# the same shape
SAME = Layout(lambda m, t: t[0], lambda m, x: [x])
# depthwise convolution: ours [D, W], theirs [D, 1, W]
CONV = Layout(lambda m, t: t[0].squeeze(1), lambda m, x: [x.unsqueeze(1)])
# norm in groups: ours [groups, D / groups], theirs [D]
GROUPS = Layout(lambda m, t: t[0].view(m.groups, -1), lambda m, x: [x.flatten()])
# queries, keys and values: ours one tensor, one after another along its first axis, theirs three
QKV = Layout(lambda m, t: torch.cat(t), lambda m, x: list(x.split(m.qkv.widths)))
QKV_CONV = Layout(lambda m, t: torch.cat(t).squeeze(1), lambda m, x: list(x.unsqueeze(1).split(m.qkv.widths)))
# a rotation for each direction: ours [directions, D], theirs [1, 1, D] for each
THETA = Layout(lambda m, t: torch.cat(t, 1)[0], lambda m, x: list(x[None].split(1, 1)))


def row(ours: str, *theirs: str, layout: Layout = SAME, when: Callable[[Any], bool] = lambda mixer: True) -> Row:
    return Row(ours, theirs or (ours,), layout, when)


def weights(*names: str) -> tuple[Row, ...]:
    """Weights of the same name and shape."""
    return tuple(row(f"{name}.weight") for name in names)


HGRN_FLA = Source(
    rows=(
        *weights("i_proj", "f_proj", "g_proj", "o_proj"),
        row("i_conv", "i_conv1d.weight", layout=CONV),
        row("f_conv", "f_conv1d.weight", layout=CONV),
        row("norm.weight", "g_norm.weight"),
    ),
    options={"complex": False, "norm": "rms", "gate_first": False, "bias": False, "bidirectional": False},
    alone=("fixed_bound", "bound"),
)

HGRN_OFFICIAL = Source(
    rows=(
        row("i_proj.weight", "input_proj.weight"),
        row("i_proj.bias", "input_proj.bias"),
        row("f_proj.weight", "lambda_proj.weight"),
        row("f_proj.bias", "lambda_proj.bias"),
        row("g_proj.weight", "gate.weight"),
        row("g_proj.bias", "gate.bias"),
        row("o_proj.weight", "out_proj.weight"),
        row("o_proj.bias", "out_proj.bias"),
        row("norm.weight"),
        row("norm.bias"),
        row("theta", layout=THETA, when=lambda m: m.causal),
        row("theta", "theta_forward", "theta_reverse", layout=THETA, when=lambda m: not m.causal),
    ),
    options={"norm": "layer", "gate_first": False, "short_conv": 0},
    alone=("fixed_bound", "bound"),
)

HGRN2_FLA = Source(
    rows=(*weights("q_proj", "f_proj", "i_proj", "o_proj"), row("norm.weight", "g_norm.weight")),
    alone=("fixed_bound", "bound"),
)

GLA_FLA = Source(
    rows=(
        *weights("q_proj", "k_proj", "v_proj", "g_proj", "o_proj"),
        row("decay_proj.0.weight", "gk_proj.0.weight"),
        row("decay_proj.1.weight", "gk_proj.1.weight"),
        row("decay_proj.1.bias", "gk_proj.1.bias"),
        row("norm.weight", "g_norm_swish_gate.weight", when=lambda m: m.norm.activation == "silu"),
        row("norm.weight", "g_norm.weight", when=lambda m: m.norm.activation != "silu"),
    ),
    # with fuse_norm=False
    aliases={"g_norm.weight": "g_norm_swish_gate.weight"},
)

RETNET_FLA = Source(
    rows=(
        *weights("q_proj", "k_proj", "v_proj", "g_proj", "o_proj"),
        row("norm.weight", "g_norm_swish_gate.weight"),
    ),
    options={"rotary_base": 10000.0},
    usual={"weight": True},
    # with fuse_norm=False
    aliases={"g_norm.weight": "g_norm_swish_gate.weight"},
)

# the names of transformers' Mamba2Mixer and of mamba_ssm's Mamba2 as well
MAMBA2_FLA = Source(
    rows=(
        row("in_proj.weight"),
        row("in_proj.bias"),
        row("conv", "conv1d.weight", layout=CONV),
        row("conv_bias", "conv1d.bias"),
        row("A_log"),
        row("D"),
        row("dt_bias"),
        row("norm.weight", layout=GROUPS),
        row("out_proj.weight"),
        row("out_proj.bias"),
    ),
)

DELTA_ROWS = (
    row("qkv.proj.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight", layout=QKV),
    row("qkv.conv_weight", "q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight", layout=QKV_CONV),
    row("qkv.conv_bias", "q_conv1d.bias", "k_conv1d.bias", "v_conv1d.bias", layout=QKV),
    row("beta_proj.weight", "b_proj.weight"),
    row("norm.weight", "o_norm.weight"),
    *weights("g_proj", "o_proj"),
)

DELTANET_FLA = Source(rows=DELTA_ROWS)

GATED_DELTANET_FLA = Source(rows=(*DELTA_ROWS, row("decay_proj.weight", "a_proj.weight"), row("A_log"), row("dt_bias")))

SOURCES: dict[str, dict[str, Source]] = {
    "deltanet": {"fla": DELTANET_FLA},
    "gated_deltanet": {"fla": GATED_DELTANET_FLA},
    "gla": {"fla": GLA_FLA},
    "hgrn": {"fla": HGRN_FLA, "official": HGRN_OFFICIAL},
    "hgrn2": {"fla": HGRN2_FLA},
    "mamba2": {"fla": MAMBA2_FLA},
    "retnet": {"fla": RETNET_FLA},
}
