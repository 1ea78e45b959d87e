"""What only a GPU can show: that kernels are right, quiet about streams and graphs, and deterministic where they run.

    pytest tests/test_gpu.py -n 14

Many small tests, so that compilers work side by side: our kernels first, then generated code and others' kernels.
With few minutes, `-k "not fla and not flex and not compiled"` leaves out what takes the longest.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
from torch import Tensor

import autotune
import mixers
from kernels.agreement import Inputs, draw, pose, sequence_dtype
from kernels.catalogue import OPS
from kernels.gated_norm import gated_norm
from kernels.hgru import OP as HGRU
from kernels.hgru import hgru
from kernels.op import Backend, Op
from kernels.problem import SEQUENCE_DTYPES, Problem
from kernels.scan import OP as SCAN
from kernels.scan import scan
from kernels.short_conv import short_conv
from kernels.tuning import STARTUP_SHARE, startup, tune
from mixers import checks
from mixers.commands.doctor import cases, compared
from mixers.commands.probe import sizes_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or HIP device")

DEVICE = torch.device("cuda")
DIRECTIONS = ("forward", "backward")
NARROW_AND_WIDE = (torch.bfloat16, torch.float32)
BACKENDS = sorted(
    ((op, b) for op in OPS.values() for b in op.backends if not b.devices or "cuda" in b.devices),
    key=lambda each: (each[1].foreign, not each[1].devices),
)
# Written for GPUs, with configs to choose from; generated code and other packages' are not.
OURS = [(op, b) for op, b in BACKENDS if b.devices and not b.foreign]
TRITON = [(op, b) for op, b in OURS if b.name == "triton"]
# No multiple of a block of rows; as wide as layers are.
REALISTIC = {"B": 2, "T": 1000, "D": 1024, "H": 4, "G": 4}


def name_of(thing: Any) -> str:
    if isinstance(thing, (Op, Backend)):
        return thing.name
    return str(thing).removeprefix("torch.")


def posed(op: Op, direction: str, dtype: torch.dtype, *, keys: int = 64, **sizes: int) -> Problem:
    """The op's problem at realistic sizes: K = V = keys."""
    letters = sizes_of(op)
    wanted = {**REALISTIC, "K": keys, "V": keys, **sizes}
    wanted |= {"S": wanted["T"], "N": wanted["B"]}
    found = {letter: wanted.get(letter, size) for letter, size in letters.items()}
    return pose(op, direction, found, dtype=dtype, device=DEVICE)


def wrong_configs(inputs: Inputs, backend: Backend, every: bool) -> list[str]:
    """What is wrong with the backend's outputs, a line a config that is."""
    found = compared(inputs, backend, every_config=every)
    return [f"{backend.name} {dict(config)}: {wrong} ({inputs.problem})" for config, wrong in found if wrong]


def report(lines: list[str]) -> None:
    assert not lines, f"{len(lines)} failures\n" + "\n".join(lines)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", SEQUENCE_DTYPES, ids=name_of)
@pytest.mark.parametrize(("op", "backend"), BACKENDS, ids=name_of)
def test_agrees_with_the_loop_on_every_kind_of_problem(
    op: Op, backend: Backend, dtype: torch.dtype, direction: str
) -> None:
    """The cases of `mixers doctor`."""
    if backend.name == "compiled" and dtype not in NARROW_AND_WIDE:
        pytest.skip("generating code costs tens of seconds for each kind; two dtypes show whether it is right")
    failures, reasons, ran = [], set(), 0
    for _, case in cases(op, DEVICE):
        if (case.direction, sequence_dtype(op, case)) != (direction, dtype):
            continue
        cannot = backend.cannot(case)
        reasons |= set(cannot)
        if not cannot:
            failures += wrong_configs(draw(op, case), backend, every=False)
            ran += 1
    report(failures)
    if not ran:
        pytest.skip(f"{op.name} {backend.name} cannot: {'; '.join(sorted(reasons))}")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", NARROW_AND_WIDE, ids=name_of)
@pytest.mark.parametrize(
    ("op", "backend", "keys"),
    [(op, b, keys) for op, b in OURS for keys in (64, 128) if keys == 64 or "V" in sizes_of(op)],
    ids=name_of,
)
def test_every_config_agrees_at_a_realistic_size(
    op: Op, backend: Backend, keys: int, dtype: torch.dtype, direction: str
) -> None:
    problem = posed(op, direction, dtype, keys=keys)
    cannot = backend.cannot(problem)
    if cannot:
        pytest.skip("; ".join(cannot))
    report(wrong_configs(draw(op, problem), backend, every=True))


# Each compiles kernels of its own, or code: tests of their own, so that they do so side by side.
ALONE = ("backends_agree", *checks.SLOW)
REST = [law for law in checks.LAWS if law not in ALONE]
GROUPS = [*[(law,) for law in ALONE], *[tuple(REST[n::3]) for n in range(3)]]


