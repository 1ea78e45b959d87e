"""Sequence mixers behind one interface: `mixers.build("hgrn", dim=512)`.

y, state = mixer(x, state=None, cu_seqlens=None), x and y [B, T, dim]; see `mixers.mixer.SequenceMixer`. A mixer's file
is imported, with the ops that it calls, when the mixer is first asked for; `import kernels.catalogue` registers every
op, for a program that torch.export saved.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mixers import registry, state
from mixers.mixer import SequenceMixer
from mixers.registry import build, describe, names, register
from mixers.stack import Stack

if TYPE_CHECKING:
    from mixers import convert, models
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
    from mixers.mlstm import MLSTM
    from mixers.qrnn import QRNN
    from mixers.retnet import RetNet
    from mixers.rglru import RGLRU
    from mixers.rwkv6 import RWKV6
    from mixers.rwkv7 import RWKV7
    from mixers.s4d import S4D

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

# what is imported when it is first asked for; a class is in the file of its name in small letters, underscores apart
_files = {module.name.replace("_", ""): module.name for module in pkgutil.iter_modules(__path__)}
_later = {name: _files[name.lower()] for name in __all__ if name not in globals()}
registry.ours.update({file: f"{__name__}.{file}" for name, file in _later.items() if name != file})


def __getattr__(name: str) -> Any:
    if name not in _later:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_later[name]}")
    return module if name == _later[name] else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
