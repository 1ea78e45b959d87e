"""GPUs for which kernels are compiled where they are not: what their makers' data sheets say of them."""

from __future__ import annotations

from dataclasses import dataclass

from autotune.device import slug

# Steps of a sequence from which several short launches may take less time than one walk
LONG = 1024
# Seconds that a load from a GPU's memory takes to arrive, about: 400 cycles on A100 and H100, of 1.4 and 1.8 GHz
# (Table 3 of doi 10.1016/j.ultsonch.2023.106546)
LATENCY = 3e-7


@dataclass(frozen=True)
class Card:
    """A GPU. name: as its driver gives it. target: what kernels are compiled for. bandwidth: of its memory, bytes a
    second."""

    name: str
    target: str
    multiprocessors: int
    bandwidth: float

    @property
    def fingerprint(self) -> str:
        """Its name in the tables, as `autotune.fingerprint` makes it where the GPU is there."""
        return slug(self.name, self.target.replace("_", ""))

    @property
    def page(self) -> str:
        """Its name in titles and headings: "NVIDIA H100 80GB HBM3 (sm_90)"."""
        return f"{self.name} ({self.target})"


CARDS = {
    card.target: card
    for card in (
        Card("NVIDIA A100-SXM4-80GB", "sm_80", 108, 2.039e12),
        Card("NVIDIA H100 80GB HBM3", "sm_90", 132, 3.35e12),
        Card("NVIDIA B200", "sm_100", 148, 8.0e12),
        Card("AMD Instinct MI300X", "gfx942", 304, 5.3e12),
    )
}


def card(target: str) -> Card:
    """The card of a target.

    Raises:
        ValueError: nothing is known of such a GPU.
    """
    if target not in CARDS:
        raise ValueError(f"no target {target!r}; there are {', '.join(CARDS)}")
    return CARDS[target]
