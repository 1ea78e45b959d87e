"""How far the kernels are from a GPU's limits, config by config: `python benchmarks/gpu.py`. Nothing is tuned or saved.

For each op, dtype and direction: the time of every config of a backend by the GPU's own clock, with an empty cache; the
bytes that any implementation must move, by that time, as a share of what a copy of a large tensor reaches in the same
run. `>` marks what runs where nothing was measured: a config that was predicted, else the default. A config whose
results differ from the default's says so; this is no proof of either (`mixers doctor` compares with the loop).

Then flash-linear-attention's kernels beside them, where they are installed: a peer's backward pass is that of a graph
that is kept. Then attention beside recurrent ops, for as many tokens at every length. Every row is printed, and with
--out saved, as soon as it is known. Elsewhere than on a GPU rows are timed by the process's clock, and only show that
all of it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from gpu_attention import beside_attention
from gpu_report import Report, Run, copied
from gpu_subjects import SUBJECTS, Subject, posed
from libraries import peers_of
from peers import Subject as Timed
from sizes import accelerated
from torch import Tensor

import autotune
from kernels.catalogue import OPS

COPIED_MIB = 1024
LENGTHS, TOKENS = (2048, 8192, 32768), 65536
# Of an output's largest number; two right configs round in another order
CLOSE = 0.05
PARTS = ("kernels", "peers", "attention")
DIRECTIONS = ("forward", "backward")
# What compiling may take of the minutes
COMPILING = 0.5


def configs(
    report: Report, subject: Subject, given: argparse.Namespace, dtype: torch.dtype, direction: str, copy: float
) -> dict[str, float]:
    """Seconds of every config, and of the one that runs by rule as "rule"."""
    inputs = posed(subject, given, dtype, direction)
    op, problem = inputs.op, inputs.problem
    backend, least = op.backend(given.backend), op.cost(problem).bytes
    what = f"{subject.name} {direction} {problem.dtype_name}"
    if reasons := backend.cannot(problem):
        report.add(f"{what}: {'; '.join(reasons)}", kind="cannot", what=what)
        return {}
    plan, found = op.choose(problem), dict[str, float]()
    default: list[Tensor | None] | None = None
    for config in backend.configs(problem):
        if report.over:
            break
        name = " ".join(f"{key}={value}" for key, value in config.items()) or "default"
        ruled = (plan.backend.name, plan.config) == (backend.name, config)
        facts = {"kind": "config", "what": what, "config": dict(config), "rule": plan.origin if ruled else ""}
        try:
            with torch.no_grad():
                run = inputs.call(backend, config)
                results = list(run())
                default = results if default is None else default
                differs = "" if agree(default, results) else "  DIFFERS from the default"
                del results
                seconds = report.seconds(run)
        except Exception as error:
            failure = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            report.add(f"  {name:48} fails: {failure}", **facts, error=failure)
            continue
        found[name] = seconds
        found |= {"rule": seconds} if ruled else {}
        rate = least / seconds
        mark = f" > {plan.origin}" if ruled else ""
        report.add(
            f"  {what:44} {name:48} {1e6 * seconds:10.1f} µs {rate / 1e9:6,.0f} GB/s {rate / copy:5.0%}{mark}{differs}",
            **facts, seconds=seconds, bytes_s=rate, share=rate / copy, differs=bool(differs),
        )  # fmt: skip
    return found


def agree(expected: Sequence[Tensor | None], found: Sequence[Tensor | None]) -> bool:
    pairs = [(e.float(), f.float()) for e, f in zip(expected, found) if e is not None and f is not None and e.numel()]
    return all(bool((e - f).abs().max() <= CLOSE * e.abs().max()) for e, f in pairs)


def theirs(
    report: Report, subject: Subject, given: argparse.Namespace, dtype: torch.dtype, direction: str
) -> float | None:
    """Seconds of the fastest peer's pass."""
    inputs = posed(subject, given, dtype, "forward")
    tensors = {arg.name: t for arg, t in zip(inputs.op.inputs, inputs.tensors) if t is not None}
    known = {peer.name: peer.prepare for peer in peers_of(subject.case, given.device) if not peer.compiles}
    fastest = None
    for name, prepare in known.items():
        what = f"{subject.name} {direction} {inputs.problem.dtype_name}"
        try:
            function, given_to, _ = prepare(tensors)
            timed = Timed(function, given_to)
            run = timed.run(direction) if direction == "forward" else backward(timed)
            seconds = report.seconds(run)
        except Exception as error:
            failure = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            report.add(f"  {what:44} {name:48} fails: {failure}", kind="peer", what=what, peer=name, error=failure)
            continue
        report.add(
            f"  {what:44} {name:48} {1e6 * seconds:10.1f} µs", kind="peer", what=what, peer=name, seconds=seconds
        )
        fastest = min(seconds, fastest or math.inf)
    return fastest


def backward(timed: Timed) -> Run:
    """The gradients alone, of a graph that is kept."""
    leaves = [t.detach().requires_grad_() for t in timed.inputs]
    y = timed.function(*leaves)
    gradient = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, leaves, gradient, retain_graph=True, allow_unused=True)


