"""Tests marked `triton` launch kernels: on a GPU where there is one, else in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so an ordinary run leaves those tests out and
test_interpreter.py runs them in a process of their own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checks import CAN_LAUNCH, INTERPRETED
from fastrd.kernels.cpu import native
from fence import fenced


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if CAN_LAUNCH:
        return
    left_out = [item for item in items if item.get_closest_marker("triton")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=INTERPRETED)
def fence() -> Iterator[None]:
    with fenced():
        yield


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def plant(tmp_path, monkeypatch) -> Iterator[Callable[..., None]]:
    """plant(file, old, new, *parts): until the test ends C++ is built with `new` for `old` in cpu/`file`.

    parts: the sources that the test needs, as fewer are built sooner.
    """

    def replace(file: str, old: str, new: str, *parts: str) -> None:
        others = {source.name for source in native.SOURCES.glob("*.cpp")} - {*parts, file, "lanes.cpp"}
        folder = shutil.copytree(native.SOURCES, tmp_path / "cpu", ignore=shutil.ignore_patterns(*others))
        path = Path(folder) / file
        text = path.read_text()
        assert text.count(old) == 1, f"{file} no longer has {old!r} once"
        path.write_text(text.replace(old, new))
        monkeypatch.setattr(native, "SOURCES", path.parent)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("FASTRD_CXXFLAGS", os.environ.get("FASTRD_CXXFLAGS", "") + " -O1")  # half the time to build
        native.library.cache_clear()

    yield replace
    native.library.cache_clear()
