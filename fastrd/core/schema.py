"""Strict construction of Python objects from TOML tables, by the signature of the class.

One rule for recipe sections (dataclasses) and methods (keyword-only constructors): the parameters are the keys,
their annotations the accepted types, their defaults the defaults. A trailing underscore keeps a Python keyword
usable as a parameter (`lambda_`) and is dropped in TOML (`lambda`).
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, Union, cast

from .values import as_integer, as_number, nearest, shown

T = TypeVar("T")
MAX_DEPTH = 16  # of tables and lists in one another


class RecipeError(ValueError):
    """A recipe that cannot be used: says where, what came, what is accepted."""


def check_tree(value: Any, where: str) -> None:
    """Raises RecipeError, naming the place, unless TOML can hold `value`.

    That is a tree of at most `MAX_DEPTH` levels: tables with strings for keys, lists, strings, booleans, finite
    numbers, integers of at most 64 bits. A None in a table stands for a key that is left out.
    """
    left = [(value, where, 0)]
    while left:  # not a recursion: a file may nest more deeply than Python's stack
        item, place, depth = left.pop()
        if depth > MAX_DEPTH:
            raise RecipeError(f"{where}: nested more than {MAX_DEPTH} deep; accepted: at most that")
        if isinstance(item, Mapping):
            for key, inner in item.items():
                if not _is_text(key):
                    raise RecipeError(f"{place}: got the key {shown(key)}; accepted: a string")
                if inner is not None:
                    left.append((inner, f"{place}.{key}" if depth else f"{place}: {key}", depth + 1))
        elif isinstance(item, (list, tuple)):
            left += [(inner, f"{place}[{i}]", depth + 1) for i, inner in enumerate(item)]
        elif not (
            isinstance(item, bool)
            or _is_text(item)
            or as_integer(item) is not None
            or (isinstance(item, Real) and not isinstance(item, Integral) and as_number(item) is not None)
        ):
            accepted = "a string, true or false, a finite number, an integer of at most 64 bits, a list or a table"
            raise RecipeError(f"{place}: got {shown(item)}; accepted: {accepted}")


def construct(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """Returns `cls(**table)` with every key and value checked. `where` prefixes errors, e.g. "my.toml: igdm".

    Raises RecipeError: unknown, missing or wrongly typed key, or a value the constructor refuses.
    """
    values, parameters = checked(cls, table, where), options(cls)
    try:
        return cls(**{parameters[key].name: value for key, value in values.items()})
    except ValueError as error:
        raise RecipeError(f"{where}.{error}") from None


def checked(cls: type, table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the options of `cls` in `table`, converted to their annotated types, with defaults filled in."""
    if not isinstance(table, Mapping):
        raise RecipeError(f"{where}: got {shown(table)}; accepted: a table")
    hints, accepted = _hints(cls), options(cls)
    for key in table:
        if key not in accepted:
            raise RecipeError(f"{where}.{key}: unknown key (value {shown(table[key])}); {suggest(key, accepted)}")
    values = {}
    for key, parameter in accepted.items():
        if key in table:
            values[key] = convert(table[key], hints[parameter.name], f"{where}.{key}")
        elif parameter.default is parameter.empty:
            raise RecipeError(f"{where}.{key}: missing; accepted: {describe(hints[parameter.name])}")
        else:
            values[key] = parameter.default() if callable(parameter.default) else parameter.default
    return values


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls if typing.is_typeddict(cls) else cls.__init__)


class Section:
    """Base of frozen dataclasses whose values are checked against their annotations however they are made."""

    def __post_init__(self) -> None:
        for name, annotation in _hints(cast(Any, type(self))).items():
            if name != "return":
                object.__setattr__(self, name, convert(getattr(self, name), annotation, name))
        self.check()

    def check(self) -> None:
        """Raises ValueError, starting with the name of the key, where a value is out of its range."""


def options(cls: Any) -> dict[str, inspect.Parameter]:
    """Returns the parameters of the constructor of `cls`, by their keys in TOML."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return {p.name.rstrip("_"): p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def convert(value: Any, annotation: Any, where: str) -> Any:
    """Returns `value` as the annotated type. Integers, "0.03" and "8/255" pass as floats; nothing else is converted.

    Raises RecipeError: another type, a number that is not finite, or an integer of more than 64 bits.
    """
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (inner,) = [arg for arg in args if arg is not type(None)]
        return convert(value, inner, where)
    if origin is Literal:
        if value in args and type(value) in {type(arg) for arg in args}:
            return value
    elif origin is tuple and isinstance(value, (list, tuple)):
        return tuple(convert(item, args[0], f"{where}[{i}]") for i, item in enumerate(value))
    elif origin is list and isinstance(value, list):
        return [convert(item, args[0], f"{where}[{i}]") for i, item in enumerate(value)]
    elif origin is dict and isinstance(value, Mapping):
        return {key: convert(item, args[1], _below(where, key)) for key, item in value.items()}
    elif typing.is_typeddict(annotation) and isinstance(value, Mapping):
        for key in annotation.__required_keys__ - value.keys():
            raise RecipeError(f"{_below(where, key)}: missing; accepted: {describe(_hints(annotation)[key])}")
        return known_entries(annotation, value, where)
    elif annotation in (float, int):
        number = as_number(value) if annotation is float else as_integer(value)
        if number is not None:
            return number
    elif annotation in (str, bool) and type(value) is annotation:
        return value
    extra = nearest(value, [str(arg) for arg in args]) if origin is Literal and isinstance(value, str) else ""
    raise RecipeError(f"{where}: got {shown(value)}; accepted: {describe(annotation)}{extra}")


def known_entries(cls: type, table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns a table of another version, which may have more keys: those of `cls` converted, others as they are."""
    hints = _hints(cls)
    return {key: convert(item, hints[key], _below(where, key)) if key in hints else item for key, item in table.items()}


def _below(where: str, key: str) -> str:
    return f"{where}{key}" if where.endswith(" ") else f"{where}.{key}"


def describe(annotation: Any) -> str:
    """Returns an annotation in words a recipe's author understands."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args if arg is not type(None)) + ", or left out"
    if origin is Literal:
        return "one of " + ", ".join(repr(arg) for arg in args)
    if origin in (tuple, list):
        return f"a list of {describe(args[0])}"
    if origin is dict or typing.is_typeddict(annotation):
        return "a table"
    names = {
        float: "a finite number or a fraction like '8/255'",
        int: "an integer",
        str: "a string",
        bool: "true or false",
    }
    return names.get(annotation, str(annotation))


def suggest(key: str, accepted: Iterable[str]) -> str:
    accepted = list(accepted)
    return f"accepted: {', '.join(sorted(accepted))}{nearest(key, accepted)}"


def _is_text(value: Any) -> bool:
    # Half of a surrogate pair is a character to Python, and no file can hold it.
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)
