"""`mixers tune --target` and `mixers calibrate --target`: what goes together with them, and where they write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import autotune
from kernels.cards import CARDS
from mixers.commands import target as targets
from tests.command import run

TARGET = ("--target", "sm_90")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """What would be compiled; nothing is."""
    asked: list[list[Any]] = []

    def records(console: object, card: object, met: list[Any], processes: int) -> list[autotune.Record]:
        asked.append(met)
        key = autotune.Key.of("scan", "forward", CARDS["sm_90"].fingerprint, "float32", {"B": 1, "D": 8}, {}, 64)
        return [autotune.Record(key, "triton", {"BT": 4}, "predicted", message="1 launch")]

    monkeypatch.setattr(targets, "records", records)
    return asked


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tune", "hgrn", *TARGET, "--out", "tables"], "--out does nothing with --target and a mixer"),
        (["tune", "hgrn", *TARGET, "--lock", "a.json"], "--lock does nothing with --target and a mixer"),
        (["tune", "hgrn", *TARGET, "--no-isolate"], "--isolate/--no-isolate does nothing with --target and a mixer"),
        (["tune", "hgrn", *TARGET, "--no-backward"], "--backward/--no-backward does nothing with --target and a mixer"),
        (["tune", *TARGET, "--out", "tables", "--dim", "8"], "--dim does nothing with --target and no mixer"),
        (["tune", *TARGET, "--out", "tables", "-o", "norm=rms"], "does nothing with --target and no mixer"),
        (["tune", *TARGET], "--target needs a mixer's name, or with --out a folder"),
        (["tune", "hgrn", "--out", "tables"], "--out does nothing without --target"),
        (["calibrate", *TARGET, "--minutes", "3"], "--minutes does nothing with --target"),
        (["calibrate", *TARGET, "--mixer", "hgrn"], "--mixer does nothing with --target"),
    ],
)
def test_what_target_would_ignore_is_refused(args: list[str], message: str, compiled: list[list[Any]]) -> None:
    assert message in run(*args, code=2)
    assert not compiled


def test_a_prediction_for_one_mixer_goes_into_the_users_table(tmp_path: Path, compiled: list[list[Any]]) -> None:
    with autotune.using(tmp_path / "tuned.jsonl") as store:
        printed = run("tune", "mingru", "--dim", "8", "--length", "64", "--dtype", "bfloat16", *TARGET)
        assert "scan forward T=64 float32: triton BT=4 predicted, not measured: 1 launch" in printed
        assert [record.status for record in store.read()] == ["predicted"]
    (met,) = compiled
    assert {(problem.sizes["T"], problem.dtype_name, problem.device.type) for problem in met} == {
        (64, "bfloat16", "cuda")
    }


def test_a_table_that_cannot_be_written_costs_a_warning(tmp_path: Path, compiled: list[list[Any]]) -> None:
    (tmp_path / "file").touch()
    with autotune.using(tmp_path / "file" / "tuned.jsonl"):
        printed = run("tune", "mingru", "--dim", "8", *TARGET)
    assert "warning: autotune: cannot save measurements in" in printed
    assert "scan forward T=64 float32: triton BT=4" in printed


def test_a_mixer_without_kernels_for_gpus_ends_there(
    monkeypatch: pytest.MonkeyPatch, compiled: list[list[Any]]
) -> None:
    monkeypatch.setattr(targets, "problems", lambda *_: [])
    assert run("tune", "mingru", "--dim", "8", *TARGET).strip() == "mingru has no op that compiles for GPUs"
    assert not compiled


def test_all_that_is_shipped_goes_where_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[list[Any]]
) -> None:
    monkeypatch.setattr(targets, "problems", lambda *_: ["a problem"])
    run("tune", *TARGET, "--out", str(tmp_path / "tables"))
    assert compiled == [["a problem"]]
    assert [path.name for path in (tmp_path / "tables").iterdir()] == [f"{CARDS['sm_90'].fingerprint}.jsonl"]


def test_without_a_cache_folder_what_is_compiled_is_kept_for_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEQUENCE_MIXERS_CACHE", str(tmp_path / "cache"))
    assert targets.memory() == tmp_path / "cache" / "compiled"
    (tmp_path / "file").touch()
    monkeypatch.setenv("SEQUENCE_MIXERS_CACHE", str(tmp_path / "file" / "cache"))
    (targets.memory() / "known.json").write_text("{}")
    assert (targets.memory() / "known.json").exists()


def test_calibrate_writes_tables_and_pages_of_every_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[list[Any]]
) -> None:
    tables: list[tuple[str, str]] = []
    monkeypatch.setattr(targets, "problems", lambda *_: [])
    monkeypatch.setattr(targets, "FLOORS", ())
    # in the place of the package's
    monkeypatch.setattr(targets, "write_table", lambda _, card, made: tables.append((card.target, made[0].backend)))
    run("calibrate", *TARGET, "--target", "gfx942", "--out", str(tmp_path))
    assert tables == [("sm_90", "triton"), ("gfx942", "triton")]
    assert set(json.loads((tmp_path / "static.json").read_text())) == {"sm_90", "gfx942"}
    assert "static.md" in {path.name for path in tmp_path.iterdir()}
