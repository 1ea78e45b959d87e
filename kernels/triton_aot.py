"""Compiles a Triton kernel for a named GPU on a machine that has none, and reads from the machine code what it needs.

    compile_kernel(kernel, {"x": torch.empty(8, device="meta"), "n": 8, "BLOCK": 128}, "sm_90", num_warps=4)

Targets are "sm_80", "sm_90", "sm_100" (NVIDIA A100, H100, B200), "gfx942" (AMD MI300) and their kin. What is reported
is what the driver will be told and what the code does; nothing is measured. Needs no driver, but the kernels must not
have been imported under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

# Shared memory of a multiprocessor in KiB, and the warps and programs it holds at most, by compute capability
MULTIPROCESSORS = {
    80: (164, 64, 32),
    86: (100, 48, 16),
    89: (100, 48, 24),
    90: (228, 64, 32),
    100: (228, 64, 32),
    120: (100, 48, 24),
}
POINTERS = {torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
POINTERS |= {torch.int64: "*i64", torch.int32: "*i32"}


@dataclass(frozen=True)
class Compiled:
    """What one program of a compiled kernel needs and does.

    registers: per thread. spills: bytes per thread of registers that did not fit. shared: bytes per program.
    occupancy: the share of a multiprocessor's warps that can be resident. loads, stores: how many instructions that
    read and write global memory the code has, by their width in bytes; asynchronous: how many loads go straight to
    shared memory. programs: of the launch, 0 where nobody said; bytes: of the tensors that it is given, each once;
    steps: as the launch says.
    """

    kernel: str
    target: str
    threads: int
    registers: int
    spills: int
    shared: int
    occupancy: float
    loads: Mapping[int, int]
    stores: Mapping[int, int]
    asynchronous: int
    programs: int = 0
    bytes: int = 0
    steps: int = 0


# Where `remembering` keeps what was compiled
_memories: list[Path] = []


@contextlib.contextmanager
def remembering(folder: Path) -> Iterator[None]:
    """Inside the block nothing is compiled twice: what is known of a kernel is kept in a file of its own, named by a
    hash of its source, its arguments' types, the target, the options and Triton's version."""
    _memories.append(folder)
    try:
        yield
    finally:
        _memories.pop()


def lanes(target: str) -> int:
    """The threads of a warp on this target: 64 on AMD's CDNA, else 32."""
    return 64 if target.startswith("gfx9") else 32


def compile_kernel(
    kernel: Any, arguments: Mapping[str, Any], target: str, *, programs: int = 0, **options: int
) -> Compiled:
    """Compiles a @triton.jit function as a launch with these arguments would.

    Tensors count as pointers to aligned memory and may be on the meta device; numbers and None as Triton specializes
    them. programs: of the launch. options: num_warps and other options of the launch.

    Raises:
        ValueError: the target's name is neither "sm_<number>" nor "gfx...".
        RuntimeError: the kernel was imported for the interpreter.
    """
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError(f"{kernel.__name__} is not compiled: it was imported with TRITON_INTERPRET=1")
    if not re.fullmatch(r"sm_\d+|gfx\w+", target):
        raise ValueError(f"no target {target!r}; a target is sm_80, sm_90, sm_100, gfx942 or the like")
    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, lanes(target))
    source = specialize(kernel, arguments, nvidia)
    moved = sum(x.numel() * x.element_size() for x in arguments.values() if isinstance(x, Tensor))
    file = _file(source, target, options) if _memories else None
    found = _remembered(file)
    if found is None:
        # Triton prints the whole assembly where the assembler rejects it
        with contextlib.redirect_stdout(None):
            compiled = triton.compile(source, target=gpu, options=options)
        found = (_nvidia if nvidia else _amd)(compiled, kernel.__name__, target)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            # Whole or not at all, whoever else writes it
            with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as whole:
                json.dump(asdict(found), whole)
            os.replace(whole.name, file)
    return replace(found, programs=programs, bytes=moved)


