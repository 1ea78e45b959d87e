"""The short convolution: torch's own convolution, sequences of any length and number, the state, and wrong calls."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from kernels.agreement import Expected, draw, pose
from kernels.short_conv import OP, short_conv

pytestmark = pytest.mark.usefixtures("nan_filled")

CPU = torch.device("cpu")
RUNNABLE = ("naive", "compiled", "native")
INPUTS = ("x", "weight", "bias", "initial_state")
FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, activation: str | None, reverse: bool,
    bounds: list[int] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """torch's conv1d of each sequence by itself with its state in front."""
    if bounds is None:
        places = [(b, 0, x.shape[1]) for b in range(x.shape[0])]
    else:
        places = [(0, begin, end) for begin, end in itertools.pairwise(bounds)]
    outputs, states = [], []
    for n, (b, begin, end) in enumerate(places):
        rows = x[b, begin:end].flip(0) if reverse else x[b, begin:end]
        before = x.new_zeros(weight.shape[1] - 1, x.shape[2]) if state is None else state[n]
        rows = torch.cat([before, rows])
        if end > begin:
            y = F.conv1d(rows.t()[None], weight[:, None], bias, groups=x.shape[2])[0].t()
            y = F.silu(y) if activation else y
            outputs.append(y.flip(0) if reverse else y)
        states.append(rows[end - begin :])
    return torch.cat(outputs).reshape(x.shape), torch.stack(states)


@st.composite
def cases(draw_: st.DrawFn) -> dict[str, Any]:
    """Lengths around the width, widths of tensors that are no multiple of a vector's, sequences that are empty."""
    width = draw_(st.sampled_from((1, 2, 3, 4, 7)), label="W")
    length = draw_(st.one_of(st.integers(1, 2 * width + 2), st.sampled_from((63, 64, 65, 130, 257, 520))), label="T")
    bounds = None
    if draw_(st.booleans(), label="packed"):
        inner = draw_(st.lists(st.integers(0, length), max_size=6), label="cuts")
        bounds = [0, *sorted(inner), length]
    return {
        "sizes": {
            "B": 1 if bounds else draw_(st.integers(1, 3), label="B"),
            "T": length,
            "D": draw_(st.sampled_from((1, 3, 17, 70)), label="D"),
            "W": width,
            **({"N": len(bounds) - 1} if bounds else {}),
        },
        "bounds": bounds,
        "bias": draw_(st.booleans(), label="bias"),
        "initial_state": draw_(st.booleans(), label="initial_state"),
        "activation": draw_(st.sampled_from((None, "silu")), label="activation"),
        "reverse": draw_(st.booleans(), label="reverse"),
        "seed": draw_(st.integers(0, 999), label="seed"),
    }


def leaves(case: dict[str, Any], dtype: torch.dtype = FLOAT64) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(case["seed"])
    sampled = OP.sample(
        case["sizes"], dtype=dtype, generator=generator, bias=case["bias"], initial_state=case["initial_state"]
    )
    return {name: None if t is None else t.requires_grad_() for name, t in sampled.items()}


def gradients(outputs: tuple[Tensor, Tensor], inputs: dict[str, Tensor | None], seed: int) -> dict[str, Tensor]:
    """Under a loss on y and on the final state."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(out.shape, generator=generator, dtype=FLOAT64).to(out.dtype) for out in outputs]
    present = {name: t for name, t in inputs.items() if t is not None}
    return dict(zip(present, torch.autograd.grad(outputs, list(present.values()), weights)))


def same(found: Tensor, right: Tensor, backend: str) -> None:
    """To the last bit, unless torch's sigmoid made it: that one rounds otherwise in other places of a tensor."""
    ulps = 0 if backend == "native" else 8
    torch.testing.assert_close(found, right, rtol=ulps * 2.0**-23, atol=ulps * 2.0**-23)


def cu(bounds: list[int] | None) -> Tensor | None:
    return None if bounds is None else torch.tensor(bounds)


