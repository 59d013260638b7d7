"""Rows of the report: which runs belong together, and what they are called."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..recipe import SECTIONS, identity
from .runs import Run
from .tables import MISSING

# Others: the name in capitals.
METHODS = {"adaad": "AdaAD", "adaiad": "AdaIAD", "iad": "IAD-I", "natural": "natural"}


@dataclass(frozen=True)
class Row:
    """Runs of one recipe under one evaluation, differing in their seeds."""

    label: str
    runs: tuple[Run, ...]

    @property
    def recipe(self) -> Mapping[str, Any]:
        return self.runs[0].recipe

    @property
    def paper(self) -> Mapping[str, float]:
        return self.runs[0].paper

    @property
    def evaluated(self) -> bool:
        return bool(self.runs[0].facts)

    @property
    def parts(self) -> list[str]:
        """Names of the base loss and the add-ons; empty where the recipe has none."""
        base = self.recipe.get("base")
        if not isinstance(base, Mapping) or not isinstance(base.get("name"), str):
            return []
        addons = [k for k, v in self.recipe.items() if isinstance(v, Mapping) and k not in (*SECTIONS, "base")]
        return [base["name"], *addons]

    @property
    def method(self) -> str:
        return " + ".join(METHODS.get(name, name.upper().replace("_", "-")) for name in self.parts) or MISSING

    def by_seed(self, metric: str) -> dict[Any, float]:
        """Returns the finite values of a metric by seed, see `Run.measure`."""
        found = {run.seed: run.measure(metric) for run in self.runs}
        return {seed: value for seed, value in found.items() if value is not None}

    def values(self, metric: str) -> list[float]:
        return list(self.by_seed(metric).values())

    def n(self, attack: str) -> int | None:
        """Returns the fewest images that any of the runs was attacked on, which give the widest interval."""
        counts = [run.results[attack]["n"] for run in self.runs if attack in run.results]
        return min((n for n in counts if n is not None), default=None)

    def who(self, run: Run) -> str:
        return self.label if len(self.runs) == 1 else f"{self.label}, seed {run.seed}"


def settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what decides the weights but for the seed, by dotted keys."""
    return {key: value for key, value in identity(recipe).items() if key != "seed"}


def group(runs: Iterable[Run]) -> list[Row]:
    """Returns the rows in the order of their first runs.

    Runs share a row when they agree in all that decides the training but the seed (see `fastrd.recipe.identity`; data
    and teachers by their contents), and their evaluations in the norm, checkpoint, data set, number of images and
    epsilon. No seed comes twice in a row: two runs of one recipe and seed differ in something that is not in a recipe,
    such as the teacher.
    """
    members: dict[Any, list[Run]] = defaultdict(list)
    seen: Counter[Any] = Counter()
    for run in runs:
        recipe = [settings(run.recipe), run.contents]
        evaluated = run.facts and run.evaluated_as
        alike = str(run.path) if run.seed is None else [run.name, recipe, evaluated]
        key = (json.dumps(alike, sort_keys=True, default=str), str(run.seed))
        seen[key] += 1
        members[key[0], seen[key]].append(run)
    rows = [Row(runs[0].name, tuple(runs)) for runs in members.values()]
    for place in (lambda run: run.path.resolve().name, lambda run: str(run.path)):
        taken = Counter(row.label for row in rows)
        rows = [
            row if taken[row.label] == 1 else Row(f"{row.runs[0].name} ({', '.join(map(place, row.runs))})", row.runs)
            for row in rows
        ]
    return rows
