"""Speed tables: pytest-benchmark's JSON in, a CSV file, a Markdown page and pictures a device out, and an index.

A row is one benchmark of `benchmarks/`, which describes itself in `extra_info`. The CSV holds every row with its
device, versions, date and command; everything else is made from it, and `check` makes it again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from autotune.lookup import MARGIN
from kernels.catalogue import OPS
from mixers import plots
from mixers.units import seconds

# What one measurement is of; of several files the last one's row counts.
IDENTITY = ["device", "kind", "name", "variant", "sizes", "direction", "dtype", "length", "backend"]
COLUMNS = [*IDENTITY, "config", "chosen", "median_s", "iqr_s", "rounds", "bytes", "flops", "tokens"]
COLUMNS += ["limit_bytes_s", "limit_flops_s", "torch", "triton", "python", "version", "threads", "date"]
COLUMNS += ["command", "test"]
RATES = {"bytes": "GB/s", "flops": "GFLOP/s"}
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
    """Writes <out>/<device>.csv, .md and pictures for every device in the files, and <out>/README.md, the index of all
    pages in the folder; returns the paths.

    Raises:
        ValueError: a file holds no benchmark results of this project.
    """
    rows = pd.concat([read(file) for file in files], ignore_index=True)
    rows = rows.drop_duplicates(IDENTITY, keep="last")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for device, part in rows.groupby("device"):
        csv = out / f"{device}.csv"
        csv.write_text(_csv(part), encoding="utf-8")
        written.append(csv)
    for name, content in generated(out).items():
        (out / name).write_bytes(content)
        written.append(out / name)
    return written


def generated(out: Path) -> dict[str, bytes]:
    """Everything that is made from the CSV files in a folder, by file name."""
    found, csvs = {}, sorted(out.glob("*.csv"))
    for csv in csvs:
        # rows that were measured before a column was thought of have none of it
        rows = pd.read_csv(csv, keep_default_na=False, na_values=[""]).reindex(columns=COLUMNS)
        pictures = _pictures(csv.stem, rows)
        found.update(pictures)
        found[f"{csv.stem}.md"] = markdown(csv.stem, rows, sorted(pictures)).encode()
    found["README.md"] = _index(csvs).encode()
    return found


def check(out: Path) -> list[str]:
    """What differs between the pages in a folder and what their CSV files give now; PNG files are not compared.

    Raises:
        FileNotFoundError: there is no CSV file.
    """
    if not list(out.glob("*.csv")):
        raise FileNotFoundError(f"no speed tables in {out}; make some with: mixers tables")
    wrong = []
    for name, content in generated(out).items():
        path = out / name
        if not path.exists():
            wrong.append(f"{name} is missing")
        elif path.suffix != ".png" and path.read_bytes() != content:
            wrong.append(f"{name} is not what {'the CSV files give' if name == 'README.md' else 'its CSV file gives'}")
    return wrong


@dataclass(frozen=True)
class Change:
    """One measurement in two runs: medians in seconds. verdict: "slower", "faster" or "same"."""

    what: str
    old: float
    new: float
    verdict: str

    @property
    def ratio(self) -> float:
        return self.new / self.old


def compare(old: Path, new: Path) -> list[Change]:
    """What two files have in common, the largest slow-down first.

    Raises:
        ValueError: they hold no results, or none of the same measurement on the same device.
    """
    before, after = (read(file).fillna("").drop_duplicates(IDENTITY, keep="last") for file in (old, new))
    both = before.merge(after, on=IDENTITY, suffixes=("_old", "_new"))
    if both.empty:
        raise ValueError(f"{old} and {new} have no measurement in common")
    changes = []
    for _, row in both.iterrows():
        gap = row["median_s_new"] - row["median_s_old"]
        noise = max(row["iqr_s_old"], row["iqr_s_new"], MARGIN * row["median_s_old"])
        verdict = "same" if abs(gap) <= noise else "slower" if gap > 0 else "faster"
        what = " ".join(str(row[name]) for name in IDENTITY[2:] if str(row[name]))
        changes.append(Change(what, row["median_s_old"], row["median_s_new"], verdict))
    return sorted(changes, key=lambda change: -change.ratio)


def _csv(rows: pd.DataFrame) -> str:
    return rows.sort_values(IDENTITY, kind="stable").to_csv(index=False, lineterminator="\n")


def _pictures(device: str, rows: pd.DataFrame) -> dict[str, bytes]:
    """Layers over lengths, one picture a direction and dtype that has more than one length; ops under the roofline."""
    found = {}
    ops = _chosen(rows).dropna(subset=["limit_flops_s", "flops"])
    for (dtype,), part in _grouped(ops, ["dtype"]):
        made = plots.roofline(part, f"ops by the backends that auto chose, {dtype}")
        found.update({f"{device}-roofline-{dtype}.{suffix}": content for suffix, content in made.items()})
    layers = rows[rows["kind"] == "mixer"]
    for (direction, dtype), part in _grouped(layers, ["direction", "dtype"]):
        if part["length"].nunique() > 1:
            stem = f"{device}-{direction.replace('+', '-')}-{dtype}"
            made = plots.layers(part, f"{direction}, {dtype}, {part['sizes'].iloc[0]}")
            found.update({f"{stem}.{suffix}": content for suffix, content in made.items()})
    return found


def _chosen(rows: pd.DataFrame) -> pd.DataFrame:
    """Those of the ops on the backends that `auto` chose."""
    return rows[(rows["kind"] == "op") & (rows["chosen"].astype(str) == "True")]


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
    # as many keys as queries: self-attention, whose length says it all
    sizes = {name: size for name, size in facts.get("sizes", {}).items() if (name, size) != ("S", facts["length"])}
    facts["sizes"] = " ".join(f"{name}={size}" for name, size in sizes.items())
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


def markdown(device: str, rows: pd.DataFrame, pictures: Sequence[str] = ()) -> str:
    """The page of one device."""
    parts = [f"# Speed on {device}", _preface(rows)]
    ops, layers = rows[rows["kind"] == "op"], rows[rows["kind"] == "mixer"]
    if len(ops):
        parts.append(
            "## Ops\n\nThe backend that `auto` chose is in bold. "
            "GB/s counts every input read once and every output written once, GFLOP/s the operations of the equation."
        )
    for (name, variant, direction, dtype), part in _grouped(ops, ["name", "variant", "direction", "dtype"]):
        parts.append(f"### {name}{f' ({variant})' if variant else ''}, {direction}, {dtype}")
        for sizes, same in _grouped(part, ["sizes"]):
            parts.append(f"{sizes[0]}\n\n{_table(same, 'backend', _rate)}")
    if len(layers):
        parts.append(
            "## Layers\n\nWhole layers with their projections, on the backends that `auto` chose; the fastest is bold. "
            "Decoding is one token after T others."
        )
    for (direction, dtype), part in _grouped(layers, ["direction", "dtype"]):
        for sizes, same in _grouped(part, ["sizes"]):
            parts.append(f"### {direction}, {dtype}, {sizes[0]}\n\n{_table(same, 'name', _tokens)}")
    drawn = [name for name in pictures if name.endswith(".svg")]
    parts += [f"![{'roofline' if 'roofline' in name else 'time against length'}]({name})" for name in drawn]
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
            f"- limits measured beside them: {_limits(rows)}; % is the share of the nearer one that the least possible "
            "bytes and operations take, above 100 % where tensors stay in a cache",
            f"- made by: `{all_of('command')}`, then `mixers tables`; one row again: `python -m pytest` with what the "
            "CSV file has in its column `test`",
        ]
    )


def _limits(rows: pd.DataFrame) -> str:
    """Medians, for a sweep in several parts measures them several times."""
    if not rows["limit_bytes_s"].notna().any():
        return "none"
    bandwidth = f"{rows['limit_bytes_s'].median() / 1e9:.3g} GB/s (an addition)"
    reached = rows.groupby("dtype")["limit_flops_s"].median()
    products = [f"{limit / 1e9:.3g} GFLOP/s ({dtype})" for dtype, limit in reached.items()]
    return f"{bandwidth}, matrix products {', '.join(products)}"


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


def _rate(row: pd.Series) -> str:
    """GB/s or GFLOP/s, whichever is nearer to what the device can do, and the share of that."""
    spent, what, unit = max((least_seconds(row, what), what, unit) for what, unit in RATES.items())
    if not spent:
        return ""
    return f"{float(row[what]) / row['median_s'] / 1e9:.3g} {unit}, {spent / row['median_s']:.0%}"


def _tokens(row: pd.Series) -> str:
    rate = float(row["tokens"]) / row["median_s"]
    tokens = f"{rate / 1e3:.3g} k tokens/s" if rate >= 1e3 else f"{rate:.0f} tokens/s"
    share = max(least_seconds(row, what) for what in RATES) / row["median_s"]
    return f"{tokens}, {share:.0%}" if share > 0 else tokens


def least_seconds(row: pd.Series, what: str) -> float:
    """How long the device takes at its measured limit for the row's "bytes" or "flops"; 0 where one is not known."""
    amount, limit = row[what], row[f"limit_{what}_s"]
    return float(amount) / float(limit) if pd.notna(amount) and pd.notna(limit) and limit != "" else 0.0


