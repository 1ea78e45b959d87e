"""The contract as callable checks: the laws that every mixer obeys, for ours and for anybody's.

from mixers import checks
checks.run(lambda dim: MyMixer(dim))        # raises LawBroken: which law, on which case, by how much
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch.autograd.gradcheck import GradcheckError

from mixers import registry
from mixers.checks.case import Case, LawBroken, Make
from mixers.checks.laws import LAWS, SLOW

__all__ = ["LAWS", "SLOW", "Case", "LawBroken", "Make", "check", "run"]


def run(
    mixer: Make | str,
    *,
    laws: Sequence[str] | None = None,
    examples: int = 10,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> None:
    """Checks a mixer (a registered name, or a function from a width to a fresh mixer) against the laws, on the device.

    Raises:
        LawBroken: the first law that does not hold, with the case that shows it.
        ValueError: there is no law, or no mixer, of a name; the device has no float64.
    """
    device = torch.device(device)
    if device.type == "mps":
        raise ValueError("checks: the laws compare in float64, which mps has not; run them on the CPU")
    if isinstance(mixer, str):
        name = mixer
        registry.get(name)
        make: Make = lambda dim: registry.build(name, dim)  # noqa: E731
    else:
        make = mixer
    for law in laws or LAWS:
        if law not in LAWS:
            raise ValueError(f"no law {law!r}{registry.suggest(law, LAWS)}; there are {', '.join(LAWS)}")
        rng = random.Random(seed)
        for _ in range(2 if law in SLOW else examples):
            check(law, make, Case.draw(rng, device))


def check(law: str, make: Make, case: Case) -> None:
    """One law on one case; an AssertionError or gradcheck failure becomes LawBroken with both named."""
    try:
        LAWS[law](make, case)
    except (AssertionError, GradcheckError) as error:
        raise LawBroken(f"{law}: {error} ({case})") from error
