"""Other libraries are only timed where they give what ours gives, and are told apart from those that do not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

FILES = (
    *("peers", "libraries", "sizes", "timing", "machine", "limits"),
    *("targets", "acceptance", "hgru", "paths", "startup", "where"),
)
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
    for name in FILES:
        sys.modules.pop(name, None)


def sampled(peers: Any, case: str) -> dict[str, torch.Tensor]:
    return peers.sampled(case, {"J": 4, **SIZES}, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("case", CASES)
def test_they_give_what_ours_gives(peers: Any, case: str) -> None:
    given = sampled(peers, case)
    # transformers takes long to import, and torch's scan to generate
    theirs = peers.peers_of(case, torch.device("cpu"))
    listed = [peer for peer in theirs if peer.package not in ("transformers", "torch")]
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


def test_a_missed_target_is_explained(peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import targets

    def rows(_: int) -> Iterator[Any]:
        yield targets.Row("on time", 1.0, 1.0, "×", "")
        yield targets.Row("late", 1.5, 1.0, "×", "")
        yield targets.Row("told", 9.0, None, "×", "")

    parts = {"both": targets.Part(rows, lambda rounds: iter([f"here, in {rounds} rounds"]))}
    parts["first"] = targets.Part(lambda n: iter([next(rows(n))]), lambda _: iter(["never asked"]))
    monkeypatch.setattr(targets, "PARTS", parts)
    lines: list[str] = []
    table = targets.Table(lines.append)
    for name in parts:
        table.measure(name, 3)
    assert [line.split()[0] for line in lines] == ["both:", "ok", "MISSED", "9.00", "here,", "first:", "ok"]
    assert table.verdict() == "2 of 3 targets are met; missed: both (late)"
