"""What the demo trains: one dataclass, so that a checkpoint can say how it was made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mixers import registry
from mixers.models import LanguageModel


@dataclass(frozen=True)
class Settings:
    """Model and recipe; what a checkpoint keeps and `--resume` goes on with.

    bfloat16: matrix products in bfloat16, with the weights that are trained kept in float32.
    muon: matrices are trained with Muon and the rest with AdamW; else everything with AdamW.
    warmup: the share of the budget in which the learning rate rises; then it falls linearly to zero at the end.
    clip: the largest norm of all gradients together.
    """

    mixer: str = "hgrn"
    seed: int = 0
    dim: int = 256
    layers: int = 4
    dropout: float = 0.1
    batch: int = 16
    length: int = 256
    bfloat16: bool = False
    muon: bool = False
    muon_rate: float = 0.02
    rate: float = 3e-3
    decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: float = 0.05
    clip: float = 1.0

    def regularised(self, seconds: float) -> Settings:
        """With more dropout for a longer training, which reads a text more often: in proportion, from 3 minutes on."""
        return replace(self, dropout=min(max(seconds / 180.0, 1.0) * self.dropout, 0.4))

    def options(self) -> dict[str, Any]:
        """The mixer's options: the real HGRN, which learns more per second here, and a window for a growing state.

        Raises:
            ValueError: the mixer's state grows with the text, and it has no option that bounds it.
        """
        known = registry.options(self.mixer)
        options: dict[str, Any] = {}
        if "complex" in known:
            options["complex"] = False
        if "window" in known:
            options["window"] = self.length
        mixer = registry.build(self.mixer, self.dim, **options)
        if not mixer.causal or mixer.state_size(2 * self.length) != mixer.state_size(self.length):
            raise ValueError(f"demo: {self.mixer} must be causal with a state of fixed size, for it reads a long text")
        return options

    def model(self, vocabulary: int) -> LanguageModel:
        return LanguageModel(
            vocabulary,
            self.dim,
            [self.mixer] * self.layers,
            options={self.mixer: self.options()},
            dropout=self.dropout,
            tied=False,
        )

    def rate_at(self, fraction: float) -> float:
        """The learning rate, as a share of the highest, after this fraction of the budget."""
        rise = fraction / self.warmup if self.warmup else 1.0
        return max(0.0, min(rise, (1 - fraction) / (1 - self.warmup), 1.0))
