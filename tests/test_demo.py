"""The demo's parts on tiny texts, and the whole of it with a budget of a second."""

from __future__ import annotations

import functools
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixers import registry
from mixers.checkpoint import Network, read_notes
from mixers.demo import evaluate, train
from mixers.demo.evaluate import agreement, bits_per_character
from mixers.demo.machine import bfloat16_speedup, keep_freed_memory
from mixers.demo.settings import Settings
from mixers.demo.streams import Streams
from mixers.demo.text import Corpus, split
from mixers.demo.trainer import SharedDropout, Trainer, heeding_interrupts, in_bfloat16
from mixers.models import LanguageModel

TEXT = "".join(
    f"{n} green bottles hanging on the wall, and if one should fall, {n - 1} remain.\n" for n in range(99, 1, -1)
)
TINY: dict[str, Any] = {"dim": 16, "layers": 2, "batch": 4, "length": 24, "dropout": 0.2}


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return split(TEXT, source="a song", minimum=1000)


def until(steps: int) -> Callable[[Trainer], float]:
    """A budget in steps; the learning rate follows as if there were 12."""
    return lambda trainer: 1.0 if trainer.step_count >= steps else trainer.step_count / 12


def tiny(**options: Any) -> Settings:
    return Settings(**{**TINY, **options})


class TestStreams:
    def test_targets_are_one_further_and_rows_go_on_where_they_stopped(self) -> None:
        ids = torch.arange(1000)
        streams = Streams(ids, 3, 50, seed=1)
        first, second = next(streams), next(streams)
        assert first.fresh
        assert not second.fresh
        assert first.inputs.shape == (3, 50)
        for batch in (first, second):
            assert torch.equal(batch.targets, (batch.inputs + 1) % 1000)
        assert torch.equal(second.inputs[:, 0], first.targets[:, -1])

    def test_an_epoch_reads_nearly_everything_once_and_the_next_starts_elsewhere(self) -> None:
        streams = Streams(torch.arange(1000), 3, 50, seed=1)
        epochs: list[list[torch.Tensor]] = []
        for batch in (next(streams) for _ in range(12)):
            if batch.fresh:
                epochs.append([])
            epochs[-1].append(batch.inputs)
        assert [len(epoch) for epoch in epochs] == [6, 6]
        for epoch in epochs:
            read = torch.cat(epoch).flatten()
            # 3 streams of 333, of which 6 batches of 50 fit
            assert len(read.unique()) == len(read) == 900
        assert not torch.equal(epochs[0][0], epochs[1][0])

    def test_a_short_text_gives_shorter_rows(self) -> None:
        assert next(Streams(torch.arange(30), 4, 256)).inputs.shape == (4, 7)
        with pytest.raises(ValueError, match="3 characters is too short for 4 streams"):
            Streams(torch.arange(3), 4, 256)

    def test_a_saved_place_is_found_again(self) -> None:
        streams = Streams(torch.arange(500), 4, 30, seed=2)
        for _ in range(6):
            next(streams)
        place = streams.state_dict()
        after = [next(streams).inputs for _ in range(9)]
        again = Streams(torch.arange(500), 4, 30, seed=7)
        again.load_state_dict(place)
        assert all(torch.equal(next(again).inputs, rows) for rows in after)


class TestSettings:
    def test_the_rate_rises_then_falls_to_zero(self) -> None:
        rates = [Settings(warmup=0.2).rate_at(n / 10) for n in range(11)]
        assert rates[:3] == [0.0, 0.5, 1.0]
        assert rates[2:] == sorted(rates[2:], reverse=True)
        assert rates[10] == 0.0
        assert Settings().rate_at(1.5) == 0.0

    def test_dropout_grows_with_the_time_up_to_a_limit(self) -> None:
        found = [Settings(dropout=0.1).regularised(60 * minutes).dropout for minutes in (0.3, 3, 6, 60)]
        assert found == pytest.approx([0.1, 0.1, 0.2, 0.4])

    @pytest.mark.parametrize("name", [n for n in registry.names() if registry.get(n)(16).causal])
    def test_every_mixer_reads_a_long_text_with_a_state_of_fixed_size(self, name: str) -> None:
        network = tiny(mixer=name).model(11)
        assert network.config()["layers"] == [name] * 2
        assert all(b.mixer.state_size(48) == b.mixer.state_size(24) for b in network.stack.blocks)

    def test_a_state_without_bound_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        known = dict(registry.options("attention"))
        del known["window"]
        monkeypatch.setattr("mixers.demo.settings.registry.options", lambda name: known)
        with pytest.raises(ValueError, match="attention must be causal with a state of fixed size"):
            tiny(mixer="attention").options()


