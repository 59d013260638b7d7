"""The page of a reproduction: verdicts, comparisons, claims, curves and cost; and the same as JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import published as facts
from ..core.documents import read_teacher
from ..core.files import atomic_write
from ..report import content, figures
from ..report.document import Section
from ..report.document import write as write_page
from ..report.metrics import ALIGNMENT, METRICS, mean_text, metric_of
from ..report.rows import Row
from ..report.statistics import correlation
from ..report.tables import MISSING, Cell, Column, Table
from . import cost
from .plan import Plan
from .verdict import COMPARISON_RULE, NOT_RUN, RULE, Comparison, RowResult, collect, compare

_STAGES = {"train": "Training", "evaluate": "Evaluation", "autoattack": "AutoAttack"}


def write(plan: Plan) -> Path | None:
    """Writes OUT/TABLE.html with TABLE.md, TABLE.json and its figures; None where no run has begun."""
    results = collect(plan.table, plan.rows, plan.out, plan.seeds)
    if not any(result.runs for result in results):
        return None
    atomic_write(plan.out / f"{plan.table.name}.json", json.dumps(document(plan, results), indent=1) + "\n")
    title = plan.table.title or plan.table.name
    return write_page(plan.out / f"{plan.table.name}.html", title, _sections(plan, results))


def verdicts(results: Sequence[RowResult]) -> Table:
    """Returns paper, ours (in parentheses minus the paper's) and verdict, one line a row."""
    metrics = _metrics(results)
    columns = [Column("Row"), Column("Seeds", numeric=True)]
    columns += [Column(metric_of(m).title, "Paper", True) for m in metrics if _printed(results, m)]
    columns += [Column(metric_of(m).title, "Ours", True) for m in metrics]
    columns += [Column("Verdict")]
    cells = []
    for result in results:
        verdict, why = result.verdict
        line = [Cell(result.row.label), Cell(f"{len(result.runs)}/{result.seeds}")]
        line += [_number(m, result.row.paper.get(m)) for m in metrics if _printed(results, m)]
        line += [_ours(result, m) for m in metrics]
        cells.append([*line, Cell(verdict, f"({why})" if why else "")])
    return Table(columns, cells)


def document(plan: Plan, results: Sequence[RowResult]) -> dict[str, Any]:
    """Returns what the page says, for machines: every number of every seed."""
    rows = []
    for result in results:
        verdict, why = result.verdict
        rows.append(
            {
                "row": result.row.name,
                "paper": dict(result.row.paper),
                "verdict": verdict,
                "why": why,
                "n": dict(result.n),
                "seeds": {metric: dict(found) for metric, found in result.values.items()},
                "mean": {metric: result.mean(metric) for metric in result.values},
                "deviation": {metric: result.deviation(metric) for metric in result.values},
                "measures": [_measures(run) for run in result.runs],
                "cost": {
                    stage: spent._asdict()
                    for stage in cost.STAGES
                    if (spent := cost.total((run.path for run in result.runs), stage))
                },
            }
        )
    return {
        "table": plan.table.name,
        "title": plan.table.title,
        "rule": RULE,
        "conditions": _conditions(results),
        "teachers": {
            name: {k: v for k, v in read_teacher(network.record).items() if k != "stamp"}
            for name, network in plan.networks.items()
        },
        "rows": rows,
        "comparisons": [
            {
                "base": c.base.row.label,
                "with": c.other.row.label,
                **{
                    metric: {"gain": gain[0], "half_width": gain[1], "word": c.word(metric)}
                    for metric in METRICS
                    if (gain := c.gain(metric))
                },
            }
            for c in compare(results)
        ],
    }


def _sections(plan: Plan, results: Sequence[RowResult]) -> list[Section]:
    begun = [result for result in results if result.runs]
    rows = [Row(result.row.label, result.runs) for result in begun]
    series = figures.series(rows)
    source = _source(results)
    said = [RULE, f"Paper's numbers: {source}."] if source else ["No paper prints these rows."]
    sections = [Section("Verdicts", tables=[verdicts(results)], notes=said)]
    comparisons = compare(results)
    if comparisons:
        sections.append(
            Section("What each add-on changes", tables=[_comparisons(comparisons)], notes=[COMPARISON_RULE])
        )
    if (claims := _claims(begun)) is not None:
        sections.append(Section("Further measurements", tables=[claims], notes=[_CLAIM_NOTE]))
    teachers = _teachers(plan)
    if teachers.rows:
        sections.append(Section("Teachers", tables=[teachers]))
    trade_off = _trade_off(series)
    if trade_off is not None:
        sections.append(
            Section(
                "Clean against robust accuracy",
                notes=["One point a run."],
                plots=[trade_off],
                name="trade-off",
            )
        )
    sections.append(
        Section(
            "Training",
            notes=["Means over each epoch; one line a run."],
            plots=figures.training(series),
            name="training",
        )
    )
    curve = figures.robustness(series)
    if curve:
        sections.append(Section("Robustness against epsilon", plots=[curve], name="robustness"))
    alignment = figures.alignment(series)
    if alignment:
        told = [
            f"AutoAttack accuracy against {METRICS[metric].title}: Pearson's r = {r:.2f} over {len(points)} runs."
            for metric in ALIGNMENT
            if (r := correlation(points := _points(begun, metric))) is not None
        ]
        sections.append(Section("Robustness against gradient alignment", notes=told, plots=alignment, name="alignment"))
    sections.append(Section("Cost", tables=[_costs(begun)], notes=[_COST_NOTE]))
    sections.append(
        Section(
            "Conditions",
            tables=[content.conditions(rows)],
            notes=[*content.notes(rows), *content.reconstructions(rows)],
        )
    )
    return sections


def _comparisons(comparisons: Sequence[Comparison]) -> Table:
    metrics = [m for m in METRICS if any(c.gain(m) for c in comparisons)]
    columns = [Column("Row"), Column("beside")]
    for metric in metrics:
        columns.append(Column(METRICS[metric].title, "Gain", True))
        if any(c.printed(metric) is not None for c in comparisons):
            columns.append(Column(f"{METRICS[metric].title}, paper", "Gain", True))
    cells = []
    for c in comparisons:
        line = [Cell(c.other.row.label), Cell(c.base.row.label)]
        for metric in metrics:
            gain, form = c.gain(metric), metric_of(metric).format().replace(":", ":+")
            text = MISSING if gain is None else f"{form.format(gain[0])}, {c.word(metric)}"
            wide = "" if gain is None or gain[1] is None else f"(±{metric_of(metric).format().format(gain[1])})"
            line.append(Cell(text, wide))
            if any(other.printed(metric) is not None for other in comparisons):
                printed = c.printed(metric)
                line.append(Cell(MISSING if printed is None else form.format(printed)))
        cells.append(line)
    return Table(columns, cells)


_CLAIM_NOTE = (
    "CKA: linear centred kernel alignment of the penultimate features of student and teacher, 1 where they agree up to "
    "rotation. Probe: accuracy in percent of a linear classifier on the frozen features, on another data set. MI "
    "bound: lower bound of the mutual information of teacher and student features, last epoch, in nats. Misranked: "
    "share of images to whose teacher features those of another class in the batch are at least as similar as the "
    "student's own. Remainder: share of a random perturbation's effect that is not linear."
)


def _claims(results: Sequence[RowResult]) -> Table | None:
    found = [(result, [_measures(run) for run in result.runs]) for result in results]
    names = list(dict.fromkeys(name for _, measured in found for each in measured for name in each))
    if not names:
        return None
    cells = []
    for result, measured in found:
        line = [Cell(result.row.label)]
        for name in names:
            values = [each[name] for each in measured if name in each]
            digits = {"Probe": 1, "Remainder": 5}.get(name.split()[0], 3)
            line.append(Cell(mean_text(values, f"{{:.{digits}f}}")))
        cells.append(line)
    return Table([Column("Row"), *(Column(name, numeric=True) for name in names)], cells)


def _measures(run: Any) -> dict[str, float]:
    """What `fastrd eval --measure` and the training log say beyond accuracy, by column title."""
    found: dict[str, float] = {}
    facts_ = run.evaluation.facts if run.evaluation else {}
    if "cka" in facts_:
        found["CKA"] = facts_["cka"]
    for data, entry in facts_.get("probe", {}).items():
        found |= {f"Probe {data}, {METRICS[m].title}": 100 * entry[m] for m in ("clean", "pgd20") if m in entry}
    last = run.epochs[-1] if run.epochs else {}
    for name, title in (("mi_bound", "MI bound"), ("misranked", "Misranked")):
        if name in last:
            found[title] = last[name]
    remainder = facts_.get("remainder", last.get("remainder"))
    if remainder is not None:
        found["Remainder"] = remainder
    return found


def _teachers(plan: Plan) -> Table:
    columns = [Column("Teacher"), Column("File")]
    columns += [Column(title, group, True) for group in ("Published", "Measured") for title in ("Clean", "PGD-20")]
    cells = []
    for name, network in plan.networks.items():
        measured = read_teacher(network.record)
        line = [
            Cell(f"{name} ({network.facts.title})"),
            Cell("missing" if network.path is None else network.path.name),
        ]
        line += [_number(m, getattr(network.facts, m)) for m in ("clean", "pgd20")]
        line += [_number(m, 100 * measured[m] if m in measured else None) for m in ("clean", "pgd20")]
        cells.append(line)
    return Table([*columns, Column("n", "Measured", True)], [
        [*line, Cell(str(read_teacher(network.record).get("n", MISSING)))]
        for line, network in zip(cells, plan.networks.values(), strict=True)
    ])  # fmt: skip


def _trade_off(series: Sequence[Any]) -> Any:
    """AutoAttack accuracy (PGD-20 where a row lacks it) against clean accuracy."""

    def points(s: Any, attack: str) -> list[tuple[float, float]]:
        found = [run.evaluation.results for run in s.row.runs if run.evaluation]
        pairs = [(r["clean"].accuracy, r[attack].accuracy) for r in found if "clean" in r and attack in r]
        return [(100 * x, 100 * y) for x, y in pairs if x is not None and y is not None]

    attack = "aa" if all(points(s, "aa") for s in series) else "pgd20"
    shown = tuple(s for s in series if points(s, attack))
    if len(shown) < 2:
        return None

    def draw(axes: Any) -> None:
        for s in shown:
            x, y = zip(*points(s, attack), strict=True)
            axes.plot(x, y, color=s.style.color, marker=s.style.marker, linestyle="none", markersize=6)
        axes.set_xlabel("clean accuracy, %")
        axes.margins(0.12)

    return figures.Plot(f"{'AutoAttack' if attack == 'aa' else 'PGD-20'} accuracy, %", shown, draw)


def _points(results: Sequence[RowResult], metric: str) -> list[tuple[float, float]]:
    return [
        (result.values[metric][seed], accuracy)
        for result in results
        for seed, accuracy in result.values.get("aa", {}).items()
        if seed in result.values.get(metric, {})
    ]


def _costs(results: Sequence[RowResult]) -> Table:
    columns = [Column("Row"), Column("Runs", numeric=True)]
    columns += [Column(title, "Minutes", True) for title in _STAGES.values()]
    columns += [Column("Energy, Wh", numeric=True), Column("Device")]
    cells = []
    for result in results:
        folders = [run.path for run in result.runs]
        spent = {stage: cost.total(folders, stage) for stage in _STAGES}
        known = [each for each in spent.values() if each is not None]
        joules = [each.joules for each in known if each.joules is not None]
        line = [Cell(result.row.label), Cell(str(len(folders)))]
        line += [Cell(MISSING if each is None else f"{each.seconds / 60:.1f}") for each in spent.values()]
        energy = "not measured" if not joules or len(joules) < len(known) else f"{sum(joules) / 3600:.1f}"
        devices = sorted({each.device for each in known})
        cells.append([*line, Cell(energy), Cell(", ".join(devices) or MISSING)])
    return Table(columns, cells)


_COST_NOTE = (
    "Wall time of all seeds together, evaluation with its model loading; attempts that were killed outright are not "
    "counted. Energy is the whole GPU's by NVML's counter; on a CPU it is not measured."
)


def _conditions(results: Sequence[RowResult]) -> dict[str, Any]:
    documents = [run.evaluation.facts for result in results for run in result.runs if run.evaluation]
    return {
        key: sorted({json.dumps(found.get(key), sort_keys=True) for found in documents})
        for key in ("device", "versions", "dataset", "data", "norm", "epsilon", "checkpoint")
    }


def _metrics(results: Sequence[RowResult]) -> list[str]:
    found = {m for result in results for m in (*result.values, *result.row.paper)}
    return [m for m in METRICS if m in found] + sorted(found - METRICS.keys())


def _printed(results: Sequence[RowResult], metric: str) -> bool:
    return any(metric in result.row.paper for result in results)


def _ours(result: RowResult, metric: str) -> Cell:
    if metric not in result.values:
        return Cell(MISSING)
    difference, form = result.difference(metric), metric_of(metric).format()
    detail = "" if difference is None else f"({form.replace(':', ':+').format(difference)})"
    return Cell(mean_text(list(result.values[metric].values()), form), detail)


def _number(metric: str, value: float | None) -> Cell:
    return Cell(MISSING if value is None else metric_of(metric).format().format(value))


def _source(results: Sequence[RowResult]) -> str:
    return "; ".join(dict.fromkeys(r.row.recipe["paper"]["source"] for r in results if r.row.paper))


def listing(table: facts.PublishedTable, rows: Sequence[facts.PublishedRow], out: Path) -> str:
    """Returns paper rows, what has been run under OUT and the difference, for a terminal."""
    results = collect(table, rows, out)
    notes = [RULE] if any(result.verdict[0] != NOT_RUN for result in results) else []
    return "\n\n".join([table.title, verdicts(results).plain(), *notes])
