"""Imports only go down the floors of the house, and the core needs nothing but torch, NumPy and triton."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "sparsefx": 6,
    "sparsefx.__main__": 6,
    "sparsefx.api": 6,
    "sparsefx.bench": 6,
    "sparsefx.checkpoint": 6,
    "sparsefx.integrations": 6,
    "sparsefx.models": 6,
    "sparsefx.summary": 6,
    "sparsefx.scheduler": 5,
    "sparsefx.distributed": 5,
    "sparsefx.exchange": 5,
    "sparsefx.moments": 5,
    "sparsefx.ranks": 5,
    "sparsefx.update": 5,
    "sparsefx.window": 5,
    "sparsefx.specialize": 4,
    "sparsefx.choices": 4,
    "sparsefx.plan": 4,
    "sparsefx.graph": 3,
    "sparsefx.blocked": 2,
    "sparsefx.layers": 2,
    "sparsefx.masks": 1,
    "sparsefx.shards": 1,
    "sparsefx.algorithms": 1,
    "sparsefx.config": 0,
    "sparsefx.errors": 0,
    "sparsefx.kernels": 0,
}
PACKAGES = {"sparsefx": ROOT / "sparsefx", "sparsefx.kernels": ROOT / "kernels"}
THIRD_PARTY = {"torch", "numpy", "triton"}
EXTRAS = {
    "sparsefx.integrations.lightning": "lightning",
    "sparsefx.integrations.transformers": "transformers",
    "sparsefx.bench.report": "matplotlib",
    "sparsefx.bench.settings": "torchvision",
}
"""What a module may import beside: an integration with its module, a benchmark inside a function, when asked for."""


def find_modules() -> dict[str, Path]:
    modules = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            modules[".".join([package, *parts]).removesuffix(".__init__")] = path
    return modules


MODULES = find_modules()


def room(module: str) -> str | None:
    """The entry of FLOORS that `module` lives in: one of the listed names, or inside a listed package."""
    if module in FLOORS:
        return module
    parent = module.rpartition(".")[0]
    return room(parent) if parent not in ("", "sparsefx") else None


def imports(module: str, source: str) -> list[tuple[int, str]]:
    """Line and absolute name of everything that a module imports, wherever in the file."""
    found = []
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, node.module] if node.module else parents)
            names = [f"{base}.{alias.name}" for alias in node.names]
            found += [(node.lineno, name if name in MODULES else base) for name in names]
    return found


@pytest.mark.parametrize("module", MODULES)
def test_every_file_has_a_floor(module: str) -> None:
    assert room(module), f"{module}: give it a room in FLOORS or move it into one"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    here = room(module)
    assert here
    for line, name in imports(module, MODULES[module].read_text()):
        if name.partition(".")[0] != "sparsefx":
            continue
        there = room(name)
        assert there, f"{module}:{line} imports {name}, which has no floor"
        assert FLOORS[there] <= FLOORS[here], f"{module}:{line} on floor {FLOORS[here]} imports {name} above it"
        if here == "sparsefx.kernels":
            assert there == here, f"{module}:{line} imports {name}: kernels know nothing of sparsefx"


@pytest.mark.parametrize("module", MODULES)
def test_only_declared_dependencies(module: str) -> None:
    for line, name in imports(module, MODULES[module].read_text()):
        top = name.partition(".")[0]
        allowed = {*THIRD_PARTY, "sparsefx", *sys.stdlib_module_names, EXTRAS.get(module)}
        assert top in allowed, f"{module}:{line} imports {name}"


@pytest.mark.parametrize("module", [name for name in EXTRAS if name.startswith("sparsefx.bench")])
def test_optional_dependencies_are_not_imported_with_the_module(module: str) -> None:
    statements = [n for n in ast.parse(MODULES[module].read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)]
    top = ast.unparse(ast.Module(statements, []))
    assert EXTRAS[module] in MODULES[module].read_text()
    assert EXTRAS[module] not in {name.partition(".")[0] for _, name in imports(module, top)}


def test_upward_and_relative_imports_are_seen() -> None:
    source = "def f():\n    from ..scheduler import SparseMomentum\nfrom . import __init__\nimport sparsefx.api"
    names = [name for _, name in imports("sparsefx.algorithms.prune", source)]
    assert sorted(names) == ["sparsefx.algorithms", "sparsefx.api", "sparsefx.scheduler"]
    assert room("sparsefx.graph.trace") == "sparsefx.graph"
    assert room("sparsefx.kernels.cpu.build") == "sparsefx.kernels"
    assert room("sparsefx.stray") is None
