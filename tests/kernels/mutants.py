"""Mutation tests of the tests: a bug planted in a kernel or its launcher must make some check fail."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import pytest


def plant(module: ModuleType, old: str, new: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launchers of `module` launch kernels in which `old` has become `new`, until the test ends."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(old) >= 1, f"{module.__name__} no longer has {old!r}"
    # Ops are registered from there on, which must not happen twice.
    kernels = source.replace(old, new)[: source.replace(old, new).index("\ndef _run(")]
    path = folder / f"{module.__name__.rpartition('.')[2]}_mutant.py"
    path.write_text(kernels, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"{module.__package__}.{path.stem}", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    for name in ("_triton_form", "_launch_update"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, getattr(mutant, name))


def assert_caught(checks: Iterable[Callable[[], None]]) -> None:
    """At least one of the checks fails."""
    for check in checks:
        try:
            check()
        except AssertionError:
            return
    pytest.fail("no check noticed the bug")
