"""Plans what a table still needs: its runs and their teachers, whose files are the only state."""

from __future__ import annotations

import fnmatch
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import published as facts
from ..core.documents import is_finished, read_evaluation, read_log, read_teacher
from ..core.files import check_path
from ..core.toml import differences
from ..core.values import check_integer, shown
from ..data.catalog import check_name
from ..evaluation.measures import needs_teacher
from ..recipe import Recipe
from ..report.tables import Table, numeric

ALL = 10**9  # test images, whatever the recipe of a run that is there says


@dataclass(frozen=True)
class FrozenTeacher:
    """A frozen teacher: a file that was given, or a run that this reproduction trains."""

    name: str
    facts: facts.PublishedTeacher
    path: Path | None  # None: missing
    record: Path  # what was measured of it before anything trains with it
    run: PlannedRun | None = None  # where it is trained here

    @property
    def measured(self) -> Mapping[str, Any] | None:
        """What was measured of the file that is there now; None where nothing was."""
        document = read_teacher(self.record)
        return document if document and document.get("stamp") == stamp(self.path) else None

    def describe(self) -> str:
        text, measured = f"teacher {self.name}: {self.path}, ", self.measured
        if measured is None:
            return text + "not measured yet"
        numbers = [f"{metric} {100 * measured[metric]:.2f}" for metric in ("clean", "pgd20") if metric in measured]
        return f"{text}{', '.join(numbers)} on {measured['n']} test images"

    def remedy(self) -> str:
        """Returns what to do about a missing teacher."""
        teacher, option = self.facts, f"--teacher {self.name}"
        lines = [f"teacher {self.name} ({teacher.title}, {teacher.data}) is missing. Give its file with {option}=FILE."]
        if teacher.source:
            lines.append(
                f"It is published as RobustBench's {teacher.source} ({teacher.data}, Linf): "
                "pip install git+https://github.com/RobustBench/robustbench && "
                f'python -c "from robustbench.utils import load_model; '
                f"load_model('{teacher.source}', dataset='{teacher.data}', threat_model='Linf')\" "
                f"leaves it in models/{teacher.data}/Linf/{teacher.source}.pt."
            )
        if teacher.substitute:
            lines.append(
                f"To train another in its place: fastrd train {teacher.substitute} --out runs/{self.name}, then "
                f"{option}=runs/{self.name} --any-teacher."
            )
        return " ".join(lines)


@dataclass(frozen=True)
class PlannedRun:
    """One recipe under one seed, in its folder."""

    label: str  # of its row, or of the teacher
    recipe: Recipe
    folder: Path
    networks: Mapping[str, FrozenTeacher]  # role -> those it trains with
    alignment_teacher: FrozenTeacher | None = None  # what its gradients are compared with
    same_weights_as: Path | None = None  # an earlier run with the same weights
    row: facts.PublishedRow | None = None

    @property
    def attacks(self) -> tuple[str, ...]:
        return self.recipe.evaluation.attacks if self.row else ()

    @property
    def name(self) -> str:
        return f"{self.label}, seed {self.recipe.seed}"

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """The lines of the log about finished epochs."""
        return [line for line in read_log(self.folder / "log.jsonl")[0] if line["kind"] == "epoch"]

    @property
    def trained(self) -> bool:
        return is_finished(self.folder)

    @property
    def measurements(self) -> Mapping[str, Any]:
        """The document in evaluation.json, empty where the run is not finished or not evaluated as it is to be."""
        document = read_evaluation(self.folder / "evaluation.json") if self.trained else {}
        return {} if self.row and evaluated_otherwise(self.recipe, self.row, document) else document

    def missing_attacks(self) -> list[str]:
        """Returns the attacks of the recipe whose results are not in evaluation.json, AutoAttack last."""
        document = self.measurements
        done, whole = dict(document.get("results", {})), document.get("of")
        if whole and self.row and "aa" in done:
            limit = self.row.facts.aa_limit or _limit(self.recipe, self.row)
            if (done["aa"].get("n") or whole) < min(limit or whole, whole):
                del done["aa"]
        return sorted((a for a in self.attacks if a not in done), key=lambda attack: attack == "aa")

    @property
    def before_autoattack(self) -> bool:
        """Whether there is anything to do before AutoAttack, which comes last."""
        return not self.trained or bool({*self.missing_attacks()} - {"aa"} or self.missing_measures())

    def missing_measures(self) -> list[str]:
        if self.row is None:
            return []
        document, comparable = self.measurements, self.evaluation_options()["teacher"] is not None
        wanted = [measure for measure in self.row.facts.measures if comparable or not needs_teacher(measure)]
        missing = [measure for measure in wanted if not _measured(measure, document)]
        if missing or self.missing_attacks():  # then the evaluation that is due drops what names no teacher
            named = document.get("teachers") or {}
            missing += [each for each in wanted if needs_teacher(each) and each not in {*missing, *named}]
        return missing

    def evaluation_options(self) -> dict[str, Any]:
        """Returns the options of `evaluate_run` that follow from the row."""
        teacher = self.alignment_teacher
        return {"teacher": teacher and teacher.path, "limit": _limit(self.recipe, self.row) or ALL}

    @property
    def done(self) -> bool:
        return self.trained and not self.missing_attacks() and not self.missing_measures()

    def failure(self) -> str:
        path = self.folder / "error.txt"
        return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""

    def check(self) -> None:
        """Raises ValueError where the folder holds a run of another recipe."""
        path = self.folder / "recipe.toml"
        if not path.is_file():
            return
        if changed := differences(Recipe.stored(path).identity(), self.recipe.identity()):
            text = ", ".join(f"{key}: {before!r} -> {now!r}" for key, (before, now) in changed.items())
            raise ValueError(f"{self.folder} was made with another recipe ({text}); move it away, or use another --out")

    def state(self) -> str:
        if self.done:
            return "done"
        if self.failure():
            return f"failed: {self.failure()}"
        if self.trained:
            return "trained; to do: " + ", ".join(self.missing_attacks() + self.missing_measures())
        if self.same_weights_as is not None:
            return f"as {self.same_weights_as}"
        done = len(self.epochs)
        return f"epoch {done} of {self.recipe.schedule.epochs}" if done else "not started"


