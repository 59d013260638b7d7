"""Decides whether a row was reproduced, by one rule, from the files of its runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import published as facts
from ..core.documents import read_state, read_teacher
from ..core.toml import differences
from ..recipe import Recipe
from ..report.metrics import ALIGNMENT, FURTHER, metric_of
from ..report.rows import Row, settings
from ..report.runs import Run, load
from ..report.statistics import LEAST_DEVIATION, Z_95, paired_difference, verdict_of, wilson_half_width
from .plan import deviation, evaluated_otherwise

JUDGED = ("clean", "pgd20", "aa")
SEED_DEVIATION = 0.6  # points, assumed with fewer than three seeds
WIDEST = 2.5  # points
RULE = (
    "A row is reproduced when clean, PGD-20 and AutoAttack accuracy, as far as the paper prints them, each lie within "
    "two standard errors of the paper's number. The squared standard error is s²(1/k + 1), for our k seeds and the "
    f"paper's one, with s the sample deviation over our seeds, at least {LEAST_DEVIATION} points ({SEED_DEVIATION} for "
    "fewer than three seeds); where only n test images were attacked, that of the accuracy on n images is added. "
    f"Agreement within two standard errors of more than {WIDEST} points together proves nothing and is undecided. GD, "
    "GC, distances and costs are shown and not judged: the paper leaves the definition of the former and the GPU of "
    "the latter open. A row is not comparable when its recipe was changed or its teacher does not have the published "
    "accuracy."
)
COMPARISON_RULE = (
    "Differences are taken seed by seed, on the same test images; in parentheses the half-width of the 95 % interval "
    f'of Student\'s t over the seeds, whose deviation is taken as at least {LEAST_DEVIATION} points. "higher" and '
    '"lower" only where that interval excludes 0. What other test images would give is not in it.'
)

REPRODUCED, MISSED, UNDECIDED, NOT_RUN = "reproduced", "not reproduced", "undecided", "not run"
UNFINISHED, INCOMPARABLE, NO_TARGET = "unfinished", "not comparable", "no published numbers"
NOT_JUDGED = "shown, not judged"  # the paper prints no accuracy


@dataclass(frozen=True)
class RowResult:
    """A row and its runs. Accuracies in percent, GD and GC as they are."""

    row: facts.PublishedRow
    runs: tuple[Run, ...]
    incomparable: str = ""  # why, in words
    seeds: int = 1  # planned
    values: Mapping[str, Mapping[int, float]] = field(default_factory=dict)  # metric -> seed -> value
    n: Mapping[str, int] = field(default_factory=dict)  # test images of each metric

    def mean(self, metric: str) -> float | None:
        return statistics.fmean(self.values[metric].values()) if self.values.get(metric) else None

    def deviation(self, metric: str) -> float | None:
        found = list(self.values.get(metric, {}).values())
        return statistics.stdev(found) if len(found) > 1 else None

    def difference(self, metric: str) -> float | None:
        """Returns ours minus the paper's."""
        mean = self.mean(metric)
        return None if mean is None or metric not in self.row.paper else mean - self.row.paper[metric]

    def tolerance(self, metric: str) -> float:
        """Returns two standard errors of `difference`, in points: `RULE`."""
        k, facts = len(self.values[metric]), self.row.facts
        s = max(SEED_DEVIATION if k < 3 else LEAST_DEVIATION, self.deviation(metric) or 0.0)
        images = 0.0
        limit = facts.limit or self.row.recipe.get("data", {}).get("test_limit")
        if metric == "aa":
            limit = facts.aa_limit or limit
        if limit:
            n = self.n[metric] or limit  # an evaluation need not say how many it attacked
            images = 100 * wilson_half_width((self.mean(metric) or 0.0) / 100, n) / Z_95
        return 2 * math.sqrt(s**2 * (1 / k + 1) + images**2)

    @property
    def verdict(self) -> tuple[str, str]:
        """(verdict, why)."""
        judged = [metric for metric in JUDGED if metric in self.row.paper]
        measured = [metric for metric in judged if metric in self.values]
        if not self.runs:
            return NOT_RUN, ""
        if not judged:
            return (NOT_JUDGED if self.row.paper else NO_TARGET), ""
        seeds = min((len(self.values[metric]) for metric in measured), default=0)
        if len(measured) < len(judged) or seeds < self.seeds:
            lacking = ", ".join(metric for metric in judged if metric not in measured)
            return UNFINISHED, f"no {lacking}" if lacking else f"{seeds} of {self.seeds} seeds"
        if self.incomparable:
            return INCOMPARABLE, self.incomparable
        off = [
            f"{metric} {self.difference(metric):+.2f}, allowed {self.tolerance(metric):.2f}"
            for metric in judged
            if abs(self.difference(metric) or 0.0) > self.tolerance(metric)
        ]
        if off:
            return MISSED, "; ".join(off)
        noisy = [f"{m} within {self.tolerance(m):.1f}" for m in judged if self.tolerance(m) > WIDEST]
        return (UNDECIDED, "; ".join(noisy)) if noisy else (REPRODUCED, "")


