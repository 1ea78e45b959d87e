"""Tensors without numbers meet the problems that real ones meet: so the commands find out what to tune."""

from __future__ import annotations

import pytest
import torch

from mixers import registry
from mixers.commands import common


@pytest.mark.parametrize("name", registry.names())
def test_a_rehearsal_meets_what_a_run_meets(name: str) -> None:
    mixer = common.build(name, 32, {}, device=torch.device("cpu"))
    rehearsed = common.problems_at(mixer, 3, 77, backward=True)
    assert len(rehearsed) == len(set(rehearsed))
    assert all(parameter.grad is None for parameter in mixer.parameters())
    # in whatever order gradients come
    assert set(rehearsed) == set(common.problems_of(mixer, 3, 77, backward=True))


def test_a_mixer_that_looks_at_numbers_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = common.build("mingru", 8, {}, device=torch.device("cpu"))
    mix = mixer.mix
    monkeypatch.setattr(mixer, "mix", lambda x, *rest: mix(x * x.norm().item(), *rest))
    assert common.problems_at(mixer, 1, 9, backward=True) == list(common.problems_of(mixer, 1, 9, backward=True))


def test_a_rehearsal_takes_no_memory() -> None:
    mixer = common.build("hgrn", 512, {}, device=torch.device("cpu"))
    forward, *_ = common.problems_at(mixer, 1024, 1 << 20, backward=True)
    assert (forward.op, forward.direction) == ("hgru", "forward")
    assert (forward.sizes["B"], forward.sizes["T"]) == (1024, 1 << 20)
