"""Every registered mixer, and the variants below, obey every law; every law refuses a mixer that breaks it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mixers
from mixers import checks
from mixers.mixer import SequenceMixer

pytestmark = pytest.mark.usefixtures("nan_filled")

# Options that change the equation and so deserve the laws of their own
VARIANTS: dict[str, checks.Make] = {
    "hgrn real": lambda dim: mixers.build("hgrn", dim, complex=False, norm="rms", bias=False, lower_bound=0.3),
    "hgrn short_conv": lambda dim: mixers.build("hgrn", dim, short_conv=4, expand=2, gate_first=True),
    "hgrn bidirectional": lambda dim: mixers.build("hgrn", dim, bidirectional=True),
    "mingru identity": lambda dim: mixers.build("mingru", dim, candidate="identity", expand=2),
    "rglru heads": lambda dim: mixers.build("rglru", dim, heads=3),
    "attention window": lambda dim: mixers.build("attention", dim, heads=3, kv_heads=1, window=7),
    "stack": lambda dim: mixers.Stack(dim, ["hgrn", "mingru", "hgrn"]),
}
# Of the profile's examples these get every one, variants a fifth, and other mixers, which share their ops, a tenth.
THOROUGH = {"hgrn", "attention"}
MAKES = {**{name: (lambda dim, name=name: mixers.build(name, dim)) for name in mixers.names()}, **VARIANTS}


@st.composite
def cases(draw: st.DrawFn) -> checks.Case:
    """Lengths that cross two chunk borders of every candidate, widths that are no powers of two."""
    length = draw(st.one_of(st.integers(1, 70), st.sampled_from((31, 32, 33, 63, 64, 65, 97))))
    return checks.Case(
        batch=draw(st.integers(1, 3)),
        length=length,
        dim=draw(st.sampled_from((6, 12, 18))),
        cut=draw(st.integers(0, length)),
        scale=draw(st.sampled_from((0.1, 1.0, 3.0))),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


@pytest.mark.parametrize("law", [law for law in checks.LAWS if law not in checks.SLOW])
@pytest.mark.parametrize("name", MAKES)
def test_law(name: str, law: str) -> None:
    @settings(max_examples=settings.default.max_examples // (1 if name in THOROUGH else 5 if name in VARIANTS else 10))
    @given(case=cases())
    def holds(case: checks.Case) -> None:
        checks.check(law, MAKES[name], case)

    holds()


@pytest.mark.parametrize("law", checks.SLOW)
@pytest.mark.parametrize("name", MAKES)
def test_law_of_the_compiler(name: str, law: str) -> None:
    checks.check(law, MAKES[name], checks.Case(length=33, dim=12))


@pytest.mark.parametrize("name", MAKES)
def test_finite_at_65536_tokens(name: str) -> None:
    mixer = MAKES[name](6)
    x = torch.randn(1, 65536, 6, requires_grad=True)
    y, _ = mixer(x)
    y.square().mean().backward()
    assert x.grad is not None
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


class Toy(SequenceMixer):
    """A running sum with decay ½ and a weight: keeps every law. Each toy below breaks one."""

    def __init__(self, dim: int, *, backend: str = "auto") -> None:
        super().__init__()
        self.dim, self.backend = dim, backend
        self.weight = nn.Parameter(torch.full((dim,), 0.5))

    def init_state(self, batch: int, *, device: Any = None, dtype: Any = None) -> Any:
        dtype = dtype or self.weight.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (torch.zeros(batch, self.dim, device=device or self.weight.device, dtype=wide),)

    ops = ("scan",)

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        from kernels.scan import scan

        half = torch.full_like(x, 0.5)
        h, final = scan(half, x * self.weight.to(x.dtype), state[0], cu_seqlens=cu_seqlens, backend=self.backend)
        return h, (final,)


class WrongDtype(Toy):
    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        y, after = super().mix(x, state, cu_seqlens)
        return y.float(), after


class SeesTheFuture(Toy):
    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        return super().mix(x + 1e-6 * x.mean(1, keepdim=True), state, cu_seqlens)


class ForgetsTheState(Toy):
    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        y, after = super().mix(x, (torch.zeros_like(state[0]),), cu_seqlens)
        return y, after


class DecodesDifferently(Toy):
    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        return super().mix(x * (1 + 1e-6) if x.shape[1] == 1 else x, state, cu_seqlens)


class DecodesDifferentlyWithoutGradients(DecodesDifferently):
    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        kind = Toy if torch.is_grad_enabled() else DecodesDifferently
        return kind.mix(self, x, state, cu_seqlens)


class LeaksOverBorders(Toy):
    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        y, after = super().mix(x, state, cu_seqlens)
        return y + 1e-6 * y.cumsum(1) if cu_seqlens is not None else y, after


class MixesTheBatch(Toy):
    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        return super().mix(x + 1e-3 * x[:1], state, cu_seqlens)


class DetachesTheFinalState(Toy):
    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        y, after = super().mix(x, state, cu_seqlens)
        return y, (after[0].detach(),)


class WrongGradient(Toy):
    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        y, after = super().mix(x, state, cu_seqlens)
        return y.detach() + 1.01 * (y - y.detach()), after


class DependsOnTheBackend(Toy):
    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        return super().mix(x if self.backend == "naive" else x * (1 + 1e-6), state, cu_seqlens)


class Random(Toy):
    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        return super().mix(x + 1e-6 * torch.randn_like(x), state, cu_seqlens)


class Doubles(torch.autograd.Function):
    """Without `setup_context`, which torch.func asks for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return 2 * dy


