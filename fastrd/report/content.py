"""The tables and notes of the report: results, footnotes, conditions, differences between recipes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.toml import differences
from ..core.values import NORMS
from ..recipe import Recipe, available
from .metrics import ACCURACIES, ALIGNMENT, METRICS, mean_text, metric_of
from .rows import Row, settings
from .runs import Run
from .statistics import LEAST_DEVIATION, paired_difference, verdict_of, wilson_half_width
from .tables import MISSING, Cell, Table, numeric

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
    lines = [mine + theirs[1:] for mine, theirs in zip(ours.rows, paper.rows, strict=True)]
    return Table(ours.columns + paper.columns[1:], lines)


def measured(rows: Sequence[Row]) -> Table:
    """Returns accuracies in percent, alignment and training time."""
    attacks = _attacks(rows)
    titles = [*(metric_of(name).title for name in attacks), "n", *(each.title for each in ALIGNMENT.values())]
    columns = ["Run", "Method", *map(numeric, (*titles, "Training, s"))]
    return Table.of(columns, [_measured_cells(row, attacks) for row in rows])


def printed(rows: Sequence[Row]) -> Table | None:
    """Returns the paper's numbers and ours minus them; None where no recipe has any."""
    keys = [key for key in METRICS if any(key in row.paper for row in rows)]
    if not keys:
        return None
    columns = ["Run", *(numeric(METRICS[key].title, "Paper") for key in keys)]
    return Table.of(columns, [[_name_cell(row), *(_beside_paper(row, key) for key in keys)] for row in rows])


def notes(rows: Sequence[Row]) -> list[str]:
    """Returns what a reader must know to read the results rightly, a sentence or two each."""
    norms = dict.fromkeys(NORMS[row.runs[0].norm] for row in rows if row.evaluated)
    lines = [f"Accuracies in percent, on test images; {' and '.join(norms)} attacks."] if norms else []
    if any(row.values(attack) and row.n(attack) for row in rows for attack in _attacks(rows)):
        lines.append(
            "In parentheses: half-width, in points, of the 95 % binomial (Wilson) interval for n images. It says how "
            "far the accuracy on these n may be from that on all such images; other training seeds are not in it."
        )
    if any(len(row.runs) > 1 for row in rows):
        lines.append(
            "Rows over several seeds: mean ± sample standard deviation over the seeds; the interval stays that of a "
            "single run, since the seeds share their test images."
        )
    if any(row.paper for row in rows):
        lines.append("Paper columns: the paper's numbers and, in parentheses, ours minus the paper's in the same unit.")
    unnamed, changed = "a source the recipe does not name", "Not the paper's configuration, for the recipe was changed"
    sources = {row.label: row.recipe["paper"].get("source", unnamed) for row in rows if row.paper}
    lines += [f"Paper's numbers for {labels}: {source}." for source, labels in _inverted(sources)]
    changes = {row.label: _changes_from_shipped(row) for row in rows if row.paper}
    lines += [f"{changed}: {labels} ({text})." for text, labels in _inverted(changes) if text]
    evaluated = {row.label: row.runs[0] for row in rows if row.evaluated}
    for name, key in {"data set": "Data", "epsilon": "Epsilon", "checkpoint": "Checkpoint"}.items():
        lines += _unlike(f"the {name} is", {label: _conditions(run)[key] for label, run in evaluated.items()})
    digests: dict[str, dict[str, str]] = {}  # of images that are as many of one data set, and should be the same
    for label, facts in ((label, run.facts) for label, run in evaluated.items()):
        images = f"the {facts.get('n')} images of {facts.get('dataset')}"
        digests.setdefault(images, {})[label] = (facts.get("images") or "")[:8]
    lines += [line for images, values in digests.items() for line in _unlike(f"{images} have the hash", values)]
    lines += [f"{row.who(run)}: {remark}." for row in rows for run in row.runs for remark in _remarks(run)]
    if any(cell.text == MISSING or cell.span > 1 for row in results(rows).rows for cell in row):
        lines.append(f'"{MISSING}": not measured.')
    return lines


def _unlike(what: str, values: Mapping[str, str]) -> list[str]:
    if len(set(values.values())) < 2:
        return []
    each = "; ".join(f"{value or 'unknown'} for {labels}" for value, labels in _inverted(values))
    return [f"Not evaluated alike: {what} {each}."]