def mine(report: Report, given: argparse.Namespace) -> Iterator[tuple[Subject, torch.dtype, str]]:
    """What this process has to do, in the order of its importance, while there is time."""
    for dtype in given.dtypes:
        for subject in SUBJECTS:
            for direction in DIRECTIONS:
                if report.mine() and not report.over and (not given.op or subject.op in given.op):
                    yield subject, dtype, direction


@contextlib.contextmanager
def reported(report: Report, given: argparse.Namespace, what: str) -> Iterator[None]:
    """A failure is a row, and all memory is given back."""
    try:
        yield
    except Exception as error:
        line = f"{what}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        report.add(line, kind="error", what=what)
    finally:
        if accelerated(given.device):
            torch.accelerator.memory.empty_cache()


def everything(report: Report, given: argparse.Namespace, copy: float) -> None:
    """The kernels and their peers, and a line each."""
    ours, peers = dict[str, dict[str, float]](), dict[str, float]()
    for part in [part for part in PARTS[:2] if part in given.parts]:
        for subject, dtype, direction in mine(report, given):
            what = f"{subject.name} {direction} {str(dtype).removeprefix('torch.')}"
            with reported(report, given, what):
                if part == "kernels":
                    ours[what] = configs(report, subject, given, dtype, direction, copy)
                elif subject.case and (seconds := theirs(report, subject, given, dtype, direction)) is not None:
                    peers[what] = seconds
    if report.compiles is not None:
        return
    shares: dict[str, float] = {}
    for row in report.rows:
        if "share" in row:
            shares[row["what"]] = max(shares.get(row["what"], 0.0), row["share"])
    print(f"\n{'':40} {'best config':48} {'µs':>10} {'of a copy':>10} {'ours / fla':>11} {'rule / best':>12}")
    for what, found in ours.items():
        ruled = found.pop("rule", None)
        if found:
            best = min(found, key=found.__getitem__)
            ratio = f"{found[best] / peers[what]:.2f}" if what in peers else ""
            rule = "" if ruled is None else f"{ruled / found[best]:.2f}"
            print(f"{what:40} {best:48} {1e6 * found[best]:10.1f} {shares[what]:10.0%} {ratio:>11} {rule:>12}")


def compile_apart(count: int, seconds: float) -> None:
    """This very command in so many processes, each of which calls its part once: what they compile stays on disk. What
    fla's autotuner finds while others use the GPU does not. What is not ready in time is compiled when it is timed."""
    start, environment = time.monotonic(), {"FLA_CACHE_RESULTS": "0", **os.environ}
    command = [sys.executable, *sys.argv, "--processes", "1", "--minutes", "60", "--compiles"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    parts = [subprocess.Popen([*command, str(number), str(count)], env=environment, **quiet) for number in range(count)]
    late = 0
    try:
        for part in parts:
            try:
                part.wait(max(0.0, start + seconds - time.monotonic()))
            except subprocess.TimeoutExpired:
                late += 1
    finally:
        for part in parts:
            if part.poll() is None:
                os.killpg(part.pid, signal.SIGKILL)
    failed = sum(part.wait() > 0 for part in parts)
    more = f"; {late} processes were not done" if late else ""
    more += f"; {failed} processes failed" if failed else ""
    print(f"compiled in {time.monotonic() - start:.0f} s{more}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="rows that have not begun by then are left out")
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--backend", default="triton", help="whose configs are timed")
    parser.add_argument("--op", action="append", choices=list(OPS), help="repeat it; by default all but attention")
    parser.add_argument("--dtype", action="append", help="repeat it; by default bfloat16, then float32")
    parser.add_argument("--part", action="append", choices=PARTS, help="repeat it; by default all")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="beside attention, of all sequences")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="beside attention")
    parser.add_argument("--copied", type=int, default=COPIED_MIB, help="MiB")
    parser.add_argument("--processes", type=int, default=1, help="that compile side by side before anything is timed")
    parser.add_argument("--compiles", type=int, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.device.type == "cuda" and not torch.cuda.is_available():
        print("there is no GPU here; --device cpu --backend native --length 64 tries the script")
        return 2
    given.dtypes = [getattr(torch, name) for name in given.dtype or ("bfloat16", "float32")]
    given.parts = given.part or PARTS
    deadline = time.monotonic() + 60 * given.minutes
    if given.processes > 1:
        compile_apart(given.processes, 60 * given.minutes * COMPILING)
    report = Report(given.device, given.out, deadline, given.compiles)
    copy = 1.0
    if given.compiles is None:
        print(f"{autotune.fingerprint(given.device)}, torch {torch.__version__}")
        copy = copied(report, given.copied)
    everything(report, given, copy)
    if "attention" in given.parts:
        beside_attention(report, given)
    if report.over:
        print("the time is over; --minutes gives more")
    return 0


if __name__ == "__main__":
    sys.exit(main())
