"""How far the kernels are from a GPU's limits, config by config: `python benchmarks/gpu.py`. Nothing is tuned or saved.

For each op, dtype and direction: the time of every config of a backend by the GPU's own clock, with an empty cache; the
bytes that any implementation must move, by that time, as a share of what a copy of a large tensor reaches in the same
run; and flash-linear-attention's kernels beside it, where they are installed. `>` marks what runs where nothing was
measured: a config that was predicted, else the default. A config whose results differ from the default's says so; this
is no proof of either (`mixers doctor` compares with the loop). A peer's backward pass is that of a graph that is kept.

Then attention beside recurrent ops, for as many tokens at every length. Every row is printed, and with --out saved, as
soon as it is known. Elsewhere than on a GPU rows are timed by the process's clock, and only show that all of it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from libraries import launched, peers_of
from sizes import accelerated, drawn
from timing import seconds_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import autotune
from autotune.device import synchronizer
from kernels.agreement import Inputs, pose
from kernels.catalogue import OPS
from kernels.op import Op

COPIED_MIB = 1024
LENGTHS, TOKENS = (2048, 8192, 32768), 65536
# Of an output's largest number; two right configs round in another order
CLOSE = 0.05
Run = Callable[[], object]


@dataclass(frozen=True)
class Subject:
    """An op with sizes beside B and T. case: of libraries.CASES, "" if nobody has the same."""

    name: str
    op: str
    sizes: Mapping[str, int]
    facts: Mapping[str, Any] = field(default_factory=dict)
    case: str = ""


def heads(keys: int, decays: int = 0) -> dict[str, int]:
    return {"H": 1024 // keys, "K": keys, "V": keys, "J": decays or keys}


WIDE = {"D": 2048}
EIGHTH = {"scale": 64**-0.5}
SUBJECTS = (
    Subject("scan", "scan", WIDE, {}, "scan"),
    Subject("scan complex", "scan", WIDE, {"pairs": True}),
    Subject("hgru", "hgru", WIDE, {"activation": "positive", "lower_bound": False}),
    Subject("gated_norm", "gated_norm", {"H": 1, "V": 2048}, {"bias": False}, "gated_norm"),
    Subject("short_conv", "short_conv", {**WIDE, "W": 4}, {"activation": "silu"}, "short_conv"),
    Subject("gla per head", "gla", heads(64, 1), EIGHTH, "gla per head"),
    Subject("gla per key", "gla", heads(64), EIGHTH, "gla per key"),
    Subject("gla per head K=V=128", "gla", heads(128, 1), {"scale": 128**-0.5}, "gla per head"),
    Subject("gla per key K=V=128", "gla", heads(128), {"scale": 128**-0.5}, "gla per key"),
    Subject("delta_rule", "delta_rule", heads(64), {"log_decay": False, **EIGHTH}, "delta_rule"),
    Subject("delta_rule per head", "delta_rule", heads(64, 1), EIGHTH, "delta_rule per head"),
    Subject("dplr", "dplr", heads(64), {}, "dplr per key"),
    Subject("selective_scan", "selective_scan", {**WIDE, "K": 16}),
)


@dataclass
class Report:
    """Rows, printed and saved as they come. compiles: the number of this process and of all, where nothing is timed and
    each calls its part of everything once."""

    device: torch.device
    out: Path | None
    deadline: float
    compiles: tuple[int, int] | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    met: int = 0

    def mine(self) -> bool:
        """Whether the next part is this process's."""
        self.met += 1
        return self.compiles is None or self.met % self.compiles[1] == self.compiles[0]

    @property
    def over(self) -> bool:
        return time.monotonic() > self.deadline

    def add(self, line: str, **facts: Any) -> None:
        if self.compiles is not None:
            return
        print(line, flush=True)
        self.rows.append(facts)
        if self.out is not None:
            about = {"device": autotune.fingerprint(self.device), "torch": str(torch.__version__)}
            self.out.write_text(json.dumps({**about, "rows": self.rows}, indent=1), encoding="utf-8")

    def seconds(self, run: Run) -> float:
        """The median of a call. It is called before, and compiles what there is to compile."""
        first = seconds_of(run, synchronizer(self.device))
        if self.compiles is not None:
            return first
        if self.device.type == "cpu":
            return seconds_of(run, None)
        import triton.testing

        return 1e-3 * triton.testing.do_bench(run, warmup=5, rep=30, return_mode="median")


