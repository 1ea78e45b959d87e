"""The `mixers` command, and Python code, as tests run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from typer.testing import CliRunner

from mixers.commands import app


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