@pytest.mark.parametrize("backend", RUNNABLE)
@given(case=cases())
def test_is_the_convolution_of_torch(backend: str, case: dict[str, Any]) -> None:
    tensors = leaves(case)
    options = {"activation": case["activation"], "reverse": case["reverse"]}
    found = short_conv(*tensors.values(), **options, cu_seqlens=cu(case["bounds"]), backend=backend)
    right = convolution(*tensors.values(), **options, bounds=case["bounds"])
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(gradients(found, tensors, 1), gradients(right, tensors, 1))
    assert all(out.is_contiguous() for out in found)
    assert torch.equal(found[1], right[1])


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("backend_name", RUNNABLE[1:])
def test_every_dtype_errs_no_more_than_the_loop(backend_name: str, direction: str) -> None:
    backend = OP.backend(backend_name)

    # a single sum that nearly cancels: little of its error is allowed
    @example(case={"sizes": {"B": 1, "T": 257, "D": 1, "W": 1}, "bounds": None, "bias": False, "initial_state": False,
                   "activation": None, "reverse": False, "seed": 0}, dtypes=(FLOAT64, FLOAT64))  # fmt: skip
    @given(case=cases(), dtypes=st.sampled_from(((FLOAT64,) * 2, (FLOAT32,) * 2, (FLOAT16,) * 2, (BFLOAT16,) * 2,
                                                 (FLOAT32, FLOAT16), (FLOAT32, BFLOAT16))))  # fmt: skip
    def agrees(case: dict[str, Any], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        facts = {name: case[name] for name in ("bias", "initial_state", "reverse")}
        facts |= {"activation": case["activation"] or "", "packed": case["bounds"] is not None}
        problem = pose(OP, direction, case["sizes"], dtype=dtypes[1], device=CPU, decay_dtype=dtypes[0], **facts)
        inputs = draw(OP, problem, seed=case["seed"])
        expected = Expected.of(inputs)
        for config in backend.configs(problem):
            if not config.get("inductor"):
                wrong = expected.difference(inputs.call(backend, config)())
                assert wrong is None, f"{wrong} ({problem})"

    agrees()


def test_an_example_by_hand() -> None:
    x, weight = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1), torch.tensor([[100.0, 10.0, 1.0]])
    state = torch.tensor([8.0, 9.0]).view(1, 2, 1)
    for backend in RUNNABLE:
        y, final = short_conv(x, weight, None, state, backend=backend)
        assert y.flatten().tolist() == [891.0, 912.0, 123.0]
        assert final.flatten().tolist() == [2.0, 3.0]
        y, final = short_conv(x, weight, None, state, reverse=True, backend=backend)
        assert y.flatten().tolist() == [321.0, 932.0, 893.0]
        assert final.flatten().tolist() == [2.0, 1.0]


@pytest.mark.parametrize("width", [1, 4])
def test_loads_the_weights_of_conv1d(width: int) -> None:
    layer = nn.Conv1d(5, 5, width, groups=5, padding=width - 1)
    x = torch.randn(2, 9, 5)
    y, _ = short_conv(x, layer.weight.squeeze(1), layer.bias)
    torch.testing.assert_close(y, layer(x.transpose(1, 2)).transpose(1, 2)[:, :9])


