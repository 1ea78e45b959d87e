"""Four ranks whose measurements disagree run the same kernels after `autotune.agree`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

RANKS = 4
# of all tests; each has a cache folder of its own besides
COMPILED = Path(os.environ["SEQUENCE_MIXERS_CACHE"]) / "native"


def _rank(rank: int, port: int, folder: str, compiled_code: str) -> None:
    # a cache of its own: what was measured there favours another backend; what was compiled is everybody's
    cache = Path(folder, f"cache{rank}")
    cache.mkdir()
    (cache / "native").symlink_to(compiled_code)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SEQUENCE_MIXERS_CACHE": str(cache)}
    import torch
    import torch.distributed as dist

    import autotune
    from kernels.scan import OP

    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    a = torch.rand(2, 33, 5, generator=torch.Generator().manual_seed(0))
    problem = OP.problem_of("forward", (a, a, None, None, False, "auto"))
    key = OP.key(problem)
    store = autotune.user_store(key.device)

    def record(backend: str, config: dict[str, int], median: float) -> None:
        store.append(
            autotune.Record(
                key, backend, config, "ok", median_s=median, spread_s=1e-9, rounds=3, source=OP.source("cpu")
            )
        )

    compiled = dict(OP.backend("compiled").configs(problem)[0])
    # rank 0 has measured what the others have, and found the opposite
    record("naive", {}, 1e-6 if rank % 3 == 0 else 9e-6)
    record("compiled", compiled, 9e-6 if rank % 3 == 0 else 1e-6)
    before = OP.choose(problem).backend.name
    agreed = autotune.agree()
    after = OP.choose(problem).backend.name
    # a measurement of one's own does not part the ranks again
    record("compiled", compiled, 1e-9)
    later = OP.choose(problem).backend.name
    bits = OP(a, a, None, None, False, "auto")[0].numpy().tobytes().hex()
    autotune.refresh()
    own = OP.choose(problem).backend.name
    found = {"before": before, "agreed": agreed, "after": after, "later": later, "bits": bits, "own": own}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def test_four_ranks_that_disagree_agree_on_rank_0(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    COMPILED.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(port), str(tmp_path), str(COMPILED)], env=env, stderr=subprocess.PIPE, text=True
        )
        for rank in range(RANKS)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=240)
        assert rank.returncode == 0, errors
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS)]
    assert [each["before"] for each in found] == ["naive", "compiled", "compiled", "naive"]
    for what in ("after", "later"):
        assert [each[what] for each in found] == ["naive"] * RANKS
    assert [each["agreed"] for each in found] == [2] * RANKS
    assert len({each["bits"] for each in found}) == 1
    assert [each["own"] for each in found] == ["compiled"] * RANKS


def test_without_a_process_group_it_says_so() -> None:
    import autotune

    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialised"):
        autotune.agree()


if __name__ == "__main__":
    _rank(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
