"""Tables of facts: the rows of published tables, and the recipes and paper numbers that follow from them.

A facts file (TOML) has five parts, all optional, and sees the methods and teachers of the shipped ones:

    paper = "IGDM (arXiv 2312.03286)"
    [methods.NAME]      recipe keys; `title`, `needs`, `on.DATA`, `on.METHOD` (keys for one of them), `faithful`
    [teachers.NAME]     `PublishedTeacher`
    [tables.NAME]       `title`, `source`, `columns`, `teacher`, `clean_teacher`, `seeds`, `measures`, `limit`,
      `aa_limit`
      recipe            keys of every row
      rows.ROW          keys of that row; `method` (default: ROW itself, e.g. "ard+igdm"), `paper` (numbers in the order
                        of `columns`), `alias`
      settings.NAME     the same keys again, for a part of the table: recipes and rows are added, the rest replaced

    [printed.NAME]      `title`, `source`, `columns`, `rows.ROW` (numbers): shown beside others, neither trained nor
    measured

A row is the recipe TABLE/ROW or TABLE/ROW/SETTING, and TABLE/ROW/SETTING/faithful where its last method has such a
variant.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, TypedDict

from .core.schema import RecipeError, Section, construct, convert, nearest, suggest
from .core.toml import merge, read_toml
from .core.values import check_integer, check_number, shown

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")  # names become folders
_SCALARS = ("name", "description", "seed")  # keys of a recipe that are no tables
MOST_SEEDS = 1000


@dataclass(frozen=True)
class PublishedTeacher(Section):
    """A frozen network that rows train with or are measured against."""

    title: str
    data: str  # data set it was trained on
    source: str | None = None  # RobustBench id of the published weights
    substitute: str | None = None  # recipe that trains one in their place
    recipe: str | None = None  # recipe that trains it; then it is part of the reproduction
    clean: float | None = None  # published accuracies in percent
    pgd20: float | None = None
    aa: float | None = None

    def check(self) -> None:
        check_number(least=0, most=100, optional=True, clean=self.clean, pgd20=self.pgd20, aa=self.aa)
        if (self.source is None) == (self.recipe is None):
            raise ValueError(f"source: got {self.source!r} and recipe {self.recipe!r}; accepted: exactly one of them")


@dataclass(frozen=True)
class _Setting(Section):
    title: str = ""
    source: str = ""
    columns: tuple[str, ...] = ()
    teacher: str | None = None  # trained with, or only measured against
    clean_teacher: str | None = None
    seeds: int = 3
    measures: tuple[str, ...] = ()  # further `fastrd eval --measure` of every row
    limit: int | None = None  # test images, default all
    aa_limit: int | None = None  # test images of AutoAttack, default as `limit`
    recipe: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)

    def check(self) -> None:
        check_integer(least=1, most=MOST_SEEDS, seeds=self.seeds)
        check_integer(least=1, optional=True, limit=self.limit, aa_limit=self.aa_limit)


class _Fragment(TypedDict, total=False):
    """Recipe keys, and more of them `on` a data set or with a method."""

    on: dict[str, _Fragment]


class _Method(_Fragment, total=False):
    title: str
    needs: list[str]
    faithful: _Fragment


class _RowKeys(TypedDict, total=False):
    method: str
    paper: list[float]
    alias: str


class _Document(TypedDict, total=False):
    paper: str
    methods: dict[str, _Method]
    teachers: dict[str, dict[str, Any]]
    tables: dict[str, dict[str, Any]]
    printed: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class PublishedRow:
    """One line of a table, as a recipe."""

    name: str  # TABLE/ROW[/SETTING][/faithful]
    method: tuple[str, ...]  # ("ard", "igdm")
    setting: str
    facts: _Setting = field(repr=False)
    recipe: Mapping[str, Any] = field(repr=False)
    trains_with: tuple[str, ...]  # of "teacher", "clean_teacher"
    alias: str | None = None

    @property
    def label(self) -> str:
        """The name without its table."""
        return self.name.partition("/")[2]

    @property
    def faithful(self) -> bool:
        """Whether it is the variant of a row that does what the authors' code does."""
        return self.name.endswith("/faithful")

    @property
    def paper(self) -> Mapping[str, float]:
        return {k: v for k, v in self.recipe.get("paper", {}).items() if k != "source"}


@dataclass(frozen=True)
class PublishedTable:
    name: str
    title: str
    rows: tuple[PublishedRow, ...]
    teachers: Mapping[str, PublishedTeacher] = field(repr=False)
    folder: Path = field(repr=False)  # of the facts file: recipes it names may lie beside it


