"""Chooses among interchangeable implementations: remembers what was measured, looks it up, never times unasked.

A leaf package: it sees names, keys and callables, and nothing of what they compute. `choose` is a pure table
look-up; only `autotune.search.search` runs anything, and it compares with a reference before it times. Every
measurement is one JSON line: shipped with the package in `tables/<device>.jsonl`, or appended to the user's
`<cache folder>/tuned/<device>.jsonl` (the environment variable SEQUENCE_MIXERS_CACHE moves the folder).

    import autotune
    from autotune.search import Candidate, search

    key = autotune.Key.of("scan", "forward", autotune.fingerprint(x.device), "float32", {"B": 8, "D": 1024}, {}, 2000)
    candidates = [Candidate("naive", {}, prepare_naive), Candidate("native", {"block": 64}, prepare_native)]
    search(key, candidates, reference, agree, source=hash_of_the_op)

    choice = autotune.choose(key, [(c.backend, c.config) for c in candidates], hash_of_the_op)
    if choice is None:
        ...  # nothing usable was measured: the caller's stated rule, less what `autotune.refused` lists

Whoever memoises a choice compares `autotune.generation()`, which grows whenever a choice may have changed.
Under `torch.use_deterministic_algorithms(True)` timings must not decide: callers go by their rule, without `choose`.
The functions `search` and `measure` are imported from their modules, whose names they share.
"""

from __future__ import annotations

from autotune.agree import agree
from autotune.changes import changed, generation
from autotune.device import fingerprint, pretend
from autotune.key import Key, bucket
from autotune.lock import Lock, lock, use
from autotune.lookup import Choice, choose, closest, listing, refresh, refused, user_store, using
from autotune.program import explain, warmup
from autotune.record import Record
from autotune.store import Store, cache_folder

__all__ = [
    "Choice",
    "Key",
    "Lock",
    "Record",
    "Store",
    "agree",
    "bucket",
    "cache_folder",
    "changed",
    "choose",
    "closest",
    "explain",
    "fingerprint",
    "generation",
    "listing",
    "lock",
    "pretend",
    "refresh",
    "refused",
    "use",
    "user_store",
    "using",
    "warmup",
]
