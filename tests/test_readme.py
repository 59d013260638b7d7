"""What the README shows works, every file and command it names is there, and its tables hold what was measured."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from bench import pages
from fastrd import cli
from fastrd.recipe import available

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def blocks(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """Every `fastrd ...` line of the blocks, split as a shell does."""
    lines = "\n".join(blocks("bash", text) + blocks("console", text)).splitlines()
    found = (shlex.split(line.removeprefix("$ "), comments=True) for line in lines if "fastrd " in line)
    split = (line[: line.index(">")] if ">" in line else line for line in found)
    return [line[1:] for line in split if line[:1] == ["fastrd"]]


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_blocks_run(number):
    exec(compile(blocks("python")[number], f"README.md block {number}", "exec"), {})


def test_size_is_that_of_one_page_and_each_way_of_use_fits_eight_lines():
    assert 6000 <= len(TEXT.encode()) <= 8000
    ways = TEXT[TEXT.index("## Three ways") : TEXT.index("## Results")]
    found = re.findall(r"```\w+\n(.*?)```", ways, re.DOTALL)
    assert len(found) == 3 and all(block.count("\n") <= 8 for block in found)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_of_every_document_are_accepted(path):
    """By the parser; what they name besides their options is checked where it is run."""
    for command in commands(path.read_text(encoding="utf-8")):
        try:
            cli._parser().parse_args(command)
        except SystemExit:
            pytest.fail(f"{path.name}: fastrd {shlex.join(command)}")


def test_named_recipes_exist():
    named = [command[1] for command in commands(TEXT) if command[0] == "train"]
    named += [command[1] for command in commands(TEXT) if command[0] == "recipes" and command[1][0] != "-"]
    assert set(named) - {"mine.toml"} <= set(available())
    assert len(named) > 2


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_named_files_and_goals_exist(path):
    text = path.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith(("http", "#"))]
    missing = [link for link in links if not (path.parent / link.partition("#")[0]).exists()]
    named = re.findall(r"`((?:bench|docs|fastrd|kernels|tests|tools)/[\w./-]+\.\w+)`", text)
    assert missing + [name for name in named if not (ROOT / name).exists()] == []
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([\w-]+)|`make ([\w-]+)", text, re.MULTILINE):
        assert re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("name", pages.PAGES)
def test_tables_are_what_was_measured(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "<!-- table: " in text and pages.filled(text) == text, "write them: python -m bench.pages"
    assert "– to –" not in text


def test_what_the_readme_says_of_its_short_table_is_so():
    """ "In this table no student with a teacher is above PGD-AT under AutoAttack"."""
    rows = {row["row"].split("/")[1]: row["mean"]["aa"] for row in pages.measured("small-scale-cifar10.json")["rows"]}
    assert max(pages.SHORT, key=rows.__getitem__) == "pgd_at"


def test_readme_links_every_guide():
    guides = [path for path in (ROOT / "docs").glob("*.md") if path.stem != "index"]
    assert [guide.name for guide in guides if f"docs/{guide.name}" not in TEXT] == []