def copied(report: Report, mib: int) -> float:
    """Bytes a second of a copy, read and written."""
    a = torch.rand(mib << 18, device=report.device)
    b = torch.empty_like(a)
    rate = 2 * a.nbytes / report.seconds(lambda: b.copy_(a))
    report.add(f"a copy of {mib} MiB: {rate / 1e9:,.0f} GB/s", kind="copy", bytes_s=rate)
    return rate


def posed(subject: Subject, given: argparse.Namespace, dtype: torch.dtype, direction: str) -> Inputs:
    """Its tensors; a backward pass gets its residuals from the backend's own forward pass."""
    op = OPS[subject.op]
    sizes = {**subject.sizes, "B": given.batch, "N": given.batch, "T": given.length}
    forward, problem = (
        pose(op, part, sizes, dtype=dtype, device=given.device, **subject.facts) for part in ("forward", direction)
    )
    inputs = drawn(op, forward)
    if direction == "forward":
        return inputs
    with torch.no_grad():
        outputs = op(*inputs.tensors, None, *options(op, inputs), given.backend)
    known = dict(zip((arg.name for arg in (*op.inputs, *op.outputs)), (*inputs.tensors, *outputs)))
    gradients = [torch.randn_like(known[arg.name]) if arg.differentiable else None for arg in op.outputs]
    return Inputs(op, problem, (*gradients, *(known[name] for name in op.residuals)), None)


def options(op: Op, inputs: Inputs) -> list[Any]:
    return [inputs.problem.options[name] for name in op.options]


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
    if subject.name == "short_conv" and known:
        path = "fla.modules.causal_conv1d:causal_conv1d"
        known = {"fla": launched(path, "x", "weight", "bias", activation="silu")}
    fastest = None
    for name, prepare in known.items():
        what = f"{subject.name} {direction} {inputs.problem.dtype_name}"
        try:
            function, given_to, _ = prepare(tensors)
            seconds = report.seconds(one_pass(function, given_to, direction))
        except Exception as error:
            failure = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            report.add(f"  {what:44} {name:48} fails: {failure}", kind="peer", what=what, peer=name, error=failure)
            continue
        report.add(
            f"  {what:44} {name:48} {1e6 * seconds:10.1f} µs", kind="peer", what=what, peer=name, seconds=seconds
        )
        fastest = min(seconds, fastest or math.inf)
    return fastest


def one_pass(function: Callable[..., Tensor], tensors: Sequence[Tensor], direction: str) -> Run:
    if direction == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*tensors)

        return forward
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    gradient = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, leaves, gradient, retain_graph=True, allow_unused=True)


def kernels(report: Report, given: argparse.Namespace, copy: float) -> None:
    summary = []
    for dtype in given.dtypes:
        for subject in SUBJECTS:
            for direction in ("forward", "backward"):
                if not report.mine() or report.over or (given.op and subject.op not in given.op):
                    continue
                try:
                    found = configs(report, subject, given, dtype, direction, copy)
                    peer = theirs(report, subject, given, dtype, direction) if subject.case else None
                except Exception as error:
                    line = f"{subject.name} {direction}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
                    report.add(line, kind="error", what=subject.name)
                    continue
                finally:
                    if accelerated(given.device):
                        torch.accelerator.memory.empty_cache()
                ruled = found.pop("rule", None)
                if found:
                    best = min(found, key=found.__getitem__)
                    summary.append((subject, direction, dtype, best, found[best], ruled, peer))
    if report.compiles is not None:
        return
    print(f"\n{'':40} {'best config':48} {'µs':>10} {'of a copy':>10} {'ours / fla':>11} {'rule / best':>12}")
    shares = {row["what"]: row["share"] for row in report.rows if row.get("share", 0) > 0}
    for row in report.rows:
        if "share" in row:
            shares[row["what"]] = max(shares[row["what"]], row["share"])
    for subject, direction, dtype, best, seconds, ruled, peer in summary:
        what = f"{subject.name} {direction} {str(dtype).removeprefix('torch.')}"
        ratio = "" if peer is None else f"{seconds / peer:.2f}"
        rule = "" if ruled is None else f"{ruled / seconds:.2f}"
        print(f"{what:40} {best:48} {1e6 * seconds:10.1f} {shares[what]:10.0%} {ratio:>11} {rule:>12}")


