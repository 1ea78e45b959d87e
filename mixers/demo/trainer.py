"""The training loop: truncated backpropagation through time, a budget, and a state that is saved and resumed whole."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers.checkpoint import replace_file
from mixers.demo.evaluate import bits_per_character
from mixers.demo.settings import Settings
from mixers.demo.streams import Batch, Streams
from mixers.demo.text import Corpus
from mixers.models import LanguageModel
from mixers.state import detach

# Evaluations may cost this share of the time, the last one excepted.
EVALUATION_SHARE = 0.06


@dataclasses.dataclass(frozen=True)
class Point:
    """A point of the learning curve: bits per character in training since the last one, and on the held-out text."""

    step: int
    seconds: float
    characters: int
    train: float
    held_out: float


class Trainer:
    """A model in training and everything that its next step depends on.

    model: the weights in float32. working: the same model with bfloat16 weights where settings.bfloat16, which does the
    computing; else the model itself. seconds: trained so far, evaluations included, in this run and those before it.
    """

    def __init__(self, settings: Settings, corpus: Corpus, *, device: torch.device | str = "cpu") -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.corpus = settings, corpus
        self.model = settings.model(corpus.size).to(device)
        self.working = in_bfloat16(self.model) if settings.bfloat16 else self.model
        share_dropout(self.working)
        self.optimizers = _optimizers(self.model, settings)
        self.streams = Streams(corpus.train, settings.batch, settings.length, seed=settings.seed)
        self.state: Any = None
        self.step_count, self.seconds, self.evaluation_seconds = 0, 0.0, 0.0
        self.history: list[Point] = []
        self._nats, self._since, self._evaluation_cost = 0.0, 0, 0.0

    @property
    def characters(self) -> int:
        """Trained on so far."""
        return self.step_count * self.settings.batch * self.streams.length

    def loss(self, batch: Batch) -> Tensor:
        """Mean nats per character; the state goes on from the batch before, without its gradient."""
        device = self.model.embedding.weight.device
        with self.autocast():
            logits, state = self.working(batch.inputs.to(device), None if batch.fresh else self.state)
        self.state = detach(state)
        return F.cross_entropy(logits.float().flatten(0, 1), batch.targets.to(device).flatten())

    def step(self, fraction: float) -> float:
        """One update, at the learning rate for this fraction of the budget; returns the nats per character."""
        loss = self.loss(next(self.streams))
        loss.backward()
        if self.working is not self.model:
            _move_gradients(self.working, self.model)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["highest"] * self.settings.rate_at(fraction)
            optimizer.step()
            optimizer.zero_grad()
        if self.working is not self.model:
            _copy_weights(self.model, self.working)
        nats = loss.item()
        if not math.isfinite(nats):
            raise RuntimeError(f"demo: the loss is {nats} at step {self.step_count}")
        self.step_count += 1
        self._nats, self._since = self._nats + nats, self._since + 1
        return nats

    def evaluate(self) -> Point:
        """Measures the held-out text with the working weights, and adds a point to the history."""
        start = time.perf_counter()
        with self.autocast():
            held_out = bits_per_character(self.working, self.corpus.train, self.corpus.held_out)
        self._evaluation_cost = time.perf_counter() - start
        self.evaluation_seconds += self._evaluation_cost
        train = self._nats / self._since / math.log(2) if self._since else math.nan
        point = Point(self.step_count, self.seconds + self._evaluation_cost, self.characters, train, held_out)
        self.history.append(point)
        self._nats, self._since = 0.0, 0
        return point

    def run(
        self,
        fraction: Callable[[Trainer], float],
        *,
        save: Callable[[], None] = lambda: None,
        after_step: Callable[[Trainer], None] = lambda trainer: None,
        after_point: Callable[[Trainer, Point], None] = lambda trainer, point: None,
    ) -> None:
        """Trains until fraction(trainer), the part of the budget that is used up, reaches 1.

        Whatever ends it, Ctrl-C included, the last complete step is saved.

        Raises:
            KeyboardInterrupt: Ctrl-C, after the step that it met was finished and saved.
        """
        start = time.perf_counter() - self.seconds
        complete = True
        try:
            with heeding_interrupts() as interrupted:
                while (used := fraction(self)) < 1:
                    complete = False
                    self.step(used)
                    self.seconds = time.perf_counter() - start
                    complete = True
                    after_step(self)
                    if interrupted():
                        raise KeyboardInterrupt
                    if self._evaluation_is_due():
                        after_point(self, self.evaluate())
                        self.seconds = time.perf_counter() - start
                        save()
                after_point(self, self.evaluate())
        finally:
            if complete:
                save()

    def _evaluation_is_due(self) -> bool:
        # before the first one: forward is about a third of a step, and one row is slower to read than several
        guess = self.seconds / self.characters * len(self.corpus.held_out) / 2
        expected = self.evaluation_seconds + (self._evaluation_cost or guess)
        return expected < EVALUATION_SHARE * self.seconds

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        with torch.autocast(self.model.embedding.weight.device.type, torch.bfloat16, enabled=self.settings.bfloat16):
            yield

    def save(self, path: Path) -> None:
        """Everything that training depends on, in one file, which is never seen half written."""
        content = {
            "settings": dataclasses.asdict(self.settings),
            "text": text_hash(self.corpus),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "streams": self.streams.state_dict(),
            "state": self.state,
            "random": torch.get_rng_state(),
            "step": self.step_count,
            "seconds": self.seconds,
            "evaluation_seconds": self.evaluation_seconds,
            "since": (self._nats, self._since),
            "history": [dataclasses.asdict(point) for point in self.history],
        }
        replace_file(path, lambda file: torch.save(content, file))

    @classmethod
    def resume(cls, path: Path, corpus: Corpus, *, device: torch.device | str = "cpu") -> Trainer:
        """The trainer as it was saved.

        Raises:
            ValueError: the file is damaged, or the run was made with another text.
        """
        try:
            content = torch.load(path, map_location=device, weights_only=True)
            settings = Settings(**content["settings"])
        except Exception as error:
            raise ValueError(f"demo: {path} is no saved run, or damaged: {error}") from error
        if content["text"] != text_hash(corpus):
            raise ValueError(f"demo: {path} was trained on another text than {corpus.source}; give the same --text")
        trainer = cls(settings, corpus, device=device)
        trainer.model.load_state_dict(content["model"])
        if trainer.working is not trainer.model:
            _copy_weights(trainer.model, trainer.working)
        for optimizer, state in zip(trainer.optimizers, content["optimizers"]):
            optimizer.load_state_dict(state)
        trainer.streams.load_state_dict(content["streams"])
        trainer.state = content["state"]
        trainer.step_count, trainer.seconds = content["step"], content["seconds"]
        trainer.evaluation_seconds = content["evaluation_seconds"]
        trainer._nats, trainer._since = content["since"]
        trainer.history = [Point(**point) for point in content["history"]]
        torch.set_rng_state(content["random"].cpu())
        return trainer


def text_hash(corpus: Corpus) -> str:
    return hashlib.sha256((corpus.train_text + corpus.held_out_text).encode("utf-8", "surrogatepass")).hexdigest()


def in_bfloat16(model: LanguageModel) -> LanguageModel:
    """A copy with bfloat16 weights in its linear layers, embeddings and norms; decays and angles stay float32."""
    working = copy.deepcopy(model)
    for module in working.modules():
        if isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)):
            module.bfloat16()
    return working


class SharedDropout(nn.Module):
    """Dropout of x [B, T, D] with one mask [B, 1, D] for all of time (Gal and Ghahramani, arXiv 1512.05287).

    It is better for recurrent networks, and drawing T times fewer random numbers is faster.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        kept = x.new_empty(x.shape[0], 1, x.shape[2]).bernoulli_(1 - self.p)
        return x * kept.div_(1 - self.p)


