"""Speed tables: pytest-benchmark's JSON in, one Markdown page and one CSV file a device out, and an index.

A row is one benchmark of `benchmarks/`, which describes itself in `extra_info`. The CSV holds every row with its
device, versions, date and command; the page shows the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from kernels.catalogue import OPS
from mixers.units import seconds

# What one measurement is of; of several files the last one's row counts.
IDENTITY = ["device", "kind", "name", "variant", "sizes", "direction", "dtype", "length", "backend"]
COLUMNS = [*IDENTITY, "config", "chosen", "median_s", "iqr_s", "rounds", "bytes", "tokens", "torch", "triton", "python"]
COLUMNS += ["version", "threads", "date", "command", "test"]
DIRECTIONS = ["forward", "forward+backward", "decode"]


def newest(folder: Path) -> Path:
    """The benchmark file saved last.

    Raises:
        FileNotFoundError: there is none.
    """
    files = sorted(folder.glob("**/*.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"no benchmark results in {folder}; make some with: python -m pytest benchmarks")
    return files[-1]


def write(files: Iterable[Path], out: Path) -> list[Path]:
    """Writes <out>/<device>.csv and .md for every device in the files, and <out>/index.md; returns the paths.

    Raises:
        ValueError: a file holds no benchmark results of this project.
    """
    rows = pd.concat([read(file) for file in files], ignore_index=True)
    rows = rows.drop_duplicates(IDENTITY, keep="last")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for device, part in rows.groupby("device"):
        part = part.sort_values(IDENTITY, kind="stable")
        csv = out / f"{device}.csv"
        part.to_csv(csv, index=False, lineterminator="\n")
        page = out / f"{device}.md"
        # what is read back is what is on the disk, so that the page can be made again from the CSV alone
        page.write_text(
            markdown(str(device), pd.read_csv(csv, keep_default_na=False, na_values=[""])), encoding="utf-8"
        )
        written += [csv, page]
    pages = sorted(out.glob("*.csv"))
    (out / "index.md").write_text(_index(pages), encoding="utf-8")
    return [*written, out / "index.md"]


def read(file: Path) -> pd.DataFrame:
    """The rows of one file that pytest-benchmark saved."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        benchmarks = data["benchmarks"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} holds no results of pytest-benchmark ({error!r})") from error
    found = [_row(each, data) for each in benchmarks if "device" in each.get("extra_info", {})]
    if not found:
        raise ValueError(f"{file} holds no results of this project's benchmarks")
    return pd.DataFrame(found, columns=COLUMNS)


def _row(benchmark: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    facts = dict(benchmark["extra_info"])
    facts["sizes"] = " ".join(f"{name}={size}" for name, size in facts.get("sizes", {}).items())
    facts["config"] = " ".join(f"{name}={value}" for name, value in facts.get("config", {}).items())
    return {
        **dict.fromkeys(COLUMNS, ""),
        **facts,
        **facts.get("versions", {}),
        "median_s": benchmark["stats"]["median"],
        "iqr_s": benchmark["stats"]["iqr"],
        "rounds": benchmark["stats"]["rounds"],
        "date": str(data.get("datetime", ""))[:10],
        "command": data.get("command", ""),
        "test": f"benchmarks/{benchmark['fullname'].removeprefix('benchmarks/')}",
    }


def markdown(device: str, rows: pd.DataFrame) -> str:
    """The page of one device."""
    parts = [f"# Speed on {device}", _preface(rows)]
    ops, layers = rows[rows["kind"] == "op"], rows[rows["kind"] == "mixer"]
    if len(ops):
        parts.append(
            "## Ops\n\nThe backend that `auto` chose is in bold. "
            "GB/s counts every input read once and every output written once."
        )
    for (name, variant, direction, dtype), part in _grouped(ops, ["name", "variant", "direction", "dtype"]):
        parts.append(f"### {name}{f' ({variant})' if variant else ''}, {direction}, {dtype}")
        for sizes, same in _grouped(part, ["sizes"]):
            parts.append(f"{sizes[0]}\n\n{_table(same, 'backend', _gigabytes)}")
    if len(layers):
        parts.append(
            "## Layers\n\nWhole layers with their projections, on the backends that `auto` chose; the fastest is bold. "
            "Decoding is one token after T others."
        )
    for (direction, dtype), part in _grouped(layers, ["direction", "dtype"]):
        for sizes, same in _grouped(part, ["sizes"]):
            parts.append(f"### {direction}, {dtype}, {sizes[0]}\n\n{_table(same, 'name', _tokens)}")
    return "\n\n".join(parts) + "\n"


def _preface(rows: pd.DataFrame) -> str:
    def all_of(column: str) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in rows[column] if str(value) not in ("", "nan"))) or "none"

    versions = f"sequence-mixers {all_of('version')}, torch {all_of('torch')}, triton {all_of('triton')}"
    return "\n".join(
        [
            "Generated by `mixers tables`. Each cell is the median of the rounds ± their interquartile range.",
            "",
            f"- device: {all_of('device')}, {all_of('threads')} threads",
            f"- versions: {versions}, Python {all_of('python')}",
            f"- date: {all_of('date')}",
            f"- made by: `{all_of('command')}`, then `mixers tables`",
        ]
    )


