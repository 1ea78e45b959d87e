"""The sizes that the benchmarks take."""

from __future__ import annotations

from kernels.op import Op

# Widths of a small language model; an op's other axes are 4.
SIZES = {"B": 2, "D": 512, "H": 8, "G": 2, "K": 64, "V": 64, "W": 4}


def sizes_of(op: Op, length: int) -> dict[str, int]:
    axes = {axis.partition("-")[0] for arg in (*op.inputs, *op.outputs) for axis in arg.letters}
    sizes = {axis: SIZES.get(axis, 4) for axis in axes}
    return {**sizes, "B": SIZES["B"], "N": SIZES["B"], "T": length, **({"S": length} if "S" in axes else {})}