def share_dropout(model: nn.Module) -> None:
    """Puts SharedDropout in the place of every nn.Dropout."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, name, SharedDropout(child.p))


@contextlib.contextmanager
def heeding_interrupts() -> Iterator[Callable[[], bool]]:
    """Inside the block the first Ctrl-C is only noted, for the caller to ask after; the second one interrupts.

    Outside the main thread, where Python delivers no signals, nothing changes.
    """
    noted = False

    def note(number: int, frame: Any) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)


def _optimizers(model: LanguageModel, settings: Settings) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices inside the Stack. Only matrices decay."""
    matrices = [m.weight for m in model.stack.modules() if isinstance(m, nn.Linear)]
    ids = {id(matrix) for matrix in matrices}
    rest = [p for p in model.parameters() if id(p) not in ids]
    groups: list[dict[str, Any]] = [{"params": rest, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = []
    if settings.muon:
        optimizers.append(
            torch.optim.Muon(matrices, settings.muon_rate, weight_decay=settings.decay, adjust_lr_fn="match_rms_adamw")
        )
    else:
        groups.append({"params": matrices, "weight_decay": settings.decay})
    optimizers.append(torch.optim.AdamW(groups, settings.rate, betas=settings.betas, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["highest"] = group["lr"]
    return optimizers


def _move_gradients(source: nn.Module, target: nn.Module) -> None:
    for ours, theirs in zip(target.parameters(), source.parameters()):
        ours.grad = None if theirs.grad is None else theirs.grad.to(ours.dtype)
        theirs.grad = None


@torch.no_grad()
def _copy_weights(source: nn.Module, target: nn.Module) -> None:
    torch._foreach_copy_(list(target.parameters()), list(source.parameters()))
    for ours, theirs in zip(target.buffers(), source.buffers()):
        ours.copy_(theirs)
