"""Every op in the catalogue: its backends agree with the float64 loop, and it is a good citizen of torch.library."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.agreement import Expected, draw, errors, pose
from kernels.catalogue import OPS
from kernels.op import Op

pytestmark = pytest.mark.usefixtures("nan_filled")

CPU = torch.device("cpu")
BACKENDS = [(op.name, backend.name) for op in OPS.values() for backend in op.backends[1:]]


def problem_sizes(op: Op, draw_: st.DrawFn) -> dict[str, int]:
    """Lengths around the chunk borders of every candidate; the other axes small, odd, and different from each other."""
    letters = dict.fromkeys(letter for arg in op.inputs for letter in arg.letters if letter.isalpha())
    sizes = {letter: draw_(st.integers(1, 9), label=letter) for letter in letters}
    sizes["T"] = draw_(st.one_of(st.integers(1, 70), st.sampled_from((15, 16, 17, 127, 128, 129, 257))), label="T")
    if "D" in sizes:
        sizes["D"] = draw_(st.sampled_from((1, 3, 8, 17, 33, 70)), label="D")
    if "S" in sizes:
        sizes["S"] = sizes["T"]
    if "H" in sizes and "G" in sizes:
        sizes["H"] = sizes["G"] * draw_(st.integers(1, 3), label="heads per group")
    return sizes


def facts(op: Op, draw_: st.DrawFn) -> dict[str, Any]:
    """Values for the op's flags and for what its sample takes."""
    found = {
        name: draw_(st.booleans(), label=name) for name, default in op.options.items() if isinstance(default, bool)
    }
    if any(arg.pairs for arg in op.inputs):
        found["pairs"] = draw_(st.booleans(), label="pairs")
    for arg in op.inputs:
        if arg.optional:
            found[arg.name] = draw_(st.booleans(), label=arg.name)
    return found


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("name", "backend_name"), BACKENDS)
def test_backend_agrees_with_the_loop(name: str, backend_name: str, direction: str) -> None:
    op = OPS[name]
    backend = op.backend(backend_name)
    ran = 0

    @given(data=st.data())
    def agrees(data: st.DataObject) -> None:
        nonlocal ran
        sizes, given_facts = problem_sizes(op, data.draw), facts(op, data.draw)
        if "cu_seqlens" not in str(op.name) and data.draw(st.booleans(), label="packed"):
            sizes |= {"B": 1, "N": data.draw(st.integers(1, 5), label="N")}
            given_facts["packed"] = True
        dtype = data.draw(st.sampled_from((torch.float64, torch.float32, torch.float16, torch.bfloat16)), label="dtype")
        decay = (
            dtype
            if data.draw(st.booleans(), label="decay in the sequence's dtype") or dtype == torch.float64
            else torch.float32
        )
        try:
            problem = pose(op, direction, sizes, dtype=dtype, device=CPU, decay_dtype=decay, **given_facts)
        except (ValueError, TypeError):
            # the op does not have this combination, and says so
            return
        if backend.cannot(problem):
            return
        inputs = draw(op, problem, seed=data.draw(st.integers(0, 1000), label="seed"))
        expected = Expected.of(inputs)
        for config in backend.configs(problem):
            if config.get("inductor"):
                continue
            wrong = expected.difference(inputs.call(backend, config)())
            assert wrong is None, f"{backend_name} {dict(config)}: {wrong} ({problem})"
            ran += 1

    agrees()
    devices = backend.devices
    if not devices or "cpu" in devices:
        assert ran >= 10, f"only {ran} problems ran"


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str) -> None:
    op = OPS[name]
    sizes = {letter: 3 for arg in op.inputs for letter in arg.letters if letter.isalpha()} | {"T": 7, "S": 7}
    sampled = op.sample(sizes, dtype=torch.float32)
    tensors = [
        None if t is None else t.requires_grad_(t.is_floating_point()) for t in (sampled[a.name] for a in op.inputs)
    ]
    torch.library.opcheck(op.forward_overload, (*tensors, None, *op.options.values(), "naive"))


