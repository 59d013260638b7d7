"""The sections of the page about runs: results, figures, conditions."""

from __future__ import annotations

from collections.abc import Sequence

from . import content, figures
from .document import Section
from .rows import Row
from .runs import Panel

_FIGURES = "(`fastrd eval RUN --figures` writes it)"


def sections(rows: Sequence[Row], data: str | None) -> list[Section]:
    """Returns the page about `rows`. `data` says where the images came from, for runs whose files do not say it."""
    found = [Section("Results", tables=[content.results(rows)], notes=content.notes(rows))]
    if gains := content.gains(rows):
        found.append(Section("What each part changes", level=3, notes=gains))
    found += [training(rows), robustness(rows), _examples(rows), alignment(rows)]
    found.append(Section("Conditions", tables=[content.conditions(rows, data)]))
    if (differences := content.recipe_differences(rows)) is not None and differences.rows:
        found.append(Section("Differences between the recipes", level=3, tables=[differences]))
    if choices := content.reconstructions(rows):
        found.append(Section("What is our choice", level=3, notes=choices))
    return found


def training(rows: Sequence[Row]) -> Section:
    note = "Means over each epoch. One colour for each row of the table, one line for each run."
    lacking = [row.who(run) for row in rows for run in row.runs if not run.epochs]
    plots = figures.training(figures.series(rows))
    return _figure("Training", "training", plots, note, _lacking("No finished epoch is logged", lacking))


def robustness(rows: Sequence[Row]) -> Section:
    plot = figures.robustness(figures.series(rows))
    lacking = [row.who(run) for row in rows for run in row.runs if run.curve is None]
    absent = _lacking(f"No curve.json {_FIGURES}", lacking)
    return _figure("Robustness against epsilon", "robustness", [plot] if plot else [], "One line for each run.", absent)


def alignment(rows: Sequence[Row]) -> Section:
    plots = figures.alignment(figures.series(rows))
    note = "One point for each run; bars are the 95 % intervals of the table."
    needed = "Not shown: it takes AutoAttack accuracy and alignment (GD, GC) of at least three runs."
    return _figure("Robustness against gradient alignment", "alignment", plots, note, "" if plots else needed)


def _figure(heading: str, name: str, plots: Sequence[figures.Plot], note: str, absent: str) -> Section:
    return Section(heading, name=name, plots=plots, notes=[note] if plots else [], absent=absent)


def _examples(rows: Sequence[Row]) -> Section:
    found = [(row.label, _first_panel(row)) for row in rows]
    panels = [(label, panel) for label, panel in found if panel is not None]
    absent = _lacking(f"No panel.npz {_FIGURES}", [label for label, panel in found if panel is None])
    notes = ["The first images of each panel, not selected."] if panels else []
    return Section("Examples", panels=panels, notes=notes, absent=absent)


def _lacking(what: str, labels: Sequence[str]) -> str:
    return f"{what} for {', '.join(labels)}." if labels else ""


def _first_panel(row: Row) -> Panel | None:
    panels = (run.panel() for run in row.runs)
    return next((panel for panel in panels if panel is not None and len(panel.clean)), None)
