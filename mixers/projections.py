"""Several projections at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from kernels.lone import unobserved
from kernels.memory import DTYPES
from kernels.projections import ROWS, SOURCE, linear_maps

_FORWARD, _SEQUENCE = nn.Linear.forward, nn.Sequential.forward


def project(x: Tensor, *maps: nn.Module | None) -> list[Any]:
    """[m(x) for m in maps], None for None; those that are plain linear maps in one call, where x is a token or few
    without a gradient; of sequences of such maps the first of each, then the second.

    Whatever somebody has put in a linear map's place, or hung on it, is called as the module that it is.
    """
    return project_each([(x, m) for m in maps])


def project_each(pairs: Sequence[tuple[Tensor, nn.Module | None]]) -> list[Any]:
    """[m(x) for x, m in pairs] likewise, every x [..., width] having the same shape but for its width."""
    first = pairs[0][0]
    if not (nn.Linear.forward is _FORWARD and _few(first) and unobserved(SOURCE)):
        return [None if m is None else m(x) for x, m in pairs]
    chains = [_chain(m) for _, m in pairs]
    made = _at_once([(x, chain[0]) for (x, _), chain in zip(pairs, chains)])
    for depth in range(1, max(map(len, chains))):
        longer = [n for n, chain in enumerate(chains) if len(chain) > depth]
        for n, y in zip(longer, _at_once([(made[n], chains[n][depth]) for n in longer])):
            made[n] = y
    return made


def _at_once(pairs: Sequence[tuple[Tensor, nn.Module | None]]) -> list[Any]:
    """[m(x) for x, m in pairs]; plain linear maps of a token or few in one call."""
    first = pairs[0][0]
    found: list[Any] = [_parameters(m, x, first) for x, m in pairs] if _few(first) else [None] * len(pairs)
    plain = [map for map in found if map is not None]
    made = iter(linear_maps(plain) if plain else ())
    return [next(made) if p is not None else None if m is None else m(x) for p, (x, m) in zip(found, pairs)]


def _chain(m: nn.Module | None) -> tuple[nn.Module | None, ...]:
    """The linear maps that a sequence of nothing else calls one after the other; any other module by itself."""
    if type(m) is not nn.Sequential or nn.Sequential.forward is not _SEQUENCE or not untouched(m, nn.Sequential):
        return (m,)
    maps = tuple(m)
    return maps if maps and all(type(each) is nn.Linear for each in maps) else (m,)


def plain_maps(layer: nn.Module, *names: str) -> list[tuple[Any, Any]] | None:
    """Weights and biases of a layer's linear maps; None if calling one of them may mean anything else."""
    if nn.Linear.forward is not _FORWARD:
        return None
    modules, maps = layer._modules, []
    for name in names:
        module: Any = modules[name]
        if type(module) is not nn.Linear or not untouched(module, nn.Linear):
            return None
        own = module._parameters
        if own.get("weight") is None or "bias" not in own:
            return None
        maps.append((own["weight"], own["bias"]))
    return maps


def untouched(module: Any, kind: type[nn.Module]) -> bool:
    """Is it of just this kind, and would nobody miss its call?"""
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own or "_compiled_call_impl" in own:
        return False
    return type(module) is kind and not (modules._global_forward_hooks or modules._global_forward_pre_hooks)


def _few(x: Tensor) -> bool:
    """Is it a token or few, as native code reads them?"""
    few = type(x) is Tensor and x.is_cpu and x.is_contiguous() and x.dtype in DTYPES
    return few and 0 < x.numel() <= ROWS * x.shape[-1]


def _parameters(m: Any, x: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Input, weight and bias of a linear map; None if calling it may mean anything else, or is an error."""
    if type(m) is not nn.Linear or not untouched(m, nn.Linear) or x.shape[:-1] != first.shape[:-1]:
        return None
    if x is not first and not (_few(x) and x.dtype is first.dtype):
        return None
    own, dtype = m.__dict__["_parameters"], first.dtype
    # False: what is no parameter is nothing that can be read
    weight, bias = own.get("weight"), own.get("bias", False)
    if not _plain(weight, dtype) or weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        return None
    if bias is not None and not (_plain(bias, dtype) and bias.shape == weight.shape[:1]):
        return None
    return x, weight, bias


def _plain(t: Any, dtype: torch.dtype) -> bool:
    kind = type(t)
    return (kind is nn.Parameter or kind is Tensor) and t.dtype is dtype and t.is_cpu and t.is_contiguous()
