"""The document model of every page: sections of figures, tables and notes, written as HTML, Markdown and PNG."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.files import atomic_write, check_writable
from ..core.version import __version__
from . import figures
from .runs import Panel
from .tables import Table, escaped

MARK = "<!-- Written by fastrd beside the page of the same name. -->"


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it, in this order: plots, example images, tables, notes, what is missing."""

    heading: str
    level: int = 2  # of the heading, 2 to 4
    name: str = ""  # of the picture file: STEM-NAME.png
    plots: Sequence[figures.Plot] = ()
    panels: Sequence[tuple[str, Panel]] = ()  # (label, example images)
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    absent: str = ""  # what could not be shown, and why


def check_out(out: Path) -> None:
    """Raises OSError where the page `out` could not be written, or its Markdown would replace a file of another."""
    text = out.with_suffix(".md")
    if text.is_file() and not out.is_file() and not text.read_bytes().startswith(MARK.encode()):
        raise FileExistsError(f"out: {text} would be replaced, which is not of this page; accepted: another name")
    check_writable(out, text)


def write(out: Path, title: str, sections: Iterable[Section]) -> Path:
    """Writes the page `out` (.html), and beside it the same as Markdown and the figures as PNG. Returns `out`."""
    check_out(out)
    sections, blocks = list(sections), [f"{MARK}\n# {escaped(title)}"]
    for section in sections:
        blocks.append(f"{'#' * section.level} {escaped(section.heading)}")
        for name, label, picture in _pictures(section):
            file = f"{out.stem}-{name}.png"
            atomic_write(out.with_name(file), picture)
            blocks.append(f"![{escaped(label)}]({file})")
        blocks += [table.markdown() for table in section.tables]
        if section.notes:
            blocks.append("\n".join(f"- {escaped(note)}" for note in section.notes))
        if section.absent:
            blocks.append(escaped(section.absent))
    html = _html(title, sections)
    atomic_write(out.with_suffix(".md"), "\n\n".join(blocks) + "\n")
    return atomic_write(out, html)


def _pictures(section: Section) -> Iterable[tuple[str, str, bytes]]:
    """Yields (name of the file, alternative text, PNG)."""
    if section.plots:
        yield section.name, section.heading, figures.png(section.plots)
    for slug, (label, panel) in zip(_slugs([label for label, _ in section.panels]), section.panels, strict=True):
        yield f"panel-{slug}", label, figures.panel_png(panel)


def _html(title: str, sections: Sequence[Section]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # only pages need it

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    template = environment.get_template("page.html.j2")
    return template.render(title=title, version=__version__, sections=sections, figures=figures)


def _slugs(labels: Sequence[str]) -> list[str]:
    """Returns distinct names of files for the labels."""
    slugs: list[str] = []
    for label in labels:
        slug = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")[:60] or "run"
        taken = sum(other == slug or re.fullmatch(rf"{slug}-\d+", other) is not None for other in slugs)
        slugs.append(f"{slug}-{taken + 1}" if taken else slug)
    return slugs
