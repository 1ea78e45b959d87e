"""The `mixers` command: what it prints, what it says of mistakes, and that a broken table or cache stops nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import autotune
import mixers
from kernels.catalogue import OPS
from kernels.scan import OP as SCAN
from kernels.scan import compiled
from mixers import units
from mixers.commands import app, doctor
from mixers.commands.catalogue import Document
from tests.command import apart, run

ROOT = Path(__file__).parent.parent
FINGERPRINT = autotune.fingerprint(torch.device("cpu"))
SMALL = ["--dim", "8", "--length", "21"]


@pytest.fixture(autouse=True)
def table(tmp_path: Path) -> Iterator[autotune.Store]:
    with autotune.using(tmp_path / "tuned.jsonl") as store:
        yield store


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
