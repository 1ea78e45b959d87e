"""`mixers demo`: a small model learns real text, here and now."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixers import registry
from mixers.commands.common import fail, mistakes


def demo(
    text: Annotated[
        Path | None, typer.Option(help="A text file; by default the manual that comes with Python.")
    ] = None,
    mixer: Annotated[str, typer.Option(help="The mixer in every layer.")] = "hgrn",
    minutes: Annotated[float, typer.Option(min=0.01, help="How long it trains.")] = 3.0,
    quick: Annotated[bool, typer.Option("--quick", help="A smaller model, done within a minute.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the folder.")] = False,
    folder: Annotated[Path, typer.Option(help="For the checkpoint and the loss curve.")] = Path("demo-run"),
    seed: Annotated[int, typer.Option(help="Of the weights, the batches and the sampled text.")] = 0,
) -> None:
    """Trains a character-level language model on real text, says how well it predicts, and lets it write."""
    if text is not None and not text.is_file():
        fail(f"--text is {str(text)!r}, which is no file", 2)
    with mistakes():
        registry.get(mixer)
        from mixers.demo.train import demo as run

        run(text=text, mixer=mixer, minutes=minutes, quick=quick, resume=resume, folder=folder, seed=seed)
