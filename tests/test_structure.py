"""Imports point downwards: each layer knows only the layers below it, and no two modules import each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# From top to bottom. Units of one line do not import each other, but for the modules inside one folder.
LAYERS = (
    ("fastrd.__main__",),
    ("fastrd.cli",),
    ("fastrd.demo", "fastrd.reproduce"),
    ("fastrd",),
    ("fastrd.deploy",),
    ("fastrd.workflow",),
    ("fastrd.engine", "fastrd.report"),
    ("fastrd.recipe",),
    ("fastrd.evaluation", "fastrd.methods", "fastrd.published"),
    ("fastrd.attacks",),
    ("fastrd.losses", "fastrd.data", "fastrd.models", "fastrd.doctor"),
    ("fastrd.core",),
    ("fastrd.kernels",),
)
FLOOR = {unit: -number for number, layer in enumerate(LAYERS) for unit in layer}


def modules() -> dict[str, Path]:
    """Module name -> file, as installed."""
    found = {}
    for folder, package in ((ROOT / "fastrd", "fastrd"), (ROOT / "kernels", "fastrd.kernels")):
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = file
    return found


FILES = modules()


def imports(module: str) -> Iterator[str]:
    """The modules of this package that a module imports, at its head or inside a function."""
    file = FILES[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                if inner in FILES or source in FILES:
                    yield inner if inner in FILES else source


def unit(module: str) -> str:
    """The folder or file of the package that LAYERS names."""
    return ".".join(module.split(".")[:2])


ARROWS = {module: set(imports(module)) - {module} for module in FILES}


def test_every_unit_has_a_layer():
    assert {unit(module) for module in FILES} == FLOOR.keys()


def test_no_import_points_upwards():
    wrong = [
        f"{module} -> {other}"
        for module, others in ARROWS.items()
        for other in others
        if unit(module) != unit(other) and FLOOR[unit(module)] <= FLOOR[unit(other)]
    ]
    assert sorted(wrong) == []


def test_no_modules_import_each_other():
    # A package's own __init__ collects names from its modules, which may name a neighbour through the package.
    graph = {module: {o for o in others if not module.startswith(f"{o}.")} for module, others in ARROWS.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_engine_knows_neither_reports_nor_cards():
    known = {other for module, others in ARROWS.items() if unit(module) == "fastrd.engine" for other in others}
    assert [other for other in known if unit(other) in ("fastrd.report", "fastrd.reproduce")] == []
