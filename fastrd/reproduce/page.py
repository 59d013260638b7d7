"""The page of a reproduction: verdicts, comparisons, claims, curves and cost; and the same as JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import published as facts
from ..core.documents import read_teacher
from ..core.files import atomic_write, check_writable
from ..report import content, figures, page
from ..report.document import Section
from ..report.document import check_out as check_page
from ..report.document import write as write_page
from ..report.metrics import ALIGNMENT, METRICS, mean_text, metric_of
from ..report.rows import Row
from ..report.runs import Run
from ..report.statistics import correlation
from ..report.tables import MISSING, Cell, Column, Table, numeric
from . import cost
from .plan import Plan
from .verdict import COMPARISON_RULE, NOT_RUN, RULE, Comparison, RowResult, collect, compare


def check_out(plan: Plan) -> None:
    """Raises OSError where `write` could not write its files."""
    html, json_ = _files(plan)
    check_page(html)
    check_writable(json_)


def _files(plan: Plan) -> tuple[Path, Path]:
    return plan.out / f"{plan.table.name}.html", plan.out / f"{plan.table.name}.json"


def write(plan: Plan) -> Path | None:
    """Writes OUT/TABLE.html with TABLE.md, TABLE.json and its figures; None where no run has begun."""
    results = collect(plan.table, plan.rows, plan.out, plan.seeds)
    if not any(result.runs for result in results):
        return None
    html, json_ = _files(plan)
    atomic_write(json_, json.dumps(document(plan, results), indent=1) + "\n")
    return write_page(html, plan.table.title or plan.table.name, _sections(plan, results))


def verdicts(results: Sequence[RowResult]) -> Table:
    """Returns paper, ours (in parentheses minus the paper's) and verdict, one line a row."""
    found = {m for result in results for m in (*result.values, *result.row.paper)}
    metrics = [m for m in METRICS if m in found] + sorted(found - METRICS.keys())
    printed = [m for m in metrics if any(m in result.row.paper for result in results)]
    columns = [numeric(metric_of(m).title, "Paper") for m in printed]
    columns += [numeric(metric_of(m).title, "Ours") for m in metrics]
    rows = []
    for result in results:
        verdict, why = result.verdict
        paper = [metric_of(m).text(result.row.paper.get(m)) for m in printed]
        ours = [_ours(result, m) for m in metrics]
        seeds = f"{len(result.runs)}/{result.seeds}"
        rows.append([result.row.label, seeds, *paper, *ours, Cell(verdict, f"({why})" if why else "")])
    return Table.of(["Row", numeric("Seeds"), *columns, "Verdict"], rows)


def document(plan: Plan, results: Sequence[RowResult]) -> dict[str, Any]:
    """Returns the numbers of the page, of every seed, for programs."""
    return {
        "table": plan.table.name,
        "title": plan.table.title,
        "rule": RULE,
        "conditions": _conditions(results),
        "teachers": {
            name: {k: v for k, v in read_teacher(network.record).items() if k != "stamp"}
            for name, network in plan.networks.items()
        },
        "rows": [_row_document(result) for result in results],
        "comparisons": [_comparison_document(comparison) for comparison in compare(results)],
    }


def _row_document(result: RowResult) -> dict[str, Any]:
    verdict, why = result.verdict
    folders = [run.path for run in result.runs]
    return {
        "row": result.row.name,
        "paper": dict(result.row.paper),
        "verdict": verdict,
        "why": why,
        "n": dict(result.n),
        "seeds": {metric: dict(found) for metric, found in result.values.items()},
        "mean": {metric: result.mean(metric) for metric in result.values},
        "deviation": {metric: result.deviation(metric) for metric in result.values},
        "measures": [_measures(run) for run in result.runs],
        "cost": {stage: spent._asdict() for stage in cost.STAGES if (spent := cost.total(folders, stage))},
    }


def _comparison_document(c: Comparison) -> dict[str, Any]:
    gains = {metric: gain for metric in METRICS if (gain := c.gain(metric))}
    return {
        "base": c.base.row.label,
        "with": c.other.row.label,
        **{m: {"gain": gain[0], "half_width": gain[1], "word": c.word(m)} for m, gain in gains.items()},
    }


def _sections(plan: Plan, results: Sequence[RowResult]) -> list[Section]:
    begun = [result for result in results if result.runs]
    rows = [Row(result.row.label, result.runs) for result in begun]
    source = "; ".join(dict.fromkeys(r.row.recipe["paper"]["source"] for r in results if r.row.paper))
    notes = [RULE, f"Paper's numbers: {source}."] if source else ["No paper prints these rows."]
    sections = [Section("Verdicts", tables=[verdicts(results)], notes=notes)]
    if comparisons := compare(results):
        table = _comparisons(comparisons)
        sections.append(Section("What each add-on changes", tables=[table], notes=[COMPARISON_RULE]))
    if (claims := _claims(begun)) is not None:
        sections.append(claims)
    if plan.networks:
        sections.append(Section("Teachers", tables=[_teachers(plan)]))
    if (trade_off := figures.trade_off(figures.series(rows))) is not None:
        heading, notes = "Clean against robust accuracy", ["One point for each run."]
        sections.append(Section(heading, name="trade-off", plots=[trade_off], notes=notes))
    alignment = page.alignment(rows)
    alignment = replace(alignment, notes=[*alignment.notes, *_correlations(rows)])
    sections += [page.training(rows), *(each for each in (page.robustness(rows), alignment) if each.plots)]
    sections.append(Section("Cost", tables=[_costs(begun)], notes=[_COST_NOTE]))
    notes = [*content.notes(rows), *content.reconstructions(rows)]
    return [*sections, Section("Conditions", tables=[content.conditions(rows)], notes=notes)]


def _correlations(rows: Sequence[Row]) -> list[str]:
    lines = []
    for metric in ALIGNMENT:
        pairs = [(row.by_seed(metric), row.by_seed("aa")) for row in rows]
        points = [
            (found[seed], accuracy) for found, robust in pairs for seed, accuracy in robust.items() if seed in found
        ]
        if (r := correlation(points)) is not None:
            title = METRICS[metric].title
            lines.append(f"AutoAttack accuracy against {title}: Pearson's r = {r:.2f} over {len(points)} runs.")
    return lines


def _comparisons(comparisons: Sequence[Comparison]) -> Table:
    metrics = [m for m in METRICS if any(c.gain(m) for c in comparisons)]
    printed = {m for m in metrics if any(c.printed(m) is not None for c in comparisons)}
    columns: list[Column | str] = ["Row", "beside"]
    for m in metrics:
        titles = [METRICS[m].title, *([f"{METRICS[m].title}, paper"] if m in printed else [])]
        columns += [numeric(title, "Gain") for title in titles]
    rows = []
    for c in comparisons:
        line: list[Cell | str] = [c.other.row.label, c.base.row.label]
        for m in metrics:
            gain, paper, signed = c.gain(m), c.printed(m), METRICS[m].format(sign="+")
            text = MISSING if gain is None else f"{signed.format(gain[0])}, {c.word(m)}"
            width = "" if gain is None or gain[1] is None else f"(±{METRICS[m].text(gain[1])})"
            line.append(Cell(text, width))
            if m in printed:
                line.append(MISSING if paper is None else signed.format(paper))
        rows.append(line)
    return Table.of(columns, rows)


_CLAIMS = {
    "CKA": "linear centred kernel alignment of the penultimate features of student and teacher, 1 where they agree up "
    "to rotation",
    "Probe": "accuracy in percent of a linear classifier on the frozen features, on another data set",
    "MI bound": "lower bound of the mutual information of teacher and student features, last epoch, in nats",
    "Misranked": "share of images to whose teacher features those of another class in the batch are at least as "
    "similar as the student's own",
    "Remainder": "share of a random perturbation's effect that is not linear",
}


def _claims(results: Sequence[RowResult]) -> Section | None:
    found = [(result, [_measures(run) for run in result.runs]) for result in results]
    names = list(dict.fromkeys(name for _, measured in found for each in measured for name in each))
    if not names:
        return None
    rows = []
    for result, measured in found:
        line = [result.row.label]
        for name in names:
            digits = {"Probe": 1, "Remainder": 5}.get(name.split()[0], 3)
            line.append(mean_text([each[name] for each in measured if name in each], f"{{:.{digits}f}}"))
        rows.append(line)
    notes = [f"{what}: {text}." for what, text in _CLAIMS.items() if any(name.startswith(what) for name in names)]
    return Section("Further measurements", tables=[Table.of(["Row", *map(numeric, names)], rows)], notes=notes)


def _measures(run: Run) -> dict[str, float]:
    """Returns what `fastrd eval --measure` and the training log hold beyond accuracy, by column title."""
    last = run.epochs[-1] if run.epochs else {}
    found = {"CKA": run.facts.get("cka")}
    for data, entry in (run.facts.get("probe") or {}).items():
        probed = {m: share for m in ("clean", "pgd20") if (share := entry.get(m)) is not None}
        found |= {f"Probe {data}, {METRICS[m].title}": 100 * share for m, share in probed.items()}
    found |= {"MI bound": last.get("mi_bound"), "Misranked": last.get("misranked")}
    found["Remainder"] = run.facts.get("remainder", last.get("remainder"))
    return {name: value for name, value in found.items() if value is not None}


def _teachers(plan: Plan) -> Table:
    columns = [numeric(title, group) for group in ("Published", "Measured") for title in ("Clean", "PGD-20")]
    rows = []
    for name, network in plan.networks.items():
        measured = read_teacher(network.record)
        file = "missing" if network.path is None else network.path.name
        line = [f"{name} ({network.facts.title})", file]
        line += [METRICS[m].text(getattr(network.facts, m)) for m in ("clean", "pgd20")]
        line += [METRICS[m].text(100 * measured[m] if m in measured else None) for m in ("clean", "pgd20")]
        rows.append([*line, str(measured.get("n", MISSING))])
    return Table.of(["Teacher", "File", *columns, numeric("n", "Measured")], rows)


def _costs(results: Sequence[RowResult]) -> Table:
    rows = []
    for result in results:
        folders = [run.path for run in result.runs]
        spent = [cost.total(folders, stage) for stage in cost.STAGES]
        known = [each for each in spent if each is not None]
        joules = [each.joules for each in known if each.joules is not None]
        minutes = [MISSING if each is None else f"{each.seconds / 60:.1f}" for each in spent]
        energy = "not measured" if not joules or len(joules) < len(known) else f"{sum(joules) / 3600:.1f}"
        devices = ", ".join(sorted({each.device for each in known})) or MISSING
        rows.append([result.row.label, str(len(folders)), *minutes, energy, devices])
    stages = [numeric(title, "Minutes") for title in cost.STAGES.values()]
    return Table.of(["Row", numeric("Runs"), *stages, numeric("Energy, Wh"), "Device"], rows)


_COST_NOTE = (
    "Wall time of all seeds together, evaluation with its model loading; attempts that were killed outright are not "
    "counted. Energy is the whole GPU's by NVML's counter; on a CPU it is not measured."
)


def _conditions(results: Sequence[RowResult]) -> dict[str, Any]:
    documents = [run.facts for result in results for run in result.runs if run.facts]
    return {
        key: sorted({json.dumps(found.get(key), sort_keys=True) for found in documents})
        for key in ("device", "versions", "dataset", "data", "norm", "epsilon", "checkpoint")
    }


def _ours(result: RowResult, metric: str) -> Cell:
    if metric not in result.values:
        return Cell(MISSING)
    difference, m = result.difference(metric), metric_of(metric)
    detail = "" if difference is None else f"({m.format(sign='+').format(difference)})"
    return Cell(mean_text(list(result.values[metric].values()), m.format()), detail)


def listings(source: str, out: Path) -> str:
    """Returns the tables that `source` names, for a terminal: each as `listing`, or the numbers that a paper prints."""
    if (printed := facts.printed().get(source)) is not None:
        head = f"{printed.title} ({printed.source}; printed numbers, nothing here trains for them)"
        rows = [[name, *(f"{number:.2f}" for number in numbers)] for name, numbers in printed.rows.items()]
        return f"{head}\n{Table.of(['', *map(numeric, printed.columns)], rows).plain()}"
    plain = [(table, [r for r in table.rows if not r.faithful]) for table in facts.load(source)]
    return "\n".join(listing(table, rows, out) for table, rows in plain)


def listing(table: facts.PublishedTable, rows: Sequence[facts.PublishedRow], out: Path) -> str:
    """Returns paper rows, what has been run under OUT and the difference, for a terminal."""
    results = collect(table, rows, out)
    notes = [RULE] if any(result.verdict[0] != NOT_RUN for result in results) else []
    return "\n\n".join([table.title, verdicts(results).plain(), *notes])
