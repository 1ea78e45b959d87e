"""One number that grows whenever a choice may have changed, for callers that memoise choices."""

from __future__ import annotations

import threading

_lock = threading.Lock()
_generation = 0


def generation() -> int:
    """Grows whenever a choice may have changed in this process; a memo made at another generation is stale."""
    return _generation


def changed() -> None:
    """Makes every memo stale without reading a table again."""
    global _generation
    # Two threads adding at once must not arrive at the same number: a memo made between them would look fresh.
    with _lock:
        _generation += 1
