"""The page, its Markdown twin and the figure files, put together from what the other modules say and draw."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..core.version import __version__
from . import benchmarks, content, figures
from .rows import Row
from .runs import Panel
from .tables import Table, escaped

HEADINGS = {
    "training": "Training",
    "robustness": "Robustness against epsilon",
    "panels": "Examples",
    "alignment": "Robustness against gradient alignment",
}
CAPTIONS = {
    "training": "Means over each epoch. One colour for each row of the table, one line for each run.",
    "robustness": "One line for each run.",
    "panels": "The first images of each panel, not selected.",
    "alignment": "One point for each run; bars are the 95 % intervals of the table.",
}


def render(
    rows: Sequence[Row], *, stem: str, title: str, data: str | None
) -> tuple[str, str, dict[str, bytes]]:
    """The HTML page, the Markdown page and the PNG files it shows, by name."""
    series = figures.series(rows)
    curve = figures.robustness(series)
    plots = {
        "training": figures.training(series),
        "robustness": [curve] if curve else [],
        "alignment": figures.alignment(series),
    }
    panels = [(row.label, panel) for row in rows if (panel := _first_panel(row)) is not None]
    tables = {
        "Results": content.results(rows),
        "Conditions": content.conditions(rows, data),
        "Differences between the recipes": content.recipe_differences(rows),
    }
    said = {
        "notes": content.notes(rows),
        "reconstructions": content.reconstructions(rows),
        "absent": _absent(rows, {**plots, "panels": panels}),
    }
    html = _page(
        "page.html.j2",
        title=title,
        keys={
            name: [s for s in series if any(s in plot.series for plot in found)]
            for name, found in plots.items()
        },
        headings=HEADINGS,
        captions=CAPTIONS,
        plots={
            name: [(plot.title, Markup(figures.svg(plot))) for plot in found] for name, found in plots.items()
        },
        panels=[(label, *figures.examples(panel)) for label, panel in panels],
        data_uri=figures.data_uri,
        tables=tables,
        **said,
    )
    pictures = {
        name: [(f"{stem}-{name}.png", HEADINGS[name], figures.png(found))]
        for name, found in plots.items()
        if found
    }
    if panels:
        pictures["panels"] = [
            (f"{stem}-panel-{slug}.png", label, figures.panel_png(panel))
            for slug, (label, panel) in zip(_slugs([label for label, _ in panels]), panels, strict=True)
        ]
    markdown = _markdown(title, tables, pictures, **said)
    return html, markdown, {name: blob for found in pictures.values() for name, _, blob in found}


def render_benchmarks(
    machines: Sequence[benchmarks.Machine], *, stem: str, title: str
) -> tuple[str, str, dict[str, bytes]]:
    """As `render`, for what the benchmarks measured."""
    shown, blocks, pictures = [], [f"# {escaped(title)}"], {}
    for number, machine in enumerate(machines):
        heading = machine.conditions.get("Device") or "Unknown device"
        conditions = benchmarks.conditions(machine)
        blocks += [f"## {escaped(heading)}", conditions.markdown()]
        kernels = []
        for name, measurements in machine.kernels.items():
            plots, table = benchmarks.plots(measurements), benchmarks.table(measurements)
            drawn = [(plot.title, Markup(figures.svg(plot))) for plot in plots]
            parts = benchmarks.breakdown(measurements)
            kernels.append(
                {"name": name, "variants": plots[0].series, "plots": drawn, "table": table, "parts": parts}
            )
            file = f"{stem}-{name}{f'-{number + 1}' if number else ''}.png"
            pictures[file] = figures.png(plots, columns=2)
            blocks += [f"### {escaped(name)}", f"![{escaped(name)}]({file})", table.markdown()]
            if parts is not None:
                blocks += [f"#### {benchmarks.BREAKDOWN}", parts.markdown()]
        shown.append({"title": heading, "kernels": kernels, "conditions": conditions})
    blocks += ["## How to read it", "\n".join(f"- {escaped(note)}" for note in benchmarks.NOTES)]
    html = _page(
        "benchmarks.html.j2",
        title=title,
        machines=shown,
        breakdown=benchmarks.BREAKDOWN,
        notes=benchmarks.NOTES,
    )
    return html, "\n\n".join(blocks) + "\n", pictures


def _page(template: str, **values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template(template).render(version=__version__, **values)


def _first_panel(row: Row) -> Panel | None:
    panels = (run.panel() for run in row.runs)
    return next((panel for panel in panels if panel is not None and len(panel.clean)), None)


def _absent(rows: Sequence[Row], shown: dict[str, list]) -> dict[str, str]:
    """For each section what it cannot show; empty where it shows everything."""
    lacking = {
        "training": [row.who(run) for row in rows for run in row.runs if not run.epochs],
        "robustness": [row.who(run) for row in rows for run in row.runs if run.curve is None],
        "panels": [row.label for row in rows if _first_panel(row) is None],
    }
    reasons = {
        "training": "No finished epoch is logged for",
        "robustness": "No curve.json (`fastrd eval RUN --figures` writes it) for",
        "panels": "No panel.npz (`fastrd eval RUN --figures` writes it) for",
    }
    absent = {name: f"{reasons[name]} {', '.join(labels)}." for name, labels in lacking.items() if labels}
    if not shown["alignment"]:
        absent["alignment"] = (
            "Not shown: it takes AutoAttack accuracy and alignment (GD, GC) of at least three runs."
        )
    return absent


def _slugs(labels: Sequence[str]) -> list[str]:
    slugs: list[str] = []
    for label in labels:
        slug = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")[:60] or "run"
        taken = sum(other == slug or re.fullmatch(rf"{slug}-\d+", other) is not None for other in slugs)
        slugs.append(f"{slug}-{taken + 1}" if taken else slug)
    return slugs


def _markdown(
    title: str,
    tables: dict[str, Table | None],
    pictures: dict[str, list[tuple[str, str, bytes]]],
    *,
    notes: list[str],
    reconstructions: list[str],
    absent: dict[str, str],
) -> str:
    blocks = [f"# {escaped(title)}"]
    for heading, table in tables.items():
        if heading == "Conditions":
            for name, text in HEADINGS.items():
                found = pictures.get(name, [])
                blocks += [f"## {text}", *(f"![{escaped(label)}]({file})" for file, label, _ in found)]
                blocks += [CAPTIONS[name]] if found else []
                blocks += [escaped(absent[name])] if name in absent else []
        if table is not None and table.rows:
            blocks += [f"## {heading}", table.markdown()]
        if heading == "Results":
            blocks.append("\n".join(f"- {escaped(note)}" for note in notes))
    if reconstructions:
        blocks += ["## What is our choice", "\n".join(f"- {escaped(text)}" for text in reconstructions)]
    return "\n\n".join(blocks) + "\n"