def _table(rows: pd.DataFrame, column: str, rate: Callable[[pd.Series], str]) -> str:
    """Lengths down, backends (simplest first) or layers across."""
    rows = rows.assign(cell=[_cell(row, rate(row), _bold(row, rows)) for _, row in rows.iterrows()])
    order = sorted(set(rows[column]), key=_place)
    wide = rows.pivot(index="length", columns=column, values="cell").reindex(columns=order).fillna("—")
    return wide.rename_axis(index="T", columns=None).to_markdown(disable_numparse=True, stralign="right")


def _place(name: str) -> tuple[int, str]:
    """Backends in the order of their op's list, everything else by name."""
    listed = [backend.name for op in OPS.values() for backend in op.backends]
    return (listed.index(name) if name in listed else len(listed), name)


def _bold(row: pd.Series, rows: pd.DataFrame) -> bool:
    """The chosen backend, or the fastest layer."""
    if row["kind"] == "op":
        return str(row["chosen"]) == "True"
    return row["median_s"] == rows[rows["length"] == row["length"]]["median_s"].min()


def _cell(row: pd.Series, rate: str, bold: bool) -> str:
    spread = seconds(row["iqr_s"], digits=2)
    text = f"{seconds(row['median_s'])} ± {spread}{f' ({rate})' if rate else ''}"
    return f"**{text}**" if bold else text


def _gigabytes(row: pd.Series) -> str:
    return f"{float(row['bytes']) / row['median_s'] / 1e9:.3g} GB/s" if pd.notna(row["bytes"]) else ""


def _tokens(row: pd.Series) -> str:
    rate = float(row["tokens"]) / row["median_s"]
    return f"{rate / 1e3:.3g} k tokens/s" if rate >= 1e3 else f"{rate:.0f} tokens/s"


def _grouped(rows: pd.DataFrame, columns: Sequence[str]) -> list[tuple[tuple[str, ...], pd.DataFrame]]:
    """Groups in the order of first appearance, directions in their own order; empty cells are a group too."""
    found = rows.fillna(dict.fromkeys(columns, "")).groupby(list(columns), sort=False)
    groups = [(key if isinstance(key, tuple) else (key,), part) for key, part in found]
    return sorted(groups, key=lambda group: [DIRECTIONS.index(k) if k in DIRECTIONS else k for k in group[0]])


def _index(files: Sequence[Path]) -> str:
    lines = [
        "# Speed",
        "",
        "One page a device, each made by running the benchmarks on it. No figure here was typed in.",
        "",
    ]
    found = []
    for file in files:
        rows = pd.read_csv(file, keep_default_na=False)
        found.append(
            {
                "device": f"[{file.stem}]({file.stem}.md)",
                "measurements": len(rows),
                "ops": ", ".join(sorted(set(rows[rows["kind"] == "op"]["name"]))),
                "layers": ", ".join(sorted(set(rows[rows["kind"] == "mixer"]["name"]))),
                "torch": ", ".join(sorted(set(map(str, rows["torch"])))),
                "date": max(map(str, rows["date"])),
            }
        )
    return "\n".join([*lines, pd.DataFrame(found).to_markdown(index=False, disable_numparse=True), ""])
