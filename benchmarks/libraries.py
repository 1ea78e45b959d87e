"""Other libraries' paths for some of our ops, each with the layout and the conventions of its own: on a CPU those of
plain PyTorch, on a GPU flash-linear-attention's kernels."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import foreign

# An op's function of tensors, by the op's own names, without states; and its result in the op's own layout.
Inputs = Mapping[str, Tensor]
Prepared = tuple[Callable[..., Tensor], Sequence[Tensor], Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Peer:
    """Somebody else's implementation. case: a key of CASES. package: the distribution. multiple: T must be one of it.

    prepare(inputs): a function, its inputs in the layout that it takes, and how its result is brought into ours.
    Raises ImportError where its package is missing. compiles: it first generates code, for a minute or so. device: the
    type of those that it is compared on.
    """

    name: str
    case: str
    package: str
    prepare: Callable[[Inputs], Prepared]
    multiple: int = 1
    compiles: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class Case:
    """The op, the sizes that are not a benchmark's usual ones, and what its problem lacks. J: 1, or as many as keys."""

    op: str
    axes: Mapping[str, int] = field(default_factory=dict)
    facts: Mapping[str, bool] = field(default_factory=dict)


CASES = {
    "scan": Case("scan"),
    "gla per head": Case("gla", {"J": 1}),
    "gla per key": Case("gla", {"J": 2}),
    "delta_rule": Case("delta_rule", {}, {"log_decay": False}),
    "delta_rule per head": Case("delta_rule", {"J": 1}),
    "delta_rule per key": Case("delta_rule", {"J": 2}),
    "dplr per key": Case("dplr", {"J": 2}),
    "selective_scan": Case("selective_scan", {"K": 16}),
    # theirs has one weight for all heads
    "gated_norm": Case("gated_norm", {"H": 1, "V": 2048}, {"bias": False}),
    "short_conv": Case("short_conv"),
}


