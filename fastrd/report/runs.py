"""Reading run folders. Everything in them is checked here once; nothing is trusted, nothing is invented."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..core.archives import read_npz
from ..core.documents import read_evaluation, read_log, read_state
from ..core.files import read_json
from ..core.schema import convert, known_entries
from ..core.toml import read_toml
from ..core.values import NORMS, shown
from ..recipe import SCALARS, SECTIONS
from .metrics import METRICS
from .tables import printable


class Curve(NamedTuple):
    epsilons: list[float]
    accuracies: list[float]  # fractions, NaN where the file has no finite value
    norm: str = "linf"
    warnings: tuple[str, ...] = ()


class Panel(NamedTuple):
    clean: np.ndarray  # (N, H, W, C) in [0, 1], C 1 or 3
    adv: np.ndarray
    label: np.ndarray  # (N,) class indices
    pred_clean: np.ndarray
    pred_adv: np.ndarray
    class_names: Any  # (classes,) strings


@dataclass(frozen=True)
class Run:
    path: Path
    recipe: Mapping[str, Any]  # empty for a folder that only holds an evaluation
    paper: Mapping[str, float]  # percent; gd and gc as printed
    epochs: tuple[Mapping[str, Any], ...]  # the log's epoch lines
    last_step: tuple[int, int] | None  # (epoch, step) of the log's last step line
    torn: bool  # the log's last line was cut off while it was written
    facts: Mapping[str, Any]  # in evaluation.json: checkpoint, dataset, n, epsilon, device, versions, ...; may be empty
    curve: Curve | None
    contents: Mapping[str, str]  # fingerprints of data and teachers; of an old run, where its teachers came from

    @property
    def name(self) -> str:
        return printable(str(self.recipe.get("name") or self.path.resolve().name))

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """Results by attack, as in evaluation.json; one without an n has that of the document."""
        results, n = self.facts.get("results", {}), self.facts.get("n")
        return {name: {**each, "n": each.get("n") or n} for name, each in results.items()}

    @property
    def norm(self) -> str:
        """The norm that it was evaluated in; older evaluations know one only."""
        return self.facts.get("norm") or "linf"

    @property
    def evaluated_as(self) -> tuple[Any, ...]:
        """What evaluations must share to be compared: norm, checkpoint, data set, images, their number, epsilon."""
        return (self.norm, *map(self.facts.get, ("checkpoint", "dataset", "images", "n", "epsilon")))

    @property
    def seed(self) -> Any:
        return self.recipe.get("seed")

    @property
    def seconds(self) -> float | None:
        """Sum of the logged epoch times; None where no epoch was finished."""
        times = self.logged("seconds")
        return sum(times) if times else None

    def logged(self, key: str) -> list[float]:
        """Returns the numbers that the log has of `key`, of the epochs that have one."""
        return [line[key] for line in self.epochs if line.get(key) is not None]

    def measure(self, metric: str) -> float | None:
        """Returns the value of a metric, an accuracy under attack as a fraction; None where it was not measured."""
        match metric:
            case "gd" | "gc":
                return (self.facts.get("alignment") or {}).get(metric)
            case "pd_uniform" | "pd_adv":
                key = {"pd_uniform": "uniform", "pd_adv": "adversarial"}[metric]
                return (self.facts.get("pointwise") or {}).get(key)
            case "minutes":
                return self.seconds / len(self.epochs) / 60 if self.seconds else None
            case "memory":
                return max(self.logged("memory_mb"), default=None)
        return self.results.get(metric, {}).get("accuracy")

    @property
    def planned_epochs(self) -> int | None:
        return self.recipe.get("schedule", {}).get("epochs")

    def panel(self) -> Panel | None:
        """Returns the example images, read when asked for: the tables do not need them."""
        path = self.path / "panel.npz"
        return _read_panel(path, self.facts) if path.is_file() else None


def load(runs: Sequence[str | os.PathLike]) -> list[Run]:
    """Returns the runs in these folders, a folder named twice only once.

    Raises FileNotFoundError, ValueError and TypeError as `fastrd.report.build` says.
    """
    folders = list({Path(run).resolve(): Path(run) for run in runs}.values())
    if not folders:
        raise ValueError("runs: none given; accepted: one or more run folders")
    return [_read(folder) for folder in folders]


def _read(folder: Path) -> Run:
    if not folder.is_dir():
        raise FileNotFoundError(f"runs: {folder}: no such run folder")
    names = ("recipe.toml", "log.jsonl", "evaluation.json")
    if not any((folder / name).is_file() for name in names):
        raise FileNotFoundError(f"runs: {folder}: not a run folder, it holds none of {', '.join(names)}")
    recipe, where = _read_recipe(folder / "recipe.toml"), f"{folder / 'recipe.toml'}: paper"
    paper = recipe.get("paper", {})
    lines, torn = read_log(folder / "log.jsonl")
    steps = [(line["epoch"], line["step"]) for line in lines if line["kind"] == "step"]
    return Run(
        path=folder,
        recipe=recipe,
        contents=_contents(folder, recipe),
        paper={key: convert(paper[key], float, f"{where}.{key}") for key in METRICS if key in paper},
        epochs=tuple(line for line in lines if line["kind"] == "epoch"),
        last_step=steps[-1] if steps else None,
        torn=torn,
        facts=(facts := read_evaluation(folder / "evaluation.json")),
        curve=_read_curve(folder / "curve.json", facts),
    )


def _read_recipe(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    recipe = read_toml(path)
    for key, value in recipe.items():
        if key in SCALARS:
            convert(value, SCALARS[key], f"{path}: {key}")
        elif type(value) is not dict:
            raise ValueError(f"{path}: {key}: got {shown(value)}; accepted: a table")
        elif key in SECTIONS:  # the recipe of another version may have more keys
            known_entries(SECTIONS[key], value, f"{path}: {key}")
    return recipe


def _contents(folder: Path, recipe: Mapping[str, Any]) -> dict[str, str]:
    if (state := read_state(folder)) is not None:
        return state["identity"]
    sources = {role: recipe.get(role, {}).get("source") for role in ("teacher", "clean_teacher")}
    return {role: source for role, source in sources.items() if source}


def _read_curve(path: Path, evaluation: Mapping[str, Any]) -> Curve | None:
    """Returns the curve; None where it is of other weights or images than the evaluation, or there is none."""
    if (document := read_json(path)) is None:
        return None
    for key in ("fingerprint", "dataset", "images", "n"):
        if None not in (evaluation.get(key), document.get(key)) and evaluation[key] != document[key]:
            return None
    columns = []
    for key, most in (("epsilons", 1e6), ("accuracies", 1)):
        values: Any = document.get(key)
        known: list[Any] = [v for v in values if v is not None] if isinstance(values, list) else [None]
        if not all(type(v) in (int, float) and 0 <= v <= most for v in known):
            raise ValueError(f"{path}: {key}: got {shown(values)}; accepted: a list of numbers in [0, {most:g}]")
        columns.append([math.nan if v is None else float(v) for v in values])
    norm, warned = document.get("norm", "linf"), document.get("warnings", [])
    if norm not in tuple(NORMS) or not isinstance(warned, list):
        got = f"norm {shown(norm)} and warnings {shown(warned)}"
        raise ValueError(f"{path}: got {got}; accepted: one of {', '.join(NORMS)}, and a list")
    epsilons, accuracies = columns
    if len(epsilons) != len(accuracies) or not all(map(math.isfinite, epsilons)):
        got = f"{len(epsilons)} epsilons and {len(accuracies)} accuracies"
        raise ValueError(f"{path}: got {got}; accepted: equally many, and finite epsilons")
    return Curve(epsilons, accuracies, norm, tuple(map(str, warned)))


def _read_panel(path: Path, evaluation: Mapping[str, Any]) -> Panel | None:
    """Returns the pictures; None where they are of other weights or images than the evaluation."""
    about = ("fingerprint", "images")
    arrays = read_npz(path, Panel._fields, optional=about)
    for key in about:
        of = arrays.pop(key, None)  # older files do not say it
        if None not in (of, evaluation.get(key)) and str(of) != evaluation[key]:
            return None
    panel = Panel(**arrays)
    shape = panel.clean.shape
    if len(shape) != 4 or shape[3] not in (1, 3) or panel.adv.shape != shape:
        raise ValueError(f"{path}: clean, adv: got {shape} and {panel.adv.shape}; accepted: both (N, H, W, 1 or 3)")
    for name in ("clean", "adv"):
        if getattr(panel, name).dtype.kind != "f":
            raise ValueError(f"{path}: {name}: got {getattr(panel, name).dtype}; accepted: float in [0, 1]")
    names = panel.class_names
    if names.ndim != 1 or names.dtype.kind != "U":
        raise ValueError(f"{path}: class_names: got {names.dtype} {names.shape}; accepted: a list of strings")
    for name in ("label", "pred_clean", "pred_adv"):
        values = getattr(panel, name)
        indices = values.shape == shape[:1] and values.dtype.kind in "iu"
        if not indices or (len(values) and not (values.min() >= 0 and values.max() < len(names))):
            raise ValueError(f"{path}: {name}: got {values!r}; accepted: one index below {len(names)} for each image")
    return panel._replace(class_names=tuple(names.tolist()))
