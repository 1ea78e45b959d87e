"""Time against length, as pictures for the speed pages: the same bytes for the same rows."""

from __future__ import annotations

import io
import itertools
import math
from typing import Any

import pandas as pd

# Without these, a picture would hold random identifiers and the date.
SALT: Any = {"svg.hashsalt": "sequence-mixers", "svg.fonttype": "none"}
YARDSTICK = "attention"
MARKERS = "os^Dv<>pP*X"


def layers(rows: pd.DataFrame, title: str) -> dict[str, bytes]:
    """Whole layers, log-log, in SVG and PNG; where another layer becomes faster than attention is marked.

    rows: those of one direction and dtype, with columns name, length, median_s.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(SALT):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        known = {name: part.sort_values("length") for name, part in rows.groupby("name")}
        for number, (name, part) in enumerate(sorted(known.items())):
            bold = {"linewidth": 2.5, "color": "black"} if name == YARDSTICK else {"linewidth": 1.2}
            marker = MARKERS[number % len(MARKERS)]
            axes.plot(part["length"], part["median_s"] * 1e3, marker=marker, markersize=4, label=name, **bold)
        for name, length in crossovers(known).items():
            axes.axvline(length, color="grey", linewidth=0.6, linestyle=":")
            axes.annotate(
                name, (length, 1), xycoords=("data", "axes fraction"), rotation=90, fontsize=6, va="top", ha="right"
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens T")
        axes.set_ylabel("ms")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, ncols=2)
        return {suffix: _saved(figure, suffix) for suffix in ("svg", "png")}


def crossovers(known: dict[str, pd.DataFrame]) -> dict[str, float]:
    """For each other layer the length from which on it is faster than attention, interpolated between measured ones;
    only where it was slower before."""
    if YARDSTICK not in known:
        return {}
    yardstick = known[YARDSTICK].set_index("length")["median_s"]
    found = {}
    for name, part in known.items():
        ratios = (part.set_index("length")["median_s"] / yardstick).dropna()
        points = list(ratios.items())
        for (before, slow), (after, fast) in itertools.pairwise(points):
            if slow > 1 >= fast and all(later <= 1 for length, later in points if length >= after):
                share = math.log(slow) / (math.log(slow) - math.log(fast))
                found[name] = float(before * (after / before) ** share)
    return found


def _saved(figure: Any, suffix: str) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=suffix, dpi=100, metadata={"Date": None} if suffix == "svg" else {"Software": None})
    return file.getvalue()