@pytest.mark.parametrize("name", OPS)
def test_an_unknown_backend_names_those_there_are(name: str) -> None:
    op = OPS[name]
    sizes = {letter: 3 for arg in op.inputs for letter in arg.letters if letter.isalpha()} | {"T": 4, "S": 4}
    sampled = op.sample(sizes, dtype=torch.float32)
    with pytest.raises(ValueError, match=f"{name}: no backend 'fast'; there are auto, naive"):
        op(*[sampled[arg.name] for arg in op.inputs], None, *op.options.values(), "fast")


@pytest.mark.parametrize("name", OPS)
def test_what_is_no_tensor_is_named(name: str) -> None:
    op = OPS[name]
    sizes = {letter: 3 for arg in op.inputs for letter in arg.letters if letter.isalpha()} | {"T": 4, "S": 4}
    sampled = op.sample(sizes, dtype=torch.float32)
    given = {**{arg.name: sampled[arg.name] for arg in op.inputs}, "cu_seqlens": torch.tensor([0, 4])}
    for axis, tensor in given.items():
        for wrong in ([1.0], 1.0) if tensor is None else (tensor.tolist(), tensor.numpy()):
            args = [*{**given, axis: wrong}.values(), *op.options.values(), "auto"]
            with pytest.raises(TypeError, match=rf"^{name}: {axis} is {type(wrong).__name__}, expected a tensor$"):
                op(*args)


@pytest.mark.parametrize("name", [name for name in OPS if OPS[name].options])
def test_an_option_of_another_type_is_named(name: str) -> None:
    op = OPS[name]
    sizes = {letter: 3 for arg in op.inputs for letter in arg.letters if letter.isalpha()} | {"T": 4, "S": 4}
    sampled = op.sample(sizes, dtype=torch.float32)
    tensors = [sampled[arg.name] for arg in op.inputs]
    for option, default in op.options.items():
        wrong = 3 if isinstance(default, str) else "3"
        options = {**op.options, option: wrong}
        with pytest.raises(TypeError, match=f"^{name}: {option} is {wrong!r}, expected {type(default).__name__}$"):
            op(*tensors, None, *options.values(), "auto")


@pytest.mark.parametrize("name", [name for name in OPS if name != "gated_norm"])
def test_the_public_function_names_what_does_not_fit_too(name: str) -> None:
    function, op = getattr(import_module(f"kernels.{name}"), name), OPS[name]
    sampled = op.sample({letter: 3 for arg in op.inputs for letter in arg.letters if letter.isalpha()} | {"T": 4})
    first, *others = [sampled[arg.name] for arg in op.inputs if not arg.optional]
    with pytest.raises(TypeError, match=f"^{name}: {op.inputs[0].name} is list, expected a tensor$"):
        function(first.tolist(), *others)
    for wrong in (first.sum(), first[None], first[..., :0]):
        with pytest.raises(ValueError, match=f"^{name}: "):
            function(wrong, *others)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", OPS)
def test_the_default_device_is_for_new_tensors_of_users(name: str, direction: str) -> None:
    op = OPS[name]
    sizes = {letter: 5 for arg in op.inputs for letter in arg.letters if letter.isalpha()}
    sizes |= {"N": 3, "B": 1, "T": 20, "S": 20}
    posed = pose(op, direction, sizes, dtype=torch.float32, device=CPU, packed=True)
    inputs = draw(op, posed)
    with torch.device("meta"):
        there = draw(op, posed)
    for drawn, right in zip(there.tensors, inputs.tensors):
        assert drawn is right is None or torch.equal(drawn, right)
    for backend in op.backends:
        if not backend.cannot(posed):
            run = inputs.call(backend, backend.configs(posed)[0])
            expected = run()
            with torch.device("meta"):
                found = run()
            for one, two in zip(found, expected):
                assert one is two is None or torch.equal(one, two)


