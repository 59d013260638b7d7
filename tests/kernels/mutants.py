"""Mutation tests of the tests: a bug planted in a kernel or its launcher must make some check fail."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
from checks import INTERPRETED
from fastrd.kernels.runtime.jit import Kernel


def write(module: ModuleType, old: str, new: str, folder: Path) -> Path:
    """The source of `module` with `old` replaced by `new`, up to where ops are registered,
    which must not happen twice."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert old in source, f"{module.__name__} no longer has {old!r}"
    path = folder / f"{module.__name__.rpartition('.')[2]}_mutant.py"
    path.write_text(source.replace(old, new).partition("\ndef _run(")[0], encoding="utf-8")
    return path


def load(path: Path, package: str = "fastrd.kernels") -> ModuleType:
    """A source that `write` wrote, as a module of `package`."""
    spec = importlib.util.spec_from_file_location(f"{package}.{path.stem}", path)
    mutant = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    return mutant


def plant(module: ModuleType, old: str, new: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Until the test ends `module` works with the functions, classes and kernels of the mutant, which is returned.

    Kernels with bugs run in the interpreter alone, where a fence stops them: on a GPU an error is there to stay.
    """
    mutant = load(write(module, old, new, folder), module.__package__)
    if not INTERPRETED and any(isinstance(value, Kernel) for value in vars(mutant).values()):
        pytest.skip("planted bugs run in Triton's interpreter only (TRITON_INTERPRET=1)")
    for name, value in vars(mutant).items():
        if isinstance(value, (FunctionType, type, Kernel)) and value.__module__ == mutant.__name__:
            monkeypatch.setattr(module, name, value)
    return mutant


def assert_caught(checks: Iterable[Callable[[], None]]) -> None:
    """At least one of the checks fails."""
    for check in checks:
        try:
            check()
        except AssertionError:
            return
    pytest.fail("no check noticed the bug")
