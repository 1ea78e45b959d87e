"""Speed pages: `mixers tables` and `compare`, and the sweeps whose rows they are made of."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import autotune
from mixers import measured, plots, tables
from tests.command import run

ROOT = Path(__file__).parent.parent
FINGERPRINT = autotune.fingerprint(torch.device("cpu"))
SMALL = ["--dim", "8", "--length", "21"]


def benchmark_json(path: Path, seconds: float = 1e-3) -> Path:
    """A file as pytest-benchmark writes it: two backends of an op, two layers."""
    versions = {"torch": "2.13.0", "triton": "", "python": "3.11.7", "version": "0.1.0"}
    common = {
        "dtype": "float32",
        "length": 512,
        "direction": "forward",
        "device": "toy-device",
        "threads": 2,
        "versions": versions,
        "limit_bytes_s": 2e10,
        "limit_flops_s": 1e11,
    }
    sizes = {"B": 2, "D": 512}
    op = {**common, "kind": "op", "name": "scan", "variant": "real", "sizes": sizes, "bytes": 10**7, "flops": 10**6}
    rows = [
        {**op, "backend": "native", "chosen": True},
        {**op, "backend": "naive", "chosen": False},
        {**common, "kind": "mixer", "name": "hgrn", "sizes": {"dim": 512, "B": 1}, "tokens": 512, "flops": 6 * 10**7},
        {**common, "kind": "mixer", "name": "attention", "sizes": {"dim": 512, "B": 1}, "tokens": 512},
    ]
    benchmarks = [
        {
            "fullname": f"test_ops.py::test_op[{n}]",
            "extra_info": row,
            "stats": {"median": (n + 1) * seconds, "iqr": seconds / 20, "rounds": 9},
        }
        for n, row in enumerate(rows)
    ]
    data = {"benchmarks": benchmarks, "datetime": "2026-01-02T03:04:05", "command": "python -m pytest benchmarks"}
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def test_tables_make_a_page_a_device_and_an_index(tmp_path: Path) -> None:
    out = tmp_path / "speed"
    printed = run("tables", "--json", str(benchmark_json(tmp_path / "a.json")), "--out", str(out))
    assert all(name in printed for name in ("toy-device.csv", "toy-device.md", "README.md"))
    page = (out / "toy-device.md").read_text(encoding="utf-8")
    # simplest first, the chosen one in bold, 10 MB in 1 ms, half of what an addition does
    assert re.search(r"\| +T \| +naive \| +native \|", page)
    slow, fast = r"2\.00 ms ± 50 µs \(5 GB/s, 25%\)", r"\*\*1\.00 ms ± 50 µs \(10 GB/s, 50%\)\*\*"
    assert re.search(rf"\| 512 \| +{slow} \| +{fast} \|", page)
    # 60 MFLOP in 3 ms of 100 GFLOP/s
    assert "**3.00 ms ± 50 µs (171 k tokens/s, 20%)**" in page
    assert "20 GB/s (an addition), matrix products 100 GFLOP/s (float32)" in page
    assert "![roofline](toy-device-roofline-float32.svg)" in page
    for fact in ("device: toy-device, 2 threads", "torch 2.13.0", "date: 2026-01-02", "`python -m pytest benchmarks`"):
        assert fact in page
    assert "[toy-device](toy-device.md)" in (out / "README.md").read_text(encoding="utf-8")
    # every row says with what, when and how it was made, and the page follows from the rows
    rows = pd.read_csv(out / "toy-device.csv", keep_default_na=False, na_values=[""])
    assert len(rows) == 4
    assert not rows[["device", "torch", "date", "command", "test", "median_s", "iqr_s"]].isna().to_numpy().any()
    assert measured.markdown("toy-device", rows, ["toy-device-roofline-float32.svg"]) == page


def without_limits(path: Path) -> Path:
    """Of a device that nobody has measured: no roofline."""
    data = json.loads(benchmark_json(path).read_text())
    for row in data["benchmarks"]:
        del row["extra_info"]["limit_bytes_s"], row["extra_info"]["limit_flops_s"]
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def test_a_rate_needs_no_limit(tmp_path: Path) -> None:
    tables.write(tables.read(without_limits(tmp_path / "a.json")), tmp_path)
    page = (tmp_path / "toy-device.md").read_text(encoding="utf-8")
    assert "**1.00 ms ± 50 µs (10 GB/s)**" in page
    assert "limits measured beside them: none" in page


def long_run(path: Path, factor: float = 1.0) -> Path:
    """Layers at two lengths: hgrn slower than attention at the first and faster at the second."""
    data = json.loads(benchmark_json(path).read_text())
    rows = data["benchmarks"][2:]
    for row, name, length, median in zip(
        rows * 2, ("hgrn", "attention") * 2, (512, 512, 2048, 2048), (2e-3, 1e-3, 4e-3, 16e-3)
    ):
        info = {**row["extra_info"], "name": name, "length": length}
        data["benchmarks"].append(
            {**row, "extra_info": info, "stats": {"median": factor * median, "iqr": 1e-5, "rounds": 9}}
        )
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def test_pages_have_pictures_and_an_answer_and_can_be_checked(tmp_path: Path) -> None:
    out = tmp_path / "speed"
    run("tables", "--json", str(long_run(tmp_path / "a.json")), "--out", str(out))
    picture = (out / "toy-device-forward-float32-dim512-B1.svg").read_text()
    assert all(text in picture for text in ("hgrn", "attention", "tokens T"))
    assert "![time against length](toy-device-forward-float32-dim512-B1.svg)" in (out / "toy-device.md").read_text()
    assert re.search(r"2048 \| hgrn, 4\.0 × as fast as attention", (out / "README.md").read_text())
    # half of the factor of 8 in the ratio lies before the crossover, on a logarithmic scale a third
    rows = pd.read_csv(out / "toy-device.csv")
    known = {str(name): part for name, part in rows[rows["kind"] == "mixer"].groupby("name")}
    assert plots.crossovers(known) == {"hgrn": pytest.approx(512 * 4 ** (1 / 3))}
    assert "every page is what its rows give" in run("tables", "--check", "--out", str(out))
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    (out / "toy-device-backward-float32.svg").write_text("of rows that are gone")
    run("tables", "--json", str(tmp_path / "a.json"), "--out", str(out))
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before, "the same bytes again"


@pytest.mark.parametrize(
    "name", ["toy-device.md", "toy-device-forward-float32-dim512-B1.svg", "README.md", "toy-device.csv"]
)
def test_a_page_that_was_edited_is_found(name: str, tmp_path: Path) -> None:
    out = tmp_path / "speed"
    run("tables", "--json", str(long_run(tmp_path / "a.json")), "--out", str(out))
    text = (out / name).read_text()
    (out / name).write_text(text.replace("0.016", "0.015") if name.endswith("csv") else text.replace("hgrn", "hgnr"))
    assert "not what" in run("tables", "--check", "--out", str(out), code=1)


def test_compare_says_what_got_slower_and_what_is_noise(tmp_path: Path) -> None:
    old, new = long_run(tmp_path / "old.json"), long_run(tmp_path / "new.json")
    assert "0 slower, 0 faster" in run("compare", str(old), str(new))
    data = json.loads(new.read_text())
    # the last two rows: 50 % slower, and faster by less than the spread
    data["benchmarks"][-1]["stats"]["median"] *= 1.5
    data["benchmarks"][-2]["stats"].update(median=3e-3, iqr=2e-3)
    new.write_text(json.dumps(data))
    printed = run("compare", str(old), str(new), code=1)
    assert "attention dim=512 B=1 forward float32 2048 16.0 ms 24.0 ms 1.50 slower" in printed
    assert "1 slower, 0 faster" in printed
    assert "hgrn dim=512 B=1 forward float32 2048 4.00 ms 3.00 ms 0.75 same" in run(
        "compare", str(old), str(new), "--all", code=1
    )
    assert "which is no file" in run("compare", str(old), str(tmp_path / "none.json"), code=2)


def test_of_several_files_the_last_counts(tmp_path: Path) -> None:
    files = [benchmark_json(tmp_path / "a.json"), benchmark_json(tmp_path / "b.json", seconds=1e-2)]
    tables.write(pd.concat(map(tables.read, files)), tmp_path)
    rows = pd.read_csv(tmp_path / "toy-device.csv")
    assert len(rows) == 4
    assert rows["median_s"].min() == 1e-2


def test_a_sweep_may_take_several_runs(tmp_path: Path) -> None:
    first, second = without_limits(tmp_path / "a.json"), tmp_path / "b.json"
    data = json.loads(first.read_text())
    data["datetime"] = "2027-01-02T03:04:05"
    data["benchmarks"] = data["benchmarks"][:1]
    data["benchmarks"][0]["stats"]["median"] = 5e-3
    second.write_text(json.dumps(data))
    tables.write(tables.read(first), tmp_path)
    before = (tmp_path / "toy-device.csv").read_text().splitlines()
    tables.write(tables.read(second), tmp_path)
    after = (tmp_path / "toy-device.csv").read_text().splitlines()
    # the same measurement's row is replaced, the others are as they were, with their date
    (old,), (new,) = set(before) - set(after), set(after) - set(before)
    assert ("0.001," in old, "2026-01-02" in old) == ("0.005," in new, "2027-01-02" in new) == (True, True)
    assert len(after) == len(before) == 5
    tables.write(tables.read(second), tmp_path, replace=True)
    assert len(pd.read_csv(tmp_path / "toy-device.csv")) == 1


def test_rows_of_other_sources_are_stale(tmp_path: Path) -> None:
    file = benchmark_json(tmp_path / "a.json")
    data = json.loads(file.read_text())
    native, naive, hgrn, attention = data["benchmarks"]
    native["extra_info"]["source"] = tables.sources("op", "scan", "toy-device")
    naive["extra_info"]["source"] = "of another day"
    hgrn["extra_info"]["source"] = tables.sources("mixer", "hgrn", "toy-device")
    attention["extra_info"]["name"] = "of another package"
    file.write_text(json.dumps(data))
    assert list(tables.current(tables.read(file))["test"]) == [
        f"benchmarks/{row['fullname']}" for row in (native, hgrn)
    ]
    here = {"device": "toy-device", "threads": 2, "versions": {"torch": "2.13.0"}}
    assert len(tables.measured_tests(tmp_path, here)) == 2
    assert not tables.measured_tests(tmp_path, {**here, "threads": 4})


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"benchmarks": []}', '{"benchmarks": [{"extra_info": {}}]}'])
def test_a_file_that_holds_no_results(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    assert "x.json holds no results of" in run(
        "tables", "--json", str(tmp_path / "x.json"), "--out", str(tmp_path), code=2
    )


def test_the_sweeps_run_and_become_pages(tmp_path: Path) -> None:
    """`python -m pytest benchmarks` is not skipped by the tests' own settings, and saves what `mixers tables` reads."""
    storage = f"--benchmark-storage=file://{tmp_path}/saved"
    chosen = "T1- and float32 and ((decode and mingru) or forward-scan-real-naive or backward-attention-naive)"
    command = [sys.executable, "-m", "pytest", "benchmarks", storage, "-k", chosen]
    # pytest-benchmark does not measure inside a worker of pytest-xdist, which this process may be
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout
    (saved,) = (tmp_path / "saved").glob("**/*.json")
    assert "node" not in json.loads(saved.read_text())["machine_info"]
    tables.write(tables.current(tables.saved(tmp_path)), tmp_path / "speed")
    rows = pd.read_csv(tmp_path / "speed" / f"{FINGERPRINT}.csv", keep_default_na=False)
    assert set(rows["name"]) == {"mingru", "scan", "attention"}
    assert (rows["median_s"] > 0).all()
    assert rows["command"].str.startswith("python -m pytest benchmarks").all()
