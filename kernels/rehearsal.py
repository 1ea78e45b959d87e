"""The problems that a model meets, found out without computing anything: its tensors have shapes, but no numbers.

with rehearsing() as met:
    x = torch.empty(1, 8192, 512)
    model(x)
tune_problems(met, seconds=10)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.catalogue import OPS
from kernels.problem import Problem
from kernels.registration import NAMESPACE


@contextlib.contextmanager
def rehearsing() -> Iterator[dict[Problem, None]]:
    """Collects the problems that ops meet inside the block, where tensors are fake; parameters may be real ones.

    Gradients are for torch.autograd.grad to find: backward() would leave fake ones in the parameters.
    """
    meetings = _Meetings()
    with FakeTensorMode(allow_non_fake_inputs=True), meetings:
        yield meetings.met


class _Meetings(TorchDispatchMode):
    """Sees the operators of ops on their way to what makes their outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.met: dict[Problem, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE:
            name, direction = func._opname, "forward"
            if name not in OPS:
                name, direction = name.removesuffix("_backward"), "backward"
            if name in OPS:
                self.met[OPS[name].problem_of(direction, args)] = None
        return func(*args, **(kwargs or {}))
