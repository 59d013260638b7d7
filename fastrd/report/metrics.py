"""The metrics of every table, figure and page: their names, titles, units and formats."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

from .tables import MISSING


class Metric(NamedTuple):
    title: str
    scale: int = 100  # of what is stored, a fraction for an accuracy, to what is shown
    digits: int = 2  # where published numbers stand beside it
    digits_alone: int = 2  # where only measured ones are shown

    def format(self, n: float = math.inf, sign: Literal["", "+"] = "") -> str:
        """Returns the format of a shown value, "+" for a difference. For an accuracy on `n` <= 1000 images one decimal
        tells all values apart."""
        return f"{{:{sign}.{1 if self.scale == 100 and n <= 1000 else self.digits}f}}"

    def text(self, value: float | None) -> str:
        """Returns a shown value as text."""
        return MISSING if value is None else self.format().format(value)


ACCURACIES = {
    "clean": Metric("Clean"),
    "fgsm": Metric("FGSM"),
    "pgd20": Metric("PGD-20"),
    "cw": Metric("C&W"),
    "aa": Metric("AutoAttack"),
}
ALIGNMENT = {
    "gd": Metric("GD", scale=1, digits=3, digits_alone=4),
    "gc": Metric("GC", scale=1, digits=3, digits_alone=3),
}
# Shown where a paper prints them.
FURTHER = {
    "pd_uniform": Metric("Distance, uniform", scale=1, digits=4),
    "pd_adv": Metric("Distance, adversarial", scale=1, digits=4),
    "minutes": Metric("min/epoch", scale=1, digits=2),
    "memory": Metric("GPU MB", scale=1, digits=0),
}
METRICS = {**ACCURACIES, **ALIGNMENT, **FURTHER}


def metric_of(name: str) -> Metric:
    """Returns the metric called `name`; one that is not listed is the accuracy under an attack of that name."""
    return METRICS.get(name) or Metric(name)


def mean_text(values: Sequence[float], number: str) -> str:
    """Returns the mean of shown values ± their sample standard deviation; one value has no deviation."""
    if not values:
        return MISSING
    mean = number.format(statistics.fmean(values))
    return f"{mean} ± {number.format(statistics.stdev(values))}" if len(values) > 1 else mean
