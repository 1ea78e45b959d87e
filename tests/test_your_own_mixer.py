"""docs/your_own_mixer.md is true: its code is installed as a package, found by name, and keeps the laws."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "your_own_mixer.md"


def test_the_page_is_true(tmp_path: Path) -> None:
    mixer, entry_points, check = re.findall(
        r"```(?:python|toml)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL
    )
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage" / "__init__.py").write_text("")
    (tmp_path / "mypackage" / "ema.py").write_text(mixer)
    info = tmp_path / "mypackage-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mypackage\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(
        entry_points.replace("[project.entry-points.mixers]", "[mixers]").replace('"', "")
    )
    use = "import mixers, torch; mixers.Stack(8, ['ema', 'attention'])(torch.ones(1, 3, 8)); print(mixers.names())"
    assert "examples=10" in check
    code = f"{use}\n{check.replace('examples=10', 'examples=2')}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "'ema'" in done.stdout