class TestEvaluation:
    def network(self, corpus: Corpus) -> LanguageModel:
        torch.manual_seed(0)
        network = tiny().model(corpus.size)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return network

    def test_it_scores_every_held_out_character_and_nothing_else(
        self, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(evaluate, "CHUNK", 100)
        monkeypatch.setattr(evaluate, "LEAD", 130)
        network = self.network(corpus)
        measured = bits_per_character(network, corpus.train, corpus.held_out)
        assert network.training
        # in one piece, from the definition
        text = torch.cat([corpus.train[-130:], corpus.held_out])[None]
        shares = network.eval()(text[:, :-1])[0].log_softmax(-1)[0, 129:].gather(1, corpus.held_out[:, None])
        assert len(shares) == len(corpus.held_out)
        assert measured == pytest.approx(-shares.double().mean().item() / math.log(2), rel=1e-5)

    def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary(self, corpus: Corpus) -> None:
        network = self.network(corpus)
        for parameter in network.head.parameters():
            parameter.data.zero_()
        expected = math.log2(corpus.size)
        assert bits_per_character(network, corpus.train, corpus.held_out) == pytest.approx(expected, rel=1e-6)

    def test_no_character_is_known_before_it_is_scored(self, corpus: Corpus) -> None:
        network, start = self.network(corpus), corpus.held_out[:300]
        changed = torch.cat([start, torch.randint(corpus.size, (300,))])
        whole = torch.cat([start, corpus.held_out[300:600]])
        scores = [bits_per_character(network, corpus.train, text) * 600 for text in (whole, changed)]
        # only what comes after the border may differ: the first 300 cost the same in both
        first = bits_per_character(network, corpus.train, start) * 300
        rest = [self.rest(network, corpus, text) for text in (whole, changed)]
        for score, later in zip(scores, rest):
            assert score - later == pytest.approx(first, rel=1e-5)

    def rest(self, network: LanguageModel, corpus: Corpus, text: torch.Tensor) -> float:
        """Bits of the characters from 300 on, with all before them as the lead."""
        before = torch.cat([corpus.train, text[:300]])
        return bits_per_character(network, before[-evaluate.LEAD - 300 :], text[300:]) * 300

    def test_reading_at_once_and_token_by_token_agree(self, corpus: Corpus) -> None:
        both = agreement(self.network(corpus), corpus.held_out[:80])
        assert both.tokens == 80
        # float32 rounding over 80 steps of a few layers
        assert both.difference < 1e-4
        assert both.prefill_per_second > 0
        assert both.decode_per_second > 0

    def test_a_state_that_is_lost_shows_as_disagreement(self, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
        network = self.network(corpus)
        forward = network.forward
        monkeypatch.setattr(network, "forward", lambda tokens, state=None: forward(tokens))
        assert agreement(network, corpus.held_out[:80]).difference > 0.01


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


def test_the_machine_is_measured() -> None:
    keep_freed_memory()
    assert 0 < bfloat16_speedup(torch.device("cpu"), rows=64, dim=32) < 1000


class TestDemo:
    """The command's function; its text is long enough for the n-gram models and short enough for a second."""

    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        (tmp_path / "song.txt").write_text(TEXT * 2, encoding="utf-8")
        monkeypatch.setattr(train, "Settings", functools.partial(Settings, **TINY))
        monkeypatch.setattr(train, "TUNING", 0.5)
        monkeypatch.setattr(train, "WRITTEN", 40)
        monkeypatch.setenv("COLUMNS", "200")
        return tmp_path / "run"

    def demo(self, folder: Path, **arguments: Any) -> None:
        train.demo(**{"text": folder.parent / "song.txt", "minutes": 1 / 60, "folder": folder, **arguments})

    def test_from_beginning_to_end(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.demo(folder)
        printed = capsys.readouterr().out
        for part in (
            "song.txt",
            "2 layers of hgrn",
            "hgru backward",
            "held-out",
            "4-character context, interpolated n-gram",
        ):
            assert part in printed
        for part in ("xz, continued", "tokens/s", "log-probabilities differ by at most", "loss-curve.png"):
            assert part in printed
        assert (folder / "loss-curve.png").read_bytes().startswith(b"\x89PNG")
        network, notes = Network.load(folder / "model.safetensors"), read_notes(folder / "model.safetensors")
        assert isinstance(network, LanguageModel)
        assert network.vocabulary == len(notes["characters"]) + 1
        assert network.generate([torch.tensor([1, 2])], 5).shape == (1, 5)
        assert sorted(file.name for file in folder.iterdir()) == ["loss-curve.png", "model.safetensors", "training.pt"]

    def test_ctrl_c_leaves_a_model_and_resume_goes_on(
        self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            step = Trainer.step

            def interrupted_step(trainer: Trainer, fraction: float) -> float:
                if trainer.step_count == 3:
                    os.kill(os.getpid(), signal.SIGINT)
                return step(trainer, fraction)

            patch.setattr(Trainer, "step", interrupted_step)
            with pytest.raises(SystemExit) as end:
                self.demo(folder, minutes=60)
        assert end.value.code == 130
        assert "interrupted after 4 steps" in capsys.readouterr().out
        assert isinstance(Network.load(folder / "model.safetensors"), LanguageModel)
        self.demo(folder, resume=True)
        assert "resumed at step 4" in capsys.readouterr().out
        content = torch.load(folder / "training.pt", weights_only=True)
        assert content["step"] > 4
        assert content["seconds"] > 1

    def test_a_run_that_is_over_is_shown_again(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.demo(folder, minutes=0.005)
        steps = torch.load(folder / "training.pt", weights_only=True)["step"]
        self.demo(folder, minutes=0.005, resume=True)
        assert torch.load(folder / "training.pt", weights_only=True)["step"] == steps
        assert "tokens/s" in capsys.readouterr().out

    def test_what_cannot_be_resumed(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="nothing to resume, there is no"):
            self.demo(folder, resume=True)
        self.demo(folder, minutes=0.002, mixer="mingru")
        with pytest.raises(ValueError, match="made with mixer 'mingru', not 'hgrn'; give --mixer mingru"):
            self.demo(folder, resume=True)

    def test_quick_caps_the_budget(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(train, "QUICK_TRAINING", 0.3)
        monkeypatch.setattr(train, "QUICK_TUNING", 0.3)
        start = time.perf_counter()
        self.demo(folder, minutes=60, quick=True)
        assert time.perf_counter() - start < 60
        assert 0.3 <= torch.load(folder / "training.pt", weights_only=True)["seconds"] < 30
