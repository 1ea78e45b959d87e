"""Configs in order for a GPU that is not there: the rule, a kernel compiled, and what look-ups and pages make of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import autotune
from autotune import lookup
from kernels import predict
from kernels.agreement import pose
from kernels.cards import CARDS, LONG, card
from kernels.catalogue import OPS
from kernels.explain import explain
from kernels.predict import Estimate, order
from kernels.problem import Problem
from mixers import predicted
from mixers.commands import target as targets
from mixers.commands.common import console
from mixers.units import seconds

pytest.importorskip("triton")

H100 = CARDS["sm_90"]


def problem(direction: str = "forward", length: int = 2048) -> Problem:
    sizes = {"B": 8, "N": 8, "T": length, "D": 1024}
    posed = pose(OPS["scan"], direction, sizes, dtype=torch.bfloat16, device=torch.device("cpu"), initial_state=True)
    return replace(posed, device=torch.device("cuda"))


def estimate(name: str, *launches: tuple[int, int], **facts: Any) -> Estimate:
    """launches: programs and bytes of each."""
    from kernels.triton_aot import Compiled

    shown = {"registers": 32, "spills": 0, "shared": 0, "occupancy": 0.5, "loads": {}, "stores": {}, "asynchronous": 0}
    kernels = [Compiled("k", "sm_90", 32, programs=p, bytes=b, **{**shown, **facts}) for p, b in launches]
    return Estimate(name, {}, tuple(kernels))


def names(*found: Estimate, length: int = LONG) -> list[str]:
    return [each.backend for each in order(found, H100, length)]


def test_what_spills_or_does_not_fit_or_compile_is_left_out() -> None:
    spills, large = estimate("spills", (999, 1), spills=8), estimate("large", (999, 1), occupancy=0.0, shared=2**20)
    broken = Estimate("broken", {}, (), "does not compile")
    assert names(spills, large, broken, estimate("fits", (1, 100))) == ["fits"]
    assert "spills 8 bytes" in spills.fault
    assert "1048576 bytes of shared memory" in large.fault


def test_the_order_of_the_rule() -> None:
    few, many = estimate("few", (66, 300)), estimate("many", (132, 300))
    assert names(few, many) == ["many", "few"], "half a card"
    assert names(many, few, estimate("more", (9999, 300))) == ["many", "more", "few"], "full is full; the simpler first"
    assert names(many, estimate("frugal", (132, 299))) == ["frugal", "many"]
    # three launches move 5/3 of the bytes: worth it below 3/5 of the card, and only for long sequences
    split = estimate("split", (999, 200), (999, 1), (999, 299))
    assert names(estimate("carried", (80, 300)), split) == ["carried", "split"]
    assert names(estimate("carried", (78, 300)), split) == ["split", "carried"]
    assert names(estimate("carried", (78, 300)), split, length=LONG - 1) == ["carried", "split"]
    assert names(estimate("two", (132, 150), (132, 150)), many) == ["many", "two"]


def test_steps_that_wait_one_after_the_other_take_their_time() -> None:
    """A walk of 4096 rows takes over a millisecond, in which 132 multiprocessors move 4 GB."""
    rows, chunks = estimate("rows", (132, 10**9), steps=4096), estimate("chunks", (132, 10**9), (132, 10**9), steps=128)
    assert names(rows, chunks) == ["chunks", "rows"]
    assert names(rows, chunks, length=LONG - 1) == ["rows", "chunks"]
    rows, chunks = estimate("rows", (132, 5 * 10**9), steps=4096), estimate("chunks", (132, 6 * 10**9), steps=128)
    assert names(chunks, rows) == ["rows", "chunks"]
    few, many = estimate("few", (66, 10**6), steps=4096), estimate("many", (132, 10**6), steps=4096)
    assert names(few, many) == ["many", "few"]


def test_one_config_compiled_becomes_a_row_that_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the configs one is left to compile; the shipped table then says it comes first."""
    op, backend = OPS["scan"], OPS["scan"].backend("triton")
    # none of several kernels, and not the default
    chosen = [config for config in backend.configs(problem()) if "split" not in config][1]
    monkeypatch.setattr(backend.loaded, "configs", lambda problem: [chosen])
    folder = tmp_path / "compiled"
    (record,) = predict.predict([problem(), problem(length=2000)], "sm_90", folder)
    assert len(list(folder.iterdir())) == 1, "lengths of one bucket are one problem, of one kernel"
    assert (record.status, record.config, record.source) == ("predicted", chosen, op.compiled_source)
    assert record.predicted is not None
    # a, x and h once, and the states
    assert record.predicted["least"] == 3 * 2 * 8 * 2048 * 1024
    assert 1 <= record.predicted["bytes"] / record.predicted["least"] < 1.01
    assert "on 132 multiprocessors" in record.message

    # nothing is compiled again
    monkeypatch.setattr("triton.compile", None)
    (again,) = predict.predict([problem()], "sm_90", folder)
    assert replace(again, date="") == replace(record, date="")
    monkeypatch.undo()

    monkeypatch.setenv("SEQUENCE_MIXERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lookup, "SHIPPED", tmp_path / "tables")
    targets.write_table(console(), H100, [record], tmp_path / "tables")
    measured = replace(
        record, status="ok", median_s=1.0, spread_s=0.0, predicted=None, key=replace(record.key, length=1)
    )
    autotune.Store(tmp_path / "tables" / f"{H100.fingerprint}.jsonl").append(measured)
    targets.write_table(console(), H100, [record], tmp_path / "tables")
    rows = autotune.Store(tmp_path / "tables" / f"{H100.fingerprint}.jsonl").read()
    assert [row.status for row in rows] == ["predicted", "ok"], "predictions are replaced, measurements stay"
    autotune.refresh()
    with autotune.pretend("cuda", "nvidia-h100-pcie-sm90"):
        plan = op.choose(problem(length=4096))
        assert (plan.config, plan.origin) == (chosen, "predicted")
        said = str(explain(op, problem(length=4096)))
    autotune.refresh()
    assert "predicted, not measured, for T ≤ 2048, the nearest length on record" in said
    assert "chosen, predicted, not measured" in said


def test_pages_of_what_is_predicted(tmp_path: Path) -> None:
    key = autotune.Key("scan", "forward", H100.fingerprint, "bfloat16", (("B", 1), ("D", 64)), (), 4096)
    figures = {"programs": 132, "launches": 3, "bytes": 3_350_000, "least": 2_010_000}
    row = autotune.Record(key, "triton", {"BT": 8}, "predicted", predicted=figures)
    targets.write_table(console(), H100, [row], tmp_path)
    floors = {"op": "scan", "direction": "forward", "columns": 64, "floor_s": 6e-7, "programs": 132, "launches": 3}
    floors = [{**floors, "steps": steps, "config": config} for steps, config in ((128, "BT=8"), (512, "BT=8 split=64"))]
    kernel = {"op": "scan", "direction": "forward", "dtype": "bfloat16", "form": "", "sizes": "B=8", "config": "BT=8"}
    kernel |= {"kernel": "scan_forward", "registers": 46, "spills": 4, "shared": 8704, "occupancy": 0.375}
    kernel |= {"loads": {"16": 20, "8": 1}, "stores": {"16": 2}, "asynchronous": 20}
    assert predicted.pages(tmp_path, tmp_path) == {}
    (tmp_path / "static.json").write_text(json.dumps({"sm_90": {"kernels": [kernel], "floors": floors}}))
    pages = {name: text.decode() for name, text in predicted.pages(tmp_path, tmp_path).items()}
    assert set(pages) == {"static.md", "sm_90.md"}
    assert "the order of configs has not been measured" in pages["sm_90.md"]
    assert "| B=1 D=64 | BT=8, 132 programs, 3 launches, ≥ 600 ns, 1.67 × |" in pages["sm_90.md"]
    assert (
        "| bfloat16 |  | BT=8 | scan_forward | 46 | **4** | 8,704 | 38% | 16: 20, 8: 1 | 16: 2 | 20 |"
        in pages["static.md"]
    )
    assert f"| 64 | {seconds(6e-7)}, 132 × 3 | **{seconds(6e-7)}, 132 × 3** |" in pages["static.md"]
    assert "time is split for B·D ≤ 64 at T = 512" in pages["static.md"]
    assert "[NVIDIA H100 80GB HBM3 (sm_90)](sm_90.md)" in predicted.links(pages)


def test_shipped_tables_are_of_known_cards_and_small() -> None:
    for known in CARDS.values():
        path = lookup.SHIPPED / f"{known.fingerprint}.jsonl"
        records = [record for record in autotune.Store(path).read() if record.status == "predicted"]
        assert {record.key.device for record in records} == {known.fingerprint}
        assert len({record.key for record in records}) == len(records)
        assert path.stat().st_size < 500_000


def test_unknown_targets_are_named() -> None:
    with pytest.raises(ValueError, match="no target 'hopper'; there are sm_80, sm_90, sm_100, gfx942"):
        card("hopper")
    assert H100.fingerprint == "nvidia-h100-80gb-hbm3-sm90"


def test_what_is_shipped_was_made_from_these_sources() -> None:
    """For every op with Triton kernels and every card; after a change: `mixers calibrate --target ...` of all four."""
    ops = {name for name, op in OPS.items() if any(hasattr(b.loaded, "compile_for") for b in op.backends)}
    known = json.loads((Path(__file__).parents[1] / "docs" / "speed" / "static.json").read_text())
    for target, where in CARDS.items():
        shipped = autotune.Store(lookup.SHIPPED / f"{where.fingerprint}.jsonl").read()
        records = [record for record in shipped if record.status == "predicted"]
        assert {record.key.op for record in records} == ops
        assert not {r.key.op for r in records if r.source != OPS[r.key.op].compiled_source}, target
        # every config of every kernel, and none that spills or does not fit
        kernels = known[target]["kernels"]
        assert {row["op"] for row in kernels} == ops
        assert not [row for row in kernels if row["spills"] or row["fault"]], target


def test_shipped_kernels_of_streaming_ops_are_wide_and_resident() -> None:
    """A quarter of the warps, 16 bytes to a load and to a row's store; on NVIDIA rows come by asynchronous copies."""
    known = json.loads((Path(__file__).parents[1] / "docs" / "speed" / "static.json").read_text())
    for target in CARDS:
        rows = [row for row in known[target]["kernels"] if row["op"] in ("scan", "hgru", "gated_norm", "short_conv")]
        assert {row["op"] for row in rows} == {"scan", "hgru", "gated_norm", "short_conv"}
        for row in rows:
            assert row["occupancy"] >= 0.25, row
            assert row["loads"].get("16"), row
            # a chunk's last state, and sums of parameters' gradients, are narrower than rows
            assert row["stores"].get("16") or row["kernel"] in ("scan_chunks", "hgru_chunks", "add_pieces"), row
            if target.startswith("sm_") and row["op"] in ("scan", "hgru") and row["kernel"] != "add_pieces":
                assert row["asynchronous"] >= 4, row
