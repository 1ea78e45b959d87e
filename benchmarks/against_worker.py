"""One tree's side of `against.py`: poses the rows that it is told of and times them when it is its turn.

    PYTHONPATH=TREE python against_worker.py TREE

Requests are lines of JSON on stdin, answers on what was stdout; what libraries print goes to stderr. Only what an older
tree has too is used: the catalogue of ops, `pose`, `draw`, `Op.choose`, and `mixers.build`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mixers
from kernels import agreement
from kernels.catalogue import OPS

Call = Callable[[], object]
CPU = torch.device("cpu")


def call_of(row: dict[str, Any]) -> tuple[Call, dict[str, Any]]:
    """The call that is timed, and what was chosen for it."""
    dtype = getattr(torch, row["dtype"])
    if row["kind"] == "mixer":
        return decoding(row["name"], row["sizes"], row["length"], dtype), {}
    op = OPS[row["name"]]
    sizes, parts = {**row["sizes"], "T": row["length"]}, row["direction"].split("+")
    # posed of one row, for tensors are drawn for that
    single = {**sizes, **{axis: 1 for axis in "TS" if axis in sizes}}
    posed = [agreement.pose(op, part, single, dtype=dtype, device=CPU, **row["facts"]) for part in parts]
    problems = [replace(problem, sizes=sizes) for problem in posed]
    plans = [op.choose(problem) for problem in problems]
    chosen = {"+".join(plan.backend.name for plan in plans): " ".join(f"{k}:{v}" for k, v in plans[-1].config.items())}
    inputs = agreement.draw(op, problems[0], by="auto")
    if not row["variant"].endswith("through the op"):
        return without_gradients(inputs.call(plans[0].backend, plans[0].config)), chosen
    options = (problems[0].options[name] for name in op.options)
    arguments = [*inputs.tensors, inputs.cu_seqlens, *options, "auto"]
    return (training(op, arguments) if len(parts) > 1 else without_gradients(lambda: op(*arguments))), chosen


def training(op: Any, arguments: list[Any]) -> Call:
    """The op and all gradients of a loss on every output."""
    leaves = [arg.requires_grad_() for arg in arguments if isinstance(arg, Tensor) and arg.is_floating_point()]
    through = [n for n, out in enumerate(op.outputs) if out.differentiable]
    with torch.no_grad():
        outputs = op(*arguments)
    gradients = [torch.randn_like(outputs[n]) for n in through]

    def run() -> object:
        outputs = op(*arguments)
        return torch.autograd.grad([outputs[n] for n in through], leaves, gradients, allow_unused=True)

    return run


def decoding(name: str, sizes: dict[str, int], prompt: int, dtype: torch.dtype) -> Call:
    """A token after a prompt; the state is not advanced, so that every call does the same."""
    torch.manual_seed(0)
    mixer = mixers.build(name, sizes["dim"]).to(dtype)
    x = torch.randn(sizes["B"], prompt, sizes["dim"]).to(dtype)
    with torch.no_grad():
        state, token = mixer(x)[1], x[:, :1].clone()
    return without_gradients(lambda: mixer(token, state))


def without_gradients(call: Call) -> Call:
    def run() -> object:
        with torch.no_grad():
            return call()

    return run


def turn(run: Call, calls: int, samples: int, warm: float) -> list[float]:
    """Seconds of a call in each sample of so many, after calls that are not timed until `warm` seconds are over."""
    end = time.perf_counter() + warm
    while time.perf_counter() < end:
        run()
    seconds = []
    for _ in range(samples):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        seconds.append((time.perf_counter() - start) / calls)
    return seconds


def own(tree: Path) -> None:
    """Raises if something of the project is not the tree's own: an install elsewhere has the same import names."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.partition(".")[0] in ("autotune", "kernels", "mixers") and file and tree not in Path(file).parents:
            raise ImportError(f"{name} comes from {file}, not from {tree}")


def main(tree: Path) -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    gc.disable()
    run: Call | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if request.pop("do") == "pose":
            run, answer = None, dict[str, Any]()
            gc.collect()
            try:
                run, chosen = call_of(request["row"])
                run()
                answer = {"chosen": chosen}
            # whatever an older tree says to what it cannot do
            except Exception as error:
                answer = {"lacks": f"{type(error).__name__}: {error}"}
            own(tree)
        else:
            assert run is not None
            answer = {"seconds": turn(run, **request)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
