"""One measurement: what was tried, what came of it, and what made it. One JSON line each."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from autotune.device import driver
from autotune.key import Key

SCHEMA = 1
STATUSES = ("ok", "wrong", "error", "predicted")
# A compiler's error can be megabytes long; its beginning tells enough.
MESSAGE_LENGTH = 2000

Config = Mapping[str, Any]
Candidate = tuple[str, tuple[tuple[str, Any], ...]]


class NewerSchema(ValueError):
    """The line comes from a later version of this package, and this one cannot use it."""


def candidate(backend: str, config: Config) -> Candidate:
    """A backend and its config as something that can be compared and hashed."""
    return backend, tuple(sorted(config.items()))


@dataclass(frozen=True)
class Record:
    """One measurement of one candidate (backend and config).

    status: "ok" (timed), "wrong" (its results differ from the reference, or it hangs or crashes), "error" (it raised,
    or gave no result in the time that a search had) or "predicted" (never run on this device: `predicted` has the
    figures by which a stated rule put it first, and `source` is of what was compiled); a table may hold others from
    later versions, which are kept and never chosen. median_s, spread_s: median and interquartile range over the rounds,
    in seconds, for "ok"; message: the reason, for the others. source: hash of the op's sources. date: ISO 8601, UTC.
    limit_s: how many seconds a search had left for checks when a candidate gave no result in its share of them; one
    that has twice as many tries it again.

    Raises:
        ValueError: "ok" without finite times.
    """

    key: Key
    backend: str
    config: Config
    status: str
    median_s: float | None = None
    spread_s: float | None = None
    rounds: int = 0
    message: str = ""
    source: str = ""
    torch: str = ""
    triton: str = ""
    driver: str = ""
    threads: int = 0
    date: str = ""
    schema: int = SCHEMA
    limit_s: float | None = None
    predicted: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", dict(self.config))
        if self.status == "ok" and not (_positive(self.median_s) and _positive(self.spread_s, zero=True)):
            raise ValueError(f"status is 'ok' but median_s is {self.median_s} and spread_s is {self.spread_s}")

    @property
    def candidate(self) -> Candidate:
        return candidate(self.backend, self.config)

    @property
    def failed(self) -> bool:
        return self.status in ("wrong", "error")

    @property
    def times(self) -> tuple[float, float]:
        """Median and spread in seconds.

        Raises:
            ValueError: nothing was timed.
        """
        if self.median_s is None or self.spread_s is None:
            raise ValueError(f"{self.backend} has status {self.status!r} and no times")
        return self.median_s, self.spread_s

    @classmethod
    def made_here(cls, key: Key, backend: str, config: Config, status: str, device_type: str, **facts: Any) -> Record:
        """A record with this process's versions and the time of now; `facts` are further fields."""
        facts["message"] = facts.get("message", "")[:MESSAGE_LENGTH]
        return cls(
            key=key,
            backend=backend,
            config=config,
            status=status,
            torch=str(torch.__version__),
            triton=_version("triton"),
            driver=driver(device_type),
            threads=torch.get_num_threads(),
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            **facts,
        )

    def to_line(self) -> str:
        """The record as one line of JSON, without the newline.

        Raises:
            ValueError, TypeError: the config or an option holds something that JSON cannot.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        data = {name: value for name, value in values.items() if value is not None}
        if self.status == "predicted":
            # shipped by the hundred, and nothing was measured
            data = {name: value for name, value in data.items() if value or name == "config"}
        return json.dumps({"schema": self.schema, **data, "key": self.key.to_json()}, allow_nan=False)

    @classmethod
    def from_line(cls, line: str | bytes) -> Record:
        """The record of one line; fields that this version does not know are ignored, absent details are empty.

        Raises:
            NewerSchema: a later version wrote the line and it lacks what this one needs.
            ValueError: anything else that is no record.
        """
        try:
            data = json.loads(line if isinstance(line, str) else line.decode())
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        if not isinstance(data, dict):
            raise ValueError(f"a JSON {type(data).__name__}, expected an object")
        schema = data.get("schema")
        try:
            return cls._from_json(data)
        except (ValueError, OverflowError) as error:
            if type(schema) is int and schema > SCHEMA:
                raise NewerSchema(f"schema {schema}: {error}") from error
            raise ValueError(str(error)) from error

    @classmethod
    def _from_json(cls, data: dict[str, Any]) -> Record:
        key = Key.from_json(data.get("key"))
        backend, config, status = data.get("backend"), data.get("config"), data.get("status")
        if not isinstance(backend, str) or not isinstance(status, str) or not isinstance(config, dict):
            raise ValueError("lacks backend, config or status")
        if any(isinstance(value, (list, dict)) for value in config.values()):
            raise ValueError(f"config is {config}, expected plain values")
        details: dict[str, Any] = {}
        for name, types in _DETAILS.items():
            value = data.get(name)
            if value is not None:
                if isinstance(value, bool) or not isinstance(value, types):
                    raise ValueError(f"{name} is {value!r}")
                details[name] = value
        predicted = data.get("predicted")
        if predicted is not None:
            if not isinstance(predicted, dict) or not all(isinstance(value, _NUMBER) for value in predicted.values()):
                raise ValueError(f"predicted is {predicted!r}")
            details["predicted"] = predicted
        return cls(key, backend, config, status, **details)


_NUMBER, _TEXT, _COUNT = (int, float), (str,), (int,)
_DETAILS: dict[str, tuple[type, ...]] = {
    "median_s": _NUMBER,
    "spread_s": _NUMBER,
    "rounds": _COUNT,
    "message": _TEXT,
    "source": _TEXT,
    "torch": _TEXT,
    "triton": _TEXT,
    "driver": _TEXT,
    "threads": _COUNT,
    "date": _TEXT,
    "schema": _COUNT,
    "limit_s": _NUMBER,
}


def _positive(value: float | None, zero: bool = False) -> bool:
    return value is not None and math.isfinite(value) and (value > 0 or (zero and value == 0))


def _version(distribution: str) -> str:
    """The installed version, or "" where it is not installed; importing it would cost seconds."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
