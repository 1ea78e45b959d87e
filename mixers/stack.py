"""Stack: pre-norm residual blocks of any mixers, with HGRN's lower bounds shared across its HGRN layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixers import registry
from mixers.mixer import SequenceMixer
from mixers.options import positive
from mixers.parts import GLU, LowerBounds, norm


class Block(nn.Module):
    """x += mixer(norm(x));  x += GLU(norm(x))."""

    def __init__(
        self, mixer: SequenceMixer, *, kind: str, width: int, activation: str, bias: bool, dropout: float
    ) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = norm(kind, mixer.dim), mixer
        self.glu_norm, self.glu = norm(kind, mixer.dim), GLU(mixer.dim, width, activation=activation, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        y, state = self.mixer(self.mixer_norm(x), state, cu_seqlens=cu_seqlens)
        x = x + self.dropout(y)
        return x + self.dropout(self.glu(self.glu_norm(x))), state


class Stack(SequenceMixer):
    """Pre-norm residual blocks: in each a mixer over time and a gated linear unit over channels, and a last norm.

    It keeps the mixers' contract; its state is the tuple of its layers' states.

    Args:
        dim: width of x and y.
        layers: the mixers' names, one a layer: ["hgrn", "hgrn", "attention"].
        options: options of each mixer by name: {"hgrn": {"complex": False}}.
        glu_width: hidden width of the gated linear units; None: 2 dim.
        glu_activation: "silu", or "identity" as in the paper's language model.
        norm: "layer" or "rms".
        bias: biases in the gated linear units.
        dropout: on the output of every mixer and gated linear unit.
        bounds: convention of HGRN's lower bounds, see `mixers.parts.LowerBounds`; None: no bounds.

    Source: the block of HGRN, arXiv 2311.04823, figure 1; GLU: arXiv 2002.05202.
    """

    def __init__(
        self,
        dim: int,
        layers: Sequence[str],
        *,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        glu_width: int | None = None,
        glu_activation: str = "silu",
        norm: str = "layer",
        bias: bool = True,
        dropout: float = 0.0,
        bounds: str | None = "inclusive",
    ) -> None:
        super().__init__()
        if isinstance(layers, str) or not layers:
            raise ValueError(f"Stack: layers is {layers!r}, expected a list of mixers' names such as ['hgrn', 'hgrn']")
        for name in layers:
            if not isinstance(name, str):
                raise TypeError(f"Stack: layers has a {type(name).__name__}, expected mixers' names")
        positive("Stack", glu_width=glu_width)
        options = {} if options is None else options
        unused = sorted(set(options) - set(layers))
        if unused:
            raise ValueError(f"Stack: options for {unused[0]!r}, which is not among the layers {list(layers)}")
        bounded = [n for n, name in enumerate(layers) if bounds and "lower_bound" in registry.options(name)]
        self.dim = dim
        self.bounds: LowerBounds | None = None
        if bounded:
            widths = {dim * options.get(layers[n], {}).get("expand", 1) for n in bounded}
            if len(widths) > 1:
                raise ValueError(f"Stack: layers that share lower bounds have different widths {sorted(widths)}")
            assert bounds is not None
            self.bounds = LowerBounds(len(bounded), widths.pop(), convention=bounds)
        blocks = []
        for n, name in enumerate(layers):
            own = dict(options.get(name, {}))
            if n in bounded and self.bounds is not None:
                own.setdefault("lower_bound", self.bounds.row(bounded.index(n)))
            mixer = registry.build(name, dim, **own)
            blocks.append(
                Block(
                    mixer, kind=norm, width=glu_width or 2 * dim, activation=glu_activation, bias=bias, dropout=dropout
                )
            )
        self.blocks = nn.ModuleList(blocks)
        self.norm = _norm(norm, dim)
        self.causal = all(block.mixer.causal for block in blocks)

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Any, ...]:
        return tuple(block.mixer.init_state(batch, device=device, dtype=dtype) for block in self.blocks)  # type: ignore[union-attr, operator]

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        after = []
        for n, block in enumerate(self.blocks):
            x, new = block(x, state[n] if self.causal else None, cu_seqlens)
            after.append(new)
        return self.norm(x), tuple(after) if self.causal else None


_norm = norm
