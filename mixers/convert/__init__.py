"""Other libraries' state dicts into our mixers and back, bit for bit.

    mixer = mixers.build("deltanet", 512, heads=4, **convert.options("deltanet"))
    convert.load(mixer, layer.state_dict())
    layer.load_state_dict(convert.dump(mixer))

`SOURCES` (in tables.py) has a table for every pair of a mixer and a source:

    "fla"        layers of flash-linear-attention 0.6, the state dict of one layer of `fla.layers`
    "official"   HGRN's authors: Hgru1d, BiHgru1d and HgruRealV6 of github.com/Doraemonzzz/hgru-pytorch

A state dict does not show everything that a layer computes. Lower bounds of HGRN and HGRN2 belong to the model around
the layer, there and here, and are neither read nor written. The eps of norms is 1e-5, as theirs in layers; where their
model's norm_eps is another (1e-6 in fla's configurations), set `mixer.norm.eps`, but not for HGRN2, whose norm takes
1e-5 whatever it is told. Theirs must have these arguments at their defaults: feature_map, clamp_min, qk_activation,
qk_norm, D_has_hdim, dt_limit, norm_before_gate, output_gate_activation; and so that heads are the same, ours must be
built with the sizes of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mixers.convert.tables import SOURCES, Row, Source
from mixers.mixer import SequenceMixer
from mixers.registry import get, suggest

__all__ = ["SOURCES", "dump", "load", "options"]


def options(name: str, source: str = "fla") -> dict[str, Any]:
    """The options with which a mixer is the layer of `source`: `build(name, dim, **options(name, source))`.

    Sizes, and what theirs may have or not (gates, biases, convolutions), are the caller's.
    """
    table = _source(name, source)
    return {**table.options, **table.usual}


@torch.no_grad()
def load(mixer: SequenceMixer, state_dict: Mapping[str, Any], source: str = "fla", *, prefix: str = "") -> None:
    """Copies the layer of `source` that `state_dict` holds under `prefix` into the mixer: everything or nothing.

    A dtype may widen on the way (bfloat16 into float32), but not lose bits.

    Raises:
        ValueError: there is no table for this mixer and source; or names, shapes, dtypes or options differ. Every
            difference is listed, and the mixer is what it was before.
    """
    name = _name(mixer)
    table = _source(name, source)
    found = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    expected, problems = _theirs(mixer, table, source)
    for alias, key in table.aliases.items():
        if key in expected and key not in found and alias in found:
            found[key] = found.pop(alias)
    problems += _differences(found, expected, prefix)
    if problems:
        problems += [
            f"option {option} is {mixer.config().get(option)!r}, and by default {value!r} in {source}"
            for option, value in table.usual.items()
            if mixer.config().get(option) != value
        ]
        raise ValueError(_listed(f"{name}: this state dict does not fit as {source!r}", problems))
    own = mixer.state_dict()
    fresh = {r.ours: r.layout.ours(mixer, [found[key] for key in r.theirs]) for r in _rows(mixer, table)}
    for key, tensor in fresh.items():
        own[key].copy_(tensor)


@torch.no_grad()
def dump(mixer: SequenceMixer, to: str = "fla", *, prefix: str = "") -> dict[str, Tensor]:
    """The state dict, names after `prefix`, with which the layer of `to` is this mixer; copies, in the mixer's dtypes.

    Raises:
        ValueError: there is no table for this mixer and `to`, or theirs cannot be what this mixer is.
    """
    name = _name(mixer)
    tensors, problems = _theirs(mixer, _source(name, to), to)
    if problems:
        raise ValueError(_listed(f"{name}: this mixer is no layer of {to!r}", problems))
    return {prefix + key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}


def _rows(mixer: SequenceMixer, table: Source) -> list[Row]:
    own = mixer.state_dict()
    return [r for r in table.rows if r.ours in own and r.when(mixer)]


def _theirs(mixer: SequenceMixer, table: Source, source: str) -> tuple[dict[str, Tensor], list[str]]:
    """The mixer's tensors as theirs, sharing memory where they can, and what of the mixer theirs cannot be."""
    own, config, rows = mixer.state_dict(), mixer.config(), _rows(mixer, table)
    problems = [
        f"option {option} is {config.get(option)!r} in the mixer but {value!r} in {source}"
        for option, value in table.options.items()
        if config.get(option) != value
    ]
    placed = {r.ours for r in rows}
    problems += [
        f"{key} {list(tensor.shape)} of the mixer has no place in {source}"
        for key, tensor in own.items()
        if key not in placed and key.split(".")[0] not in table.alone
    ]
    problems += [f"{key} of the mixer is on the meta device and holds no numbers" for key in placed if own[key].is_meta]
    return {key: t for r in rows for key, t in zip(r.theirs, r.layout.theirs(mixer, own[r.ours]))}, sorted(problems)


def _differences(found: Mapping[str, Any], expected: Mapping[str, Tensor], prefix: str) -> list[str]:
    problems = [f"missing {prefix}{key} {list(expected[key].shape)}" for key in expected if key not in found]
    for key, tensor in found.items():
        name = prefix + key
        if not isinstance(tensor, Tensor):
            problems.append(f"{name} is of type {type(tensor).__name__}, expected a tensor")
        elif key not in expected:
            problems.append(f"unexpected {name} {list(tensor.shape)}{suggest(key, expected.keys() - found.keys())}")
        elif tensor.shape != expected[key].shape:
            shapes = f"{list(tensor.shape)} in the state dict but {list(expected[key].shape)} in the mixer"
            problems.append(f"shape of {name} is {shapes}")
        elif tensor.is_meta:
            problems.append(f"{name} is on the meta device and holds no numbers")
        elif torch.promote_types(tensor.dtype, expected[key].dtype) != expected[key].dtype:
            dtypes = f"{tensor.dtype} in the state dict but {expected[key].dtype} in the mixer, which would lose bits"
            problems.append(f"dtype of {name} is {dtypes}")
    return problems


def _name(mixer: SequenceMixer) -> str:
    return str(mixer.config()["name"])


def _source(name: str, source: str) -> Source:
    get(name)
    if name not in SOURCES:
        raise ValueError(f"convert: no table for {name!r}; there are tables for {', '.join(SOURCES)}")
    if source not in SOURCES[name]:
        there = ", ".join(map(repr, SOURCES[name]))
        raise ValueError(f"convert: {name} has no source {source!r}{suggest(source, SOURCES[name])}; there is {there}")
    return SOURCES[name][source]


def _listed(what: str, problems: list[str]) -> str:
    return "\n    ".join([f"convert: {what}:", *problems])
