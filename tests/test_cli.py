"""The `mixers` command: what it prints, what it says of mistakes, and that a broken table or cache stops nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import autotune
import mixers
from kernels.catalogue import OPS
from kernels.scan import OP as SCAN
from kernels.scan import compiled
from mixers import measured, plots, tables, units
from mixers.commands import app, doctor
from mixers.commands.catalogue import Document

ROOT = Path(__file__).parent.parent
FINGERPRINT = autotune.fingerprint(torch.device("cpu"))
SMALL = ["--dim", "8", "--length", "21"]


@pytest.fixture(autouse=True)
def table(tmp_path: Path) -> Iterator[autotune.Store]:
    with autotune.using(tmp_path / "tuned.jsonl") as store:
        yield store


def run(*args: str, code: int = 0) -> str:
    """What the command prints on stdout and stderr, spaces run together; the exit code must be `code`."""
    result = CliRunner().invoke(app, args, env={"COLUMNS": "160"})
    assert result.exit_code == code, result.output + str(result.exception or "")
    assert "Traceback" not in result.output
    return re.sub(r"\s+", " ", result.output)


def apart(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process of its own."""
    env = {**os.environ, "COLUMNS": "160", **environment}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300, check=False
    )


def test_list_names_every_mixer_with_its_state_and_what_runs_it_here() -> None:
    printed = run("list", "--dim", "64", "--device", "cpu")
    for name in mixers.names():
        assert name in printed
    assert re.search(r"hgrn element-wise linear RNN 128 hgru: naive, compiled", printed)
    assert re.search(r"attention softmax attention 128 a token", printed)


@pytest.mark.parametrize("name", mixers.names())
def test_show_has_the_equation_every_option_and_the_size(name: str) -> None:
    printed = run("show", name, "--dim", "64")
    document = Document(mixers.describe(name))
    assert document.title.split()[0] in printed
    assert any(kind == "equation" for kind, _ in document.paragraphs)
    for option, default in mixers.registry.options(name).items():
        assert f"{option} {default!r} {document.arguments[option].split()[0]}" in printed
    parameters = sum(p.numel() for p in mixers.build(name, 64).parameters())
    assert f"parameters {parameters:,} at dim 64" in printed


def test_the_page_of_all_mixers_is_what_the_registry_gives() -> None:
    path = ROOT / "docs" / "mixers.md"
    made = CliRunner().invoke(app, ["list", "--markdown"]).output
    assert path.read_text(encoding="utf-8") == made, "run: mixers list --markdown > docs/mixers.md"
    assert made.count("\n## ") == len(mixers.names()) + 1


def test_show_builds_with_the_options_given() -> None:
    printed = run("show", "hgrn", "--dim", "64", "-o", "complex=false", "-o", "norm=rms")
    assert "state 64 numbers" in printed
    assert "mixers.build(\"hgrn\", dim=64, complex=False, norm='rms')" in printed


def test_explain_shows_every_candidate_of_both_directions() -> None:
    printed = run("explain", "hgrn", *SMALL)
    for direction in ("forward", "backward"):
        assert f"hgru {direction} [B=1 T=21 D=8 N=1] float32 cpu activation=silu pairs theta initial_state" in printed
    assert "by rule, for nothing was measured" in printed
    assert "naive — not measured" in printed
    assert "triton cannot:" in printed
    assert "measure: mixers tune hgrn --dim 8 --length 21" in printed
    assert "backward" not in run("explain", "hgrn", *SMALL, "--no-backward")


def test_tune_then_explain_goes_by_what_was_measured(table: autotune.Store, tmp_path: Path) -> None:
    lock = tmp_path / "tuned.json"
    printed = run("tune", "mingru", *SMALL, "--length", "2", "--seconds", "4", "--lock", str(lock))
    assert len(autotune.Lock.read(lock).entries) == 4
    with autotune.use(lock):
        assert "decided locked by" in run("explain", "mingru", *SMALL)
    records = table.read()
    assert {record.key.length for record in records} == {32, 2}
    assert {record.key.direction for record in records} == {"forward", "backward"}
    assert f"{len(records)} new records, 0 of them failures" in printed
    explained = run("explain", "mingru", *SMALL)
    assert "decided measured at this length" in explained
    assert "slower by" in explained
    assert "not measured" not in re.sub(r"(compiled|native) \S+=\S+( \S+=\S+)* not measured", "", explained)