@dataclass(frozen=True)
class PrintedTable:
    """Numbers that a paper prints and nothing here trains for or measures."""

    title: str
    source: str
    columns: tuple[str, ...]
    rows: dict[str, Any] = field(repr=False)  # name -> numbers in the order of `columns`


def tables() -> Mapping[str, PublishedTable]:
    """Returns the shipped tables, by name."""
    return _shipped()[0]


def printed() -> Mapping[str, PrintedTable]:
    """Returns the shipped tables of printed numbers alone, by name."""
    return _shipped()[3]


def load(source: str | os.PathLike) -> list[PublishedTable]:
    """Returns the tables `source` names: a shipped table, a facts file, or one table of it as FILE:TABLE.

    Raises:
        FileNotFoundError: neither a shipped table nor a file.
        RecipeError: not a valid facts file; names the file, the key, what came and what is accepted.
    """
    text, shipped = os.fspath(source), tables()
    if text in printed():
        remedy = f"`fastrd recipes --table {text}` shows them"
        raise RecipeError(f"table: {text} holds printed numbers alone, which no row here trains for; {remedy}")
    if text in shipped:
        return [shipped[text]]
    path, _, wanted = (text, "", "") if Path(text).is_file() else text.rpartition(":")
    if not Path(path).is_file():
        accepted = f"a .toml file, FILE:TABLE, or one of {', '.join(shipped)}{nearest(text, shipped)}"
        raise FileNotFoundError(f"table: no shipped table or facts file {text!r}; accepted: {accepted}")
    document = read_toml(Path(path))
    found = _Facts(Path(path).name, document, *_shipped()[1:3]).tables(Path(path).resolve().parent)
    if wanted and wanted not in found:
        raise FileNotFoundError(f"table: {path} has no table {wanted!r}; accepted: {', '.join(found)}")
    return [found[wanted]] if wanted else list(found.values())


@functools.cache
def rows() -> Mapping[str, PublishedRow]:
    """Returns every row of the shipped tables by its name, and again by its alias."""
    named = {row.name: row for table in tables().values() for row in table.rows}
    return named | {row.alias: row for row in named.values() if row.alias}


@functools.cache
def _shipped() -> tuple[Mapping[str, PublishedTable], Mapping[str, Any], Mapping[str, Any], Mapping[str, PrintedTable]]:
    folder = Path(str(resources.files("fastrd") / "recipes" / "tables"))
    documents = {path.name: read_toml(path) for path in sorted(folder.glob("*.toml"))}
    methods: dict[str, Any] = {}
    teachers: dict[str, Any] = {}
    for document in documents.values():
        methods |= document.get("methods", {})
        teachers |= document.get("teachers", {})
    found: dict[str, PublishedTable] = {}
    numbers: dict[str, PrintedTable] = {}
    for name, document in documents.items():
        found |= _Facts(name, document, methods, teachers).tables(folder)
        for table, contents in document.get("printed", {}).items():
            numbers[table] = construct(PrintedTable, contents, f"{name}: printed.{table}")
    return found, methods, teachers, numbers


_Tables = Mapping[str, Any]


