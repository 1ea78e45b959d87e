"""Why a problem runs on the backend it runs on: every candidate with its verdict, and where the decision came from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

import autotune
from autotune.lookup import MARGIN
from autotune.record import candidate as name_of
from kernels.op import Config, Op, Plan
from kernels.problem import Problem

# "as fast": within the margin by which a candidate must win to take a simpler one's place.
STATUSES = ("chosen", "slower", "as fast", "wrong", "error", "cannot", "not measured")


@dataclass(frozen=True)
class Verdict:
    """One candidate, or (config None) a backend that cannot run the problem.

    status: one of STATUSES. reason: why it cannot, what is wrong, or a remark. ratio: its time over the chosen one's.
    """

    backend: str
    config: Config | None
    status: str
    reason: str = ""
    record: autotune.Record | None = None
    ratio: float | None = None


@dataclass(frozen=True)
class Explanation:
    """A problem, the plan for it, and every candidate's verdict, simplest first.

    origin: what decided, in words. measured: the key whose measurements are shown; another length's where this one
    has none.
    """

    problem: Problem
    plan: Plan
    origin: str
    measured: autotune.Key
    verdicts: tuple[Verdict, ...]

    def __str__(self) -> str:
        lines = [f"{self.problem}: {self.origin}"]
        for verdict in self.verdicts:
            name = " ".join([verdict.backend, *(f"{k}={v}" for k, v in (verdict.config or {}).items())])
            facts = [verdict.status]
            if verdict.ratio is not None and verdict.status == "slower":
                facts = [f"slower by {verdict.ratio:.2f} x"]
            if verdict.record is not None and verdict.record.status == "ok":
                facts.append(f"{verdict.record.times[0] * 1e6:.4g} µs")
            lines.append(f"  {name}: {', '.join([*facts, *filter(None, [verdict.reason])])}")
        return "\n".join(lines)


def explain(op: Op, problem: Problem, plan: Plan | None = None) -> Explanation:
    """plan: the one that was met, by default what `backend="auto"` gives. A look-up: nothing is run or written.

    Raises:
        RuntimeError: no backend can run the problem.
    """
    plan = plan or op.choose(problem)
    key, candidates = op.key(problem), op.candidates(problem)
    offered = [(backend.name, config) for backend, config in candidates]
    source = op.source(problem.device.type)
    choice = autotune.choose(key, offered, source, op.compiled_source)
    measured = choice.record.key if choice else key
    known = _newest(autotune.listing(measured, source))
    refused = {record.candidate: record for record in autotune.refused(key, source)}
    chosen = name_of(plan.backend.name, plan.config)
    prediction = choice.record if choice is not None and plan.origin == "predicted" else None
    verdicts = []
    for backend in op.backends:
        reasons = backend.cannot(problem)
        if reasons:
            verdicts.append(Verdict(backend.name, None, "cannot", "; ".join(reasons)))
            continue
        for config in backend.configs(problem):
            name = name_of(backend.name, config)
            record = refused.get(name) or known.get(name, (None, False))[0]
            stale = name not in refused and known.get(name, (None, False))[1]
            if prediction is not None and prediction.candidate == name == chosen:
                record, stale = prediction, False
            verdicts.append(_verdict(name, config, record, stale, chosen, known.get(chosen, (None, False))[0]))
    return Explanation(problem, plan, _origin(op, problem, plan, choice), measured, tuple(verdicts))


def _verdict(
    name: tuple[str, object],
    config: Config,
    record: autotune.Record | None,
    stale: bool,
    chosen: tuple[str, object],
    best: autotune.Record | None,
) -> Verdict:
    backend = name[0]
    if record is None or stale:
        remark = "measured with other sources" if record else ""
        return Verdict(backend, config, "chosen" if name == chosen else "not measured", remark)
    if record.failed:
        # a plan by name runs what was named, whatever is on record
        status = "chosen" if name == chosen else record.status
        return Verdict(backend, config, status, record.message, record)
    if record.status == "predicted":
        return Verdict(backend, config, "chosen", "predicted, not measured", record)
    if name == chosen:
        return Verdict(backend, config, "chosen", record.message, record, 1.0)
    if best is None or best.status != "ok" or record.status != "ok":
        return Verdict(backend, config, "not measured", record.message, record)
    ratio = record.times[0] / best.times[0]
    return Verdict(backend, config, "slower" if ratio > 1 + MARGIN else "as fast", record.message, record, ratio)


def _origin(op: Op, problem: Problem, plan: Plan, choice: autotune.Choice | None) -> str:
    if plan.origin == "named" or plan.backend is not op.choose(problem).backend:
        return f"by name: backend={plan.backend.name!r} was asked for"
    if plan.origin.startswith("locked"):
        return plan.origin
    if plan.origin == "rule":
        if autotune.lock() is not None:
            return "by rule, because the lock in use is silent about it: the last listed backend that can run it"
        if torch.are_deterministic_algorithms_enabled():
            return "by rule, because torch.use_deterministic_algorithms is on: the last listed backend that can run it"
        origin = "by rule, for nothing was measured: the last listed backend that can run it"
        closest = autotune.closest(op.key(problem))
        if closest is None:
            return origin
        differences = op.key(problem).difference(closest)
        if all(stale for _, _, stale in autotune.listing(closest, op.source(problem.device.type))):
            differences.append("the sources of the op have changed since")
        return f"{origin}; the closest measured problem differs: {', '.join(differences)}"
    if choice is None:
        return plan.origin
    record = choice.record
    length = (
        "this length" if record.key == op.key(problem) else f"T ≤ {record.key.length}, the nearest length on record"
    )
    if record.status == "predicted":
        facts = f"{record.message} (compiled on {record.date[:10]} with triton {record.triton})"
        return f"predicted, not measured, for {length}: {facts}"
    rows = autotune.listing(record.key, op.source(problem.device.type))
    table = next((f"the {where} table" for row, where, _ in rows if row is record), "a table")
    return f"measured at {length} on {record.date[:10]} with torch {record.torch} ({table})"


def _newest(
    rows: Iterable[tuple[autotune.Record, str, bool]],
) -> dict[tuple[str, object], tuple[autotune.Record, bool]]:
    """The record that counts of each candidate and whether it is stale; a fresh one before a stale one."""
    found: dict[tuple[str, object], tuple[autotune.Record, bool]] = {}
    for record, _, stale in rows:
        name = record.candidate
        if name not in found or (found[name][1] and not stale):
            found[name] = (record, stale)
    return found
