"""TOML files and tables: reading, `key=value` assignments, merging and comparing."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import check_regular
from .schema import RecipeError, check_tree

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_BYTES = 1 << 20  # of a TOML file


def read_toml(path: Path) -> dict[str, Any]:
    """Returns the parsed file, or a RecipeError that names it."""
    try:
        check_regular(path)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    if path.stat().st_size > MAX_BYTES:
        raise RecipeError(f"{path}: {path.stat().st_size} bytes; accepted: a TOML file of at most {MAX_BYTES}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # a nest of brackets, a number of thousands of digits
        raise RecipeError(f"{path}: not a TOML file: {error}") from None
    check_tree(table, str(path))
    return table


def to_toml(table: Mapping[str, Any], where: str) -> str:
    """Returns `table` as TOML; raises RecipeError where it would read back as something else."""
    import tomli_w  # on first use: steps and benchmarks run in a checkout on a machine without it

    text = tomli_w.dumps(table)
    if tomllib.loads(text) != table:
        raise RecipeError(f"{where}: cannot be written as TOML that reads back alike")
    return text


def parse_assignment(text: str) -> tuple[str, Any]:
    """Parses "igdm.alpha=20" as ("igdm.alpha", 20): the value as TOML, or as a plain string where it is not TOML."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise RecipeError(f"--set: got {text!r}; accepted: key=value, e.g. schedule.epochs=10")
    try:
        parsed = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):
        return key.strip(), value.strip()
    if len(parsed) > 1:
        raise RecipeError(f"--set: got {text!r}; accepted: one key=value, each after its own --set")
    return key.strip(), parsed["value"]


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `over` laid over `under`, table by table; a base loss of another name replaces the one below it."""
    merged = copy.deepcopy(dict(under))
    for key, value in over.items():
        below: Any = merged.get(key)
        joined = isinstance(value, Mapping) and isinstance(below, Mapping)
        if joined and key == "base":  # options of one loss mean nothing to another
            joined = value.get("name", below.get("name")) == below.get("name")
        merged[key] = merge(below, value) if joined else copy.deepcopy(value)
    return merged


def assign(table: dict[str, Any], dotted: str, value: Any, where: str) -> None:
    *path, last = dotted.split(".")
    for key in path:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise RecipeError(f"{where}: {dotted}: {key} is a value, not a table")
    table[last] = value


def without_none(value: Any) -> Any:
    """Returns a copy with None left out of tables and tuples as lists."""
    if isinstance(value, Mapping):
        return {k: without_none(v) for k, v in value.items() if v is not None}
    return list(map(without_none, value)) if isinstance(value, (list, tuple)) else value


def differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, tuple]:
    """Returns the dotted keys whose values differ between two tables -> (left, right)."""
    a, b = flat(left), flat(right)
    return {key: (a.get(key), b.get(key)) for key in {**a, **b} if a.get(key) != b.get(key)}


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of a table of tables by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return found