def test_a_wrong_backend_is_reported_and_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, **options: Any) -> Any:
        h, final = agreement_forward(*args, **options)
        return h, final + 1

    agreement_forward = compiled.forward
    monkeypatch.setattr(compiled, "forward", wrong)
    printed = run("tune", "mingru", *SMALL, "--no-backward", "--seconds", "2")
    assert "wrong: hgru forward compiled" in printed
    assert "final_state is off by 1 at its worst" in printed
    assert "compiled chunk=16 inductor=0 wrong: final_state is off by 1" in run("explain", "mingru", *SMALL)


def test_doctor_finds_every_backend_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LENGTHS", (5,))
    printed = run("doctor", "--device", "cpu")
    for op in OPS.values():
        assert re.search(rf"{op.name} naive \d+/\d+ ✓ \d+/\d+ ✓ \S+ \S+ right", printed)
    assert "triton cannot: " in printed
    assert f"cpu: {FINGERPRINT}" in printed
    assert str(autotune.cache_folder()) in printed


def test_doctor_fails_where_a_gradient_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, **options: Any) -> Any:
        da, dx, dinitial = backward(*args, **options)
        return da, dx, None if dinitial is None else 2 * dinitial

    backward = compiled.backward
    monkeypatch.setattr(compiled, "backward", wrong)
    monkeypatch.setattr(doctor, "LENGTHS", (5,))
    monkeypatch.setattr(doctor, "OPS", {"scan": SCAN})
    printed = run("doctor", "--device", "cpu", code=1)
    assert re.search(r"compiled \d+/\d+ ✓ \d+/\d+ ✗ \S+ \S+ WRONG in \d+ cases", printed)
    assert "scan compiled: backward float64 T=5 plain chunk=16 inductor=0: dinitial_state is off by" in printed


@pytest.mark.parametrize(
    ("args", "message", "code"),
    [
        (["show", "hgm"], "error: no mixer 'hgm'; did you mean 'hgrn'?", 2),
        (["explain", "hgm"], "error: no mixer 'hgm'; did you mean 'hgrn'?", 2),
        (["tune", "hgm"], "error: no mixer 'hgm'; did you mean 'hgrn'?", 2),
        (["demo", "--mixer", "hgm"], "error: no mixer 'hgm'; did you mean 'hgrn'?", 2),
        (["demo", "--text", "/no/such/file"], "error: --text is '/no/such/file', which is no file", 2),
        (["explain", "hgrn", "-o", "nrom=rms"], "error: hgrn: no option 'nrom'; did you mean 'norm'?", 2),
        (["explain", "hgrn", "-o", "norm=rsm"], "error: hgrn: norm is 'rsm', expected one of 'layer', 'rms'", 2),
        (["explain", "hgrn", "-o", "norm"], "error: --option is 'norm', expected NAME=VALUE", 2),
        (
            ["explain", "hgrn", "--device", "gpu"],
            "error: --device is 'gpu', expected cpu, cuda, cuda:1, mps or the like",
            2,
        ),
        (["explain", "hgrn", *SMALL, "-o", "backend=fast"], "error: hgru: no backend 'fast'; there are auto, naive", 2),
        (["explain", "hgrn", *SMALL, "-o", "backend=triton"], "error: hgru: backend 'triton' cannot run", 1),
        (["explain", "hgrn", "--dim", "0"], "Invalid value for '--dim'", 2),
        (["explain", "hgrn", "--dtype", "int8"], "Invalid value for '--dtype'", 2),
        (["tables", "--json", "/no/such/file"], "error: --json is '/no/such/file', which is no file", 2),
        (["frobnicate"], "No such command 'frobnicate'", 2),
    ],
)
def test_mistakes_get_one_clear_line(args: list[str], message: str, code: int) -> None:
    assert message in run(*args, code=code)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device here")
def test_a_device_that_is_not_there() -> None:
    assert "error: --device is 'cuda', but torch finds no such device here" in run(
        "explain", "hgrn", "--device", "cuda", code=1
    )