def _grouped(rows: pd.DataFrame, columns: Sequence[str]) -> list[tuple[tuple[str, ...], pd.DataFrame]]:
    """Groups in the order of first appearance, directions in their own order; empty cells are a group too."""
    found = rows.fillna(dict.fromkeys(columns, "")).groupby(list(columns), sort=False)
    groups = [(key if isinstance(key, tuple) else (key,), part) for key, part in found]
    return sorted(groups, key=lambda group: [DIRECTIONS.index(k) if k in DIRECTIONS else k for k in group[0]])


def _index(files: Sequence[Path]) -> str:
    parts = ["# Speed", "One page a device, each made by running the benchmarks on it. No figure here was typed in."]
    found, answers = [], []
    for file in files:
        rows = pd.read_csv(file, keep_default_na=False)
        answers += _answers(file.stem, rows)
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
    parts.append(pd.DataFrame(found).to_markdown(index=False, disable_numparse=True))
    return "\n\n".join([*parts, *answers]) + "\n"


def _answers(device: str, rows: pd.DataFrame) -> list[str]:
    """Which layer is the fastest at which length, and how many times as fast as attention; and which backend runs."""
    parts = []
    for (dtype,), part in _grouped(rows[rows["kind"] == "mixer"], ["dtype"]):
        table: dict[str, dict[int, str]] = {}
        for (direction,), same in _grouped(part, ["direction"]):
            yardstick = same[same["name"] == plots.YARDSTICK].set_index("length")["median_s"]
            for length, at in same.groupby("length"):
                best = at.loc[at["median_s"].idxmin()]
                known = length in yardstick and best["name"] != plots.YARDSTICK
                faster = f", {yardstick[length] / best['median_s']:.1f} × as fast as attention" if known else ""
                table.setdefault(direction, {})[int(length)] = f"{best['name']}{faster}"
        made = pd.DataFrame(table).sort_index().fillna("—").rename_axis(index="T")
        parts.append(f"## The fastest layer on {device}, {dtype}, {part['sizes'].iloc[0]}")
        parts.append(made.to_markdown(disable_numparse=True))
    for (dtype,), part in _grouped(_chosen(rows), ["dtype"]):
        part = part.assign(op=part["name"] + part["variant"].map(lambda variant: f" ({variant})" if variant else ""))
        wide = part.pivot_table(index=["op", "direction"], columns="length", values="backend", aggfunc="first")
        parts.append(f"## The backend that auto chooses on {device}, {dtype}, by length T")
        parts.append(wide.fillna("—").reset_index().rename_axis(columns=None).to_markdown(index=False))
    return parts
