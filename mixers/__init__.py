"""Sequence mixers behind one interface: `mixers.build("hgrn", dim=512)`.

y, state = mixer(x, state=None, cu_seqlens=None), x and y [B, T, dim]; see `mixers.mixer.SequenceMixer`.
"""

from __future__ import annotations

from mixers import convert, models, state
from mixers.attention import Attention
from mixers.based import Based
from mixers.deltanet import DeltaNet
from mixers.forgetting_attention import ForgettingAttention
from mixers.gated_conv import GatedConv
from mixers.gated_deltanet import GatedDeltaNet
from mixers.gla import GLA
from mixers.gsa import GSA
from mixers.hgrn import HGRN
from mixers.hgrn2 import HGRN2
from mixers.kda import KDA
from mixers.linear_attention import LinearAttention
from mixers.lru import LRU
from mixers.mamba import Mamba
from mixers.mamba2 import Mamba2
from mixers.mingru import MinGRU
from mixers.minlstm import MinLSTM
from mixers.mixer import SequenceMixer
from mixers.mlstm import MLSTM
from mixers.qrnn import QRNN
from mixers.registry import build, describe, names, register
from mixers.retnet import RetNet
from mixers.rglru import RGLRU
from mixers.rwkv6 import RWKV6
from mixers.rwkv7 import RWKV7
from mixers.s4d import S4D
from mixers.stack import Stack

__all__ = [
    "GLA",
    "GSA",
    "HGRN",
    "HGRN2",
    "KDA",
    "LRU",
    "MLSTM",
    "QRNN",
    "RGLRU",
    "RWKV6",
    "RWKV7",
    "S4D",
    "Attention",
    "Based",
    "DeltaNet",
    "ForgettingAttention",
    "GatedConv",
    "GatedDeltaNet",
    "LinearAttention",
    "Mamba",
    "Mamba2",
    "MinGRU",
    "MinLSTM",
    "RetNet",
    "SequenceMixer",
    "Stack",
    "build",
    "convert",
    "describe",
    "models",
    "names",
    "register",
    "state",
]
