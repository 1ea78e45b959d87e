"""Every mixer as a layer: the forward pass, training, and decoding token by token after a prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sizes import ACCELERATED_LAYERS, LAYERS, accelerated
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import mixers
from mixers.tables import sources


@pytest.mark.parametrize("name", mixers.names())
@pytest.mark.parametrize("direction", ["forward", "forward+backward", "decode"])
def test_mixer(
    name: str, direction: str, length: int, dtype_name: str, dim: int, device: torch.device, timer: Any
) -> None:
    if length == 1 and direction != "decode":
        pytest.skip("a single token is decoding")
    dtype = getattr(torch, dtype_name)
    batch = (ACCELERATED_LAYERS if accelerated(device) else LAYERS)[0]
    with torch.device(device):
        torch.manual_seed(0)
        mixer = mixers.build(name, dim).to(dtype)
        x = torch.randn(batch, length, dim, dtype=dtype)
    run = {"forward": forward, "forward+backward": forward_backward, "decode": decode}[direction](mixer, x)
    facts = {
        "kind": "mixer",
        "name": name,
        "direction": direction,
        "dtype": dtype_name,
        # of a decoding step: the tokens that came before
        "length": length,
        "sizes": {"dim": dim, "B": batch},
        "tokens": batch if direction == "decode" else batch * length,
        "source": sources("mixer", name, device.type),
        "bytes": least_bytes(mixer, x, direction),
        "flops": flops(run if direction == "decode" else forward(mixer, x)) * (3 if "backward" in direction else 1),
    }
    timer(run, facts)


def flops(run: Callable[[], object]) -> int:
    """Of the projections and of the ops' own formulas; element-wise operations are not counted. A backward pass is
    taken to have two products for each of the forward pass."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def least_bytes(mixer: mixers.SequenceMixer, x: torch.Tensor, direction: str) -> int:
    """Weights, x and y moved once forward; backward weights are read and their gradients written, as for x and y.

    A step of decoding reads the state.
    """
    weights = sum(parameter.nbytes for parameter in mixer.parameters())
    if direction == "decode":
        with torch.no_grad():
            held = tree_leaves(mixer(x)[1])
        return weights + sum(t.nbytes for t in held) + 2 * x[:, :1].numel() * x.itemsize
    return weights + 2 * x.nbytes if direction == "forward" else 3 * weights + 6 * x.nbytes


def forward(mixer: mixers.SequenceMixer, x: torch.Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return mixer(x)

    return run


def forward_backward(mixer: mixers.SequenceMixer, x: torch.Tensor) -> Callable[[], object]:
    leaves = [x.requires_grad_(), *mixer.parameters()]
    gradient = torch.randn_like(x)

    def run() -> object:
        return torch.autograd.grad(mixer(x)[0], leaves, gradient, allow_unused=True)

    return run


def decode(mixer: mixers.SequenceMixer, x: torch.Tensor) -> Callable[[], object]:
    """One token after a prompt of x; the state is not advanced, so that every round does the same."""
    with torch.no_grad():
        state = mixer(x)[1]

    def run() -> object:
        with torch.no_grad():
            return mixer(x[:, :1], state)

    return run