@pytest.mark.parametrize("backend", RUNNABLE)
@given(case=cases(), data=st.data())
def test_split_anywhere_and_carry_the_state(backend: str, case: dict[str, Any], data: st.DataObject) -> None:
    if case["bounds"] or case["sizes"]["T"] == 1:
        return
    tensors = leaves(case, FLOAT32)
    x, weight, bias, state = tensors.values()
    assert x is not None
    options = {"activation": case["activation"], "reverse": case["reverse"], "backend": backend}
    whole = short_conv(x, weight, bias, state, **options)
    cut = data.draw(st.integers(1, case["sizes"]["T"] - 1), label="cut")
    parts: list[Any] = [None, None]
    order = (1, 0) if case["reverse"] else (0, 1)
    for part in order:
        parts[part], state = short_conv(x[:, cut:] if part else x[:, :cut], weight, bias, state, **options)
    split = torch.cat(parts, 1), state
    same(split[0], whole[0], backend)
    assert torch.equal(split[1], whole[1])
    torch.testing.assert_close(gradients(split, tensors, 2), gradients(whole, tensors, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", RUNNABLE)
def test_packed_sequences_do_not_see_each_other(backend: str) -> None:
    # some begin just before the native backend cuts rows into runs, at multiples of 64 and 256
    bounds = [0, 0, 2, 3, 3, 11, 254, 511, 530, 530]
    case = {"sizes": {"B": 1, "T": 530, "D": 18, "W": 4, "N": 9}, "bias": True, "initial_state": True, "seed": 5}
    x, weight, bias, state = leaves(case, FLOAT32).values()
    assert x is not None
    assert state is not None
    for activation, reverse in itertools.product((None, "silu"), (False, True)):
        options = {"activation": activation, "reverse": reverse, "backend": backend}
        y, final = short_conv(x, weight, bias, state, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), **options)
        dx, dstate = torch.autograd.grad((y * y).sum() + (final**3).sum(), (x, state))
        for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
            if begin == end:
                assert torch.equal(final[n], state[n])
                torch.testing.assert_close(dstate[n], 3 * state[n] ** 2)
                continue
            one, one_final = short_conv(x[:, begin:end], weight, bias, state[n : n + 1], **options)
            same(one, y[:, begin:end], backend)
            assert torch.equal(one_final[0], final[n])
            done = torch.autograd.grad((one * one).sum() + (one_final**3).sum(), (x, state))
            torch.testing.assert_close(done[0][:, begin:end], dx[:, begin:end])
            torch.testing.assert_close(done[1][n], dstate[n])


@pytest.mark.parametrize(
    ("reverse", "packed", "activation"), list(itertools.product((False, True), (False, True), (None, "silu")))
)
@pytest.mark.parametrize("backend", RUNNABLE)
def test_first_and_second_gradients(backend: str, reverse: bool, packed: bool, activation: str | None) -> None:
    sizes = {"B": 1 if packed else 2, "T": 5, "D": 2, "W": 3, "N": 3 if packed else 2}
    tensors = leaves({"sizes": sizes, "bias": True, "initial_state": True, "seed": 3})
    cu_seqlens = torch.tensor([0, 1, 1, 5]) if packed else None

    def function(*args: Tensor) -> tuple[Tensor, Tensor]:
        return short_conv(*args, activation=activation, reverse=reverse, cu_seqlens=cu_seqlens, backend=backend)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))
    assert torch.autograd.gradgradcheck(function, tuple(tensors.values()))


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize(
    ("packed", "optional", "width"), [(False, True, 4), (True, True, 4), (False, False, 1), (True, False, 2)]
)
def test_opcheck(backend: str, packed: bool, optional: bool, width: int) -> None:
    sizes = {"B": 1 if packed else 2, "T": 5, "D": 3, "W": width, "N": 3 if packed else 2}
    tensors = leaves({"sizes": sizes, "bias": optional, "initial_state": optional, "seed": 3}, FLOAT32)
    cu_seqlens = torch.tensor([0, 1, 1, 5]) if packed else None
    torch.library.opcheck(OP.forward_overload, (*tensors.values(), cu_seqlens, "silu", False, backend))


def test_only_the_gradients_that_are_needed() -> None:
    sizes = {"B": 2, "T": 300, "D": 20, "W": 4}
    inputs = draw(OP, pose(OP, "backward", sizes, dtype=FLOAT32, device=CPU, activation="silu"))
    for backend in OP.backends[:3]:
        run = {"activation": "silu", "reverse": False, "config": backend.configs(inputs.problem)[0]}
        every = backend.function("backward")(*inputs.tensors, None, needs=(True,) * 4, **run)
        for needs in itertools.product((False, True), repeat=4):
            found = backend.function("backward")(*inputs.tensors, None, needs=needs, **run)
            for needed, gradient, expected in zip(needs, found, every):
                assert torch.equal(gradient, expected) if needed else gradient is None


@pytest.mark.parametrize("gradient", ["y", "final_state"])
@pytest.mark.parametrize("backend", RUNNABLE)
def test_a_loss_on_one_output(backend: str, gradient: str) -> None:
    case = {"sizes": {"B": 2, "T": 2, "D": 3, "W": 5}, "bias": True, "initial_state": True, "seed": 1}
    tensors = leaves(case)
    out = short_conv(*tensors.values(), backend=backend)[gradient == "final_state"]
    right = convolution(*tensors.values(), None, False, None)[gradient == "final_state"]
    found = torch.autograd.grad(out.square().sum(), list(tensors.values()), allow_unused=True)
    expected = torch.autograd.grad(right.square().sum(), list(tensors.values()), allow_unused=True)
    for f, e in zip(found, expected):
        torch.testing.assert_close(f, torch.zeros_like(f) if e is None else e)


