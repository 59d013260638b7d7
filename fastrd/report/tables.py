"""Tables of text, and how to write one for a terminal or as Markdown (the HTML page has a template)."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from itertools import groupby
from typing import Any, NamedTuple

MISSING = "–"


class Column(NamedTuple):
    title: str
    group: str = ""  # title over neighbouring columns
    numeric: bool = False


def numeric(title: str, group: str = "") -> Column:
    return Column(title, group, numeric=True)


class Cell(NamedTuple):
    text: str
    detail: str = ""  # in smaller type where the medium has one
    span: int = 1  # columns; a medium without wide cells fills up with MISSING


class Table(NamedTuple):
    columns: list[Column]
    rows: list[list[Cell]]

    @classmethod
    def of(cls, columns: Iterable[Any], rows: Iterable[Iterable[Any]]) -> Table:
        """Returns the table of these columns and cells, each a `Column` or `Cell`, or its text alone."""
        return cls(
            [Column(each) if isinstance(each, str) else each for each in columns],
            [[Cell(each) if isinstance(each, str) else each for each in row] for row in rows],
        )

    def plain(self) -> str:
        """Returns text for a terminal: padded columns."""
        lines = [[printable(text) for text in line] for line in self._lines()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        sides = [">" if column.numeric else "<" for column in self.columns]
        form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
        return "\n".join(form.format(*line).rstrip() for line in lines)

    def markdown(self) -> str:
        """Returns a GitHub table in which everything from files is escaped."""
        lines = [[escaped(text) for text in line] for line in self._lines()]
        lines.insert(1, ["---:" if column.numeric else "---" for column in self.columns])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def groups(self) -> list[tuple[str, int]]:
        """Returns the titles over the columns: (title, number of columns)."""
        return [(title, len(list(found))) for title, found in groupby(column.group for column in self.columns)]

    def _lines(self) -> list[list[str]]:
        body = [
            [text for cell in row for text in [f"{cell.text} {cell.detail}".strip(), *[MISSING] * (cell.span - 1)]]
            for row in self.rows
        ]
        return [[f"{column.group} {column.title}".strip() for column in self.columns], *body]


def escaped(text: str) -> str:
    """Returns text that Markdown shows as it is, that of GitHub and that of MkDocs."""
    plain = re.sub(r"([\\`*_{}\[\]|#])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
    return plain.replace("~", "&#126;")  # MkDocs shows the backslash of an escaped one


def printable(text: str) -> str:
    """Returns text without control characters, which could be commands to a terminal."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)
