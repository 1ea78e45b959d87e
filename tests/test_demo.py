"""The demo's parts on tiny texts, and the whole of it with a budget of a second."""

from __future__ import annotations

import functools
import math
import os
import signal
import time
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
from mixers.demo.trainer import Trainer
from mixers.models import LanguageModel
from tests.demo_song import TEXT, TINY, tiny


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return split(TEXT, source="a song", minimum=1000)


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