@pytest.mark.parametrize("backend", RUNNABLE)
def test_any_strides(backend: str) -> None:
    wide = torch.randn(2, 21, 14)
    weight, bias = torch.randn(2, 14, 8).unbind()[0][::2, ::2], torch.randn(14)[::2]
    state = torch.randn(7, 3, 2).permute(2, 1, 0)
    layouts = {
        "last axis sliced": lambda t: t[:, :, :7],
        "every other column": lambda t: t[:, :, ::2],
        "time before batch": lambda t: t[:, :, :7].transpose(0, 1).contiguous().transpose(0, 1),
        "columns before time": lambda t: t[:, :, :7].transpose(1, 2).contiguous().transpose(1, 2),
        "expanded over time": lambda t: t[:, :1, :7].expand(-1, 21, -1),
        "expanded over the batch": lambda t: t[:1, :, :7].expand(2, -1, -1),
    }
    for name, layout in layouts.items():
        x, dy = layout(wide), layout(wide.flip(0))
        right = short_conv(x.contiguous(), weight.contiguous(), bias.contiguous(), state.contiguous(), backend="naive")
        torch.testing.assert_close(short_conv(x, weight, bias, state, backend=backend), right, msg=name)
        near, far = x.contiguous().requires_grad_(), x.detach().requires_grad_()
        (expected,) = torch.autograd.grad(short_conv(near, weight, backend="naive")[0], near, dy.contiguous())
        (found,) = torch.autograd.grad(short_conv(far, weight, backend=backend)[0], far, dy)
        torch.testing.assert_close(found, expected, msg=name)


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, BFLOAT16], ids=str)
def test_silu_where_it_saturates(dtype: torch.dtype) -> None:
    """Down to where the sigmoid is no normal number any more, up to the largest numbers there are."""
    values = torch.cat([torch.linspace(-120, 120, 4001), torch.logspace(-30, 30, 601), -torch.logspace(-30, 30, 601)])
    z = values.to(dtype)[None, None].requires_grad_()
    one = torch.ones(z.shape[2], 1, dtype=dtype)
    y, _ = short_conv(z, one, activation="silu", backend="native")
    (dz,) = torch.autograd.grad(y.sum(), z)
    exact = z.detach().double()
    ulp, least = torch.finfo(dtype).eps, torch.finfo(state := torch.float32 if dtype.itemsize < 8 else dtype).tiny
    assert state in (FLOAT32, FLOAT64)
    right = exact * torch.sigmoid(exact)
    slope = torch.sigmoid(exact) * (1 + exact * torch.sigmoid(-exact))
    assert ((y.double() - right).abs() <= 4 * ulp * right.abs() + 1e3 * least).all()
    assert ((dz.double() - slope).abs() <= 4 * ulp * slope.abs().clamp(min=1) + 1e3 * least).all()


x, weight, state = torch.rand(2, 5, 3), torch.rand(3, 4), torch.rand(2, 3, 3)
WRONG: dict[str, tuple[type[Exception], str, Any]] = {
    "channels": (ValueError, "short_conv: axis D is 3 in x but 6 in weight", lambda: short_conv(x, torch.rand(6, 4))),
    "taps": (ValueError, "short_conv: axis W is 0 in weight", lambda: short_conv(x, weight[:, :0])),
    "conv1d": (ValueError, r"weight has 3 axes \[3, 1, 4\], expected \[D, W\]", lambda: short_conv(x, weight[:, None])),
    "bias": (ValueError, "short_conv: axis D is 3 in x but 4 in bias", lambda: short_conv(x, weight, torch.rand(4))),
    "no time": (ValueError, "short_conv: axis T is 0 in x", lambda: short_conv(x[:, :0], weight)),
    "state": (ValueError, "short_conv: axis W-1 is 4 in initial_state but axis W is 4 in weight",
              lambda: short_conv(x, weight, None, torch.rand(2, 4, 3))),
    "batch": (ValueError, "short_conv: axis N is 3 in initial_state but the batch B is 2",
              lambda: short_conv(x, weight, None, torch.rand(3, 3, 3))),
    "state dtype": (TypeError, "initial_state is float64 but x is float32",
                    lambda: short_conv(x, weight, None, state.double())),
    "weight dtype": (TypeError, "weight is bfloat16 but x is float32", lambda: short_conv(x, weight.bfloat16())),
    "integers": (TypeError, "short_conv: x is int64, expected a floating-point", lambda: short_conv(x.long(), weight)),
    "devices": (ValueError, "short_conv: x is on cpu but weight is on meta", lambda: short_conv(x, weight.to("meta"))),
    "activation": (ValueError, "short_conv: no activation 'relu'; there are None, 'silu'",
                   lambda: short_conv(x, weight, activation="relu")),
    "packed": (ValueError, "short_conv: axis B is 2, but packed",
               lambda: short_conv(x, weight, cu_seqlens=torch.tensor([0, 5]))),
    "end": (ValueError, "goes from 0 to 4, but axis T goes from 0 to 5",
            lambda: short_conv(x[:1], weight, cu_seqlens=torch.tensor([0, 4]))),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name: str) -> None:
    error, message, call = WRONG[name]
    with pytest.raises(error, match=message):
        call()