@dataclass(frozen=True)
class Comparison:
    """What an add-on changes: the row with it minus the row without, over the seeds both have."""

    base: RowResult
    other: RowResult

    def gain(self, metric: str) -> tuple[float, float | None] | None:
        """Returns the `paired_difference` of the two rows."""
        with_, without = (result.values.get(metric, {}) for result in (self.other, self.base))
        return paired_difference(with_, without, 0.0 if metric in (*ALIGNMENT, *FURTHER) else LEAST_DEVIATION)

    def printed(self, metric: str) -> float | None:
        """Returns the paper's difference."""
        base, other = (r.row.paper.get(metric) for r in (self.base, self.other))
        return None if base is None or other is None else other - base

    def word(self, metric: str) -> str:
        return verdict_of(self.gain(metric))


def collect(
    table: facts.PublishedTable, rows: Iterable[facts.PublishedRow], out: Path, seeds: int | None = None
) -> list[RowResult]:
    """Returns what OUT holds for these rows."""
    results = []
    for row in rows:
        folders = sorted((out / table.name / row.label).glob("seed-*"), key=lambda f: (len(f.name), f.name))
        found = [folder for folder in folders if (folder / "recipe.toml").is_file()]
        shown = Row(row.label, tuple(load(found) if found else ()))
        attacks = dict.fromkeys(name for run in shown.runs for name in run.results)
        values = {}
        for metric in (*attacks, *ALIGNMENT, *(name for name in FURTHER if name in row.paper)):
            if by_seed := shown.by_seed(metric):
                values[metric] = {seed: metric_of(metric).scale * value for seed, value in by_seed.items()}
        n = {attack: shown.n(attack) or 0 for attack in attacks if attack in values}
        why = _incomparable(table, row, shown.runs, out)
        results.append(RowResult(row, shown.runs, why, seeds or row.facts.seeds, values, n))
    return results


def compare(results: Sequence[RowResult]) -> list[Comparison]:
    """Returns every row beside the row of the same setting that lacks its last add-on."""
    named = [r for r in results if r.row.label.split("/")[0] == "+".join(r.row.method)]
    plain = {(r.row.setting, r.row.method): r for r in named if not r.row.faithful}
    pairs = ((plain.get((r.row.setting, r.row.method[:-1])), r) for r in results)
    return [Comparison(base, other) for base, other in pairs if base and base.runs and other.runs]


def _incomparable(table: facts.PublishedTable, row: facts.PublishedRow, runs: Sequence[Run], out: Path) -> str:
    recipe = Recipe.from_dict(row.recipe, where=row.name)
    for run in runs:
        if changed := differences(settings(recipe.to_dict()), settings(run.recipe)):
            text = ", ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in changed.items())
            return f"the recipe was changed: {text}"
        if off := evaluated_otherwise(recipe, row, run.facts):
            return f"evaluated otherwise: {off}"
    for role in row.trains_with:
        name = getattr(row.facts, role)
        record = read_teacher(out / "teachers" / f"{name}.json")
        if off := deviation(table.teachers[name], record):
            return f"another teacher: {off}"
        measured = record.get("fingerprint")
        states = [read_state(run.path) or {"identity": {}} for run in runs]
        if measured and any(state["identity"].get(role, measured) != measured for state in states):
            return f"another teacher: {name} holds other weights than the runs were trained with"
    return ""
