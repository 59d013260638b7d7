"""What the report says in words and numbers: results, footnotes, conditions, differences between recipes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..core.toml import differences
from ..core.values import NORMS
from ..recipe import Recipe, available
from .metrics import ACCURACIES, ALIGNMENT, METRICS, mean_text, metric_of
from .rows import Row, settings
from .runs import Run, finite
from .statistics import LEAST_DEVIATION, t_half_width, wilson_half_width
from .tables import MISSING, Cell, Column, Table

NOT_EVALUATED = "not evaluated"

RECONSTRUCTIONS = {
    "gacd": "GACD (arXiv 2009.09922) is a reconstruction: teacher anchors, other-class negatives, the contrastive "
    "loss and the reweighting are the paper's; softmax form, heads, temperature and weight are our choices.",
    "vfd": "VFD (arXiv 2206.02158) is a reconstruction: the idea is the abstract's; distance, weights and projector "
    "are our choices.",
    "direct": "Gradients matched directly (IGDM's ablation): distance, point and weight are our choices.",
    "akd": "AKD: the equal weight of its two terms is our choice.",
}
ALIGNMENT_NOTE = (
    "GD and GC, the mean distance and the mean cosine between the input gradients of student and teacher, are taken of "
    "the cross-entropy at clean images: our choice, the paper leaves it open."
)


COSTS = {
    "igdm": " IGDM matches how outputs change across the ball to first order; where networks are far from linear, "
    "it takes weight from the base's loss for nothing. A smaller igdm.alpha takes less.",
    "gacd": " GACD moves features apart by class for other tasks than this one. A smaller gacd.weight takes less from "
    "the base's loss.",
}


def results(rows: Sequence[Row]) -> Table:
    """Returns `measured`, and beside it `printed` where a recipe has the paper's numbers."""
    ours, paper = measured(rows), printed(rows)
    if paper is None:
        return ours
    return Table(ours.columns + paper.columns[1:], [a + b[1:] for a, b in zip(ours.rows, paper.rows, strict=True)])


def measured(rows: Sequence[Row]) -> Table:
    """Accuracies in percent, alignment and training time."""
    attacks = _attacks(rows)
    columns = [
        Column("Run"),
        Column("Method"),
        *(Column(metric_of(name).title, numeric=True) for name in attacks),
        Column("n", numeric=True),
        *(Column(metric_of(name).title, numeric=True) for name in ALIGNMENT),
        Column("Training, s", numeric=True),
    ]
    return Table(columns, [_measured_cells(row, attacks) for row in rows])


def printed(rows: Sequence[Row]) -> Table | None:
    """Returns the paper's numbers and ours minus them; None where no recipe has any."""
    keys = [key for key in METRICS if any(key in row.paper for row in rows)]
    if not keys:
        return None
    columns = [Column("Run"), *(Column(METRICS[key].title, "Paper", True) for key in keys)]
    return Table(columns, [[_name_cell(row), *(_beside_paper(row, key) for key in keys)] for row in rows])