@dataclass(frozen=True)
class Plan:
    """The runs of one table, seed by seed, so that every row has a first number early."""

    table: facts.PublishedTable
    out: Path
    rows: tuple[facts.PublishedRow, ...]
    seeds: int
    runs: tuple[PlannedRun, ...]  # teachers that are trained here first
    networks: Mapping[str, FrozenTeacher]
    any_teacher: bool = False

    def blocked(self, run: PlannedRun) -> str:
        """Returns why a run cannot start, in words; empty where it can, now or once its teachers are trained."""
        for network in run.networks.values():
            if network.path is None:
                return network.remedy()
            if (off := deviation(network.facts, network.measured or {})) and not self.any_teacher:
                remedy = "Check the file, or accept it with --any-teacher; its rows are then not comparable."
                return f"teacher {network.name} is not the published one: {off}. {remedy}"
        return ""

    def lines(self) -> list[str]:
        """Returns the plan in words for a terminal."""
        rows = [[run.label, str(run.recipe.seed), str(run.recipe.schedule.epochs), run.state()] for run in self.runs]
        lines = [Table.of(["Run", numeric("Seed"), numeric("Epochs"), "State"], rows).plain(), ""]
        lines += dict.fromkeys(reason for run in self.runs if (reason := self.blocked(run)))
        lines += [network.describe() for network in self.networks.values() if network.path is not None]
        left = [run for run in self.runs if not run.done]
        text = f"{len(self.runs) - len(left)} of {len(self.runs)} runs done"
        seconds = self._seconds_left(left)
        return [*lines, text + (f"; about {seconds / 3600:.1f} hours of training left" if seconds else "")]

    def _seconds_left(self, left: Sequence[PlannedRun]) -> float | None:
        """Estimates from the epochs logged of the same label, else of the other rows; None where neither has any."""
        seen: dict[str, list[float]] = {}
        for run in self.runs:
            seen.setdefault(run.label, []).extend(line.get("seconds") or 0.0 for line in run.epochs)
        means = {label: statistics.fmean(values) for label, values in seen.items() if values}
        rows = [means[label] for label in dict.fromkeys(run.label for run in self.runs if run.row) if label in means]
        total = 0.0
        for run in left:
            each = means.get(run.label, statistics.fmean(rows) if rows and run.row else None)
            if each is None:
                return None
            total += (run.recipe.schedule.epochs - len(run.epochs)) * each
        return total