@pytest.mark.parametrize("laws", GROUPS, ids=lambda laws: "+".join(laws))
@pytest.mark.parametrize("name", mixers.names())
def test_laws(name: str, laws: tuple[str, ...]) -> None:
    broken = []
    for law in laws:
        try:
            checks.run(name, laws=[law], device=DEVICE, examples=2)
        # laws about compilers and kernels meet exceptions of theirs
        except Exception as error:
            broken.append(f"{name} {law}: {type(error).__name__}: {error}")
    report(broken)


COLUMNS, LARGE = 1024, 2064 * 1024
LAYOUTS = {"sequences": (2064, 1024), "rows": (1, LARGE)}
# Enough rows for a decaying state to forget what came before them.
TAIL, WARM = 2048, 1024
BYTES = 26e9


def in_scan(x: Tensor) -> Tensor:
    return scan(x, x, backend="triton")[0]


def in_hgru(x: Tensor) -> Tensor:
    return hgru(x, x, backend="triton")[0]


def in_gated_norm(x: Tensor) -> Tensor:
    return gated_norm(x, x, torch.ones(COLUMNS, dtype=x.dtype, device=x.device), backend="triton")


def in_short_conv(x: Tensor) -> Tensor:
    weight = torch.linspace(-1, 1, COLUMNS * 4, device=x.device).to(x.dtype).reshape(COLUMNS, 4)
    return short_conv(x, weight, activation="silu", backend="triton")[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", [in_scan, in_hgru, in_gated_norm, in_short_conv])
def test_more_numbers_than_32_bits_can_count(
    function: Callable[[Tensor], Tensor], layout: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    batch, length = LAYOUTS[layout]
    assert batch * length * COLUMNS > 2**31
    # one at a time has that much of the memory
    with filelock.FileLock(tmp_path_factory.getbasetemp().parent / "large.lock"):
        free, _ = torch.cuda.mem_get_info()
        if free < BYTES:
            pytest.skip(f"needs {BYTES / 1e9:.0f} GB of GPU memory, {free / 1e9:.0f} GB are free")
        try:
            torch.manual_seed(0)
            x = torch.rand(batch, length, COLUMNS, dtype=torch.bfloat16, device=DEVICE)
            tail = x[-1:, -TAIL:].clone()
            kept = slice(0 if length <= TAIL else WARM, None)
            found, expected = both_ways(function, x, tail.shape[1]), both_ways(function, tail, tail.shape[1])
        finally:
            x = None
            torch.cuda.empty_cache()
    for what, one, two in zip(("y", "dx"), found, expected):
        one, two = one[:, kept].float(), two[:, kept].float()
        gap, scale = (one - two).abs().max().item(), two.abs().max().item()
        assert gap <= 2**-6 * scale, f"{function.__name__} {layout}: last {what} off by {gap:.3g} of {scale:.3g}"


def both_ways(function: Callable[[Tensor], Tensor], x: Tensor, tail: int) -> tuple[Tensor, Tensor]:
    """The last rows of y, and of x's gradient for x as y's."""
    x = x.detach().requires_grad_()
    y = function(x)
    (dx,) = torch.autograd.grad(y, [x], x.detach())
    return y[-1:, -tail:].detach().clone(), dx[-1:, -tail:].clone()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("op", "backend"), TRITON, ids=name_of)
def test_runs_on_the_current_stream(op: Op, backend: Backend, direction: str) -> None:
    problem = posed(op, direction, torch.bfloat16, T=130)
    inputs = draw(op, problem)
    config = backend.configs(problem)[0]
    with torch.no_grad():
        expected = inputs.call(backend, config)()
        late = [None if t is None else torch.zeros_like(t) for t in inputs.tensors]
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            # whatever does not wait for this stream reads zeros
            torch.cuda._sleep(200_000_000)
            for to, of in zip(late, inputs.tensors):
                if to is not None:
                    to.copy_(of)
            found = Inputs(op, problem, tuple(late), inputs.cu_seqlens).call(backend, config)()
        torch.cuda.synchronize()
    for arg, one, two in zip(inputs.results, found, expected):
        assert (one is None) == (two is None)
        assert one is None or torch.equal(one, two), f"{op.name} {backend.name} {direction}: {arg.name} differs"


@pytest.mark.parametrize("name", ["hgrn", "gla", "deltanet", "mamba"])
def test_a_graph_is_captured_and_replayed(name: str) -> None:
    mixer = mixers.build(name, 256).to(DEVICE, torch.bfloat16)
    x, other = torch.randn(2, 2, 300, 256, device=DEVICE, dtype=torch.bfloat16)
    still = x.clone()
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                mixer(still)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, _ = mixer(still)
        for given in (other, x):
            still.copy_(given)
            graph.replay()
            torch.testing.assert_close(y, mixer(given)[0], msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("layers", [("hgrn", "gla"), ("deltanet", "attention"), ("mamba", "rwkv7")], ids="-".join)
def test_a_compiled_training_step_equals_an_eager_one(layers: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = mixers.Stack(64, list(layers)).to(DEVICE)
    x = torch.randn(2, 130, 64, device=DEVICE)
    torch._dynamo.reset()
    steps = []
    for run in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        loss = run(x)[0].square().mean()
        loss.backward()
        steps.append({"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}})
    differences = []
    for name, eager in steps[0].items():
        fast = steps[1][name]
        if (eager is None) != (fast is None):
            differences.append(f"the gradient of {name} is missing on one side")
        elif eager is not None and (gap := (fast - eager).norm() / (eager.norm() + 1e-6)) > 1e-3:
            differences.append(f"{name} is off by {gap:.3g} of its norm")
    report(differences)


@pytest.mark.parametrize("name", mixers.names())
def test_training_step_under_autocast(name: str) -> None:
    torch.manual_seed(0)
    mixer = mixers.build(name, 64).to(DEVICE)
    x = torch.randn(2, 130, 64, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y, _ = mixer(x)
        loss = y.float().square().mean()
    loss.backward()
    wrong = []
    for what, tensor in {"x": x, **dict(mixer.named_parameters())}.items():
        if tensor.grad is None or not tensor.grad.isfinite().all():
            wrong.append(f"{name}: the gradient of {what} is {'missing' if tensor.grad is None else 'not finite'}")
    report(wrong)
    assert y.isfinite().all(), f"{name}: y is not finite"


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("op", "backend"), TRITON, ids=name_of)
def test_same_bits_twice_on_a_full_card(op: Op, backend: Backend, direction: str) -> None:
    problem = posed(op, direction, torch.bfloat16, B=8, T=2048, H=16, G=16)
    inputs = draw(op, problem, by=backend.name)
    call = inputs.call(backend, backend.configs(problem)[0])
    with torch.no_grad():
        first = call()
        for attempt in range(3):
            for arg, one, two in zip(inputs.results, first, call()):
                same = one is two if one is None or two is None else torch.equal(one, two)
                assert same, f"{op.name} {backend.name} {direction}: {arg.name} differs in call {attempt + 2}"


def test_the_tuner_measures_what_can_run_and_auto_goes_by_it(tmp_path: Path) -> None:
    seconds = 60.0
    problem = posed(HGRU, "forward", torch.bfloat16, D=256)
    able = {b.name for b, c in HGRU.candidates(problem) if startup(b, problem, c) <= STARTUP_SHARE * seconds}
    with autotune.using(tmp_path / "tuned.jsonl"):
        records = tune(HGRU, problem, seconds=seconds)
        told = "\n".join(f"{r.backend} {dict(r.config)}: {r.status} {r.message}" for r in records)
        assert not [r for r in records if r.status == "wrong"], told
        assert able <= {r.backend for r in records if r.status == "ok"}, told
        plan = HGRU.choose(problem)
        assert plan.origin == "exact", f"{plan}\n{told}"
        assert (plan.backend.name, dict(plan.config)) in [(r.backend, dict(r.config)) for r in records if r.times]


OUT_OF_RANGE = """
import torch
from kernels.scan.naive import backward

def forward(a, *others, **options):
    torch.zeros(3, device=a.device)[torch.full((1,), 99, device=a.device)]
    torch.cuda.synchronize()
"""


def test_a_candidate_that_faults_costs_this_process_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "planted_out_of_range.py").write_text(OUT_OF_RANGE)
    monkeypatch.syspath_prepend(tmp_path)
    planted = Backend("out_of_range", "planted_out_of_range", foreign=True)
    monkeypatch.setitem(SCAN.__dict__, "backends", (SCAN.backends[0], planted))
    problem = pose(SCAN, "forward", {"B": 2, "T": 16, "D": 5, "N": 2}, dtype=torch.float32, device=DEVICE)
    with autotune.using(tmp_path / "tuned.jsonl"):
        records = {r.backend: r for r in tune(SCAN, problem, seconds=60)}
    assert records["out_of_range"].status in ("wrong", "error"), records
    assert records["naive"].status == "ok", records
    assert torch.ones(3, device=DEVICE).sum().item() == 3


def test_tensors_on_two_devices_are_named() -> None:
    here, there = torch.rand(1, 4, 3, device=DEVICE), torch.rand(1, 4, 3)
    with pytest.raises(ValueError, match=r"scan: a is on cuda:0 but x is on cpu"):
        scan(here, there)
    with pytest.raises(ValueError, match=r"scan: a is on cuda:0 but cu_seqlens is on cpu"):
        scan(here, here, cu_seqlens=torch.tensor([0, 4]))
