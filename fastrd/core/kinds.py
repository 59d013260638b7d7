"""Arguments of public functions, checked against their annotations."""

from __future__ import annotations

import functools
import inspect
import os
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, Union, get_args, get_origin

import numpy as np

from .values import shown

Function = TypeVar("Function", bound=Callable[..., Any])


def check_kinds(function: Function) -> Function:
    """Makes `function` raise a TypeError, before it does anything, for an argument of another kind than annotated.

    Flags, paths, lists, tables, functions, objects of classes, and strings that may be None are checked. Numbers and
    other strings are not: where they are used, their range or the names that are accepted are checked too. The error
    names the argument, what came and what is accepted.
    """
    signature = inspect.signature(function)
    annotations: dict[str, Any] = {}

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if not annotations:  # at the first call, when all that they name is imported
            annotations.update({name: _resolved(p.annotation, function) for name, p in signature.parameters.items()})
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return function(*args, **kwargs)  # Python's own message also names the function
        for name, value in given.items():
            if annotations[name] is not str and not _fits(value, annotations[name]):
                raise TypeError(f"{name}: got {shown(value)}; accepted: {_words(annotations[name])}")
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


def _resolved(annotation: Any, function: Callable[..., Any]) -> Any:
    if not isinstance(annotation, str):
        return Any
    try:
        return eval(annotation, inspect.unwrap(function).__globals__)
    except NameError:  # imported for type checkers alone
        return Any


def _fits(value: Any, annotation: Any) -> bool:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Sequence:
        is_list = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
        return is_list and all(_fits(each, parts[0]) for each in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_fits(each, parts[1]) for each in value.values())
    if origin is tuple:
        return isinstance(value, (tuple, list))
    if annotation is bool:
        return isinstance(value, (bool, np.bool_))
    kind = origin or annotation
    return kind in (Any, int, float) or not isinstance(kind, type) or isinstance(value, kind)


def _words(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        left = [part for part in parts if part is not types.NoneType]
        if os.PathLike in left:
            left.remove(str)  # a path too
        return " or ".join(_words(part) for part in left)
    if origin is Sequence:
        return f"a list of {_words(parts[0]).removeprefix('a ')}s"
    known = {bool: "true or false", str: "a string", os.PathLike: "a path", Mapping: "a table", Callable: "a function"}
    kind = origin or annotation
    return known.get(kind) or f"a {getattr(kind, '__name__', kind)}"
