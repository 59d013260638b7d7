"""Strict construction of Python objects from TOML tables, by the signature of the class.

One rule for recipe sections (dataclasses) and methods (keyword-only constructors): the parameters are the keys,
their annotations the accepted types, their defaults the defaults. A trailing underscore keeps a Python keyword
usable as a parameter (`lambda_`) and is dropped in TOML (`lambda`).
"""

from __future__ import annotations

import difflib
import inspect
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union

T = TypeVar("T")


class RecipeError(ValueError):
    """A recipe that cannot be used: says where, what came, what is accepted."""


def construct(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """`cls(**table)` with every key and value checked. `where` prefixes errors, e.g. "my.toml: igdm".

    Raises:
        RecipeError: unknown, missing or wrongly typed key, or a value the constructor refuses.
    """
    return _call(cls, checked(cls, table, where), where)


def checked(cls: type, table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options of `cls` in `table`, converted to their annotated types; defaults filled in, without constructing."""
    if not isinstance(table, Mapping):
        raise RecipeError(f"{where}: got {table!r}; accepted: a table")
    hints = typing.get_type_hints(cls.__init__)
    accepted = {name.rstrip("_"): p for name, p in options(cls).items()}
    for key in table:
        if key not in accepted:
            raise RecipeError(f"{where}.{key}: unknown key (value {table[key]!r}); {suggest(key, accepted)}")
    values = {}
    for key, parameter in accepted.items():
        if key in table:
            values[key] = convert(table[key], hints[parameter.name], f"{where}.{key}")
        elif parameter.default is parameter.empty:
            raise RecipeError(f"{where}.{key}: missing; accepted: {describe(hints[parameter.name])}")
        else:
            default = parameter.default
            values[key] = default() if callable(default) else default
    return values


def _call(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    names = {name.rstrip("_"): name for name in options(cls)}
    try:
        return cls(**{names[key]: value for key, value in values.items()})
    except ValueError as error:
        raise RecipeError(f"{where}.{error}") from None


def options(cls: type) -> dict[str, inspect.Parameter]:
    """The parameters of the constructor of `cls`, by name."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return {p.name: p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def convert(value: Any, annotation: Any, where: str) -> Any:
    """`value` as the annotated type. Integers pass as floats and "8/255" is a float; nothing else is coerced."""
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
    elif origin is dict and isinstance(value, Mapping):
        return dict(value)
    elif annotation is float:
        if isinstance(value, str):
            numerator, _, denominator = value.partition("/")
            try:
                return float(numerator) / float(denominator)
            except (ValueError, ZeroDivisionError):
                pass
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif annotation in (int, str, bool) and type(value) is annotation:
        return value
    extra = ""
    if origin is Literal and isinstance(value, str):
        extra = nearest(value, [str(arg) for arg in args])
    raise RecipeError(f"{where}: got {value!r}; accepted: {describe(annotation)}{extra}")


def describe(annotation: Any) -> str:
    """An annotation in words a recipe's author understands."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args if arg is not type(None)) + ", or left out"
    if origin is Literal:
        return "one of " + ", ".join(repr(arg) for arg in args)
    if origin is tuple:
        return f"a list of {describe(args[0])}"
    if origin is dict:
        return "a table"
    names = {
        float: "a number or a fraction like '8/255'",
        int: "an integer",
        str: "a string",
        bool: "true or false",
    }
    return names.get(annotation, str(annotation))


def suggest(key: str, accepted: Iterable[str]) -> str:
    accepted = list(accepted)
    return f"accepted: {', '.join(sorted(accepted))}{nearest(key, accepted)}"


def nearest(key: str, accepted: Iterable[str]) -> str:
    """`; did you mean 'x'?` or nothing."""
    close = difflib.get_close_matches(key, list(accepted), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
