"""Plugins: files and modules that register networks, methods, inner maximisations, data sets and measures.

A recipe names the plugins it needs and executes none: whoever starts a run names them too (`--plugin`, `plugins=`), or
has them installed under the entry-point group `fastrd.plugins`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from .kinds import check_kinds
from .schema import RecipeError

GROUP = "fastrd.plugins"
_loaded: dict[str, str] = {}  # name -> where it came from
_given: list[str] = []  # what to load in another process; installed plugins load there by themselves


@check_kinds
def load_plugins(sources: Sequence[str | os.PathLike] = ()) -> tuple[str, ...]:
    """Imports `sources` and all installed plugins, each once; returns the names of all that are loaded.

    sources: paths of Python files (a plugin's name is then that of the file) or names of modules.

    Raises:
        FileNotFoundError: no such file.
        ImportError: no such module, or one that it needs is missing.
        ValueError: the plugin failed, or another of its name is loaded.
    """
    for point in metadata.entry_points(group=GROUP):
        _load(point.name, f"entry point {point.value}", point.load)
    for source in (os.fspath(each) for each in sources):
        if source.endswith(".py"):
            path = Path(source).expanduser().resolve()
            if not path.is_file():
                raise FileNotFoundError(f"plugin: no file {source}; accepted: a Python file, or the name of a module")
            _load(path.name, str(path), partial(_import_file, path))
            source = str(path)
        elif source.replace(".", "").isidentifier():
            _load(source, f"module {source}", partial(importlib.import_module, source))
        else:
            raise ValueError(f"plugin: got {source!r}; accepted: a file that ends in .py, or the name of a module")
        if source not in _given:
            _given.append(source)
    return tuple(sorted(_loaded))


def given_plugins() -> tuple[str, ...]:
    """Returns the files and modules loaded so far, for another process to load."""
    return tuple(_given)


def check_plugins(needed: Iterable[str], where: str) -> None:
    """Raises RecipeError where a plugin that a recipe or run names is not loaded."""
    if missing := [name for name in needed if name not in _loaded]:
        raise RecipeError(
            f"{where}: plugins: needs {', '.join(missing)}, which a recipe does not load by itself; accepted: --plugin "
            "FILE.py or MODULE (plugins= in Python) for each"
        )


def _load(name: str, place: str, load: Callable[[], object]) -> None:
    if name in _loaded:
        if _loaded[name] != place:
            raise ValueError(f"plugin: got {place} where {name} is {_loaded[name]}; accepted: one of that name")
        return
    try:
        load()
    except ImportError as error:
        raise ImportError(f"plugin: {place}: {error}", name=error.name) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin may raise anything at all, and may leave
        raise ValueError(f"plugin: {place}: {type(error).__name__}: {error}") from error
    _loaded[name] = place


def _import_file(path: Path) -> None:
    name = f"fastrd_plugin_{path.stem}"
    spec: Any = importlib.util.spec_from_file_location(name, path)  # of a file that exists
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # what it defines can be pickled, for worker processes
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
