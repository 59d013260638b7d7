"""Every code block of the guides runs, in order, in one folder per guide; the site builds without a warning.

A `console` block shows commands with names to fill in: it is not run here, and `test_readme.py` has its options parsed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastrd import published as facts
from fastrd.cli import main

ROOT = Path(__file__).resolve().parent.parent
GUIDES = sorted((ROOT / "docs").glob("*.md"))
SLOW = {"kernels", "reproduce"}


def blocks(guide: Path) -> list[tuple[str, str]]:
    return re.findall(r"```(\w+)\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize(
    "guide",
    [pytest.param(g, marks=[pytest.mark.slow] if g.stem in SLOW else [], id=g.stem) for g in GUIDES if blocks(g)],
)
def test_every_block_of_a_guide_runs(guide, tmp_path, monkeypatch, registry):
    monkeypatch.chdir(tmp_path)
    shell = {**os.environ, "OMP_NUM_THREADS": "1"}
    shell["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    scope: dict[str, object] = {"__name__": "guide"}
    for language, code in blocks(guide):
        if language == "python":
            exec(compile(code, str(guide), "exec"), scope)
        elif language == "bash" and all(line.startswith("fastrd ") for line in code.splitlines()):
            for line in code.splitlines():  # in this process, which has imported torch already
                assert main(shlex.split(line, comments=True)[1:]) == 0, line
        elif language == "bash":
            done = subprocess.run(["bash", "-euc", code], env=shell, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        elif language == "toml":
            name = re.match(r"# (\S+\.toml)\n", code)
            assert name, f"{guide.name}: the first line of a TOML block is no comment that names its file"
            (tmp_path / name[1]).write_text(code)
        elif language != "console":
            pytest.fail(f"{guide.name}: a block of {language}, which nothing runs")


def test_tables_named_in_the_guides_exist():
    for guide in GUIDES:
        for table in re.findall(r"`((?:igdm|gacd|vfd)-[\w]+)`", guide.read_text(encoding="utf-8")):
            assert table in facts.tables(), (guide.name, table)


def test_each_page_is_once_in_the_navigation_of_the_site():
    pages = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    docs = ROOT / "docs"
    assert sorted(pages) == sorted(str(path.relative_to(docs)) for path in docs.rglob("*.md"))


@pytest.fixture
def site(tmp_path):
    """A copy of what the site is made of, and a function that builds it."""
    pytest.importorskip("mkdocstrings", reason="the extra `docs` is not installed")
    for name in ("docs", "tools", "fastrd", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
    for picture in (ROOT / "docs").glob("*.png"):
        shutil.copy2(picture, tmp_path / "docs")
    shutil.copy2(ROOT / "mkdocs.yml", tmp_path)

    def build():
        environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "mkdocs", "build"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    return tmp_path, build


@pytest.mark.slow
def test_the_site_builds_and_names_what_is_wrong(site):
    folder, build = site
    status, said = build()
    assert status == 0, said
    for page in ("index.html", "api/losses/index.html", "performance/index.html"):
        assert (folder / "build/site" / page).stat().st_size > 10_000
    with (folder / "docs/glossary.md").open("a", encoding="utf-8") as file:
        file.write("\n[nowhere](nowhere.md)\n")
    status, said = build()
    assert status != 0 and "nowhere.md" in said


def test_an_undocumented_public_name_is_an_error(tmp_path, monkeypatch):
    hook = pytest.importorskip("mkdocs", reason="the extra `docs` is not installed") and load_hook()
    (tmp_path / "api/losses").mkdir(parents=True)
    ids = [f'<h2 id="fastrd.losses.{name}">' for name in hook.public_names("fastrd.losses")]
    monkeypatch.setattr(hook, "MODULES", ("fastrd.losses",))
    (tmp_path / "api/losses/index.html").write_text("".join(ids))
    hook.on_post_build({"site_dir": str(tmp_path)})
    (tmp_path / "api/losses/index.html").write_text("".join(ids[1:]))
    with pytest.raises(Exception, match=re.escape(hook.public_names("fastrd.losses")[0])):
        hook.on_post_build({"site_dir": str(tmp_path)})


def load_hook():
    spec = importlib.util.spec_from_file_location("docs_hook", ROOT / "tools/docs_hook.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    return hook