def make(
    table: facts.PublishedTable,
    out: str | os.PathLike,
    *,
    patterns: Sequence[str] = (),
    seeds: int | None = None,
    teachers: Mapping[str, str | os.PathLike] | None = None,
    any_teacher: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> Plan:
    """Plans the rows of `table` whose labels match one of `patterns` (shell wildcards; default: all but the variants).

    Raises:
        ValueError: nothing matches; a bad number of seeds; an unknown teacher; a folder of another recipe.
        FileNotFoundError: a teacher's file is not there.
    """
    rows = _chosen(table, patterns)
    seeds = rows[0].facts.seeds if seeds is None else seeds
    check_integer(least=1, most=facts.MOST_SEEDS, seeds=seeds)
    out = check_path(out=out)
    given = dict(teachers or {})
    # A teacher is also what gradients are compared with, of rows that do not train with it.
    roles = [(row, role) for row in rows for role in dict.fromkeys(("teacher", *row.trains_with))]
    wanted = dict.fromkeys(name for row, role in roles if (name := getattr(row.facts, role)))
    for name in given:
        if name not in wanted:
            raise ValueError(f"--teacher: got {name!r}; accepted: {', '.join(wanted) or 'none for these rows'}")
    networks = {name: _network(name, table, out, given.get(name)) for name in wanted}

    runs = [network.run for network in networks.values() if network.run is not None]
    earlier: dict[str, Path] = {}
    for seed in range(seeds):
        for row in rows:
            recipe = Recipe.from_dict({**row.recipe, "seed": seed}, where=row.name)
            if overrides:
                recipe = _overridden(recipe, overrides)
            check_name("data.name", recipe.data.name)
            folder = out / table.name / row.label / f"seed-{seed}"
            used = {role: networks[getattr(row.facts, role)] for role in row.trains_with}
            key = json.dumps([recipe.identity(), {role: n.name for role, n in used.items()}], sort_keys=True)
            aligned = networks.get(row.facts.teacher or "")
            run = PlannedRun(row.label, recipe, folder, used, aligned, earlier.get(key), row)
            earlier.setdefault(key, folder)
            run.check()
            runs.append(run)
    return Plan(table, out, tuple(rows), seeds, tuple(runs), networks, any_teacher)


def _overridden(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """Returns the recipe of a row with other settings, none of which the plan itself decides."""
    changed = recipe.override(overrides)
    decided = {
        "seed": "--seeds N, which gives each run its own",
        "name": "another --out",
        "teacher.source": "--teacher NAME=CKPT",
        "clean_teacher.source": "--teacher NAME=CKPT",
    }
    for key, (_, new) in differences(recipe.to_dict(), changed.to_dict()).items():
        if key in decided:
            raise ValueError(f"--set {key}: got {shown(new)}; accepted: {decided[key]}")
    return changed


def deviation(teacher: facts.PublishedTeacher, measured: Mapping[str, Any]) -> str:
    """Returns how the measured accuracies of a teacher differ from its published ones; empty where they agree."""
    off = []
    for metric in ("clean", "pgd20"):
        expected = getattr(teacher, metric)
        if expected is not None and metric in measured:
            accuracy, n = measured[metric], measured["n"]
            # Three standard deviations of n images, and a point for what else may differ in the attack.
            allowed = 1 + 300 * (accuracy * (1 - accuracy) / n) ** 0.5
            if abs(100 * accuracy - expected) > allowed:
                off.append(f"{metric} {100 * accuracy:.2f}, published {expected:.2f}")
    return "; ".join(off)


def _limit(recipe: Recipe, row: facts.PublishedRow | None) -> int | None:
    """Returns how many test images are evaluated; None: all."""
    return (row.facts.limit if row else None) or recipe.data.test_limit


def evaluated_otherwise(recipe: Recipe, row: facts.PublishedRow, document: Mapping[str, Any]) -> str:
    """Returns how an evaluation.json differs from what the row asks for; empty where it does not, or says nothing.

    Not the number of AutoAttack's images, which are fewer where the budget is.
    """
    attack, n, whole = recipe.attack, document.get("n"), document.get("of")
    limit = _limit(recipe, row)
    wanted = {"norm": attack.norm, "epsilon": attack.epsilon, "checkpoint": "last"}
    if n and whole:
        wanted["n"] = min(limit or whole, whole)
    off = {key: document[key] for key in wanted if document.get(key) not in (None, wanted[key])}
    return ", ".join(f"{key} {value} instead of {wanted[key]}" for key, value in off.items())


def stamp(path: Path | None) -> list[Any] | None:
    """Returns what changes when a file is replaced."""
    if path is None or not path.exists():
        return None
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def _chosen(table: facts.PublishedTable, patterns: Sequence[str]) -> list[facts.PublishedRow]:
    def matches(row: facts.PublishedRow, pattern: str) -> bool:
        return fnmatch.fnmatchcase(row.label, pattern) and row.faithful == pattern.endswith("faithful")

    rows = [row for row in table.rows if any(matches(row, pattern) for pattern in patterns or ["*"])]
    if not rows:
        accepted = f"shell patterns of {', '.join(row.label for row in table.rows)}"
        raise ValueError(f"rows: nothing in {table.name} matches {' '.join(patterns)!r}; accepted: {accepted}")
    return rows


def _network(name: str, table: facts.PublishedTable, out: Path, given: str | os.PathLike | None) -> FrozenTeacher:
    teacher = table.teachers[name]
    home = out / "teachers"
    network = FrozenTeacher(name, teacher, None, home / f"{name}.json")
    if given is not None:
        if not Path(given).exists():
            raise FileNotFoundError(f"--teacher {name}: no file or folder {given}")
        return replace(network, path=Path(given))
    if teacher.source is not None:
        published = Path("models") / teacher.data / "Linf" / f"{teacher.source}.pt"
        return replace(network, path=published if published.is_file() else None)
    beside = table.folder / str(teacher.recipe)
    recipe = Recipe.load(beside if beside.is_file() else str(teacher.recipe))
    run = PlannedRun(label=f"teacher {name}", recipe=recipe, folder=home / name, networks={})
    run.check()
    return replace(network, path=run.folder / "best.pt", run=run)


def _measured(measure: str, document: Mapping[str, Any]) -> bool:
    kind, _, data = measure.partition(":")
    found = document.get(kind)
    return found is not None and (not data or Path(data).stem in found)
