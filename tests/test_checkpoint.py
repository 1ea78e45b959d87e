"""Checkpoints: what is loaded is what was saved, and what is damaged or does not fit is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mixers import checkpoint
from mixers.checkpoint import Network, read_notes
from mixers.models import ImageClassifier, LanguageModel
from tests.test_models import model, prompts


@pytest.fixture(params=["safetensors", "torch"])
def written_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        # what an import of a package that is not installed looks like
        monkeypatch.setitem(sys.modules, "safetensors", None)
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    return request.param


def test_what_is_loaded_is_what_was_saved(written_by: str, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "model"
    network = model(layers=["hgrn", "mingru"], options={"hgrn": {"complex": False}}, tied=False, dropout=0.25).eval()
    network.save(path, notes={"characters": "añ\n"})
    state = torch.get_rng_state()
    loaded = LanguageModel.load(path).eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert type(Network.load(path)) is LanguageModel
    assert loaded.config() == network.config()
    assert read_notes(path) == {"characters": "añ\n"}
    assert (path.read_bytes()[:2] == b"PK") == (written_by == "torch")
    tokens = torch.stack(prompts(8, 8))
    assert torch.equal(loaded(tokens)[0], network(tokens)[0])
    assert all(p.requires_grad and p.is_leaf for p in loaded.parameters())
    assert [file.name for file in path.parent.iterdir()] == ["model"]
    # as readable as any other file that is written here
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_bounds_shared_between_layers_stay_shared_when_loaded(tmp_path: Path) -> None:
    model().save(tmp_path / "model")
    loaded = LanguageModel.load(tmp_path / "model")
    loaded(torch.stack(prompts(8)))[0].square().sum().backward()
    bounds = loaded.stack.bounds
    assert bounds is not None
    assert bounds.weight.grad is not None
    assert bounds.weight.grad.abs().sum() > 0


def test_dtypes_are_kept(tmp_path: Path) -> None:
    model().double().save(tmp_path / "model")
    assert LanguageModel.load(tmp_path / "model").embedding.weight.dtype == torch.float64
    narrow = model(seed=1).bfloat16()
    narrow.load_weights(tmp_path / "model")
    assert narrow.embedding.weight.dtype == torch.bfloat16
    assert torch.equal(narrow.embedding.weight, model().embedding.weight.bfloat16())


def test_every_mismatch_is_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    model(layers=["hgrn"], vocabulary=9).save(tmp_path / "model")
    other = model(layers=["hgrn", "hgrn"], tied=False)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        other.load_weights(tmp_path / "model")
    message = str(error.value)
    assert "embedding.weight is [9, 16] in the file but [23, 16] in the network" in message
    assert "head.weight is missing from the file" in message
    assert "stack.blocks.1.mixer.theta is missing from the file" in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_a_file_whose_weights_do_not_fit_its_configuration_is_refused(tmp_path: Path) -> None:
    network = model()
    network._config = {**network.config(), "dim": 12}
    network.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"embedding.weight is \[23, 16\] in the file but \[23, 12\] in the network"):
        LanguageModel.load(tmp_path / "model")


def test_a_configuration_that_nothing_understands_is_refused(tmp_path: Path) -> None:
    network = model()
    network._config = {**network.config(), "colour": "blue"}
    network.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"its configuration builds no LanguageModel.*colour"):
        LanguageModel.load(tmp_path / "model")


def test_another_kind_of_network_is_refused(tmp_path: Path) -> None:
    ImageClassifier(4, 2, 8, ["hgrn"], 3).save(tmp_path / "model")
    with pytest.raises(ValueError, match="holds a ImageClassifier, expected a LanguageModel"):
        LanguageModel.load(tmp_path / "model")
    assert isinstance(Network.load(tmp_path / "model"), ImageClassifier)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 and then nothing", b"hello" * 100, b"\x08\0\0\0\0\0\0\0{}      "]
)
def test_what_is_no_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(content)
    with pytest.raises(ValueError, match="no sequence-mixers network, or damaged"):
        LanguageModel.load(tmp_path / "model")


def test_a_truncated_checkpoint_is_refused(written_by: str, tmp_path: Path) -> None:
    model().save(tmp_path / "model")
    whole = (tmp_path / "model").read_bytes()
    (tmp_path / "model").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        LanguageModel.load(tmp_path / "model")


def test_a_file_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> Any:
            return subprocess.call, (["touch", str(marker)],)

    torch.save({"metadata": {}, "tensors": Payload()}, tmp_path / "model")
    with pytest.raises(ValueError, match="damaged"):
        LanguageModel.load(tmp_path / "model")
    assert not marker.exists()


def test_a_write_that_fails_leaves_the_old_file(
    written_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    model().save(path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        model(seed=1).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_options_that_json_cannot_hold_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    bound = torch.full((16,), 0.5)
    network = model(options={"hgrn": {"lower_bound": bound}})
    with pytest.raises(TypeError, match="plain values"):
        network.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_tensors_that_share_memory_are_saved_apart(tmp_path: Path) -> None:
    network = model(tied=False)
    assert network.head is not None
    network.head.weight = network.embedding.weight
    network.save(tmp_path / "model")
    loaded = LanguageModel.load(tmp_path / "model")
    assert loaded.head is not None
    assert torch.equal(loaded.head.weight, loaded.embedding.weight)


def test_safetensors_metadata_is_readable_without_this_library(tmp_path: Path) -> None:
    model().save(tmp_path / "model")
    data = (tmp_path / "model").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert json.loads(header["__metadata__"]["config"])["layers"] == ["hgrn", "hgrn"]
    assert json.loads(header["__metadata__"]["network"]) == "LanguageModel"