def beside_attention(report: Report, given: argparse.Namespace) -> None:
    """Attention and recurrent ops of 16 heads of 64, or as wide, without states: forward, and forward + backward."""
    subjects = {
        "scan": Subject("scan", "scan", {"D": 1024}, {"initial_state": False}),
        "gla per head": Subject("", "gla", heads(64, 1), {"initial_state": False, **EIGHTH}),
        "gla per key": Subject("", "gla", heads(64), {"initial_state": False, **EIGHTH}),
        "delta_rule": Subject("", "delta_rule", heads(64), {"initial_state": False, "log_decay": False, **EIGHTH}),
    }
    for length in given.lengths:
        batch = max(1, given.tokens // length)
        sized = argparse.Namespace(**{**vars(given), "batch": batch, "length": length})
        for name, (function, tensors) in functions(subjects, sized):
            for direction in ("forward", "forward+backward"):
                if report.over:
                    return
                if not report.mine():
                    continue
                what = f"{name} {direction} [{batch}, {length}] bfloat16"
                try:
                    run = one_pass(function, tensors, "forward") if direction == "forward" else both(function, tensors)
                    seconds = report.seconds(run)
                except Exception as error:
                    report.add(f"  {what:60} {type(error).__name__}: {error}", kind="error", what=what)
                    continue
                report.add(f"  {what:60} {1e6 * seconds:10.1f} µs", kind="attention", what=what, seconds=seconds)


def functions(
    subjects: Mapping[str, Subject], given: argparse.Namespace
) -> Iterator[tuple[str, tuple[Callable[..., Tensor], list[Tensor]]]]:
    q, k, v = (
        torch.randn(given.batch, 16, given.length, 64, device=given.device, dtype=torch.bfloat16) for _ in range(3)
    )

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if accelerated(given.device) else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    yield "flash attention", (attention, [q, k, v])
    for name, subject in subjects.items():
        inputs = posed(subject, given, torch.bfloat16, "forward")
        yield name, of(inputs)


def of(inputs: Inputs) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The op's first output as a function of the tensors that are there."""
    op, there = inputs.op, [n for n, t in enumerate(inputs.tensors) if t is not None]

    def function(*tensors: Tensor) -> Tensor:
        every: list[Tensor | None] = [None] * len(op.inputs)
        for place, tensor in zip(there, tensors):
            every[place] = tensor
        return op(*every, None, *options(op, inputs), "auto")[0]

    return function, [t for t in inputs.tensors if t is not None]


def both(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Run:
    leaves = [t.detach().requires_grad_() for t in tensors]
    gradient = torch.randn_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, gradient, allow_unused=True)


def compile_apart(count: int) -> None:
    """This very command in so many processes, each of which calls its part once: what they compile stays on disk. What
    fla's autotuner finds while others use the GPU does not."""
    start, environment = time.monotonic(), {"FLA_CACHE_RESULTS": "0", **os.environ}
    command = [sys.executable, *sys.argv, "--processes", "1", "--minutes", "60", "--compiles"]
    parts = [
        subprocess.Popen([*command, str(number), str(count)], env=environment, stdout=subprocess.DEVNULL)
        for number in range(count)
    ]
    failed = sum(part.wait() != 0 for part in parts)
    print(f"compiled in {time.monotonic() - start:.0f} s{f'; {failed} processes failed' if failed else ''}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="rows that have not begun by then are left out")
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--backend", default="triton", help="whose configs are timed")
    parser.add_argument("--op", action="append", choices=list(OPS), help="repeat it; by default all but attention")
    parser.add_argument("--dtype", action="append", help="repeat it; by default bfloat16, then float32")
    parser.add_argument("--part", choices=("kernels", "attention"), help="by default both")
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
    if given.processes > 1:
        compile_apart(given.processes)
    report = Report(given.device, given.out, time.monotonic() + 60 * given.minutes, given.compiles)
    copy = 1.0
    if given.compiles is None:
        print(f"{autotune.fingerprint(given.device)}, torch {torch.__version__}")
        copy = copied(report, given.copied)
    if given.part != "attention":
        kernels(report, given, copy)
    if given.part != "kernels":
        beside_attention(report, given)
    if report.over:
        print("the time is over; --minutes gives more")
    return 0


if __name__ == "__main__":
    sys.exit(main())
