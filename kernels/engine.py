"""What `autotune.warmup` and `autotune.explain` ask of the ops. Everything is imported when it is first needed."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from autotune.program import Progress

# Inputs, the loop's results or a second problem of that length, a candidate's results, and what it needs meanwhile: so
# many times a problem's own tensors.
COPIES = 4


class Engine:
    def recording(self) -> AbstractContextManager[Mapping[Any, Any]]:
        from kernels.op import recording

        return recording()

    def tune(
        self,
        problems: Iterable[Any],
        *,
        seconds: float,
        memory: int | None,
        isolate: bool | None,
        progress: Progress,
    ) -> Mapping[Any, Any]:
        from kernels.catalogue import OPS
        from kernels.tuning import tune_problems

        def fits(problem: Any) -> bool:
            return memory is None or COPIES * OPS[problem.op].cost(problem).bytes <= memory

        met = filter(fits, problems)
        return tune_problems(met, seconds=seconds, memory=memory, isolate=isolate, progress=progress)

    def explain(self, problem: Any) -> Any:
        from kernels.catalogue import OPS
        from kernels.explain import explain

        return explain(OPS[problem.op], problem)

    def release(self) -> None:
        from kernels import pool

        gc.collect()
        pool.release()
        if torch.accelerator.is_available():
            torch.accelerator.memory.empty_cache()