class UnknownToTransforms(Toy):
    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        return super().mix(Doubles.apply(x), state, cu_seqlens)


class BreaksTheGraph(Toy):
    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        return super().mix(x if x.sum() < 1e30 else 2 * x, state, cu_seqlens)


class HidesAWeight(Toy):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.hidden = torch.randn(dim)

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        return super().mix(x * self.hidden.to(x.dtype), state, cu_seqlens)


class NarrowStateUnderAutocast(Toy):
    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        y, after = super().mix(x, state, cu_seqlens)
        return y, (after[0].bfloat16().float() if not torch.is_autocast_enabled("cpu") else after[0].bfloat16(),)


class Overflows(Toy):
    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        return super().mix(torch.log(torch.exp(x)), state, cu_seqlens)


BROKEN = {
    "shape_and_dtype": WrongDtype,
    "future_never_leaks": SeesTheFuture,
    "splitting": ForgetsTheState,
    "token_by_token": DecodesDifferently,
    "packed": LeaksOverBorders,
    "batch_permutes": MixesTheBatch,
    "gradients_arrive": DetachesTheFinalState,
    "gradcheck": WrongGradient,
    "backends_agree": DependsOnTheBackend,
    "same_bits_twice": Random,
    "transforms": UnknownToTransforms,
    "compiles": BreaksTheGraph,
    "exports": BreaksTheGraph,
    "copies_and_reloads": HidesAWeight,
    "autocast": NarrowStateUnderAutocast,
    "extreme_values": Overflows,
}


def test_the_honest_toy_keeps_every_law() -> None:
    checks.run(Toy, examples=5)


def test_every_law_has_a_broken_toy() -> None:
    assert set(BROKEN) == set(checks.LAWS)


@pytest.mark.parametrize("law", checks.LAWS)
def test_broken_toy_is_refused(law: str) -> None:
    # compilers speak in exceptions of their own
    refusal = Exception if law in checks.SLOW else checks.LawBroken
    with pytest.raises(refusal, match=None if law in checks.SLOW else law):
        checks.run(BROKEN[law], laws=[law], examples=20)


def test_decoding_without_gradients_is_held_to_the_law_too() -> None:
    with pytest.raises(checks.LawBroken, match="without gradients"):
        checks.run(DecodesDifferentlyWithoutGradients, laws=["token_by_token"], examples=20)


def test_run_by_name_and_unknown_law() -> None:
    checks.run("mingru", laws=["batch_permutes"], examples=2)
    with pytest.raises(ValueError, match="did you mean 'splitting'"):
        checks.run("mingru", laws=["spliting"])
    with pytest.raises(ValueError, match="no mixer 'mingr'"):
        checks.run("mingr")