def _file(source: ASTSource, target: str, options: Mapping[str, int]) -> Path:
    name = f"{source.hash()} {target} {sorted(options.items())} {triton.__version__}"
    # What is read from the code is this module's business
    name += hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return _memories[-1] / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"


def _remembered(file: Path | None) -> Compiled | None:
    try:
        known = json.loads(file.read_text()) if file is not None else None
    except (OSError, ValueError):
        return None
    if known is None:
        return None
    widths = {name: {int(width): count for width, count in known[name].items()} for name in ("loads", "stores")}
    return Compiled(**{**known, **widths})


def specialize(kernel: Any, arguments: Mapping[str, Any], nvidia: bool) -> ASTSource:
    """What Triton makes of a kernel and the arguments of a launch before it compiles."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
            if not nvidia and value.numel() * value.element_size() < 2**31:
                attributes[(i,)].append(["tt.pointer_range", 32])
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def _nvidia(compiled: CompiledKernel, kernel: str, target: str) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", listing)}
    shared = max(used["SHARED"], compiled.metadata.shared)
    threads = 32 * compiled.metadata.num_warps
    kibibytes, warps, programs = MULTIPROCESSORS[int(target[3:])]
    # Registers are given to a warp in units of 256, from one of four files of 16384; every program costs 1 KiB besides
    per_warp = -(-used["REG"] // 8) * 256
    resident = min(
        4 * (16384 // per_warp) * 32 // threads,
        kibibytes * 1024 // (-(-shared // 128) * 128 + 1024),
        warps * 32 // threads,
        programs,
    )
    codes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", listing, re.MULTILINE)
    loads = [code for code in codes if code.startswith(("LDG.", "LDGSTS."))]
    return Compiled(
        kernel=kernel,
        target=target,
        threads=threads,
        registers=used["REG"],
        spills=used["STACK"] + used["LOCAL"],
        shared=shared,
        occupancy=resident * threads / 32 / warps,
        loads=_by_width(loads, _nvidia_width),
        stores=_by_width([code for code in codes if code.startswith("STG.")], _nvidia_width),
        asynchronous=sum(code.startswith("LDGSTS.") for code in loads),
    )


def _amd(compiled: CompiledKernel, kernel: str, target: str) -> Compiled:
    listing = compiled.asm["amdgcn"]

    def used(pattern: str) -> int:
        return int(re.search(pattern, listing)[1])  # type: ignore[index]

    shared = max(used(r"\.group_segment_fixed_size: (\d+)\n"), compiled.metadata.shared)
    threads = used(r"\.max_flat_workgroup_size: (\d+)\n")
    waves = threads // lanes(target)
    # A compute unit has four SIMDs of eight waves; the compiler says how many of those its registers allow
    resident = min(4 * used(r"; Occupancy: (\d+)") // waves, 64 * 1024 // max(shared, 1), 32 // waves)
    codes = re.findall(r"^\s+((?:global|buffer|flat)_(?:load|store)_\w+)", listing, re.MULTILINE)
    loads = [code for code in codes if "_load_" in code]
    return Compiled(
        kernel=kernel,
        target=target,
        threads=threads,
        registers=used(r"; TotalNumVgprs: (\d+)"),
        spills=used(r"\.private_segment_fixed_size: (\d+)\n"),
        shared=shared,
        occupancy=resident * waves / 32,
        loads=_by_width(loads, _amd_width),
        stores=_by_width([code for code in codes if "_store_" in code], _amd_width),
        asynchronous=sum("_lds_" in code for code in loads),
    )


def _by_width(codes: list[str], width: Callable[[str], int]) -> dict[int, int]:
    return dict(sorted(Counter(width(code) for code in codes).items(), reverse=True))


def _nvidia_width(code: str) -> int:
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((widths[part] for part in code.split(".") if part in widths), 4)


def _amd_width(code: str) -> int:
    multiple = re.search(r"dwordx(\d)", code)
    if multiple:
        return 4 * int(multiple[1])
    return 4 if "dword" in code else 2 if "short" in code else 1
