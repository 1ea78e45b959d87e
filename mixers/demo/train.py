"""`mixers demo` from beginning to end."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from kernels.catalogue import OPS
from kernels.explain import explain
from kernels.op import recording
from kernels.problem import Problem
from kernels.tuning import tune_problems
from mixers.commands.common import console as make_console
from mixers.commands.common import count, device_of
from mixers.commands.tune import report as report_tuning
from mixers.demo import report
from mixers.demo.evaluate import CHUNK, agreement, bits_per_character
from mixers.demo.machine import WORTH, bfloat16_speedup, keep_freed_memory
from mixers.demo.ngram import Yardsticks, yardsticks
from mixers.demo.settings import Settings
from mixers.demo.streams import Batch
from mixers.demo.text import Corpus
from mixers.demo.text import load as load_text
from mixers.demo.trainer import Point, Trainer

MODEL, RUN, PICTURE = "model.safetensors", "training.pt", "loss-curve.png"

# Seconds for tuning and training with --quick, and for tuning without.
QUICK_TUNING, QUICK_TRAINING, TUNING = 3.0, 20.0, 8.0
# With a longer text, counting n-grams and xz would take longer than the training.
LONGEST_TEXT = 20_000_000
# Characters: of the prompt, written by the model, and read both ways.
PROMPT, WRITTEN, COMPARED = 200, 500, 512


def demo(
    text: Path | None = None,
    mixer: str = "hgrn",
    minutes: float = 3.0,
    quick: bool = False,
    resume: bool = False,
    folder: Path = Path("demo-run"),
    seed: int = 0,
) -> None:
    """Trains a character-level language model on a text for some minutes, and shows what it has learned.

    The folder receives the model, the learning curve and the state of training, which Ctrl-C leaves there too before
    the exit with code 130.

    Args:
        text: a UTF-8 file; None: the documentation that every Python carries.
        mixer: the mixer in every layer.
        minutes: of training, evaluations included; with `resume` together with those before.
        quick: at most 20 seconds of training.
        resume: go on with the run in the folder.
        folder: where the run is kept; a run that is there already is replaced, unless it is resumed.
        seed: of weights, batches and the text that is written.

    Raises:
        ValueError: the text cannot be used, there is nothing to resume, or it was made with another text or mixer.
    """
    console = make_console()
    seconds = min(60 * minutes, QUICK_TRAINING) if quick else 60 * minutes
    keep_freed_memory()
    corpus = load_text(text, maximum=LONGEST_TEXT)
    trainer = resumed(corpus, mixer, folder) if resume else fresh(console, corpus, mixer, seed, seconds)
    introduce(console, trainer)
    with console.status("counting n-grams, running xz"):
        known = yardsticks(corpus)
    tune(console, trainer, QUICK_TUNING if quick else TUNING)
    try:
        train(console, trainer, seconds, folder)
    except KeyboardInterrupt:
        console.print(
            f"interrupted after {trainer.step_count:,} steps; {folder / MODEL} can be used, and --resume goes on"
        )
        raise SystemExit(130) from None
    conclude(console, trainer, known, folder)


def fresh(console: Console, corpus: Corpus, mixer: str, seed: int, seconds: float) -> Trainer:
    settings, device = Settings(mixer=mixer, seed=seed).regularised(seconds), device_of(None)
    speedup = bfloat16_speedup(device, rows=settings.batch * settings.length, dim=settings.dim)
    low = speedup >= WORTH
    console.print(
        f"matrix products in bfloat16: {speedup:.1f} × as fast as in float32, {'used' if low else 'not used'}"
    )
    return Trainer(replace(settings, bfloat16=low, muon=low), corpus, device=device)


def resumed(corpus: Corpus, mixer: str, folder: Path) -> Trainer:
    path = folder / RUN
    if not path.exists():
        raise ValueError(f"demo: nothing to resume, there is no {path}")
    trainer = Trainer.resume(path, corpus, device=device_of(None))
    if trainer.settings.mixer != mixer:
        made = trainer.settings.mixer
        raise ValueError(f"demo: the run in {folder} was made with mixer {made!r}, not {mixer!r}; give --mixer {made}")
    return trainer


def introduce(console: Console, trainer: Trainer) -> None:
    corpus, settings = trainer.corpus, trainer.settings
    parameters = sum(p.numel() for p in trainer.model.parameters())
    console.print(
        f"text: {corpus.source}, {len(corpus.train):,} characters to learn from and {len(corpus.held_out):,} held out, "
        f"{corpus.size} different"
    )
    console.print(
        f"model: {settings.layers} layers of {settings.mixer}, dim {settings.dim}, {count(parameters)} parameters, "
        f"{'Muon and AdamW' if settings.muon else 'AdamW'}, {settings.batch} × {settings.length} characters a step, "
        f"{torch.get_num_threads()} threads"
    )
    if trainer.step_count:
        console.print(f"resumed at step {trainer.step_count:,}, after {trainer.seconds:.0f} seconds of training")


def tune(console: Console, trainer: Trainer, seconds: float) -> None:
    """Measures the backends on the problems that training, evaluation and writing will meet, and says which won."""
    with console.status("one rehearsal; the first time, kernels are compiled"):
        met = problems(trainer)
    console.print(report.heading("tuning"))
    start = time.perf_counter()
    with report.bar(console) as bar:
        task = bar.add_task("", total=len(met))
        tune_problems(met, seconds=seconds, progress=lambda n, _, what: bar.update(task, completed=n, description=what))
    report_tuning(console, [explain(OPS[problem.op], problem) for problem in met])
    console.print(Text(f"{time.perf_counter() - start:.1f} seconds", "dim"))


def problems(trainer: Trainer) -> list[Problem]:
    """What the ops will meet in training, evaluation and writing; the trainer is as it was afterwards."""
    settings, model = trainer.settings, trainer.model
    rows = torch.zeros(settings.batch, trainer.streams.length + 1, dtype=torch.int64)
    tokens = torch.zeros(1, CHUNK, dtype=torch.int64, device=model.embedding.weight.device)
    state = trainer.state
    with torch.random.fork_rng(devices=[]), recording() as met:
        # twice, for the second batch has a state to start from
        trainer.loss(Batch(rows[:, :-1], rows[:, 1:], fresh=True))
        trainer.loss(Batch(rows[:, :-1], rows[:, 1:], fresh=False)).backward()
        with torch.no_grad(), trainer.autocast():
            trainer.working(tokens)
        with torch.no_grad():
            model(tokens[:, :1], model(tokens)[1])
    trainer.working.zero_grad()
    trainer.state = state
    return list(met)


def train(console: Console, trainer: Trainer, seconds: float, folder: Path) -> None:
    characters, held_out = len(trainer.corpus.train), "–"

    def save() -> None:
        trainer.save(folder / RUN)
        trainer.model.save(
            folder / MODEL, notes={"characters": trainer.corpus.vocabulary, "text": trainer.corpus.source}
        )

    def fraction(trainer: Trainer) -> float:
        return trainer.seconds / seconds

    console.print(report.heading("learning"))
    with report.bar(console) as bar:
        task = bar.add_task("", total=1.0)

        def after_step(trainer: Trainer) -> None:
            about = f"{trainer.characters / characters:.2f} epochs   held-out {held_out} bits/char"
            bar.update(task, completed=min(fraction(trainer), 1.0), description=about)

        def after_point(trainer: Trainer, point: Point) -> None:
            nonlocal held_out
            held_out = f"{point.held_out:.3f}"
            bar.console.print(report.point_line(point, characters))

        trainer.run(fraction, save=save, after_step=after_step, after_point=after_point)


def conclude(console: Console, trainer: Trainer, known: Yardsticks, folder: Path) -> None:
    corpus, model, settings = trainer.corpus, trainer.model, trainer.settings
    with console.status("reading the held-out text in float32"):
        bits = bits_per_character(model, corpus.train, corpus.held_out)
    name = f"{settings.mixer}, {trainer.seconds / 60:.1f} minutes of training"
    console.print(report.heading("bits per character on the held-out text"))
    console.print(report.comparison(name, bits, known))

    console.print(report.heading("writing, token by token from the state"))
    prompt = corpus.held_out[:PROMPT]
    seconds = report.write(console, corpus, model, prompt, WRITTEN, seed=settings.seed)
    console.print(Text(f"{WRITTEN / seconds:,.0f} tokens/s", "dim"))

    console.print(report.heading("reading at once and token by token"))
    both = agreement(model, corpus.held_out[:COMPARED])
    console.print(
        f"{both.tokens} tokens: at once {both.prefill_per_second:,.0f} tokens/s, one by one "
        f"{both.decode_per_second:,.0f} tokens/s; log-probabilities differ by at most {both.difference:.1e}"
    )
    report.plot(folder / PICTURE, trainer.history, known, f"{settings.mixer} on {corpus.source}")
    console.print(f"\nwritten: {', '.join(str(folder / file) for file in (MODEL, RUN, PICTURE))}")
