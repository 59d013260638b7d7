"""Intervals and correlations."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Z_95 = 1.959964
LEAST_DEVIATION = 0.3  # points between seeds: three can agree by chance


def wilson_half_width(accuracy: float, n: int) -> float:
    """Returns half the width of the 95 % Wilson score interval of a fraction `accuracy` of `n`, above 0 at 0 and 1."""
    spread = accuracy * (1 - accuracy) / n + Z_95**2 / (4 * n**2)
    return Z_95 * math.sqrt(spread) / (1 + Z_95**2 / n)


def correlation(points: Sequence[tuple[float, float]]) -> float | None:
    """Returns Pearson's r; None for fewer than three points or no spread."""
    if len(points) < 3:
        return None
    try:
        return statistics.correlation(*zip(*points, strict=True))
    except statistics.StatisticsError:
        return None


def t_half_width(values: Sequence[float], least: float = 0.0) -> float | None:
    """Returns half the 95 % interval of a mean by Student's t, the deviation at least `least`; None for one value."""
    if len(values) < 2:
        return None
    from scipy.stats import t  # slow to import, and needed for comparisons alone

    return float(t.ppf(0.975, len(values) - 1)) * max(least, statistics.stdev(values)) / math.sqrt(len(values))


def paired_difference(
    with_: Mapping[Any, float], without: Mapping[Any, float], least: float
) -> tuple[float, float | None] | None:
    """Returns (mean, `t_half_width`) of the differences over the seeds that both have; None where they share none."""
    gains = [with_[seed] - without[seed] for seed in sorted(with_.keys() & without.keys(), key=str)]
    return (statistics.fmean(gains), t_half_width(gains, least)) if gains else None


def verdict_of(difference: tuple[float, float | None] | None) -> str:
    """Returns "higher" or "lower" where the interval of a `paired_difference` excludes 0, else "undecided"."""
    if difference is None or difference[1] is None or abs(difference[0]) <= difference[1]:
        return "undecided"
    return "higher" if difference[0] > 0 else "lower"
