"""Numbers as people read them."""

from __future__ import annotations

import math


def seconds(value: float, digits: int = 3) -> str:
    """0.0003124 as "312 µs": so many digits, and none that mean nothing."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            number = value / size
            return f"{number:.{max(digits - 1 - math.floor(math.log10(number)), 0)}f} {unit}"
    return f"{value / 1e-9:.0f} ns"


def times(ratio: float) -> str:
    """2.5 as "2.50×"."""
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:,.0f}×"


def count(value: float) -> str:
    """46250000 as "46.25 M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= max(size, 1e4):
            return f"{value / size:.4g} {unit}"
    return f"{value:,.0f}"