@pytest.mark.parametrize("name", OPS)
def test_flops_are_counted(name: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    op = OPS[name]
    sizes = {letter: 3 for arg in op.inputs for letter in arg.letters if letter.isalpha()} | {"T": 4, "S": 4}
    sampled = op.sample(sizes, dtype=torch.float32)
    tensors = [
        None if t is None else t.requires_grad_(t.is_floating_point()) for t in (sampled[a.name] for a in op.inputs)
    ]
    with FlopCounterMode(display=False) as counter:
        outputs = op(*tensors, None, *op.options.values(), "naive")
        forward = counter.get_total_flops()
        sum(out.sum() for out in outputs if out.requires_grad).backward()
    assert forward > 0
    assert counter.get_total_flops() > forward


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_first_and_second_gradients_of_the_loop(name: str, packed: bool) -> None:
    op = OPS[name]
    sizes = {"B": 1 if packed else 2, "N": 3 if packed else 2, "T": 4, "S": 4, "H": 2, "G": 1, "K": 2, "V": 3, "D": 3}
    optional = {arg.name: True for arg in op.inputs if arg.optional and arg.role != "index"}
    accepted = inspect.signature(op.sample).parameters
    sampled = op.sample(
        {**sizes, "W": 3, "J": 2},
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(0),
        **{name: True for name in optional if name in accepted},
    )
    tensors = [sampled[arg.name] for arg in op.inputs]
    cu_seqlens = torch.tensor([0, 3, 3, 4]) if packed else None
    leaves = [t.requires_grad_() for t in tensors if t is not None]

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        queue = list(leaves)
        given = [None if t is None else queue.pop(0) for t in tensors]
        outputs = op(*given, cu_seqlens, *op.options.values(), "naive")
        return tuple(out for out, arg in zip(outputs, op.outputs) if arg.differentiable)

    torch.autograd.gradcheck(function, leaves, fast_mode=True)
    torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", OPS)
def test_the_loop_rounds_only_what_it_writes(name: str, direction: str) -> None:
    """States and sums are at least float32 where sequences are bfloat16: others may err as the loop does."""
    op = OPS[name]
    sizes = {"B": 2, "N": 2, "T": 150, "S": 150, "H": 2, "G": 1, "K": 8, "V": 5, "D": 6, "W": 4, "J": 8}
    inputs = draw(op, pose(op, direction, sizes, dtype=torch.bfloat16, device=CPU))
    for arg, own, exact in zip(inputs.results, inputs.loop(), inputs.to(torch.float64).loop()):
        if own is not None and exact is not None:
            worst, scale = errors(own, exact)[0], exact.abs().max().item()
            rounding = 0.51 * torch.finfo(own.dtype).eps if own.dtype == torch.bfloat16 else 0.0
            assert worst <= (rounding + 1e-5) * scale, f"{arg.name} is off by {worst:.3g} of {scale:.3g}"


@pytest.mark.parametrize("name", OPS)
def test_autocast_stays_outside(name: str) -> None:
    """An op computes in the dtypes that it was given, on every backend."""
    op = OPS[name]
    sizes = {"B": 2, "N": 2, "T": 40, "S": 40, "H": 2, "G": 1, "K": 4, "V": 5, "D": 6, "W": 4, "J": 4}
    sampled = op.sample(sizes, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    problem = pose(op, "forward", sizes, dtype=torch.float32, device=CPU)
    args = [*(sampled[arg.name] for arg in op.inputs), None, *op.options.values()]
    for backend in op.backends:
        if not backend.cannot(problem):
            outside = op(*args, backend.name)
            with torch.autocast("cpu", torch.bfloat16):
                inside = op(*args, backend.name)
            assert all(torch.equal(one, two) for one, two in zip(inside, outside)), backend.name


@pytest.mark.parametrize(
    ("name", "option"),
    [("attention", "scale"), ("gla", "scale"), ("delta_rule", "scale"), ("dplr", "scale"), ("gated_norm", "eps")],
)
def test_a_number_that_would_get_no_gradient_is_refused(name: str, option: str) -> None:
    op = OPS[name]
    sizes = {"B": 1, "N": 1, "T": 3, "S": 3, "H": 1, "G": 1, "K": 2, "V": 2}
    sampled = op.sample(sizes, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    function = getattr(import_module(f"kernels.{name}"), name)
    given = {arg: sampled[arg] for arg in inspect.signature(function).parameters if sampled.get(arg) is not None}
    function(**given)
    with pytest.raises(TypeError, match=f"{name}: {option} is a tensor, expected a number"):
        function(**given, **{option: torch.nn.Parameter(torch.tensor(0.5))})
