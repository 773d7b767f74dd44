"""The import rules of the three packages, read from the source: nothing is imported."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("stages", "cascade", "train")
OURS = {*PACKAGES, "sample", "tests"}

NEVER_ON_IMPORT = {"diffusers", "timm", "torchvision"}
"""No part of the program needs them: they are yardsticks of the tests."""
TRAINING_ONLY = {"lightning", "webdataset", "matplotlib", "gradio"}
"""Extras: what generates pictures must work without them."""


@dataclass(frozen=True)
class Import:
    """One imported module, as its source names it."""

    module: str
    line: int
    on_import: bool
    """False within a function and under ``if TYPE_CHECKING``."""

    @property
    def top(self) -> str:
        return self.module.split(".")[0]


def imports(source: str) -> list[Import]:
    return list(_walk(ast.parse(source), on_import=True))


def _walk(node: ast.AST, *, on_import: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(name.name, child.lineno, on_import) for name in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: a relative import hides its package"
            assert child.module is not None
            yield Import(child.module, child.lineno, on_import)
            # "from cascade import rng" imports cascade.rng.
            for name in child.names:
                yield Import(f"{child.module}.{name.name}", child.lineno, on_import)
        else:
            runs = not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                runs = False
            yield from _walk(child, on_import=on_import and runs)


def files(*parts: str) -> list[Path]:
    found = [path for part in parts for path in _files(ROOT / part)]
    assert found, f"no source under {parts}"
    return found


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def violations(paths: list[Path], forbidden: set[str], *, on_import: bool = False) -> list[str]:
    """List imports of the forbidden packages or modules; ``on_import``: module-level ones only."""
    return [
        f"{path.relative_to(ROOT)}:{found.line} imports {found.module}"
        for path in paths
        for found in imports(path.read_text(encoding="utf-8"))
        if (found.on_import or not on_import)
        and any(found.module == name or found.module.startswith(f"{name}.") for name in forbidden)
    ]


def test_the_reader_sees_every_way_to_import() -> None:
    source = """
import torch.nn as nn, cascade.rng
from train import runs
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import timm
try:
    import gradio
except ImportError:
    pass
class A:
    import diffusers
    def method(self):
        from cascade.errors import UserError
"""
    found = {(i.module, i.on_import) for i in imports(source)}
    for module in ("torch.nn", "cascade.rng", "train", "train.runs", "gradio", "diffusers"):
        assert (module, True) in found
    for module in ("timm", "cascade.errors"):
        assert (module, False) in found and (module, True) not in found


@pytest.mark.parametrize(
    ("part", "forbidden"),
    [
        ("stages", {"cascade", "train", "sample", "tests"}),
        ("cascade", {"train", "sample", "tests"}),
        ("train", {"sample", "tests"}),
        ("sample.py", {"train", "stages", "tests"}),
    ],
)
def test_imports_point_down_only(part: str, forbidden: set[str]) -> None:
    assert violations(files(part), forbidden) == []


def test_networks_know_no_text_model_and_no_training_framework() -> None:
    assert violations(files("stages"), {"transformers", "tokenizers", "lightning"}) == []


def test_the_diffusion_maths_imports_torch_alone() -> None:
    allowed = {*sys.stdlib_module_names, "torch"}
    foreign = [
        f"{path.name}: {found.module}"
        for path in files("cascade/diffusion")
        for found in imports(path.read_text(encoding="utf-8"))
        if found.top not in allowed and not found.module.startswith("cascade.diffusion")
    ]
    assert foreign == []


def test_what_makes_pictures_does_not_import_what_measures_them() -> None:
    rest = [path for path in files("cascade") if path.parts[-2] != "evaluate"]
    assert violations(rest, {"cascade.evaluate"}) == []
    below = files("cascade/diffusion", "cascade/text", "cascade/checkpoints")
    assert violations(below, {"cascade.pipelines"}) == []


def test_nothing_imports_a_yardstick_when_it_is_imported() -> None:
    assert violations(files(*PACKAGES, "sample.py"), NEVER_ON_IMPORT, on_import=True) == []


def test_making_pictures_needs_none_of_the_extras() -> None:
    assert violations(files("stages", "cascade", "sample.py"), TRAINING_ONLY, on_import=True) == []


def test_sample_py_answers_help_and_slips_before_anything_heavy_is_imported() -> None:
    """All that ``import sample`` runs is the standard library, PyYAML and our own files."""
    seen: set[Path] = set()
    heavy: list[str] = []
    waiting = [ROOT / "sample.py"]
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for found in imports(path.read_text(encoding="utf-8")):
            if not found.on_import:
                continue
            if found.top in OURS:
                waiting += _modules(found.module)
            elif found.top not in {*sys.stdlib_module_names, "yaml"}:
                heavy.append(f"{path.relative_to(ROOT)}:{found.line} imports {found.module}")
    assert heavy == []
    assert {ROOT / "cascade" / "config.py", ROOT / "cascade" / "errors.py"} <= seen


def _modules(module: str) -> list[Path]:
    """Return the files that importing a module of ours runs."""
    parts = module.split(".")
    paths = [ROOT.joinpath(*parts[:n], "__init__.py") for n in range(1, len(parts) + 1)]
    paths.append(ROOT.joinpath(*parts).with_suffix(".py"))
    return [path for path in paths if path.is_file()]


def test_importing_a_module_does_nothing() -> None:
    """Module level holds definitions: no call for its effect, no loop, no ``with``."""
    inert = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    active = []
    for path in files("stages", "cascade", "train", "sample.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            guarded = isinstance(node, ast.If) and (
                "TYPE_CHECKING" in ast.dump(node.test) or "__name__" in ast.dump(node.test)
            )
            if not (isinstance(node, inert) or docstring or guarded):
                active.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert active == []


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in files(*PACKAGES, "sample.py")
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert silent == []


def test_tests_are_no_package_and_no_module_hides_a_dependency() -> None:
    """An ``__init__.py`` under tests makes ``import cascade`` find tests/cascade."""
    assert list((ROOT / "tests").rglob("__init__.py")) == []
    taken = {"safetensors", "transformers", "torch", "numpy", "PIL", "yaml", "tqdm"}
    tops = {path.stem for path in ROOT.glob("*.py")} | set(PACKAGES)
    assert not tops & {*taken, *sys.stdlib_module_names}
