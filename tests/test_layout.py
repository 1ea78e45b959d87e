"""The house: imports run one way, `kernels` is shared ground, and importing costs little and needs nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import autotune
import mixers

# the checkout in an editable install, site-packages in a real one
ROOT = Path(mixers.__file__).parent.parent
# who may import whom
ALLOWED = {"autotune": set(), "kernels": {"autotune"}, "mixers": {"autotune", "kernels"}}
# modules directly in Hugging Face's `kernels` package, which shares the import name
HUGGING_FACE = {
    "__init__", "__main__", "_versions", "backends", "benchmark", "benchmarks", "check", "cli", "compat",
    "deps", "doc", "generate_readme", "init", "kernel_card_utils", "layer", "load", "lockfile", "metadata",
    "migrate", "python_depends", "skills", "status", "upload", "utils", "variants", "verify", "versions",
    "wheel",
}  # fmt: skip


def test_imports_run_from_mixers_to_kernels_to_autotune() -> None:
    seen = 0
    for package, allowed in ALLOWED.items():
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    assert node.level == 0, f"{path}: relative import"
                    names = [node.module or ""]
                for name in names:
                    top = name.split(".")[0]
                    seen += 1
                    assert top not in ALLOWED or top == package or top in allowed, (
                        f"{path}:{node.lineno} imports {name}"
                    )
                    assert top not in ("benchmarks", "tests"), (
                        f"{path}:{node.lineno} imports {name}, which is not installed"
                    )
    assert seen > 100


def test_kernels_leaves_room_for_hugging_face() -> None:
    import kernels

    assert getattr(kernels, "__file__", None) is None, (
        "kernels/ must have no __init__.py: another distribution may own it"
    )
    files = {path.stem for path in (ROOT / "kernels").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert files.isdisjoint(HUGGING_FACE)


def test_a_mixer_is_named_like_its_file() -> None:
    from mixers import registry

    ours = [n for n in mixers.names() if registry.get(n).__module__.startswith("mixers.")]
    assert len(ours) >= 4
    for name in ours:
        assert registry.get(name).__module__ == f"mixers.{name}"


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_importing_needs_neither_triton_nor_a_compiler_nor_the_extras() -> None:
    blocked = (
        "triton",
        "typer",
        "rich",
        "pandas",
        "matplotlib",
        "safetensors",
        "hypothesis",
        "pytest",
        "fla",
        "transformers",
    )
    code = f"""
import os, sys
os.environ["PATH"] = ""
os.environ.pop("CXX", None)
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)")
sys.meta_path.insert(0, Block())
import torch, mixers
mixer = mixers.build("hgrn", dim=8)
y, state = mixer(torch.randn(2, 20, 8))
y.sum().backward()
print(tuple(y.shape), mixer.f_proj.weight.grad.isfinite().all().item())
"""
    done = _python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "(2, 20, 8) True"


def test_importing_mixers_loads_no_heavy_module() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import mixers
print(*(set(sys.modules) - before))
for name in mixers.__all__:
    getattr(mixers, name)
print(*(set(sys.modules) - before))
"""
    done = _python(code)
    assert done.returncode == 0, done.stderr
    first, everything = ({name.split(".")[0] for name in line.split()} for line in done.stdout.splitlines())
    assert "mixers" in first
    assert first.isdisjoint({"kernels", "autotune"}), "a mixer's file is imported when it is asked for"
    heavy = {"triton", "pandas", "matplotlib", "rich", "typer", "hypothesis", "sympy", "transformers"}
    assert everything.isdisjoint(heavy)
    assert everything >= {"kernels", "autotune"}


def test_packages_are_typed() -> None:
    for package in (autotune, mixers):
        assert (Path(package.__file__ or "").parent / "py.typed").exists()
    assert (ROOT / "kernels" / "scan" / "py.typed").exists()


def test_the_page_of_references_has_every_mixer_and_tests_that_there_are() -> None:
    page = (Path(__file__).parent.parent / "docs" / "checked_against.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+)[^|]*\| ([^|]*) \| `(\w+\.py)::(\w+)` \|$", page, re.MULTILINE)
    assert {mixer for mixer, *_ in rows} == set(mixers.names())
    for _, against, file, test in rows:
        code = (Path(__file__).parent / file).read_text(encoding="utf-8")
        body = code.partition(f"def {test}(")[2].partition("\ndef ")[0]
        assert body, f"{file} has no {test}"
        quoted = [name for name in re.findall(r"`([\w./]+)`", against) if name != "fla"]
        assert bool(quoted) != (against.startswith(("**no such code**", "the paper"))), against
        for name in quoted:
            # imported by that name, or called by its last one
            assert name in body or f"F.{name.rpartition('.')[2]}(" in body, f"{test}: {name}"
