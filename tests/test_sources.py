"""The hash by which a measurement or a prediction is known to be stale."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernels import sources
from kernels.catalogue import OPS


@pytest.mark.parametrize(
    ("op", "files"),
    [
        ("gla", {"gla/native.cpp", "matrix.h", "simd.h", "triton_matrix.py", "triton_matrix_launch.py", "foreign.py"}),
        ("dplr", {"rank_one.py", "rank_one_backward.h", "delta_rule/rows.py", "matrix_state.py", "loop.py"}),
        ("hgru", {"scan/triton_kernels.py", "scan/compiled.py", "triton_rows.py", "sigmoid.h"}),
    ],
)
def test_what_an_op_is_made_of(op: str, files: set[str]) -> None:
    own = [path for path in (sources.ROOT / op).iterdir() if path.is_file()]
    found = {path.relative_to(sources.ROOT).as_posix() for path in sources.gathered(own)}
    assert files <= found
    assert not found & {"op.py", "tuning.py", "trial.py"}


def test_every_edit_is_another_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    (tmp_path / "toy").mkdir()
    files = {
        "toy/naive.py": "from kernels.shared import (\n    one,\n    two,\n)\n",
        "toy/native.cpp": '#include "../rows.h"\n',
        "shared.py": "from kernels import deep as d, other\n",
        "deep.py": "",
        "rows.h": "",
        "unused.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)

    def found() -> str:
        return sources.digest((tmp_path / "toy").iterdir())

    before = found()
    for name, text in files.items():
        (tmp_path / name).write_text(f"{text}# edited\n")
        assert (found() == before) == (name == "unused.py"), name
        (tmp_path / name).write_text(text)
    assert found() == before


def test_measurements_outlive_edits_of_what_does_not_run_on_their_device() -> None:
    folder = sources.ROOT / "gla"
    on_cpu, on_gpu = (set(sources.gathered(sources.own(folder, kind))) for kind in ("cpu", "gpu"))
    assert {path.name for path in on_cpu - on_gpu} >= {"native.py", "native.cpp", "matrix.h", "step.cpp"}
    assert {path.name for path in on_gpu - on_cpu} >= {"triton.py", "triton_chunks.py", "triton_matrix.py"}
    assert {path.name for path in on_cpu & on_gpu} >= {"__init__.py", "naive.py", "compiled.py", "loop.py"}
    assert not [path for path in on_gpu if path.suffix != ".py"]


def test_predictions_outlive_edits_of_what_is_not_compiled_for_gpus() -> None:
    found = sources.gathered((sources.ROOT / "gla").glob("triton*.py"))
    assert not [path for path in found if path.suffix != ".py"]
    assert OPS["gla"].compiled_source not in (OPS["gla"].source("cpu"), OPS["gla"].source("cuda"))