def gains(rows: Sequence[Row]) -> list[str]:
    """Returns what each row changes against the same recipe with one part less, and whether that is decided.

    A part is an add-on, or the distillation, which PGD-AT does without. Both rows need two seeds in common and the same
    evaluation.
    """
    parts = [(base, row, _added(base, row)) for row in rows for base in rows]
    lines = [line for base, row, part in parts if part and (line := _gain(base, row, part))]
    if lines:
        lines.append(
            "Differences in points, seed by seed on the same test images, ± half the 95 % interval of Student's t over "
            f"the seeds, whose deviation is taken as at least {LEAST_DEVIATION} points. Undecided: the interval holds "
            "0. What other test images would give is not in it."
        )
    return lines


def _added(base: Row, row: Row) -> str | None:
    """Returns the one part that `row` has and `base`, else the same, has not: an add-on, or the distillation."""
    if not row.parts or not base.parts or base.runs[0].evaluated_as != row.runs[0].evaluated_as:
        return None
    extra = set(row.parts) - set(base.parts)
    free = {"base", "teacher", "clean_teacher", *extra}
    if any(key.split(".")[0] not in free for key in differences(settings(base.recipe), settings(row.recipe))):
        return None
    if base.parts == ["pgd_at"] and len(row.parts) == 1 and extra:
        return row.parts[0]
    return extra.pop() if len(extra) == 1 and set(base.parts) < set(row.parts) else None


def _gain(base: Row, row: Row, part: str) -> str:
    """Returns the line about two rows; empty with fewer than two seeds, or no attack on as many images, in common."""
    seeds = {run.seed for run in base.runs} & {run.seed for run in row.runs}
    if len(seeds) < 2:
        return ""
    changes, worse = [], False
    for attack in (attack for attack in _attacks([base, row]) if base.n(attack) == row.n(attack)):
        without, with_ = base.by_seed(attack), row.by_seed(attack)
        found = paired_difference(with_, without, LEAST_DEVIATION / 100)
        if found is not None and seeds <= without.keys() & with_.keys():
            worse |= verdict_of(found) == "lower"
            mean, half = found[0], found[1] or 0.0
            changes.append(f"{metric_of(attack).title} {100 * mean:+.1f} ± {100 * half:.1f}, {verdict_of(found)}")
    why = COSTS.get(part, "") if worse else ""
    return "" if not changes else f"{row.label} against {base.label}, {len(seeds)} seeds: {'; '.join(changes)}.{why}"


def conditions(rows: Sequence[Row], data: str | None = None) -> Table:
    """Returns a table of where, on what and with what each row was made, one column per row. `data` says where the
    images came from, where no file does."""
    found = [[_conditions(run, data or "") for run in row.runs] for row in rows]
    lines = []
    for name in found[0][0]:
        texts = [dict.fromkeys(run[name] for run in runs if run[name]) for runs in found]
        lines.append([name, *(", ".join(each) or MISSING for each in texts)])
    return Table.of(["Condition", *(row.label for row in rows)], lines)


def recipe_differences(rows: Sequence[Row]) -> Table | None:
    """Returns the recipe keys in which rows differ, one column per row; None with fewer than two recipes."""
    rows = [row for row in rows if row.recipe]
    if len(rows) < 2:
        return None
    changes = [differences(settings(rows[0].recipe), settings(row.recipe)) for row in rows]
    firsts = {key: first for change in changes for key, (first, _) in change.items()}
    lines = [[key, *(_shown(key, c.get(key, (first, first))[1]) for c in changes)] for key, first in firsts.items()]
    return Table.of(["Key", *(row.label for row in rows)], lines)


def reconstructions(rows: Sequence[Row]) -> list[str]:
    """Returns which parts of what the rows use are not fixed by any paper."""
    used = dict.fromkeys(part for row in rows for part in row.parts if not (part == "gacd" and _is_crd(row)))
    lines = [text for name, text in RECONSTRUCTIONS.items() if name in used]
    return lines + ([ALIGNMENT_NOTE] if any(row.values(name) for row in rows for name in ALIGNMENT) else [])


def epsilon_text(value: float, norm: str = "linf") -> str:
    """Returns a radius or step below 1 as a fraction of 255 where it is a whole number of grey levels; "l2 0.5" in
    another norm."""
    if norm != "linf":
        return f"{norm} {value:.4g}"
    levels = value * 255
    whole = abs(levels) < 255 and abs(levels - round(levels)) < 1e-3
    return f"{round(levels)}/255" if whole else f"{value:.4g}"


def _attacks(rows: Sequence[Row]) -> list[str]:
    measured = dict.fromkeys(name for row in rows for run in row.runs for name in run.results) or ACCURACIES
    return [name for name in ACCURACIES if name in measured] + [name for name in measured if name not in ACCURACIES]


