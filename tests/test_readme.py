"""What the README shows works, and every file it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastrd.recipe import available

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
RUNNABLE = [block for block in BLOCKS if "train(" not in block]  # that one trains ResNet-18 for thirty epochs


@pytest.mark.parametrize("number", range(len(RUNNABLE)))
def test_python_blocks_run(number):
    exec(compile(RUNNABLE[number], f"README.md block {number}", "exec"), {})  # noqa: S102
    assert "fastrd" in RUNNABLE[number]


def test_the_training_block_compiles_and_its_recipe_exists():
    (block,) = [block for block in BLOCKS if "train(" in block]
    compile(block, "README.md", "exec")
    assert re.search(r'Recipe.load\("([^"]+)"', block)[1] in available()


def test_named_files_and_recipes_exist():
    files = re.findall(r"!\[[^]]*\]\(([^)]+)\)|\]\(([^)h][^)]*)\)|`(bench/results/[^`]+)`", TEXT)
    named = [name for group in files for name in group if name]
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
    recipes = re.findall(r"fastrd train (\S+)", TEXT)
    assert recipes and set(recipes) <= set(available())


def test_opening_commands_are_make_targets():
    opening = re.search(r"```bash\n(.*?)```", TEXT, re.DOTALL)[1]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", opening, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
