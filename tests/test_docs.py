"""Every code block of the guides runs, in order, in one folder per guide."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastrd import published as facts
from fastrd.methods import ADDONS

ROOT = Path(__file__).resolve().parent.parent
GUIDES = sorted((ROOT / "docs").glob("*.md"))
SLOW = {"kernels", "reproduce"}


def blocks(guide: Path) -> list[tuple[str, str]]:
    found = re.findall(r"```(\w+)\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return found


@pytest.fixture
def registry():
    """Forgets the add-ons that a guide registers."""
    before = dict(ADDONS)
    yield
    for name in ADDONS.keys() - before.keys():
        del ADDONS[name]


@pytest.mark.parametrize(
    "guide",
    [pytest.param(g, marks=[pytest.mark.slow] if g.stem in SLOW else [], id=g.stem) for g in GUIDES],
)
def test_every_block_of_a_guide_runs(guide, tmp_path, monkeypatch, registry):
    monkeypatch.chdir(tmp_path)
    shell = {**os.environ, "OMP_NUM_THREADS": "1"}
    shell["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    tomls = iter(("digits.toml", "mine.toml"))
    scope: dict[str, object] = {"__name__": "guide"}
    for language, code in blocks(guide):
        if language == "python":
            exec(compile(code, str(guide), "exec"), scope)  # noqa: S102
        elif language == "bash":
            done = subprocess.run(
                ["bash", "-euc", code], env=shell, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        elif language == "toml":
            (tmp_path / next(tomls)).write_text(code)
        else:
            pytest.fail(f"{guide.name}: a block of {language}, which nothing runs")


def test_files_and_tables_named_in_the_guides_exist():
    for guide in GUIDES:
        text = guide.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (guide.parent / link).exists(), (guide.name, link)
        for path in re.findall(r"`((?:fastrd|kernels|tests)/[\w./]+)`", text):
            assert (ROOT / path).exists(), (guide.name, path)
        for table in re.findall(r"`((?:igdm|gacd|vfd)-[\w]+)`", text):
            assert table in facts.tables(), (guide.name, table)
        for target in re.findall(r"`make ([\w-]+)`", text):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_the_readme_links_every_guide():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [guide.name for guide in GUIDES if f"docs/{guide.name}" not in readme] == []
