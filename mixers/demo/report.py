"""What the demo shows: the learning curve as lines and as a picture, and the model beside its yardsticks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import isnan
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from mixers.checkpoint import replace_file
from mixers.demo.ngram import Yardsticks
from mixers.demo.text import Corpus
from mixers.demo.trainer import Point
from mixers.models import LanguageModel

WIDTH = 30


def bar(console: Console) -> Progress:
    """A bar over the budget, with what the model has learned beside it."""
    return Progress(
        TextColumn("{task.percentage:3.0f}%"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=console,
    )


def heading(title: str) -> Text:
    return Text(f"\n{title}", "bold cyan")


def point_line(point: Point, characters: int) -> str:
    minutes, seconds = divmod(round(point.seconds), 60)
    # not a number: nothing was trained on since the last line
    train = "  –  " if isnan(point.train) else f"{point.train:.3f}"
    return (
        f"{minutes:3d}:{seconds:02d}   {point.characters / characters:5.2f} epochs   "
        f"train {train}   held-out {point.held_out:.3f} bits/char"
    )


def comparison(name: str, bits: float, yardsticks: Yardsticks) -> Table:
    """All figures on the held-out text, best first, the model's in colour, with bars to scale."""
    rows = [(f"{k}-character context, interpolated n-gram", value) for k, value in yardsticks.ngram.items()]
    rows += [("xz, the held-out text alone", yardsticks.xz_alone)]
    rows += [("xz, continued from the training text", yardsticks.xz_continued)]
    rows += [(name, bits)]
    worst = max(value for _, value in rows)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("predictor")
    table.add_column("bits/char", justify="right")
    table.add_column("")
    for row, value in sorted(rows, key=lambda row: row[1]):
        style = "bold green" if row == name else ""
        table.add_row(
            Text(row, style), Text(f"{value:.3f}", style), Text("━" * round(WIDTH * value / worst), style or "dim")
        )
    return table


def write(console: Console, corpus: Corpus, model: LanguageModel, prompt: Tensor, length: int, *, seed: int) -> float:
    """Prints the prompt and how the model continues it, while it does; returns the seconds that the model took."""
    console.print(Text(corpus.decode(prompt), "dim"), end="")
    tokens, seconds = model.stream([prompt], temperature=0.8, top_p=0.95, seed=seed), 0.0
    # the prompt itself is read before the first token
    written = [int(next(tokens))]
    for _ in range(length):
        console.print(Text(corpus.decode(written[-1:]), "green"), end="", soft_wrap=True)
        start = time.perf_counter()
        written.append(int(next(tokens)))
        seconds += time.perf_counter() - start
    console.print()
    return seconds


def plot(path: Path, history: Sequence[Point], yardsticks: Yardsticks, title: str) -> None:
    """The learning curve as a PNG, with the yardsticks as lines across."""
    import matplotlib

    # no window, whatever the desktop offers
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), dpi=120)
    minutes = [point.seconds / 60 for point in history]
    axes.plot(minutes, [point.held_out for point in history], "o-", color="tab:green", label="held-out", markersize=3)
    axes.plot(minutes, [point.train for point in history], "-", color="tab:blue", label="training", alpha=0.6)
    lines = {
        f"best n-gram ({yardsticks.best_context} characters)": (yardsticks.best_ngram, "tab:orange"),
        "xz, alone": (yardsticks.xz_alone, "tab:gray"),
        "xz, continued from training": (yardsticks.xz_continued, "tab:red"),
    }
    for label, (value, color) in lines.items():
        axes.axhline(value, linestyle="--", linewidth=1, color=color, label=f"{label}: {value:.2f}")
    lowest = min(yardsticks.xz_continued, *(v for p in history for v in (p.held_out, p.train) if not isnan(v)))
    axes.set(xlabel="minutes", ylabel="bits per character", title=title, ylim=(lowest - 0.1, 4.0))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    replace_file(path, lambda file: figure.savefig(file, format="png"))
    plt.close(figure)
