"""Other libraries are only timed where they give what ours gives, and are told apart from those that do not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

SIZES = {"B": 2, "T": 64, "D": 6, "H": 2, "G": 2, "K": 4, "V": 4, "N": 2}
CASES = (
    *("scan", "selective_scan", "gla per head", "gla per key"),
    *("delta_rule", "delta_rule per head", "delta_rule per key"),
)


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script, from a folder that is not installed."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import peers

    yield peers
    for name in ("peers", "libraries", "limits"):
        sys.modules.pop(name, None)


def sampled(peers: Any, case: str) -> dict[str, torch.Tensor]:
    return peers.sampled(case, {"J": 4, **SIZES}, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("case", CASES)
def test_they_give_what_ours_gives(peers: Any, case: str) -> None:
    given = sampled(peers, case)
    # transformers takes long to import, and torch's scan to generate
    listed = [peer for peer in peers.PEERS if peer.case == case and peer.package not in ("transformers", "torch")]
    assert listed
    for peer in listed:
        found = peers.prepared(peer, given, "forward+backward")
        if isinstance(found, str):
            assert found.startswith("not installed"), f"{peer.name}: {found}"
            # a package that is there, but has what we import no more, is not missing
            with pytest.raises(PackageNotFoundError):
                version(peer.package)
        else:
            assert all(gradient.isfinite().all() for gradient in found.run("forward+backward")())


def test_why_one_is_left_out(peers: Any) -> None:
    given = sampled(peers, "scan")

    def found(prepare: Any, **facts: Any) -> Any:
        peer = peers.Peer("toy", "scan", "toy", prepare, **facts)
        return peers.prepared(peer, given, "forward", generate=False)

    def missing(_: Any) -> Any:
        raise ImportError("no module toy")

    def of(function: Any) -> Any:
        return lambda tensors: (function, [tensors["a"], tensors["x"]], lambda h: h)

    assert found(missing) == "not installed (no module toy)"
    assert found(of(lambda a, x: x)).startswith("gives something else: off by ")
    assert found(of(lambda a, x: x @ a)).startswith("fails here: RuntimeError: ")
    assert found(of(lambda a, x: x), multiple=48) == "takes multiples of 48 rows"
    assert found(of(lambda a, x: x), compiles=True) == "code is generated for a minute or more"
    right = found(of(lambda a, x: peers.OPS["scan"](a, x, None, None, False, "naive")[0]))
    assert isinstance(right, peers.Subject)
