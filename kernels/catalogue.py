"""The list of ops: one line each. Tests, benchmarks, docs and the tuner iterate it."""

from __future__ import annotations

from kernels.attention import OP as ATTENTION
from kernels.delta_rule import OP as DELTA_RULE
from kernels.dplr import OP as DPLR
from kernels.gated_norm import OP as GATED_NORM
from kernels.gla import OP as GLA
from kernels.hgru import OP as HGRU
from kernels.op import Op
from kernels.scan import OP as SCAN
from kernels.selective_scan import OP as SELECTIVE_SCAN
from kernels.short_conv import OP as SHORT_CONV

OPS: dict[str, Op] = {
    op.name: op for op in (SCAN, HGRU, SHORT_CONV, ATTENTION, GLA, DELTA_RULE, DPLR, SELECTIVE_SCAN, GATED_NORM)
}  # fmt: skip
