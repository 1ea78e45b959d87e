"""What flash-linear-attention 0.6 and hgru-pytorch name the tensors of their layers, and how they shape them."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import mixers
from mixers import convert
from mixers.mixer import SequenceMixer

DIM = 12


class Layer(NamedTuple):
    name: str
    source: str
    # how to build ours and theirs
    options: dict[str, Any]
    theirs: str
    arguments: dict[str, Any]
    tensors: str


LAYERS = {
    "hgrn": Layer(
        "hgrn",
        "fla",
        {"expand": 2, "short_conv": 3},
        "HGRNAttention",
        {"expand_ratio": 2, "use_short_conv": True, "conv_size": 3},
        "i_proj.weight 24 12; f_proj.weight 24 12; g_proj.weight 24 12; f_conv1d.weight 24 1 3; i_conv1d.weight 24 1 3;"
        "g_norm.weight 24; o_proj.weight 12 24",
    ),
    "hgrn2": Layer(
        "hgrn2",
        "fla",
        {"heads": 3},
        "HGRN2Attention",
        {"expand_ratio": 4},
        "q_proj.weight 12 12; f_proj.weight 12 12; i_proj.weight 12 12; g_norm.weight 12; o_proj.weight 12 12",
    ),
    "gla": Layer(
        "gla",
        "fla",
        {"heads": 3, "expand_v": 2, "rank": 5},
        "GatedLinearAttention",
        {"num_heads": 3, "expand_v": 2, "gate_low_rank_dim": 5},
        "q_proj.weight 6 12; k_proj.weight 6 12; v_proj.weight 24 12; g_proj.weight 24 12; gk_proj.0.weight 5 12;"
        "gk_proj.1.weight 6 5; gk_proj.1.bias 6; o_proj.weight 12 24; g_norm_swish_gate.weight 8",
    ),
    "gla without a gate": Layer(
        "gla",
        "fla",
        {"heads": 3, "gate": None},
        "GatedLinearAttention",
        {"num_heads": 3, "use_output_gate": False},
        "q_proj.weight 6 12; k_proj.weight 6 12; v_proj.weight 12 12; gk_proj.0.weight 16 12; gk_proj.1.weight 6 16;"
        "gk_proj.1.bias 6; o_proj.weight 12 12; g_norm.weight 4",
    ),
    "retnet": Layer(
        "retnet",
        "fla",
        {"heads": 3},
        "MultiScaleRetention",
        {"num_heads": 3},
        "q_proj.weight 12 12; k_proj.weight 12 12; v_proj.weight 24 12; g_proj.weight 24 12; o_proj.weight 12 24;"
        "g_norm_swish_gate.weight 8",
    ),
    "mamba2": Layer(
        "mamba2",
        "fla",
        {"heads": 6, "state_dim": 5, "groups": 2},
        "Mamba2",
        {"head_dim": 4, "state_size": 5, "n_groups": 2},
        "dt_bias 6; A_log 6; D 6; conv1d.weight 44 1 4; conv1d.bias 44; in_proj.weight 74 12; norm.weight 24;"
        "out_proj.weight 12 24",
    ),
    "deltanet": Layer(
        "deltanet",
        "fla",
        {"heads": 3, "expand_v": 2},
        "DeltaNet",
        {"num_heads": 3, "expand_v": 2},
        "q_proj.weight 12 12; k_proj.weight 12 12; v_proj.weight 24 12; b_proj.weight 3 12; q_conv1d.weight 12 1 4;"
        "k_conv1d.weight 12 1 4; v_conv1d.weight 24 1 4; o_norm.weight 8; o_proj.weight 12 24",
    ),
    "deltanet with a gate": Layer(
        "deltanet",
        "fla",
        {"heads": 3, "expand_k": 0.5, "gate": True, "conv_bias": True},
        "DeltaNet",
        {"num_heads": 3, "expand_k": 0.5, "use_gate": True, "conv_bias": True},
        "q_proj.weight 6 12; k_proj.weight 6 12; v_proj.weight 12 12; b_proj.weight 3 12; q_conv1d.weight 6 1 4;"
        "q_conv1d.bias 6; k_conv1d.weight 6 1 4; k_conv1d.bias 6; v_conv1d.weight 12 1 4; v_conv1d.bias 12;"
        "g_proj.weight 12 12; o_norm.weight 4; o_proj.weight 12 12",
    ),
    "deltanet without a convolution": Layer(
        "deltanet",
        "fla",
        {"heads": 2, "short_conv": 0},
        "DeltaNet",
        {"num_heads": 2, "use_short_conv": False},
        "q_proj.weight 12 12; k_proj.weight 12 12; v_proj.weight 12 12; b_proj.weight 2 12; o_norm.weight 6;"
        "o_proj.weight 12 12",
    ),
    "gated_deltanet": Layer(
        "gated_deltanet",
        "fla",
        {"heads": 2, "head_dim": 5, "value_heads": 4},
        "GatedDeltaNet",
        {"head_dim": 5, "num_heads": 2, "num_v_heads": 4},
        "A_log 4; dt_bias 4; q_proj.weight 10 12; k_proj.weight 10 12; v_proj.weight 40 12; a_proj.weight 4 12;"
        "b_proj.weight 4 12; q_conv1d.weight 10 1 4; k_conv1d.weight 10 1 4; v_conv1d.weight 40 1 4;"
        "g_proj.weight 40 12; o_norm.weight 10; o_proj.weight 12 40",
    ),
    "gated_deltanet without a gate": Layer(
        "gated_deltanet",
        "fla",
        {"heads": 2, "head_dim": 5, "expand_v": 1, "gate": False},
        "GatedDeltaNet",
        {"head_dim": 5, "num_heads": 2, "expand_v": 1, "use_gate": False},
        "A_log 2; dt_bias 2; q_proj.weight 10 12; k_proj.weight 10 12; v_proj.weight 10 12; a_proj.weight 2 12;"
        "b_proj.weight 2 12; q_conv1d.weight 10 1 4; k_conv1d.weight 10 1 4; v_conv1d.weight 10 1 4; o_norm.weight 5;"
        "o_proj.weight 12 10",
    ),
    "official hgrn": Layer(
        "hgrn",
        "official",
        {},
        "Hgru1d",
        {},
        "input_proj.weight 24 12; input_proj.bias 24; lambda_proj.weight 12 12; lambda_proj.bias 12; theta 1 1 12;"
        "gate.weight 24 12; gate.bias 24; out_proj.weight 12 24; out_proj.bias 12; norm.weight 24; norm.bias 24",
    ),
    "official hgrn without biases": Layer(
        "hgrn",
        "official",
        {"bias": False},
        "Hgru1d",
        {"bias": False},
        "input_proj.weight 24 12; lambda_proj.weight 12 12; theta 1 1 12; gate.weight 24 12; out_proj.weight 12 24;"
        "norm.weight 24; norm.bias 24",
    ),
    "official hgrn in both directions": Layer(
        "hgrn",
        "official",
        {"bidirectional": True},
        "BiHgru1d",
        {},
        "input_proj.weight 24 12; input_proj.bias 24; lambda_proj.weight 12 12; lambda_proj.bias 12;"
        "theta_forward 1 1 12; theta_reverse 1 1 12; gate.weight 24 12; gate.bias 24; out_proj.weight 12 24;"
        "out_proj.bias 12; norm.weight 24; norm.bias 24",
    ),
    "official real hgrn": Layer(
        "hgrn",
        "official",
        {"complex": False},
        "HgruRealV6",
        {},
        "input_proj.weight 12 12; input_proj.bias 12; lambda_proj.weight 12 12; lambda_proj.bias 12;"
        "gate.weight 12 12; gate.bias 12; out_proj.weight 12 12; out_proj.bias 12; norm.weight 12; norm.bias 12",
    ),
}
each_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def shapes(layer: Layer) -> dict[str, list[int]]:
    words = [tensor.split() for tensor in layer.tensors.split(";")]
    return {name: [int(size) for size in sizes] for name, *sizes in words}


def theirs(layer: Layer, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A state dict of theirs, no two numbers of which are equal by design."""
    torch.manual_seed(7)
    return {name: (0.4 * torch.randn(shape)).to(dtype) for name, shape in shapes(layer).items()}


def ours(layer: Layer, dtype: torch.dtype = torch.float32, **more: Any) -> SequenceMixer:
    options = {**convert.options(layer.name, layer.source), **layer.options, **more}
    return mixers.build(layer.name, DIM, **options).to(dtype)


def bits(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, list[int], bytes]]:
    """Equal only if names, dtypes, shapes and bits are: NaN equals itself, and 0 is not -0."""
    return {
        name: (t.dtype, list(t.shape), bytes(t.contiguous().flatten().view(torch.uint8).tolist()))
        for name, t in tensors.items()
    }
