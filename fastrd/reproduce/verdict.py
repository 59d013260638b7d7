"""Was a row reproduced? The rule, and what lies on disk for it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import published as facts
from ..core.documents import read_teacher
from ..core.toml import differences
from ..report import runs as reports
from ..report.metrics import ALIGNMENT, FURTHER
from ..report.statistics import LEAST_DEVIATION, Z_95, t_half_width, wilson_half_width
from .plan import deviation

JUDGED = ("clean", "pgd20", "aa")
SEED_DEVIATION = 0.6  # points, where fewer than three seeds say it
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
    "of "
    f'Student\'s t over the seeds, whose deviation is taken as at least {LEAST_DEVIATION} points. "higher" and "lower" '
    "only "
    "where that interval excludes 0. What other test images would give is not in it."
)

REPRODUCED, MISSED, UNDECIDED, NOT_RUN = "reproduced", "not reproduced", "undecided", "not run"
UNFINISHED, INCOMPARABLE, NO_TARGET = "unfinished", "not comparable", "no numbers printed"
NOT_JUDGED = "shown, not judged"  # the paper prints no accuracy


@dataclass(frozen=True)
class RowResult:
    """A row and its runs. Accuracies in percent, GD and GC as they are."""

    row: facts.PublishedRow
    runs: tuple[reports.Run, ...]
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
        """Ours minus the paper's."""
        mean = self.mean(metric)
        return None if mean is None or metric not in self.row.paper else mean - self.row.paper[metric]

    def tolerance(self, metric: str) -> float:
        """Returns two standard errors of `difference`, in points: `RULE`."""
        found = self.values[metric]
        s = SEED_DEVIATION if len(found) < 3 else LEAST_DEVIATION
        s = max(s, self.deviation(metric) or 0.0)
        limit = self.row.facts.aa_limit if metric == "aa" else None
        images = 0.0
        if limit or self.row.facts.limit:
            images = 100 * wilson_half_width((self.mean(metric) or 0.0) / 100, self.n[metric]) / Z_95
        return 2 * math.sqrt(s**2 * (1 / len(found) + 1) + images**2)

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
            lacking = [metric for metric in judged if metric not in measured]
            why = f"no {', '.join(lacking)}" if lacking else f"{seeds} of {self.seeds} seeds"
            return UNFINISHED, why
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
        """Returns (mean difference, half-width of its 95 % interval or None for one seed);
        None without common seeds."""
        with_, without = (r.values.get(metric, {}) for r in (self.other, self.base))
        gains = [with_[seed] - without[seed] for seed in sorted(with_.keys() & without.keys())]
        if not gains:
            return None
        return statistics.fmean(gains), t_half_width(
            gains, 0.0 if metric in (*ALIGNMENT, *FURTHER) else LEAST_DEVIATION
        )

    def printed(self, metric: str) -> float | None:
        """Returns the paper's difference."""
        base, other = (r.row.paper.get(metric) for r in (self.base, self.other))
        return None if base is None or other is None else other - base

    def word(self, metric: str) -> str:
        found = self.gain(metric)
        if found is None or found[1] is None or abs(found[0]) <= found[1]:
            return "undecided"
        return "higher" if found[0] > 0 else "lower"


def collect(
    table: facts.PublishedTable, rows: Iterable[facts.PublishedRow], out: Path, seeds: int | None = None
) -> list[RowResult]:
    """Returns what OUT holds for these rows."""
    return [_collect(table, row, Path(out), seeds or row.facts.seeds) for row in rows]


def compare(results: Sequence[RowResult]) -> list[Comparison]:
    """Returns every row beside the row of the same setting that lacks its last add-on."""
    plain = {(r.row.setting, r.row.method): r for r in results if _is_plain(r.row)}
    pairs = ((plain.get((r.row.setting, r.row.method[:-1])), r) for r in results)
    return [Comparison(base, other) for base, other in pairs if base and base.runs and other.runs]


def _is_plain(row: facts.PublishedRow) -> bool:
    return row.label.split("/")[0] == "+".join(row.method) and not row.name.endswith("/faithful")


def _collect(table: facts.PublishedTable, row: facts.PublishedRow, out: Path, seeds: int) -> RowResult:
    folders = sorted((out / table.name / row.label).glob("seed-*"), key=lambda f: (len(f.name), f.name))
    found = [folder for folder in folders if (folder / "recipe.toml").is_file()]
    runs = reports.load(found) if found else []
    values: dict[str, dict[int, float]] = {}
    n: dict[str, int] = {}
    for run in runs:
        if run.evaluation is None:
            continue
        for attack, result in run.evaluation.results.items():
            if result.accuracy is not None:
                values.setdefault(attack, {})[run.seed] = 100 * result.accuracy
                n[attack] = min(result.n or 0, n.get(attack, result.n or 0))
        for metric in (*ALIGNMENT, *(name for name in FURTHER if name in row.paper)):
            if (value := run.measure(metric)) is not None:
                values.setdefault(metric, {})[run.seed] = value
    return RowResult(row, tuple(runs), _incomparable(table, row, runs, out), seeds, values, n)


def _incomparable(table: facts.PublishedTable, row: facts.PublishedRow, runs: Sequence[reports.Run], out: Path) -> str:
    from ..recipe import Recipe, identity

    planned = Recipe.from_dict(row.recipe, where=row.name).identity()
    for run in runs:
        changed = differences(planned, identity(run.recipe), ignore=("seed",))
        if changed:
            return "the recipe was changed: " + ", ".join(
                f"{key} {before!r} -> {now!r}" for key, (before, now) in changed.items()
            )
    for role in row.trains_with:
        name = getattr(row.facts, role)
        off = deviation(table.teachers[name], read_teacher(out / "teachers" / f"{name}.json"))
        if off:
            return f"another teacher: {off}"
    return ""
