"""The JSON files of a run folder, one schema each. Readers raise errors that name the file and the entry."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypedDict

from .files import atomic_write, read_json, read_jsonl
from .schema import convert
from .values import NORMS, as_number, check_integer, check_number, check_option, shown

EVALUATION_SCHEMA = 1
STATE = "run.json"
_LARGEST_RADIUS = 1e6  # a number that can still be shown in 255ths


class _Alignment(TypedDict, total=False):
    gd: float | None
    gc: float | None


class _Attacked(TypedDict, total=False):
    accuracy: float | None
    accuracy_8bit: float | None
    n: int | None
    seconds: float | None
    stages: dict[str, float | None] | None
    warnings: list[str] | None
    device: str | None


class _Distances(TypedDict, total=False):
    uniform: float | None
    adversarial: float | None
    n: int | None


class _Probed(TypedDict, total=False):
    clean: float | None
    pgd20: float | None
    n: int | None


class _Evaluation(TypedDict, total=False):
    checkpoint: str | None
    fingerprint: str | None
    dataset: str | None
    data: str | None
    images: str | None
    n: int | None
    of: int | None
    norm: str | None
    epsilon: float | None
    device: str | None
    results: dict[str, _Attacked]
    alignment: _Alignment | None
    remainder: float | None
    cka: float | None
    pointwise: _Distances | None
    probe: dict[str, _Probed] | None
    teachers: dict[str, str] | None
    versions: dict[str, str] | None


class _State(TypedDict):
    finished: bool
    identity: dict[str, str]


class _Cost(TypedDict):
    stage: str
    seconds: float
    joules: float | None
    device: str


class _Measured(TypedDict, total=False):
    stamp: list[Any]
    fingerprint: str
    clean: float
    pgd20: float


class _TeacherRecord(_Measured):
    n: int


def read_evaluation(path: str | os.PathLike) -> dict[str, Any]:
    """Returns the document in an evaluation.json, empty where there is none. Raises ValueError where it is not one."""
    if (document := read_json(path)) is None:
        return {}
    where = f"{path}: "
    if document.get("schema") != EVALUATION_SCHEMA:
        raise ValueError(f"{where}schema: got {shown(document.get('schema'))}; accepted: {EVALUATION_SCHEMA}")
    entries = document.get("results")
    if type(entries) is not dict:
        raise ValueError(f"{where}results: got {shown(entries)}; accepted: a table of attacks")
    for name, entry in entries.items():
        accuracy = entry.get("accuracy", "") if type(entry) is dict else ""
        if accuracy is not None and not _is_number(accuracy, 0, 1):
            got = f"{where}results.{name}: got {shown(entry)}"
            raise ValueError(f"{got}; accepted: a table with an accuracy from 0 to 1")
    check_option(f"{where}norm", document.get("norm", "linf"), NORMS)
    epsilon = document.get("epsilon")
    if epsilon is not None and not _is_number(epsilon, 0, _LARGEST_RADIUS):
        raise ValueError(f"{where}epsilon: got {shown(epsilon)}; accepted: a number in [0, {_LARGEST_RADIUS:g}]")
    document = convert(document, _Evaluation, where)
    counts = {f"results.{name}.n": entry.get("n") for name, entry in document["results"].items()}
    counts["n"] = document.get("n")
    check_integer(least=1, optional=True, **{f"{where}{name}": n for name, n in counts.items()})
    return document


def write_json(path: str | os.PathLike, document: dict[str, Any]) -> None:
    atomic_write(path, json.dumps(document, indent=1) + "\n")


def read_log(path: str | os.PathLike) -> tuple[list[dict[str, Any]], bool]:
    """Returns (the lines of a log.jsonl, whether the last one was cut off). Raises ValueError that names the line."""
    return read_jsonl(path, _log_line)


def _log_line(line: Any, where: str) -> dict[str, Any]:
    kind = line.get("kind") if type(line) is dict else None
    needed = {"epoch": ("epoch",), "step": ("epoch", "step")}.get(kind if type(kind) is str else "")
    if needed is None or not all(type(line.get(key)) is int and 0 <= line[key] < 2**31 for key in needed):
        raise ValueError(
            f'{where}: got {shown(line)}; accepted: a table of kind "epoch" with an integer "epoch", or of kind "step" '
            'with integers "epoch" and "step"'
        )
    for key, value in line.items():
        if key != "kind" and value is not None and not _is_number(value):
            raise ValueError(f"{where}: {key}: got {shown(value)}; accepted: a number or null")
    return line


def read_costs(path: str | os.PathLike) -> list[_Cost]:
    """Returns the lines of a cost.jsonl."""
    return read_jsonl(path, lambda line, where: convert(line, _Cost, f"{where}: "))[0]


def read_teacher(path: str | os.PathLike) -> dict[str, Any]:
    """Returns what was measured of a teacher, empty where nothing was."""
    if (document := read_json(path)) is None:
        return {}
    record = convert(document, _TeacherRecord, f"{path}: ")
    accuracies = {f"{path}: {key}": record.get(key) for key in ("clean", "pgd20")}
    check_number(least=0, most=1, optional=True, **accuracies)
    check_integer(least=1, **{f"{path}: n": record["n"]})
    return record


def write_state(run: Path, finished: bool, identity: dict[str, str]) -> None:
    """Writes RUN/run.json: whether the run is finished, and the fingerprints of its data and teachers."""
    write_json(run / STATE, {"finished": finished, "identity": identity})


def read_state(run: Path) -> dict[str, Any] | None:
    """Returns what `write_state` wrote, None where there is no such file."""
    document = read_json(run / STATE)
    return None if document is None else convert(document, _State, f"{run / STATE}: ")


def is_finished(run: Path) -> bool:
    """Returns whether the run in this folder was trained to its end."""
    state = read_state(run)
    return state is not None and state["finished"]


def _is_number(value: Any, least: float | None = None, most: float | None = None) -> bool:
    number = None if isinstance(value, str) else as_number(value)
    return number is not None and (least is None or least <= number) and (most is None or number <= most)
