"""Which machine a measurement belongs to: a short name, safe as a file name, that a person recognises."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from autotune.changes import changed

SAFE = re.compile(r"[a-z0-9][a-z0-9._-]{0,119}")
# Words that every chip of a maker carries in its name, and clock rates.
NOISE = re.compile(r"\((r|tm|c)\)|\b(processor|cpu)\b|@.*$", re.IGNORECASE)

_names: dict[tuple[torch.device, int], str] = {}
_pretended: dict[str, str] = {}


def fingerprint(device: torch.device) -> str:
    """The device's name in the tables, memoised: "cpu-intel-xeon-6-167-avx512-2threads", "nvidia-h100-80gb-hbm3-sm90".

    A CPU is its brand, family and model, the widest vector instructions that torch uses and torch's number of
    threads; changing the number of threads changes the name.
    """
    name = _names.get((device, torch.get_num_threads()))
    return _name(device) if name is None else name


def _name(device: torch.device) -> str:
    pretended = _pretended.get(device.type)
    if pretended is None and device.index is None and device.type in ("cuda", "xpu"):
        # "cuda" is whatever card is current, which may change: the name is filed under the card's own index.
        return fingerprint(torch.device(device.type, torch.get_device_module(device).current_device()))
    threads = torch.get_num_threads()
    name = pretended or _measured_name(device, threads)
    _names[device, threads] = name
    return name


def _measured_name(device: torch.device, threads: int) -> str:
    if device.type == "cpu":
        vector = torch.backends.cpu.get_cpu_capability()
        return slug("cpu", *cpu_model(), vector, f"{threads}threads")
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        target = getattr(card, "gcnArchName", "").split(":")[0] if torch.version.hip else f"sm{card.major}{card.minor}"
        return slug(card.name, target)
    if device.type == "xpu":
        return slug(torch.xpu.get_device_name(device))
    if device.type == "mps":
        return slug("mps", *cpu_model())
    return slug(device.type)


def architecture(name: str) -> str:
    """What kernels are compiled for on the GPU of that fingerprint, "sm90" or "gfx942"; "" where the name has none."""
    last = name.rpartition("-")[2]
    return last if re.fullmatch(r"sm\d+|gfx\w+", last) else ""


def slug(*parts: str) -> str:
    """Lower-case letters, digits, dots and single dashes; at most 120 characters."""
    text = re.sub(r"[^a-z0-9.]+", "-", "-".join(parts).lower()).strip("-.")
    return text[:120] or "unknown"


@functools.cache
def cpu_model() -> tuple[str, ...]:
    """Brand, family and model of the CPU, as far as the system tells."""
    system = platform.system()
    described: dict[str, str] = {}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if system == "Linux":
            described = _cpuinfo(Path("/proc/cpuinfo").read_text(errors="replace"))
        elif system == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            described = {"brand": subprocess.run(command, capture_output=True, text=True, timeout=5).stdout}
        elif system == "Windows":
            # "Intel64 Family 6 Model 158 Stepping 10, GenuineIntel"
            described = {"brand": re.sub(r" Stepping.*", "", os.environ.get("PROCESSOR_IDENTIFIER", ""))}
    brand = NOISE.sub(" ", described.pop("brand", "")).strip() or platform.machine() or "unknown"
    return (brand, *described.values())


def _cpuinfo(text: str) -> dict[str, str]:
    """Brand, family and model of the first processor in the text of /proc/cpuinfo; on ARM implementer and part."""
    first = dict(re.findall(r"^([^\t:\n]+?)\s*:[ \t]*(.*)$", text.split("\n\n")[0], re.MULTILINE))
    wanted = {"brand": "model name", "family": "cpu family", "model": "model"}
    arm = {"implementer": "CPU implementer", "part": "CPU part"}
    return {name: first[field] for name, field in {**wanted, **arm}.items() if first.get(field)}


@contextlib.contextmanager
def pretend(device_type: str, name: str) -> Iterator[None]:
    """Inside the block, every device of that type ("cpu", "cuda", ...) has the fingerprint `name`, in all threads.

    Raises:
        ValueError: the name is no file name of lower-case letters, digits, dots, dashes and underscores.
    """
    if not SAFE.fullmatch(name):
        raise ValueError(f"autotune: fingerprint is {name!r}, expected to match {SAFE.pattern}")
    before = _pretended.get(device_type)
    _set_pretended(device_type, name)
    try:
        yield
    finally:
        _set_pretended(device_type, before)


def _set_pretended(device_type: str, name: str | None) -> None:
    _pretended.pop(device_type, None)
    if name is not None:
        _pretended[device_type] = name
    _names.clear()
    changed()


def synchronizer(device: torch.device | None) -> Callable[[], None] | None:
    """What waits for the device's queued work; None where calls return when they are done."""
    if device is None or device.type in ("cpu", "meta"):
        return None
    module = torch.get_device_module(device)
    return functools.partial(module.synchronize, device) if device.type in ("cuda", "xpu") else module.synchronize


@functools.cache
def driver(device_type: str) -> str:
    """The version of the GPU's driver ("550.54.15", "hip 6.2"), or "" where there is none or nothing tells."""
    if device_type != "cuda":
        return ""
    if torch.version.hip:
        return f"hip {torch.version.hip}"
    with contextlib.suppress(OSError):
        found = re.search(r"Module.*?\s(\d+\.\d[\d.]*)", Path("/proc/driver/nvidia/version").read_text())
        if found:
            return found[1]
    return f"cuda {torch.version.cuda}"