class _Facts:
    """One facts file, with the methods and teachers that it may use."""

    def __init__(self, where: str, document: Mapping[str, Any], methods: _Tables, teachers: _Tables) -> None:
        for key in document:
            if key not in _Document.__annotations__:
                raise RecipeError(f"{where}: {key}: unknown key; {suggest(key, _Document.__annotations__)}")
        document = convert(document, _Document, f"{where}: ")
        self.where, self.document = where, document
        self.methods = {**methods, **document.get("methods", {})}
        for name in document.get("teachers", {}):
            self._check_name(f"teachers.{name}", name)
        self.teachers = {
            name: construct(PublishedTeacher, table, f"{where}: teachers.{name}")
            for name, table in {**teachers, **document.get("teachers", {})}.items()
        }

    def tables(self, folder: Path) -> dict[str, PublishedTable]:
        found = {}
        for name, table in self.document.get("tables", {}).items():
            self._check_name(f"tables.{name}", name)
            where = f"{self.where}: tables.{name}"
            facts = construct(_Setting, table, where)
            rows = [] if facts.settings else self._rows(where, name, "", facts)
            shared = {k: v for k, v in table.items() if k != "settings"}
            for setting, over in facts.settings.items():
                title, at = over.get("title", setting), f"{where}.settings.{setting}"
                own = construct(_Setting, {**merge(shared, over), "title": title}, at)
                rows += self._rows(at, name, setting, replace(own, title=f"{facts.title}; {own.title}"))
            found[name] = PublishedTable(name, facts.title, tuple(rows), self.teachers, folder)
        return found

    def _rows(self, where: str, table: str, setting: str, facts: _Setting) -> list[PublishedRow]:
        for role in ("teacher", "clean_teacher"):
            name = getattr(facts, role)
            if name not in (None, *self.teachers):
                raise RecipeError(f"{where}.{role}: got {name!r}; {suggest(name, self.teachers)}")
        found = []
        for name, row in facts.rows.items():
            found += self._row(f"{where}.rows.{name}", table, setting, facts, name, row)
        return found

    def _row(
        self, where: str, table: str, setting: str, facts: _Setting, name: str, row: Mapping[str, Any]
    ) -> list[PublishedRow]:
        """Returns the row, and its variant `faithful` to the authors' code where the method has one."""
        for part in (name, *([setting] if setting else [])):
            self._check_name(where, part)
        row = convert(row, _RowKeys, where)
        method = tuple(row.get("method", name).split("+"))
        for part in method:
            if part not in self.methods:
                raise RecipeError(f"{where}: method: got {part!r}; {suggest(part, self.methods)}")
        fragments = [self.methods[part] for part in method]
        data = convert(facts.recipe.get("data", {}), dict[str, Any], f"{where}: data").get("name", "cifar10")
        data = convert(data, str, f"{where}: data.name")
        needs = {need for fragment in fragments for need in fragment.get("needs", ())}
        trains_with = tuple(role for role in ("teacher", "clean_teacher") if role in needs)
        names = (data, *method)
        own = {k: v for k, v in row.items() if k not in _RowKeys.__annotations__}
        recipe: dict[str, Any] = {}
        for fragment in fragments:
            recipe = merge(recipe, self._keys(fragment, names))
        given = merge(facts.recipe, own)
        inherited, schedule = recipe.get("schedule"), given.get("schedule")
        if isinstance(inherited, dict) and isinstance(schedule, Mapping) and schedule.get("kind") == "cosine":
            inherited.pop("milestones", None)  # of the method's own schedule, and without effect in this one
        recipe = merge(recipe, given)
        for key, value in recipe.items():
            if key not in _SCALARS and not isinstance(value, Mapping):
                raise RecipeError(f"{where}: {key}: got {shown(value)}; accepted: a table")
        for role in trains_with:
            if (teacher := getattr(facts, role)) is None:
                raise RecipeError(f"{where}: {'+'.join(method)} needs a {role}, and the table names none")
            if self.teachers[teacher].source:
                recipe = merge(recipe, {role: {"source": self.teachers[teacher].source}})
        numbers = row.get("paper", [])
        if len(numbers) > len(facts.columns):
            raise RecipeError(f"{where}.paper: got {len(numbers)} numbers; accepted: at most {facts.columns}")
        if numbers:
            source = f"{self.document.get('paper', self.where)}, {facts.source or facts.title}"
            recipe["paper"] = {"source": source, **dict(zip(facts.columns, numbers, strict=False))}
        titles = [fragment.get("title", part) for fragment, part in zip(fragments, method, strict=True)]
        spelled = " + ".join(titles) + ("" if "+".join(method) == name else f" ({name})")
        full = f"{table}/{name}" + (f"/{setting}" if setting else "")
        recipe |= {"name": full, "description": f"{spelled}. {facts.title}."}
        plain = PublishedRow(full, method, setting, facts, recipe, trains_with, row.get("alias"))
        # The authors are those of what the row adds last: IGDM's scripts of a base are not the base's own.
        faithful = self._keys(fragments[-1].get("faithful", {}), names)
        if not faithful:
            return [plain]
        full, alias = f"{full}/faithful", plain.alias and f"{plain.alias}-faithful"
        named = {"name": full, "description": f"{spelled}, as the authors' code has it. {facts.title}."}
        return [plain, replace(plain, name=full, recipe={**merge(plain.recipe, faithful), **named}, alias=alias)]

    def _keys(self, fragment: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """Returns the recipe keys of a fragment for a data set and methods, by their names."""
        keys = {k: v for k, v in fragment.items() if k not in _Method.__annotations__}
        on = fragment.get("on", {})
        for name in filter(on.__contains__, names):
            keys = merge(keys, self._keys(on[name], names))
        return keys

    def _check_name(self, where: str, name: str) -> None:
        if not _NAME.fullmatch(name) or ".." in name:
            accepted = "letters, digits and _ . + -, no '..'"
            raise RecipeError(f"{self.where}: {where}: got the name {name!r}; accepted: {accepted}")
