"""The `mixers` command. What it needs beyond the library comes with the extra "cli"."""

from __future__ import annotations

import sys

# Top-level modules of the extra "cli".
EXTRA = ("typer", "rich", "pandas", "matplotlib", "tabulate", "safetensors")


def main() -> None:
    """Runs the command; exit code 1 with one line that says what to install where the extra is missing."""
    try:
        from mixers.commands import app

        app()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRA:
            raise
        sys.exit(f'mixers: this command needs {missing}; install it with: pip install "sequence-mixers[cli]"')


if __name__ == "__main__":
    main()
