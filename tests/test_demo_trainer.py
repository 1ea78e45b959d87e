"""Training in the demo: its steps, what interrupts and resumes it, its precision and dropout."""

from __future__ import annotations

import math
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from mixers.demo.evaluate import bits_per_character
from mixers.demo.settings import Settings
from mixers.demo.text import Corpus, split
from mixers.demo.trainer import SharedDropout, Trainer, heeding_interrupts, in_bfloat16
from tests.demo_song import TEXT, tiny, until


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return split(TEXT, source="a song", minimum=1000)


@pytest.mark.parametrize("options", [{}, {"bfloat16": True, "muon": True}, {"mixer": "attention", "muon": True}])
class TestTrainer:
    def test_it_learns(self, corpus: Corpus, options: dict[str, Any]) -> None:
        trainer = Trainer(tiny(**options, dropout=0.0), corpus)
        before = bits_per_character(trainer.model, corpus.train, corpus.held_out)
        trainer.run(lambda t: t.step_count / 60)
        after = bits_per_character(trainer.model, corpus.train, corpus.held_out)
        assert after < min(before - 1, 3.5)
        assert trainer.history[-1].held_out == pytest.approx(after, abs=0.05)
        assert trainer.history[-1].step == trainer.step_count == 60
        assert trainer.history[-1].characters == 60 * 4 * 24

    def test_interrupted_and_resumed_is_as_if_nothing_had_happened(
        self, corpus: Corpus, options: dict[str, Any], tmp_path: Path
    ) -> None:
        whole = Trainer(tiny(**options), corpus)
        whole.run(until(12))
        trainer, path = Trainer(tiny(**options), corpus), tmp_path / "run"

        def interrupt(trainer: Trainer) -> None:
            if trainer.step_count == 7:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            trainer.run(until(12), after_step=interrupt, save=lambda: trainer.save(path))
        # whatever the process does in between
        torch.manual_seed(1234)
        resumed = Trainer.resume(path, corpus)
        assert resumed.step_count == 7
        assert resumed.seconds == trainer.seconds > 0
        resumed.run(until(12))
        assert resumed.step_count == 12
        assert resumed.seconds > trainer.seconds
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[name], tensor), name
        assert resumed.history[-1].held_out == whole.history[-1].held_out
        assert resumed.history[-1].train == pytest.approx(whole.history[-1].train)


class TestInterruption:
    def test_ctrl_c_finishes_the_step_and_saves_it(self, corpus: Corpus) -> None:
        trainer, saved = Trainer(tiny(), corpus), []
        step = trainer.step

        def interrupted_step(fraction: float) -> float:
            if trainer.step_count == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return step(fraction)

        trainer.step = interrupted_step  # type: ignore[method-assign]
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            trainer.run(until(12), save=lambda: saved.append(trainer.step_count))
        assert trainer.step_count == 3
        assert saved[-1] == 3
        assert signal.getsignal(signal.SIGINT) is before

    def test_half_a_step_is_not_saved(self, corpus: Corpus) -> None:
        trainer, saved = Trainer(tiny(), corpus), []

        def broken_step(fraction: float) -> float:
            raise KeyboardInterrupt

        trainer.step = broken_step  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            trainer.run(until(12), save=lambda: saved.append(trainer.step_count))
        assert saved == []

    def test_the_second_ctrl_c_does_not_wait(self) -> None:
        with heeding_interrupts() as interrupted:
            assert not interrupted()
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupted()
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)

    def test_other_threads_can_train(self, corpus: Corpus) -> None:
        trainer = Trainer(tiny(), corpus)
        thread = threading.Thread(target=lambda: trainer.run(until(2)))
        thread.start()
        thread.join(60)
        assert trainer.step_count == 2

    def test_evaluations_take_a_small_part_of_the_time(self, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
        trainer, clock = Trainer(tiny(), corpus), [0.0]
        monkeypatch.setattr("mixers.demo.trainer.time.perf_counter", lambda: clock[0])

        def step(fraction: float) -> float:
            clock[0] += 1
            trainer.step_count += 1
            return 0.0

        def read(*_: Any) -> float:
            clock[0] += 2
            return 1.0

        trainer.step = step  # type: ignore[method-assign]
        monkeypatch.setattr("mixers.demo.trainer.bits_per_character", read)
        trainer.run(lambda t: t.seconds / 1000)
        points = [point.seconds for point in trainer.history]
        # 6 % of 1000 seconds are 30 evaluations of 2 seconds, and one at the end
        assert 28 <= len(points) <= 31
        assert points == sorted(points)
        assert trainer.seconds == pytest.approx(1000, abs=3)

    def test_a_loss_that_is_not_finite_ends_the_training(self, corpus: Corpus) -> None:
        trainer = Trainer(tiny(), corpus)
        trainer.model.embedding.weight.data.fill_(math.nan)
        with pytest.raises(RuntimeError, match="the loss is nan at step 0"):
            trainer.step(0.5)

    def test_what_cannot_be_resumed(self, corpus: Corpus, tmp_path: Path) -> None:
        path = tmp_path / "run"
        path.write_bytes(b"nothing")
        with pytest.raises(ValueError, match="no saved run, or damaged"):
            Trainer.resume(path, corpus)
        Trainer(tiny(), corpus).save(path)
        with pytest.raises(ValueError, match="trained on another text than a song in prose"):
            Trainer.resume(path, split(TEXT.replace(",", ";"), source="a song in prose", minimum=1000))


def test_bfloat16_leaves_decays_and_angles_in_float32() -> None:
    network = Settings(mixer="hgrn", dim=16).model(9)
    working = in_bfloat16(network)
    dtypes = {name: parameter.dtype for name, parameter in working.named_parameters()}
    assert dtypes["stack.bounds.weight"] == torch.float32
    assert dtypes["stack.blocks.0.mixer.f_proj.weight"] == dtypes["embedding.weight"] == torch.bfloat16
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_dropout_drops_a_channel_for_all_of_time_and_keeps_the_mean() -> None:
    dropout, x = SharedDropout(0.25), torch.ones(200, 5, 100)
    y = dropout(x)
    assert torch.equal(y, y[:, :1].expand_as(y))
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert y.mean().item() == pytest.approx(1, abs=0.02)
    assert dropout.eval()(x) is x
    trained = Trainer(tiny(), split(TEXT, source="a song", minimum=1000)).working
    assert not any(isinstance(module, torch.nn.Dropout) for module in trained.modules())
