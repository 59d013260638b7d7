"""The sections of the page about runs: results, figures, conditions."""

from __future__ import annotations

from collections.abc import Sequence

from . import content, figures
from .document import Section
from .rows import Row
from .runs import Panel


def sections(rows: Sequence[Row], data: str | None) -> list[Section]:
    """Returns the page about `rows`. `data` says where the images came from, for runs whose files do not say it."""
    series = figures.series(rows)
    curve, alignment = figures.robustness(series), figures.alignment(series)
    panels = [(row.label, panel) for row in rows if (panel := _first_panel(row)) is not None]
    runs = [(row.who(run), run) for row in rows for run in row.runs]
    differences = content.recipe_differences(rows)
    choices = content.reconstructions(rows)
    figure_note = "(`fastrd eval RUN --figures` writes it)"
    found = [
        Section("Results", tables=[content.results(rows)], notes=content.notes(rows)),
        *([Section("What each part changes", level=3, notes=gains)] if (gains := content.gains(rows)) else []),
        Section(
            "Training",
            name="training",
            plots=(plots := figures.training(series)),
            notes=["Means over each epoch. One colour for each row of the table, one line for each run."]
            if plots
            else [],
            absent=_lacking("No finished epoch is logged", [who for who, run in runs if not run.epochs]),
        ),
        Section(
            "Robustness against epsilon",
            name="robustness",
            plots=[curve] if curve else [],
            notes=["One line for each run."] if curve else [],
            absent=_lacking(f"No curve.json {figure_note}", [who for who, run in runs if run.curve is None]),
        ),
        Section(
            "Examples",
            panels=panels,
            notes=["The first images of each panel, not selected."] if panels else [],
            absent=_lacking(f"No panel.npz {figure_note}", [row.label for row in rows if _first_panel(row) is None]),
        ),
        Section(
            "Robustness against gradient alignment",
            name="alignment",
            plots=alignment,
            notes=["One point for each run; bars are the 95 % intervals of the table."] if alignment else [],
            absent=""
            if alignment
            else "Not shown: it takes AutoAttack accuracy and alignment (GD, GC) of at least three runs.",
        ),
        Section("Conditions", tables=[content.conditions(rows, data)]),
    ]
    if differences is not None and differences.rows:
        found.append(Section("Differences between the recipes", level=3, tables=[differences]))
    if choices:
        found.append(Section("What is our choice", level=3, notes=choices))
    return found


def _lacking(what: str, labels: Sequence[str]) -> str:
    return f"{what} for {', '.join(labels)}." if labels else ""


def _first_panel(row: Row) -> Panel | None:
    panels = (run.panel() for run in row.runs)
    return next((panel for panel in panels if panel is not None and len(panel.clean)), None)
