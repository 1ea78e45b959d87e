"""Speed tables: pytest-benchmark's JSON in, a CSV file, a Markdown page and pictures a device out, and an index.

A row is one benchmark of `benchmarks/`, which describes itself in `extra_info`. The CSV holds every row with its
device, versions, date and command, from as many runs as it took: a row of a later run takes the place of the same
measurement's. Everything else is made from the CSV, and `check` makes it again.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from autotune.lookup import MARGIN
from kernels.catalogue import OPS
from mixers import measured, predicted, registry

# What one measurement is of; of several runs the last one's row counts.
IDENTITY = ["device", "kind", "name", "variant", "sizes", "direction", "dtype", "length", "backend"]
COLUMNS = [*IDENTITY, "config", "chosen", "median_s", "iqr_s", "rounds", "bytes", "flops", "tokens"]
COLUMNS += ["limit_bytes_s", "limit_flops_s", "torch", "triton", "python", "version", "threads", "date"]
COLUMNS += ["source", "command", "test"]
INTRODUCTION = (
    "One page a device, each made by running the benchmarks on it. No figure here was typed in; "
    "[how we measure](how-we-measure.md)."
)
WIDTHS = (
    "Which layer, and which backend, for a length T: below, for the widths that stand there. "
    "`python -m pytest benchmarks/test_mixers.py --dim 1024`, then `mixers tables`, adds another."
)


def saved(folder: Path) -> pd.DataFrame:
    """Of all benchmark files in a folder, the oldest first, but for files that hold none."""
    found = [pd.DataFrame(columns=COLUMNS)]
    for file in sorted(folder.glob("**/*.json"), key=lambda path: path.stat().st_mtime):
        with contextlib.suppress(ValueError):
            found.append(read(file))
    return pd.concat(found, ignore_index=True)


@cache
def sources(kind: str, name: str, device: str) -> str:
    """A hash of what an op or a mixer is made of, in its own file and in its ops: with others, a row is stale.

    device: as for `Op.source`. Empty for what is not there.
    """
    if kind == "op":
        return OPS[name].source(device) if name in OPS else ""
    if name not in registry.names():
        return ""
    made = registry.get(name)
    text = Path(inspect.getfile(made)).read_text(encoding="utf-8")
    return hashlib.sha256("\0".join([text, *(OPS[op].source(device) for op in made.ops)]).encode()).hexdigest()[:16]


def current(rows: pd.DataFrame) -> pd.DataFrame:
    """Those that were made with the sources that are here."""
    fresh = [row["source"] == sources(row["kind"], row["name"], row["device"]) != "" for _, row in rows.iterrows()]
    return rows[pd.Series(fresh, index=rows.index, dtype=bool)]


def measured_tests(folder: Path, about: Mapping[str, Any]) -> set[str]:
    """The tests whose rows are saved, made with the sources, the torch, the device and the threads that are here."""
    rows = current(saved(folder))
    here = (rows["device"] == about["device"]) & (rows["threads"] == about["threads"])
    return set(rows[here & (rows["torch"] == about["versions"]["torch"])]["test"])


def write(rows: pd.DataFrame, out: Path, *, replace: bool = False) -> list[Path]:
    """Writes <out>/<device>.csv, .md and pictures for every device of the rows, and <out>/README.md, the index of all
    pages in the folder; returns the paths. replace: without the rows that the CSV file has from other runs."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for device, part in rows.groupby("device"):
        csv = out / f"{device}.csv"
        if csv.exists() and not replace:
            # as text, which is written as it was read
            stands = pd.read_csv(csv, dtype=str, keep_default_na=False).reindex(columns=COLUMNS, fill_value="")
            part = pd.concat([stands.astype({"length": int}), part], ignore_index=True)
        csv.write_text(_csv(part.drop_duplicates(IDENTITY, keep="last")), encoding="utf-8")
        written.append(csv)
    made = generated(out)
    for csv in list(written):
        for picture in (*out.glob(f"{csv.stem}-*.svg"), *out.glob(f"{csv.stem}-*.png")):
            if picture.name not in made:
                picture.unlink()
    for name, content in made.items():
        (out / name).write_bytes(content)
        written.append(out / name)
    return written


def generated(out: Path) -> dict[str, bytes]:
    """Everything that is made from the CSV files in a folder, by file name."""
    found: dict[str, bytes] = {}
    devices = {}
    for csv in sorted(out.glob("*.csv")):
        # rows that were measured before a column was thought of have none of it
        rows = pd.read_csv(csv, keep_default_na=False, na_values=[""]).reindex(columns=COLUMNS)
        devices[csv.stem] = rows
        pictures = measured.pictures(csv.stem, rows)
        found.update(pictures)
        found[f"{csv.stem}.md"] = measured.markdown(csv.stem, rows, sorted(pictures)).encode()
    found.update(predicted.pages(out))
    found["README.md"] = f"{_index(devices)}{predicted.links(found)}".encode()
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


def read(file: Path) -> pd.DataFrame:
    """The rows of one file that pytest-benchmark saved.

    Raises:
        ValueError: it holds no benchmark results of this project.
    """
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
        "test": test_name(benchmark["fullname"]),
    }


def test_name(node: str) -> str:
    """A test as it is named from the root of the repository, whichever folder pytest was told of."""
    return f"benchmarks/{node.removeprefix('benchmarks/')}"


def _index(devices: Mapping[str, pd.DataFrame]) -> str:
    parts = ["# Speed", INTRODUCTION]
    found, answers = [], []
    for device, rows in devices.items():
        answers += measured.answers(device, rows)
        found.append(
            {
                "device": f"[{device}]({device}.md)",
                "measurements": len(rows),
                "ops": ", ".join(sorted(set(rows[rows["kind"] == "op"]["name"]))),
                "layers": ", ".join(sorted(set(rows[rows["kind"] == "mixer"]["name"]))),
                "torch": ", ".join(sorted(set(map(str, rows["torch"])))),
                "date": max(map(str, rows["date"])),
            }
        )
    parts.append(pd.DataFrame(found).to_markdown(index=False, disable_numparse=True))
    return "\n\n".join([*parts, WIDTHS, *answers]) + "\n"