def _name_cell(row: Row) -> Cell:
    return Cell(row.label, f"({len(row.runs)} seeds)" if len(row.runs) > 1 else "")


def _measured_cells(row: Row, attacks: Sequence[str]) -> list[Cell | str]:
    cells: list[Cell | str] = [_name_cell(row), row.method]
    if row.evaluated:
        counts = sorted({n for n in map(row.n, attacks) if n is not None})
        cells += [_accuracy(row, attack, show_n=len(counts) > 1) for attack in attacks]
        cells.append(" to ".join(map(str, dict.fromkeys(counts[:1] + counts[-1:]))) or MISSING)
    else:
        cells.append(Cell("not evaluated", span=len(attacks) + 1))
    seconds = [run.seconds for run in row.runs if run.seconds is not None]
    shown = [(row.values(name), f"{{:.{found.digits_alone}f}}") for name, found in ALIGNMENT.items()]
    shown.append((seconds, "{:.0f}"))
    return [*cells, *(Cell(mean_text(values, number), _share(row, values)) for values, number in shown)]


def _accuracy(row: Row, attack: str, show_n: bool) -> Cell:
    values, n = row.values(attack), row.n(attack)
    number = metric_of(attack).format(n or 0)
    detail = []
    if values and n:
        half = number.format(100 * wilson_half_width(statistics.fmean(values), n))
        detail = [f"±{half}", f"n {n}" if show_n else ""]
    detail = [text for text in (*detail, _share(row, values).strip("()")) if text]
    return Cell(mean_text([100 * v for v in values], number), f"({', '.join(detail)})" if detail else "")


def _beside_paper(row: Row, key: str) -> Cell:
    if key not in row.paper:
        return Cell(MISSING)
    metric, printed, values = METRICS[key], row.paper[key], row.values(key)
    form = metric.format(row.n(key) or 0, sign="+")
    difference = f"({form.format(metric.scale * statistics.fmean(values) - printed)})" if values else ""
    return Cell(metric.text(printed), difference)


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
    remarks, done = [], _epochs_done(run)
    if run.torn:
        remarks.append("the last line of log.jsonl is torn (the run was killed while writing it) and left out")
    if done < (run.planned_epochs or 0) and (run.epochs or run.last_step or run.torn):
        epoch, step = run.last_step or (0, 0)
        where = f", then step {step} of epoch {epoch}" if epoch > done else ""
        remarks.append(f"the log ends after epoch {done} of {run.planned_epochs}{where}; training is unfinished")
    for name, result in run.results.items():
        remarks += [f"{metric_of(name).title} warned: {warning}" for warning in result.get("warnings") or ()]
    if run.curve:
        remarks += [f"The robustness curve warned: {w}" for w in run.curve.warnings]
    return remarks


def _inverted(values: Mapping[str, str]) -> list[tuple[str, str]]:
    """Returns each text with the labels that have it."""
    return [(text, ", ".join(k for k, v in values.items() if v == text)) for text in dict.fromkeys(values.values())]


def _conditions(run: Run, data: str = "") -> dict[str, str]:
    """Returns where, on what and with what a run was made; empty where it is not known."""
    facts = run.facts
    section, done = run.recipe.get("data", {}), _epochs_done(run)
    limited = f", trained on {section['train_limit']} images" if section.get("train_limit") else ""
    return {
        "Folder": str(run.path),
        "Seed": "" if run.seed is None else str(run.seed),
        "Data": (facts.get("dataset") or str(section.get("name", ""))) + limited,
        "Source of the data": facts.get("data") or data,
        "Student": _shown("arch", run.recipe.get("student", {}).get("arch")) if run.recipe else "",
        "Epochs": f"{done} of {run.planned_epochs}" if run.planned_epochs else str(done or ""),
        "Checkpoint": facts.get("checkpoint") or "",
        "Test images": "" if facts.get("n") is None else str(facts["n"]),
        "Epsilon": "" if facts.get("epsilon") is None else epsilon_text(facts["epsilon"], run.norm),
        "Evaluated on": facts.get("device") or "",
        "Versions": ", ".join(f"{name} {version}" for name, version in (facts.get("versions") or {}).items()),
    }


def _epochs_done(run: Run) -> int:
    return max((line["epoch"] for line in run.epochs), default=0)


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
    return (options.get("estimator"), options.get("input"), options.get("reweight")) == ("crd", "clean", False)
