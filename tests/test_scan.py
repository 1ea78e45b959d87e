"""The scan: hard decays, complex numbers, gradients of every order, wrong calls, and code that no one here wrote."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.agreement import Expected, Inputs, draw, pose
from kernels.scan import OP, scan

pytestmark = pytest.mark.usefixtures("nan_filled")

CPU = torch.device("cpu")
HARD = (0.0, 1e-30, 1e-3, 0.5, 1.0, -0.9, 1 - 2.0**-24)
RUNNABLE = ("naive", "compiled", "native")


@st.composite
def hard_problems(draw_: st.DrawFn, direction: str) -> Inputs:
    """Decays drawn from the hard values, channel by channel or row by row."""
    length = draw_(st.sampled_from((1, 2, 15, 16, 17, 33, 65, 130)))
    sizes = {"B": draw_(st.integers(1, 3)), "T": length, "D": draw_(st.sampled_from((1, 5, 16, 19)))}
    facts: dict[str, Any] = {
        "reverse": draw_(st.booleans()),
        "pairs": draw_(st.booleans()),
        "initial_state": draw_(st.booleans()),
    }
    if draw_(st.booleans()):
        sizes |= {"B": 1, "N": draw_(st.integers(1, 6))}
        facts["packed"] = True
    dtype = draw_(st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16)))
    decay = torch.float32 if dtype.itemsize == 2 and draw_(st.booleans()) else dtype
    problem = pose(OP, direction, sizes, dtype=dtype, device=CPU, decay_dtype=decay, **facts)
    inputs = draw(OP, problem, seed=draw_(st.integers(0, 99)))
    shape = (sizes["B"], length, sizes["D"]) if draw_(st.booleans()) else (1, 1, sizes["D"])
    generator = torch.Generator().manual_seed(draw_(st.integers(0, 99)))
    hard = torch.tensor(HARD)[torch.randint(len(HARD), shape, generator=generator)].expand(sizes["B"], length, -1)
    names = OP.names(direction)
    tensors = list(inputs.tensors)
    a = tensors[names.index("a")]
    assert a is not None
    hard = torch.stack((hard, torch.zeros_like(hard)), -1) if facts["pairs"] else hard
    tensors[names.index("a")] = hard.to(a.dtype)
    if direction == "backward":
        # the rows h that these decays give
        initial = inputs.tensors[-1]
        x = torch.randn(a.shape, generator=generator).to(dtype)
        tensors[names.index("h")] = OP(
            tensors[names.index("a")], x, initial, inputs.cu_seqlens, facts["reverse"], "naive"
        )[0]
    return Inputs(OP, problem, tuple(tensors), inputs.cu_seqlens)


@pytest.mark.parametrize("backend_name", RUNNABLE[1:])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_hard_decays(backend_name: str, direction: str) -> None:
    backend = OP.backend(backend_name)

    @given(inputs=hard_problems(direction))
    def agrees(inputs: Inputs) -> None:
        expected = Expected.of(inputs)
        wrong = expected.difference(inputs.call(backend, backend.configs(inputs.problem)[0])())
        assert wrong is None, f"{wrong} ({inputs.problem})"

    agrees()


def test_the_float64_loop_is_the_equation() -> None:
    a, x = torch.tensor([0.5, 2.0, 0.0]), torch.tensor([1.0, 10.0, 100.0])
    h, final = scan(a.view(1, 3, 1), x.view(1, 3, 1), torch.tensor([[4.0]]), backend="naive")
    assert h.flatten().tolist() == [3.0, 16.0, 100.0]
    assert final.tolist() == [[100.0]]
    h, final = scan(a.view(1, 3, 1), x.view(1, 3, 1), torch.tensor([[4.0]]), reverse=True, backend="naive")
    assert h.flatten().tolist() == [106.0, 210.0, 100.0]
    assert final.tolist() == [[106.0]]


@pytest.mark.parametrize(("reverse", "packed", "pairs"), list(itertools.product((False, True), repeat=3)))
@pytest.mark.parametrize("backend", RUNNABLE)
def test_first_and_second_gradients(backend: str, reverse: bool, packed: bool, pairs: bool) -> None:
    generator = torch.Generator().manual_seed(3)

    def leaf(*shape: int) -> Tensor:
        tail = (2,) if pairs else ()
        return torch.randn(*shape, *tail, generator=generator, dtype=torch.float64).requires_grad_()

    cu_seqlens = torch.tensor([0, 2, 2, 5]) if packed else None
    batch = 1 if packed else 2
    tensors = leaf(batch, 5, 2), leaf(batch, 5, 2), leaf(3 if packed else 2, 2)

    def function(a: Tensor, x: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        return scan(a, x, initial, reverse=reverse, cu_seqlens=cu_seqlens, backend=backend)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("backend", RUNNABLE)
def test_complex_dtypes_are_views_of_pairs(backend: str) -> None:
    a = torch.polar(torch.rand(2, 9, 3), torch.randn(2, 9, 3)).requires_grad_()
    x, initial = torch.randn(2, 9, 3, dtype=torch.complex64).requires_grad_(), torch.randn(2, 3, dtype=torch.complex64)
    h, final = scan(a, x, initial, backend=backend)
    expected, rows = initial, []
    for t in range(9):
        expected = a[:, t] * expected + x[:, t]
        rows.append(expected)
    torch.testing.assert_close(h, torch.stack(rows, 1))
    torch.testing.assert_close(final, expected)
    weights = torch.randn_like(h)
    found = torch.autograd.grad((h * weights).sum().real, (a, x))
    right = torch.autograd.grad((torch.stack(rows, 1) * weights).sum().real, (a, x))
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    pairs, _ = scan(torch.view_as_real(a), torch.view_as_real(x), torch.view_as_real(initial), backend=backend)
    torch.testing.assert_close(torch.view_as_complex(pairs), h)


@pytest.mark.parametrize("backend", RUNNABLE)
def test_any_strides(backend: str) -> None:
    wide = torch.rand(3, 2, 21, 14)
    layouts = {
        "last axis sliced": lambda t: t[0, :, :, :7],
        "every other column": lambda t: t[0, :, :, ::2],
        "time before batch": lambda t: t[0, :, :, :7].transpose(0, 1).contiguous().transpose(0, 1),
        "columns before time": lambda t: t[0, :, :, :7].transpose(1, 2).contiguous().transpose(1, 2),
        "expanded over time": lambda t: t[0, :, :1, :7].expand(-1, 21, -1),
        "expanded over the batch": lambda t: t[0, :1, :, :7].expand(2, -1, -1),
    }
    for name, layout in layouts.items():
        a, x = layout(wide), layout(wide.flip(0))
        expected = scan(a.contiguous(), x.contiguous(), backend="naive")
        torch.testing.assert_close(scan(a, x, backend=backend), expected, msg=name)
        # the gradient of h has a layout of its own
        dh = layout(wide.flip(1))
        gradients = [
            torch.autograd.grad(scan(*leaves, backend=which)[0], leaves, given)
            for which, given in (("naive", dh.contiguous()), (backend, dh))
            for leaves in [[t.contiguous().requires_grad_() for t in (a, x)]]
        ]
        torch.testing.assert_close(gradients[1], gradients[0], msg=f"gradients, {name}")


def test_generated_code_agrees() -> None:
    """`compiled` through Inductor: one graph of each kind for several lengths."""
    backend = OP.backend("compiled")
    for direction, length in itertools.product(("forward", "backward"), (19, 70)):
        problem = pose(
            OP, direction, {"B": 2, "T": length, "D": 9}, dtype=torch.float32, device=CPU, initial_state=True
        )
        configs = [config for config in backend.configs(problem) if config["inductor"]]
        if not configs:
            pytest.fail("no C++ compiler: Inductor cannot be checked here")
        inputs = draw(OP, problem)
        wrong = Expected.of(inputs).difference(inputs.call(backend, configs[0])())
        assert wrong is None, wrong


def test_agrees_with_flash_linear_attention() -> None:
    hgrn = pytest.importorskip("fla.ops.hgrn.naive")
    x, f = torch.randn(2, 33, 5), torch.nn.functional.logsigmoid(torch.randn(2, 33, 5))
    initial = torch.randn(2, 5)
    expected, final = hgrn.naive_recurrent_hgrn(x, f, initial_state=initial, output_final_state=True)
    h, state = scan(f.exp(), x, initial)
    torch.testing.assert_close(h, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, final.view_as(state), rtol=1e-4, atol=1e-5)


a, x = torch.rand(2, 4, 3), torch.rand(2, 4, 3)
packed = torch.tensor([0, 2, 4])
WRONG: dict[str, tuple[type[Exception], str, Any]] = {
    "length": (ValueError, "scan: axis T is 4 in a but 5 in x", lambda: scan(a, torch.rand(2, 5, 3))),
    "width": (ValueError, "scan: axis D is 3 in a but 6 in x", lambda: scan(a, torch.rand(2, 4, 6))),
    "axes": (ValueError, r"scan: x has 2 axes \[4, 3\], expected \[B, T, D\]", lambda: scan(a, x[0])),
    "no time": (ValueError, "scan: axis T is 0 in a", lambda: scan(a[:, :0], x[:, :0])),
    "state": (
        ValueError,
        "scan: axis N is 3 in initial_state but the batch B is 2",
        lambda: scan(a, x, torch.zeros(3, 3)),
    ),
    "state dtype": (
        TypeError,
        "initial_state is float64 but x is float32",
        lambda: scan(a, x, torch.zeros(2, 3).double()),
    ),
    "integers": (TypeError, "scan: x is int64, expected a floating-point", lambda: scan(a, x.long())),
    "dtypes": (TypeError, "scan: a is float64 but x is float32", lambda: scan(a.double(), x)),
    "half complex": (TypeError, "scan: a is torch.float32 beside complex", lambda: scan(a, x + 0j)),
    "complex decay": (TypeError, "scan: a is complex64, expected a floating-point", lambda: scan(a + 0j, x)),
    "missing": (TypeError, "scan: x is missing", lambda: scan(a, None)),  # type: ignore[arg-type]
    "devices": (ValueError, "scan: a is on cpu but x is on meta", lambda: scan(a, x.to("meta"))),
    "packed batch": (ValueError, "scan: axis B is 2, but packed", lambda: scan(a, x, cu_seqlens=packed)),
    "packed end": (
        ValueError,
        "goes from 0 to 4, but axis T goes from 0 to 3",
        lambda: scan(a[:1, :3], x[:1, :3], cu_seqlens=packed),
    ),
    "packed order": (
        ValueError,
        "cu_seqlens falls from 3 to 2",
        lambda: scan(a[:1], x[:1], cu_seqlens=torch.tensor([0, 3, 2, 4])),
    ),
    "packed dtype": (TypeError, "cu_seqlens is float32", lambda: scan(a[:1], x[:1], cu_seqlens=packed.float())),
    "packed state": (
        ValueError,
        "number of packed sequences",
        lambda: scan(a[:1], x[:1], torch.zeros(1, 3), cu_seqlens=packed),
    ),
    "no tensor": (TypeError, "scan: x is int, expected a tensor", lambda: scan(a, 3)),
    "backend": (
        ValueError,
        "no backend 'cuda'; there are auto, naive, compiled, native, triton",
        lambda: scan(a, x, backend="cuda"),
    ),
    "unavailable": (
        RuntimeError,
        "backend 'triton' cannot run this problem: runs on cuda, the tensors are on cpu",
        lambda: scan(a, x, backend="triton"),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name: str) -> None:
    error, message, call = WRONG[name]
    with pytest.raises(error, match=message):
        call()


def test_a_wrong_call_is_refused_after_a_right_one_too() -> None:
    """The checks are remembered per signature; the values of cu_seqlens are looked at in every call."""
    scan(a[:1], x[:1], cu_seqlens=packed)
    with pytest.raises(ValueError, match="goes from 0 to 9"):
        scan(a[:1], x[:1], cu_seqlens=torch.tensor([0, 2, 9]))


def test_one_graph_serves_all_lengths() -> None:
    torch._dynamo.reset()
    graphs = 0

    def count(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    fast = torch.compile(lambda a, x: scan(a, x)[0] * 2, fullgraph=True, dynamic=True, backend=count)
    for length in (5, 64, 100, 1000):
        a, x = torch.rand(2, length, 3), torch.rand(2, length, 3)
        torch.testing.assert_close(fast(a, x), scan(a, x)[0] * 2)
    assert graphs == 1


def test_meta_and_fake_tensors_have_the_right_shapes() -> None:
    a, x = torch.rand(1, 4, 3, 2, device="meta"), torch.rand(1, 4, 3, 2, device="meta", dtype=torch.bfloat16)
    h, final = scan(a, x, cu_seqlens=torch.zeros(6, dtype=torch.int32, device="meta"))
    assert (h.shape, h.dtype, final.shape, final.dtype) == (x.shape, x.dtype, (5, 3, 2), torch.float32)


def test_calling_the_backward_operator_directly_never_loses_a_gradient() -> None:
    h = torch.rand(1, 3, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="not differentiable"):
        OP.backward_overload(h, None, a[:1, :3, :2], h, None, None, False, 7, "naive")