def test_a_traceback_for_those_who_ask() -> None:
    result = CliRunner().invoke(app, ["--traceback", "show", "hgm"])
    assert isinstance(result.exception, ValueError)


def test_without_the_extra_the_command_says_what_to_install() -> None:
    done = apart("import sys; sys.modules['typer'] = None; from mixers.cli import main; main()")
    assert done.returncode == 1
    assert done.stderr == 'mixers: this command needs typer; install it with: pip install "sequence-mixers[cli]"\n'
    assert done.stdout == ""


def test_tables_without_pandas_say_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['pandas'] = None; sys.argv = ['mixers', 'tables']; from mixers.cli import main; main()"
    )
    done = apart(code)
    assert done.returncode == 1
    assert done.stderr == 'mixers: this command needs pandas; install it with: pip install "sequence-mixers[cli]"\n'


def test_no_compiler_and_a_cache_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """Explain says why native cannot run, doctor what that means, and tune chooses among the others."""
    (tmp_path / "file").touch()
    commands = ["explain mingru --dim 8 --length 21", "tune mingru --dim 8 --length 21 --seconds 2 --no-backward"]
    code = f"""
from typer.testing import CliRunner
from mixers.commands import app, doctor
from kernels.catalogue import OPS
doctor.LENGTHS, doctor.OPS = (3,), {{"scan": OPS["scan"]}}
for command in [*{commands!r}, "doctor"]:
    result = CliRunner().invoke(app, command.split())
    print(result.output, result.exit_code)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
"""
    done = apart(code, CXX="/no/such/compiler", SEQUENCE_MIXERS_CACHE=str(tmp_path / "file" / "cache"))
    assert done.returncode == 0, done.stderr
    printed = re.sub(r"\s+", " ", done.stdout)
    assert "native cannot: no C++ compiler found ($CXX is '/no/such/compiler', which is no program on PATH)" in printed
    assert "warning: autotune: cannot save measurements in" in printed
    assert re.search(
        r"hgru forward \[B=1 T=21 D=8 N=1\] float32 cpu activation=positive initial_state (compiled|naive)", printed
    )
    assert "NOT writable" in printed


def test_a_corrupt_table_costs_a_warning(table: autotune.Store) -> None:
    table.path.write_bytes(b"garbage\n\x00\xff\n")
    printed = run("explain", "mingru", *SMALL)
    assert "warning: autotune:" in printed
    assert "lines 1, 2 are no records" in printed
    assert "by rule, for nothing was measured" in printed


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


def test_calibrate_checks_tunes_and_goes_on_where_it_was(
    table: autotune.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # in a folder without benchmarks, and with one op to check
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "OPS", {"short_conv": OPS["short_conv"]})
    arguments = ("calibrate", "--minutes", "0.1", "--mixer", "mingru", "--dim", "8", "--length", "9", "--length", "1")
    printed = run(*arguments)
    assert re.search(r"short_conv naive 34/34 ✓ 34/34 ✓ \S+ \S+ right", printed)
    # float32 and bfloat16, forward and backward at 9 tokens, forward at 1
    assert "6 problems" in printed
    assert "no folder benchmarks here" in printed
    assert table.read()
    again = re.search(r"(\d+) new measurements, 0 failures", run(*arguments))
    assert again is not None
    assert int(again[1]) < len(table.read())


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
    native["extra_info"]["source"] = tables.sources("op", "scan")
    naive["extra_info"]["source"] = "of another day"
    hgrn["extra_info"]["source"] = tables.sources("mixer", "hgrn")
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


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.5, "2.50 s"),
        (0.9996, "1000 ms"),
        (0.0123, "12.3 ms"),
        (3.12e-4, "312 µs"),
        (4.5e-8, "45 ns"),
        (0.0, "0 ns"),
        (120.0, "120 s"),
    ],
)
def test_times_for_people(value: float, text: str) -> None:
    assert units.seconds(value) == text


def test_the_package_works_without_the_extra() -> None:
    """Only the command needs typer and rich: building and running a mixer does not."""
    block = "import sys; sys.modules.update(dict.fromkeys(['typer', 'rich', 'pandas', 'matplotlib']))"
    done = apart(f"{block}; import mixers, torch; mixers.build('hgrn', 8)(torch.zeros(1, 3, 8))")
    assert done.returncode == 0, done.stderr
