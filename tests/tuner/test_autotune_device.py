"""Fingerprints: readable, safe as file names, one per kind of machine and number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import autotune
from autotune import device

CPU = torch.device("cpu")

XEON = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) Platinum 8488C @ 2.40GHz
stepping\t: 8

processor\t: 1
model\t\t: 1
"""
GRAVITON = "processor\t: 0\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: 0xd40\n"


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_the_cpu_says_its_vector_width_and_threads(threads: int) -> None:
    name = autotune.fingerprint(CPU)
    assert device.SAFE.fullmatch(name)
    assert name.startswith("cpu-")
    assert name.endswith(f"-{torch.backends.cpu.get_cpu_capability().lower()}-{threads}threads")
    torch.set_num_threads(threads + 1)
    assert autotune.fingerprint(CPU).endswith(f"-{threads + 1}threads")
    torch.set_num_threads(threads)
    assert autotune.fingerprint(CPU) == name


def test_the_system_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    name = autotune.fingerprint(CPU)

    def refuse(*_: object) -> str:
        raise AssertionError("asked again")

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", refuse)
    assert autotune.fingerprint(CPU) == name


def test_cpus_are_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device._cpuinfo(XEON) == {
        "brand": "Intel(R) Xeon(R) Platinum 8488C @ 2.40GHz",
        "family": "6",
        "model": "143",
    }
    monkeypatch.setattr(device.platform, "system", lambda: "Linux")
    for text, expected in [
        (XEON, "intel-xeon-platinum-8488c-6-143"),
        (GRAVITON, "aarch64-0x41-0xd40"),
        ("", "aarch64"),
    ]:
        monkeypatch.setattr(Path, "read_text", lambda *_, text=text, **__: text)
        monkeypatch.setattr(device.platform, "machine", lambda: "aarch64")
        assert device.slug(*device.cpu_model.__wrapped__()) == expected


def test_a_gpu_is_its_name_and_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(device, "_names", {})
    assert autotune.fingerprint(torch.device("cuda:0")) == "nvidia-h100-80gb-hbm3-sm90"
    # Plain "cuda" follows the current device, whatever was asked before.
    assert autotune.fingerprint(torch.device("cuda")) == "nvidia-h100-80gb-hbm3-sm90"
    card.name = "NVIDIA L4"
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert autotune.fingerprint(torch.device("cuda")) == "nvidia-l4-sm90"


@given(st.lists(st.text(), max_size=4))
def test_a_slug_is_always_safe(parts: list[str]) -> None:
    assert device.SAFE.fullmatch(device.slug(*parts))


def test_pretending_is_seen_by_memos_and_ends() -> None:
    real = autotune.fingerprint(CPU)
    before = autotune.generation()
    with autotune.pretend("cpu", "toy"):
        assert autotune.fingerprint(CPU) == "toy"
        assert autotune.generation() > before
        with autotune.pretend("cpu", "toy-2"):
            assert autotune.fingerprint(CPU) == "toy-2"
        assert autotune.fingerprint(CPU) == "toy"
        inside = autotune.generation()
    assert autotune.fingerprint(CPU) == real
    assert autotune.generation() > inside


def test_a_gpu_can_be_pretended_where_there_is_none() -> None:
    with autotune.pretend("cuda", "nvidia-h100-80gb-hbm3-sm90"):
        assert autotune.fingerprint(torch.device("cuda:0")) == "nvidia-h100-80gb-hbm3-sm90"
        assert autotune.fingerprint(torch.device("cuda")) == "nvidia-h100-80gb-hbm3-sm90"


@pytest.mark.parametrize("name", ["", "../escape", "a/b", "Upper", "a" * 121])
def test_unsafe_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="fingerprint is"), autotune.pretend("cpu", name):
        pass


def test_waiting_is_for_devices_that_queue() -> None:
    assert device.synchronizer(CPU) is None
    assert device.synchronizer(None) is None
    assert callable(device.synchronizer(torch.device("cuda:0")))


def test_the_driver_is_read_from_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.driver("cpu") == ""
    for text, expected in [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\n", "550.54.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  555.42.02  Release Build\n", "555.42.02"),
    ]:
        monkeypatch.setattr(Path, "read_text", lambda *_, text=text, **__: text)
        assert device.driver.__wrapped__("cuda") == expected