@cache
def fla(path: str) -> Any:
    """A file of plain PyTorch, without the package around it, which takes long to import."""
    package = importlib.util.find_spec("fla")
    if package is None or package.origin is None:
        raise ImportError("fla-core is not installed")
    name = f"fla_{Path(path).parent.name}"
    spec = importlib.util.spec_from_file_location(name, Path(package.origin).parent / "ops" / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def channels_last_but_one(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


def fla_scan(given: Inputs) -> Prepared:
    function = fla("hgrn/naive.py").naive_recurrent_hgrn
    return lambda g, x: function(x, g)[0], [given["a"].log(), given["x"]], lambda h: h


def accelerated_scan(given: Inputs) -> Prepared:
    function = importlib.import_module("accelerated_scan.ref").scan
    return function, [channels_last_but_one(given[name]) for name in ("a", "x")], lambda h: h.transpose(1, 2)


def mambapy_scan(given: Inputs) -> Prepared:
    function = importlib.import_module("mambapy.pscan").pscan
    return function, [given["a"][..., None], given["x"][..., None]], lambda h: h.squeeze(3)


def assoc_scan(given: Inputs) -> Prepared:
    return importlib.import_module("assoc_scan").AssocScan(), [given["a"], given["x"]], lambda h: h


@cache
def generated_scan() -> Callable[..., Tensor]:
    """torch's associative_scan, whose code is generated for one length and any other sizes."""
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(left: Sequence[Tensor], right: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    @torch.compile(fullgraph=True)
    def scan(a: Tensor, x: Tensor) -> Tensor:
        return associative_scan(combine, (a, x), dim=1, combine_mode="generic")[1]

    def run(a: Tensor, x: Tensor) -> Tensor:
        for tensor in (a, x):
            torch._dynamo.mark_dynamic(tensor, (0, 2))
        return scan(a, x)

    return run


def torch_scan(given: Inputs) -> Prepared:
    return generated_scan(), [given["a"], given["x"]], lambda h: h


def with_decays(path: str, name: str, decay: str, *names: str) -> Callable[[Inputs], Prepared]:
    """One of fla's files: a function of tensors by name, whose decays may lack their last axis."""

    def prepare(given: Inputs) -> Prepared:
        function = getattr(fla(path), name)
        return by_name(function, decay, [*names], given)

    return prepare


def by_name(function: Callable[..., Any], decay: str, names: Sequence[str], given: Inputs) -> Prepared:
    tensors = [*(given[name] for name in names), given["log_decay"]]
    if tensors[-1].shape[-1] == 1:
        tensors[-1] = tensors[-1].squeeze(3)
    return lambda *all_: function(**dict(zip((*names, decay), all_)))[0], tensors, lambda y: y


def fla_delta(given: Inputs) -> Prepared:
    function = fla("delta_rule/naive.py").delta_rule_chunkwise
    tensors = [channels_last_but_one(given[name]) for name in ("q", "k", "v", "beta")]
    return lambda *tensors: function(*tensors)[0], tensors, lambda y: y.transpose(1, 2)


def transformers_delta(given: Inputs) -> Prepared:
    module = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    # without the kernels that it takes from other packages wherever those are installed
    function = inspect.unwrap(module.torch_chunk_gated_delta_rule)
    tensors = [*(given[name] for name in ("q", "k", "v")), given["log_decay"].squeeze(3), given["beta"]]
    return lambda *tensors: function(*tensors)[0], tensors, lambda y: y


def mambapy_selective(given: Inputs) -> Prepared:
    block = importlib.import_module("mambapy.mamba").MambaBlock
    return (
        partial(block.selective_scan, None),
        [given[name] for name in ("x", "delta", "A", "B", "C", "D")],
        lambda y: y,
    )


def transformers_selective(given: Inputs) -> Prepared:
    module = importlib.import_module("transformers.models.mamba.modeling_mamba")
    function = inspect.unwrap(module.mamba_selective_scan)
    x, delta, B, C = (channels_last_but_one(given[name]) for name in ("x", "delta", "B", "C"))

    def run(*tensors: Tensor) -> Tensor:
        y = function(*tensors)
        return y[0] if isinstance(y, tuple) else y

    return run, [x, delta, given["A"], B, C, given["D"]], lambda y: y.transpose(1, 2)


def launched(path: str, *names: str, decay: str = "", **options: Any) -> Callable[[Inputs], Prepared]:
    """One of fla's functions around kernels: of tensors by name, and of decays where it has them."""

    def prepare(given: Inputs) -> Prepared:
        function = partial(foreign.function(path), **options)
        if decay:
            return by_name(function, decay, names, given)
        return lambda *tensors: function(**dict(zip(names, tensors)))[0], [given[name] for name in names], lambda y: y

    return prepare


def launched_scan(path: str) -> Callable[[Inputs], Prepared]:
    def prepare(given: Inputs) -> Prepared:
        function = foreign.function(path)
        return lambda g, x: function(x=x, g=g)[0], [given["a"].log(), given["x"]], lambda h: h

    return prepare


def fla_norm(given: Inputs) -> Prepared:
    function = foreign.function("fla.modules.norm.fused_norm_gate:rms_norm_gated")
    x, gate, weight = (given[name].squeeze(-2) for name in ("x", "gate", "weight"))
    return lambda *tensors: function(*tensors, bias=None, eps=1e-5), [x, gate, weight], lambda y: y.unsqueeze(2)


QKV = ("q", "k", "v")


def on_gpu(name: str, case: str, prepare: Callable[[Inputs], Prepared]) -> Peer:
    return Peer(name, case, "fla-core", prepare, device="cuda")


PEERS = (
    Peer("fla-naive", "scan", "fla-core", fla_scan),
    Peer("accelerated-scan-ref", "scan", "accelerated-scan", accelerated_scan),
    Peer("mambapy", "scan", "mambapy", mambapy_scan),
    Peer("assoc-scan", "scan", "assoc-scan", assoc_scan),
    Peer("torch-associative-scan", "scan", "torch", torch_scan, compiles=True),
    Peer("fla-naive", "gla per key", "fla-core", with_decays("gla/naive.py", "naive_recurrent_gla", "gk", *QKV)),
    Peer(
        "fla-chunk", "gla per head", "fla-core", with_decays("simple_gla/naive.py", "naive_chunk_simple_gla", "g", *QKV)
    ),
    Peer("fla-chunk", "delta_rule", "fla-core", fla_delta, multiple=32),
    Peer(
        "fla-chunk",
        "delta_rule per head",
        "fla-core",
        with_decays("gated_delta_rule/naive.py", "naive_chunk_gated_delta_rule", "g", *QKV, "beta"),
    ),
    Peer("transformers", "delta_rule per head", "transformers", transformers_delta),
    Peer(
        "fla-chunk",
        "delta_rule per key",
        "fla-core",
        with_decays("kda/naive.py", "naive_chunk_kda", "g", *QKV, "beta"),
        multiple=64,
    ),
    Peer("mambapy", "selective_scan", "mambapy", mambapy_selective),
    Peer("transformers", "selective_scan", "transformers", transformers_selective),
    on_gpu("fla-chunk", "scan", launched_scan("fla.ops.hgrn:chunk_hgrn")),
    on_gpu("fla-recurrent", "scan", launched_scan("fla.ops.hgrn:fused_recurrent_hgrn")),
    on_gpu("fla-chunk", "gla per head", launched("fla.ops.simple_gla:chunk_simple_gla", *QKV, decay="g")),
    on_gpu("fla-chunk", "gla per key", launched("fla.ops.gla:chunk_gla", *QKV, decay="g")),
    on_gpu("fla-recurrent", "gla per key", launched("fla.ops.gla:fused_recurrent_gla", *QKV, decay="gk")),
    on_gpu("fla-chunk", "delta_rule", launched("fla.ops.delta_rule:chunk_delta_rule", *QKV, "beta")),
    on_gpu(
        "fla-chunk",
        "delta_rule per head",
        launched("fla.ops.gated_delta_rule:chunk_gated_delta_rule", *QKV, "beta", decay="g"),
    ),
    on_gpu("fla-chunk", "delta_rule per key", launched("fla.ops.kda:chunk_kda", *QKV, "beta", decay="g")),
    on_gpu(
        "fla-chunk",
        "dplr per key",
        launched("fla.ops.generalized_delta_rule:chunk_dplr_delta_rule", *QKV, "a", "b", decay="gk"),
    ),
    on_gpu("fla", "gated_norm", fla_norm),
    on_gpu(
        "fla", "short_conv", launched("fla.modules.causal_conv1d:causal_conv1d", "x", "weight", "bias", activation=None)
    ),
)


def peers_of(case: str, device: torch.device) -> list[Peer]:
    return [peer for peer in PEERS if (peer.case, peer.device) == (case, device.type)]