def notes(rows: Sequence[Row]) -> list[str]:
    """Returns what a reader must know to read the results rightly, a sentence or two each."""
    norms = dict.fromkeys(NORMS[row.runs[0].norm] for row in rows if row.evaluated)
    lines = [f"Accuracies in percent, on test images; {' and '.join(norms)} attacks."] if norms else []
    if any(row.values(attack) and row.n(attack) for row in rows for attack in _attacks(rows)):
        lines.append(
            "In parentheses: half-width, in points, of the 95 % binomial (Wilson) interval for n images. It says how "
            "far the accuracy on these n may be from that on endlessly many; it knows nothing of other training seeds."
        )
    if any(len(row.runs) > 1 for row in rows):
        lines.append(
            "Rows over several seeds: mean ± sample standard deviation over the seeds; the interval stays that of a "
            "single run, since the seeds share their test images."
        )
    if any(row.paper for row in rows):
        lines.append(
            "Paper columns: what the paper prints and, in parentheses, ours minus the paper's in the same unit."
        )
    with_paper = [row for row in rows if row.paper]
    sources = {row.label: row.recipe["paper"].get("source", "a source the recipe does not name") for row in with_paper}
    lines += [f"Paper's numbers for {labels}: {source}." for source, labels in _inverted(sources)]
    changes = {row.label: _changes_from_shipped(row) for row in with_paper}
    lines += [
        f"Not the paper's configuration, for the recipe was changed: {labels} ({changed})."
        for changed, labels in _inverted(changes)
        if changed
    ]
    for key, text_of in {
        "data set": _dataset,
        "epsilon": _epsilon,
        "checkpoint": _fact("checkpoint"),
    }.items():
        values = {row.label: text_of(row.runs[0]) for row in rows if row.evaluated}
        if len(set(values.values())) > 1:
            each = "; ".join(f"{value or 'unknown'} for {labels}" for value, labels in _inverted(values))
            lines.append(f"Not evaluated alike: the {key} is {each}.")
    lines += [f"{row.who(run)}: {remark}." for row in rows for run in row.runs for remark in _remarks(run)]
    if any(cell.text == MISSING or cell.span > 1 for row in results(rows).rows for cell in row):
        lines.append(f'"{MISSING}": not measured.')
    return lines


def gains(rows: Sequence[Row]) -> list[str]:
    """Returns what each row changes against the same student with one part less, and whether that is decided.

    A part is an add-on, or the distillation, which PGD-AT does without. Both rows need
    two seeds in common.
    """
    lines = [_gain(base, row) for row in rows for base in rows if _added(base, row) and _seeds(base, row)]
    if lines:
        lines.append(
            "Differences in points, seed by seed on the same test images, ± half the 95 % interval of Student's t over "
            f"the seeds, whose deviation is taken as at least {LEAST_DEVIATION} points. Undecided: the interval holds "
            "0. What other test images would give is not in it."
        )
    return lines


def _added(base: Row, row: Row) -> str | None:
    """Returns the one part that `row` has and `base`, of the same student, has not: an add-on, or the distillation."""
    if not row.parts or not base.parts or base.recipe.get("student") != row.recipe.get("student"):
        return None
    extra = set(row.parts) - set(base.parts)
    if base.parts == ["pgd_at"] and len(row.parts) == 1 and extra:
        return row.parts[0]
    return extra.pop() if len(extra) == 1 and set(base.parts) < set(row.parts) else None


def _seeds(base: Row, row: Row) -> list[Any]:
    common = {run.seed for run in base.runs} & {run.seed for run in row.runs}
    return sorted(common, key=str) if len(common) > 1 else []


def _gain(base: Row, row: Row) -> str:
    seeds, said, worse = _seeds(base, row), [], False
    for attack in _attacks([base, row]):
        without, with_ = _accuracies(base, attack), _accuracies(row, attack)
        if not set(seeds) <= without.keys() & with_.keys():
            continue
        differences = [100 * (with_[seed] - without[seed]) for seed in seeds]
        mean, half = statistics.fmean(differences), t_half_width(differences, LEAST_DEVIATION) or 0.0
        word = "undecided" if abs(mean) <= half else "higher" if mean > 0 else "lower"
        worse |= word == "lower"
        said.append(f"{metric_of(attack).title} {mean:+.1f} ± {half:.1f}, {word}")
    why = COSTS.get(_added(base, row) or "", "") if worse else ""
    return f"{row.label} against {base.label}, {len(seeds)} seeds: {'; '.join(said)}.{why}"


def _accuracies(row: Row, attack: str) -> dict[Any, float]:
    """By seed."""
    results = {run.seed: run.evaluation.results.get(attack) for run in row.runs if run.evaluation is not None}
    return {seed: r.accuracy for seed, r in results.items() if r is not None and r.accuracy is not None}


