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


def roofline(rows: pd.DataFrame, title: str) -> dict[str, bytes]:
    """Operations a second against operations a byte, under what the device's bandwidth and its arithmetic allow.

    rows: ops of one dtype with columns name, variant, direction, length, bytes, flops, median_s, limit_bytes_s and
    limit_flops_s; the longest length of each op, variant and direction is shown.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = rows.sort_values("length").groupby(["name", "variant", "direction"], sort=True, dropna=False).tail(1)
    bandwidth, arithmetic = (float(rows[name].median()) for name in ("limit_bytes_s", "limit_flops_s"))
    with mpl.rc_context(SALT):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        for number, (direction, part) in enumerate(rows.groupby("direction")):
            intensity, speed = part["flops"] / part["bytes"], part["flops"] / part["median_s"] / 1e9
            axes.plot(intensity, speed, MARKERS[number], markersize=5, label=direction)
            for name, x, y in zip(part["name"], intensity, speed):
                axes.annotate(name, (x, y), xytext=(4, 2), textcoords="offset points", fontsize=6)
        ridge = arithmetic / bandwidth
        ends = [min(float((rows["flops"] / rows["bytes"]).min()), ridge) / 2, ridge, ridge * 16]
        axes.plot(ends, [min(x * bandwidth, arithmetic) / 1e9 for x in ends], color="black", label="measured limit")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("operations a byte, at the least bytes")
        axes.set_ylabel("GFLOP/s")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
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
