"""Plain values from files and callers: numbers in a range, names of a list, and how a message shows a value."""

from __future__ import annotations

import difflib
import math
import operator
import re
import reprlib
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

NORMS = {"linf": "l-infinity", "l2": "l2"}  # of the change of an image: the name in a recipe, the text for a reader
LARGEST_INTEGER = 2**63 - 1  # what TOML promises to keep

_REAL = (float, int, Real)  # the usual ones first: Real alone takes ten times as long to ask
_COMPARE = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlong, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict, _SHORT.maxlevel = 60, 12, 12, 8, 4


def shown(value: Any) -> str:
    """Returns `repr(value)` for a message, on one line, cut where it is long or deep."""
    try:
        return re.sub(r"\s*\n\s*", " ", _SHORT.repr(value))
    except ValueError:  # Python does not print an integer of more than 4300 digits
        return f"an integer of {value.bit_length()} bits"


def one_line(error: BaseException) -> str:
    """Returns what an exception says, on one line, without control characters, cut where it is long."""
    words = " ".join(
        re.sub(r"\x1b\[[0-9;]*m|[\x00-\x1f\x7f]", " ", str(error).partition("\nException raised from")[0]).split()
    )
    return words[:2000] or type(error).__name__


def nearest(key: str, accepted: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` or nothing."""
    close = difflib.get_close_matches(key[:80], list(accepted), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_option(name: str, value: Any, accepted: Iterable[str]) -> None:
    """Raises ValueError, with the nearest name, unless `value` is one of the accepted names."""
    accepted = list(accepted)
    if not isinstance(value, str) or value not in accepted:
        names = ", ".join(accepted)
        raise ValueError(f"{name}: got {shown(value)}; accepted: {names}{nearest(str(value), accepted)}")


def as_number(value: Any) -> float | None:
    """Returns a real number, "0.03" or "8/255" as a finite float, and None for anything else."""
    try:
        if isinstance(value, str):
            parts = [float(part) for part in value.split("/", 1)]
        elif isinstance(value, _REAL) and not isinstance(value, bool):
            parts = [float(value)]
        else:
            return None
        number = parts[0] / parts[1] if len(parts) > 1 else parts[0]
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
    return number if all(map(math.isfinite, (*parts, number))) else None


def as_integer(value: Any) -> int | None:
    """Returns an integer of at most 64 bits as an int, and None for anything else."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        return None
    return int(value) if abs(int(value)) <= LARGEST_INTEGER else None


def check_number(
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    what: str = "a number",
    optional: bool = False,
    **values: Any,
) -> None:
    """Raises TypeError unless each named value is a real number (or None, where it is `optional`), ValueError unless it
    is finite and in the range least <= value <= most, above < value < below."""
    bounds = {">=": least, ">": above, "<=": most, "<": below}
    limits = {sign: bound for sign, bound in bounds.items() if bound is not None}
    for name, value in values.items():
        if value is None and optional:
            continue
        is_number = isinstance(value, _REAL) and not isinstance(value, bool)
        number = as_number(value) if is_number else None
        if number is None or not all(_COMPARE[sign](number, bound) for sign, bound in limits.items()):
            accepted = "".join(f" {sign} {bound}" for sign, bound in limits.items()) or ", finite"
            lower, upper = (least if above is None else above), (most if below is None else below)
            if lower is not None and upper is not None:
                accepted = f" in {'[' if above is None else '('}{lower}, {upper}{']' if below is None else ')'}"
            raise (ValueError if is_number else TypeError)(f"{name}: got {shown(value)}; accepted: {what}{accepted}")


def positive(**values: Any) -> None:
    """Raises unless every named value is a finite number > 0."""
    check_number(above=0, **values)


def non_negative(**values: Any) -> None:
    """Raises unless every named value is a finite number >= 0."""
    check_number(least=0, **values)


def unit_interval(**values: Any) -> None:
    """Raises unless every named value is a number in [0, 1]."""
    check_number(least=0, most=1, **values)


def check_integer(*, least: int, most: int = LARGEST_INTEGER, optional: bool = False, **values: Any) -> None:
    """Raises unless each named value is an integer in [least, most]; `optional` and errors as in `check_number`."""
    for name, value in values.items():
        number = as_integer(value)
        if not (value is None and optional) and (number is None or not least <= number <= most):
            error = ValueError if isinstance(value, Integral) else TypeError
            upper = f" and <= {most}" * (most < LARGEST_INTEGER)
            raise error(f"{name}: got {shown(value)}; accepted: an integer >= {least}{upper}")