def conditions(rows: Sequence[Row], data: str | None = None) -> Table:
    """Returns a table of where, on what and with what each row was made, one column per row. `data` says where the
    images came from, where no file does."""
    describe: dict[str, Callable[[Run], str]] = {
        "Folder": lambda run: str(run.path),
        "Seed": lambda run: "" if run.seed is None else str(run.seed),
        "Data": _dataset,
        "Source of the data": lambda run: _fact("data")(run) or data or "",
        "Student": lambda run: _shown("arch", run.recipe.get("student", {}).get("arch")) if run.recipe else "",
        "Epochs": _epochs,
        "Checkpoint": _fact("checkpoint"),
        "Test images": _fact("n"),
        "Epsilon": _epsilon,
        "Evaluated on": _fact("device"),
        "Versions": _versions,
    }
    cells = [
        [Cell(name), *(Cell(_joined(map(text_of, row.runs))) for row in rows)] for name, text_of in describe.items()
    ]
    return Table([Column("Condition"), *(Column(row.label) for row in rows)], cells)


def recipe_differences(rows: Sequence[Row]) -> Table | None:
    """Returns the recipe keys in which rows differ, one column per row; None with fewer than two recipes."""
    rows = [row for row in rows if row.recipe]
    if len(rows) < 2:
        return None
    changes = [differences(settings(rows[0].recipe), settings(row.recipe)) for row in rows]
    firsts = {key: first for change in changes for key, (first, _) in change.items()}
    cells = [
        [Cell(key), *(Cell(_shown(key, change.get(key, (first, first))[1])) for change in changes)]
        for key, first in firsts.items()
    ]
    return Table([Column("Key"), *(Column(row.label) for row in rows)], cells)


def reconstructions(rows: Sequence[Row]) -> list[str]:
    """Returns which parts of what the rows use are not fixed by any paper."""
    used = dict.fromkeys(part for row in rows for part in row.parts if not (part == "gacd" and _is_crd(row)))
    lines = [text for name, text in RECONSTRUCTIONS.items() if name in used]
    return lines + ([ALIGNMENT_NOTE] if any(row.values(name) for row in rows for name in ALIGNMENT) else [])


def epsilon_text(value: float, norm: str = "linf") -> str:
    """Returns a radius or step as a fraction of 255 where it is a whole number of grey levels;
    "l2 0.5" in another norm."""
    if norm != "linf":
        return f"{norm} {value:.4g}"
    levels = value * 255
    return f"{round(levels)}/255" if abs(levels - round(levels)) < 1e-3 else f"{value:.4g}"


def _attacks(rows: Sequence[Row]) -> list[str]:
    measured = dict.fromkeys(
        name for row in rows for run in row.runs if run.evaluation for name in run.evaluation.results
    )
    if not measured:
        return list(ACCURACIES)
    known = [name for name in ACCURACIES if name in measured]
    return known + [name for name in measured if name not in ACCURACIES]


def _name_cell(row: Row) -> Cell:
    return Cell(row.label, f"({len(row.runs)} seeds)" if len(row.runs) > 1 else "")


def _measured_cells(row: Row, attacks: Sequence[str]) -> list[Cell]:
    cells = [_name_cell(row), Cell(row.method)]
    if row.evaluated:
        counts = sorted({n for n in map(row.n, attacks) if n is not None})
        cells += [_accuracy(row, attack, show_n=len(counts) > 1) for attack in attacks]
        ends = dict.fromkeys(counts[:1] + counts[-1:])
        cells.append(Cell(" to ".join(map(str, ends)) or MISSING))
    else:
        cells.append(Cell(NOT_EVALUATED, span=len(attacks) + 1))
    seconds = [run.seconds for run in row.runs if run.seconds is not None]
    shown = [(row.values(name), f"{{:.{found.digits_alone}f}}") for name, found in ALIGNMENT.items()]
    for values, number in (*shown, (seconds, "{:.0f}")):
        cells.append(Cell(mean_text(values, number), _share(row, values)))
    return cells


def _accuracy(row: Row, attack: str, show_n: bool) -> Cell:
    values, n = row.values(attack), row.n(attack)
    number = metric_of(attack).format(n or 0)
    detail = []
    if values and n:
        detail.append("±" + number.format(100 * wilson_half_width(statistics.fmean(values), n)))
        detail += [f"n {n}"] if show_n else []
    share = _share(row, values).strip("()")
    detail += [share] if share else []
    return Cell(mean_text([100 * v for v in values], number), f"({', '.join(detail)})" if detail else "")


