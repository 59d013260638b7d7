"""Model cards: a description beside each checkpoint, for a later reader."""

from __future__ import annotations

import os
from pathlib import Path

from ..core.files import atomic_write, check_writable
from ..core.values import NORMS
from ..recipe import Recipe
from . import content, rows, runs
from .tables import escaped

NAME = "card.md"
LIMITS = (
    "Trained and measured against perturbations in one norm and of one radius on one data set; nothing is known about "
    "other perturbations or data. Accuracies on few test images carry the intervals given above."
)


def check_card(run: str | os.PathLike) -> None:
    """Raises where `write_card` would for what RUN holds now: to be called before the work that it is to tell of."""
    _read(Path(run))
    check_writable(Path(run) / NAME)


def _read(folder: Path) -> tuple[Recipe, rows.Row]:
    recipe = Recipe.stored(folder / "recipe.toml")
    (row,) = rows.group(runs.load([folder]))
    return recipe, row


def write_card(run: str | os.PathLike) -> Path:
    """Writes RUN/card.md from the recipe, the log and the evaluations of the folder. Returns its path.

    `train` writes it when a run is finished, and an evaluation of the run anew; it holds no date and no path, so the
    same run gives the same card.
    """
    folder = Path(run)
    recipe, row = _read(folder)
    teachers = {"Teacher": recipe.teacher.source, "Clean teacher": recipe.clean_teacher.source}
    attack = recipe.attack
    facts = {
        "Method": row.method,
        "Architecture": escaped(recipe.student.arch),
        "Data": f"{escaped(Path(recipe.data.name).name)}, {recipe.data.holdout} training images held out to choose "
        "`best.pt`",
        "Input": "pixels in [0, 1], no normalisation outside the network",
        "Inner attack": f"`{recipe.build_method().inner}`, {NORMS[attack.norm]}, epsilon "
        f"{content.epsilon_text(attack.epsilon)}, {attack.steps} steps of {content.epsilon_text(attack.step_size)}",
        "Epochs, seed": f"{recipe.schedule.epochs}, {recipe.seed}",
        **{role: f"`{Path(source).name}`" for role, source in teachers.items() if source},
        "Files": "`last.pt` (last epoch, resumable), `best.pt` (best held-out epoch), `recipe.toml`, `log.jsonl`",
    }
    lines = [f"# {escaped(row.label)}", "", *([escaped(recipe.description), ""] if recipe.description else [])]
    lines += [f"- **{name}:** {value}" for name, value in facts.items() if value]
    measured = ["Not evaluated yet: `fastrd eval RUN`."]
    if row.evaluated:
        measured = [content.measured([row]).markdown(), "", *(f"- {note}" for note in content.notes([row]))]
    lines += ["", "## Measured", "", *measured, "", "## Limits", "", LIMITS, *content.reconstructions([row])]
    return atomic_write(folder / NAME, "\n".join(lines) + "\n")
