"""One page from any set of runs: what they reached, how they trained, beside what the paper prints; another of
benchmarks.

`table` and `benchmark_table` are text for a terminal. `build` and `build_benchmarks` write a self-contained HTML page,
the same tables as Markdown and the figures as PNG files.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..core.files import check_path, locked
from ..core.kinds import check_kinds
from . import benchmarks, page
from .content import gains, measured, notes, printed
from .document import check_out, write
from .rows import group
from .runs import load
from .tables import printable

__all__ = ["benchmark_table", "build", "build_benchmarks", "table"]


@check_kinds
def table(runs: Sequence[str | os.PathLike]) -> str:
    """Returns the results of run folders as a plain text table with its footnotes. Errors as in `build`."""
    rows = group(load(runs))
    tables = [table.plain() for table in (measured(rows), printed(rows)) if table is not None]
    return "\n\n".join([*tables, "\n".join(map(printable, [*notes(rows), *gains(rows)]))])


@check_kinds
def build(
    runs: Sequence[str | os.PathLike], out: str | os.PathLike, *, title: str | None = None, data: Any = None
) -> Path:
    """Writes the page `out`, and beside it its tables as Markdown and its figures as PNG, named after `out`.

    Args:
        runs: run folders. Each needs one of recipe.toml, log.jsonl, evaluation.json; curve.json (a robustness curve)
            and panel.npz (examples) are shown where there are any. Runs of one recipe that differ in their seed alone
            are one row: mean and sample standard deviation.
        out: the HTML file. "report.html" also makes report.md and report-training.png, report-robustness.png,
            report-alignment.png, report-panel-NAME.png, as far as the runs have something to show.
        title: heading of the page.
        data: where the images came from: one line, or a `fastrd.data.Dataset`, whose `source` says it.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: a run folder does not exist or holds nothing to report.
        ValueError: no runs; a file in a run folder is malformed (names the file and, for text, the line); `out` is
            not an .html file.
        TypeError: `runs` is a single path.
    """
    path = _checked(out)
    sections = page.sections(group(load(runs)), getattr(data, "source", data))
    with locked(path.parent):
        return write(path, title or "Adversarial robust distillation", sections)


@check_kinds
def benchmark_table(files: Sequence[str | os.PathLike]) -> str:
    """Returns what pytest-benchmark's JSON files say as plain text tables, one for each kernel and machine. Errors as
    in `build_benchmarks`."""
    blocks = []
    for machine in benchmarks.load(files):
        blocks.append(benchmarks.conditions(machine).plain())
        for name, found in machine.kernels.items():
            blocks.append(f"{name}\n{benchmarks.table(found).plain()}")
            if (parts := benchmarks.breakdown(found)) is not None:
                blocks.append(f"{name}: {benchmarks.BREAKDOWN.lower()}\n{parts.plain()}")
    return "\n\n".join(blocks)


@check_kinds
def build_benchmarks(files: Sequence[str | os.PathLike], out: str | os.PathLike, *, title: str | None = None) -> Path:
    """Writes the page `out` of what the benchmarks measured; beside it tables as Markdown and figures as PNG, as
    `build` does.

    Args:
        files: JSON files that `pytest bench --benchmark-only --benchmark-json=FILE` wrote. Those made under the same
            conditions (device, threads, versions) are shown together.
        out: the HTML file.
        title: heading of the page.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: no files; a malformed one (named); one variant measured twice under the same conditions; `out` is
            not an .html file.
    """
    path, sections = _checked(out), benchmarks.sections(benchmarks.load(files))
    with locked(path.parent):
        return write(path, title or "Kernel benchmarks", sections)


def _checked(out: str | os.PathLike) -> Path:
    """Returns the path of a page that can be written."""
    path = check_path(out=out)
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        example = str(path / "report.html")
        raise ValueError(f"out: got {str(path)!r}; accepted: the name of an .html file, e.g. {example!r}")
    check_out(path)
    return path


class _Callable(ModuleType):
    """Makes `from fastrd import report; report(runs, out)` the same as `report.build(runs, out)`."""

    __call__ = staticmethod(build)


sys.modules[__name__].__class__ = _Callable