def _beside_paper(row: Row, key: str) -> Cell:
    if key not in row.paper:
        return Cell(MISSING)
    printed, values = row.paper[key], row.values(key)
    ours = METRICS[key].format(row.n(key) or 0).replace(":", ":+")
    difference = METRICS[key].scale * statistics.fmean(values) - printed if values else None
    return Cell(METRICS[key].format().format(printed), "" if difference is None else f"({ours.format(difference)})")


def _share(row: Row, values: Sequence[float]) -> str:
    return f"({len(values)} of {len(row.runs)} runs)" if 0 < len(values) < len(row.runs) else ""


def _changes_from_shipped(row: Row) -> str:
    name = str(row.recipe.get("name"))
    if name not in available():
        return ""
    changed = differences(settings(Recipe.load(name).to_dict()), settings(row.recipe))
    values = [f"{key} {_shown(key, shipped)} -> {_shown(key, ours)}" for key, (shipped, ours) in changed.items()]
    return ", ".join(values[:8] + ([f"and {len(values) - 8} more keys"] if len(values) > 8 else []))


def _remarks(run: Run) -> list[str]:
    remarks = []
    if run.torn:
        remarks.append("the last line of log.jsonl is torn (the run was killed while writing it) and left out")
    done = max((line["epoch"] for line in run.epochs), default=0)
    if isinstance(run.planned_epochs, int) and done < run.planned_epochs and (run.epochs or run.last_step or run.torn):
        epoch, step = run.last_step or (0, 0)
        where = f", then step {step} of epoch {epoch}" if epoch > done else ""
        remarks.append(f"the log ends after epoch {done} of {run.planned_epochs}{where}; training is unfinished")
    if run.evaluation:
        remarks += [f"{metric_of(k).title} warned: {w}" for k, r in run.evaluation.results.items() for w in r.warnings]
    if run.curve:
        remarks += [f"The robustness curve warned: {w}" for w in run.curve.warnings]
    return remarks


def _inverted(values: Mapping[str, str]) -> list[tuple[str, str]]:
    """Returns each text with the labels that have it."""
    return [(text, ", ".join(k for k, v in values.items() if v == text)) for text in dict.fromkeys(values.values())]


def _fact(key: str) -> Callable[[Run], str]:
    def text(run: Run) -> str:
        value = run.evaluation.facts.get(key) if run.evaluation else None
        return "" if value is None else _shown(key, value)

    return text


def _dataset(run: Run) -> str:
    section = run.recipe.get("data", {})
    name = _fact("dataset")(run) or str(section.get("name", ""))
    limit = section.get("train_limit")
    return f"{name}, trained on {limit} images" if limit else name


def _epsilon(run: Run) -> str:
    value = finite(run.evaluation.facts.get("epsilon")) if run.evaluation else None
    return "" if value is None else epsilon_text(value, run.norm)


def _epochs(run: Run) -> str:
    done = max((line["epoch"] for line in run.epochs), default=0)
    return f"{done} of {run.planned_epochs}" if run.planned_epochs else str(done or "")


def _versions(run: Run) -> str:
    versions = run.evaluation.facts.get("versions") if run.evaluation else None
    return ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, Mapping) else ""


def _joined(values: Any) -> str:
    return ", ".join(dict.fromkeys(text for text in values if text)) or MISSING


def _shown(key: str, value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return epsilon_text(value) if key.split(".")[-1] in ("epsilon", "step_size") else f"{value:.6g}"
    return ", ".join(_shown(key, item) for item in value) if isinstance(value, list) else str(value)


def _is_crd(row: Row) -> bool:
    """Contrastive representation distillation, which is published, as GACD's special case."""
    options = row.recipe.get("gacd", {})
    return (options.get("estimator"), options.get("input"), options.get("reweight")) == (
        "crd",
        "clean",
        False,
    )
