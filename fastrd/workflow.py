"""Evaluating what is on disk: a run folder, or any checkpoint that `load_teacher` reads."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .core.files import atomic_write, atomic_writer
from .core.schema import convert
from .data import Dataset, load_dataset
from .evaluation.alignment import cka, gradient_alignment, pointwise_distance, remainder_proportion
from .evaluation.record import write_evaluation
from .evaluation.robustness import Listener, adversarial_examples, check_attacks, evaluate, robustness_curve
from .evaluation.transfer import linear_probe
from .models import load_teacher
from .recipe import Recipe
from .report.card import write_card
from .report.statistics import wilson_half_width

DEFAULT_ATTACKS = ("clean", "fgsm", "pgd20", "cw", "aa")
CURVE = (0, 0.25, 0.5, 0.75, 1, 1.5, 2)  # multiples of epsilon
PANEL_IMAGES = 8
NAMES = {"clean": "clean", "fgsm": "FGSM", "cw": "C&W", "cw-quick": "C&W quick", "aa": "AutoAttack"}


def evaluate_source(
    source: str | os.PathLike,
    *,
    attacks: tuple[str, ...] | None = None,
    limit: int | None = None,
    checkpoint: str = "last",
    dataset: str | None = None,
    arch: str | None = None,
    epsilon: float | str | None = None,
    batch_size: int = 250,
    teacher: str | os.PathLike | None = None,
    measures: Sequence[str] = (),
    figures: bool = False,
    out: str | os.PathLike | None = None,
    data: str | os.PathLike | None = None,
    download: bool = False,
    device: str | torch.device | None = None,
    progress: bool | Listener = True,
) -> dict[str, Any]:
    """Evaluate saved weights on the TEST set and write evaluation.json; what is there already of them is kept.

    Stopped at any point and called again, it goes on where it was (verdicts are kept in `.evaluation/` beside it).

    Args:
        source: run folder, checkpoint, state dict or RobustBench id.
        attacks: see `evaluate`; default the run's recipe's, else clean to AutoAttack.
        limit: only so many test images, classes in their shares.
        checkpoint: "last" or "best", of a run folder. "best" writes evaluation-best.json.
        dataset, epsilon: default those of the recipe it was trained with, else CIFAR-10 and 8/255.
        teacher: measure gradient alignment against it; default the teacher the run was distilled from, if it is there.
        progress: as in `evaluate`.
        measures: further things to measure, each a section of the document: "remainder" (see
            `remainder_proportion`), "cka" (features against the teacher's, see `cka`), "pointwise" (see `pointwise_distance`), "probe:DATA" (accuracy clean and
            under PGD-20 of a linear probe on another data set, see `linear_probe`).
        figures: also write curve.json (robust accuracy over epsilon) and panel.npz (pictures) for the report.
        out: folder for the files; default the run folder, or the folder of the checkpoint.

    Returns:
        The document written to evaluation.json.

    Raises:
        FileNotFoundError, ValueError: nothing there, or nothing that can be used; says what and the remedy.
    """
    path, recipe = _locate(source, checkpoint)
    check_measures(measures)
    attacks = check_attacks(attacks or (recipe.evaluation.attacks if recipe else DEFAULT_ATTACKS))
    if limit is not None and limit < 1:
        raise ValueError(f"limit: got {limit}; accepted: an integer >= 1")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if epsilon is None:
        epsilon = recipe.attack.epsilon if recipe else 8 / 255
    epsilon = convert(epsilon, float, "epsilon")
    images = load_dataset(
        dataset or (recipe.data.name if recipe else "cifar10"),
        root=data,
        download=download,
        test_limit=limit or (recipe.data.test_limit if recipe else None),
        image_size=recipe.data.image_size if recipe and dataset is None else None,
    )
    model = _load(path, images, arch, device)
    x, y = images.x_test, images.y_test

    folder = Path(out) if out is not None else (path.parent if path.exists() else Path("."))
    stem = {"last": "evaluation", "best": "evaluation-best"}[checkpoint]
    if not Path(source).is_dir():
        stem = f"{Path(source).stem}-evaluation"
    sections: dict[str, Any] = {"data": images.source}
    if (
        teacher is None
        and recipe is not None
        and recipe.teacher.source
        and Path(recipe.teacher.source).exists()
    ):
        teacher = recipe.teacher.source
    if teacher is not None:
        teacher = _load(teacher, images, None, device)
        sections["alignment"] = gradient_alignment(model, teacher, x, y, batch_size=batch_size)
    for measure in measures:
        if measure == "remainder":
            sections["remainder"] = remainder_proportion(model, x, epsilon=epsilon, batch_size=batch_size)
        elif measure in ("cka", "pointwise"):
            if teacher is None:
                raise ValueError(
                    f"measures: {measure} compares with a teacher and none was given (--teacher CKPT)"
                )
            if measure == "cka":
                sections["cka"] = cka(model, teacher, x, batch_size=batch_size)
            else:
                inner = recipe.build_method().inner if recipe else "ce"
                sections["pointwise"] = pointwise_distance(
                    model,
                    teacher,
                    x,
                    y,
                    inner="ce" if inner == "none" else inner,
                    epsilon=epsilon,
                    step_size=epsilon / 4,
                    norm=recipe.attack.norm if recipe else "linf",
                    batch_size=batch_size,
                )
        else:
            other = load_dataset(measure.partition(":")[2], root=data, download=download, test_limit=limit)
            accuracies = _probe(model, other, images.image_shape[1:], epsilon, batch_size, progress)
            sections["probe"] = {**sections.get("probe", {}), other.name: accuracies}
    results = evaluate(
        model,
        x,
        y,
        attacks=attacks,
        epsilon=epsilon,
        step_size=epsilon / 4,  # 2/255 at 8/255
        batch_size=batch_size,
        device=device,
        state_dir=folder / ".evaluation",
        progress=progress,
    )
    document = write_evaluation(
        folder / f"{stem}.json", results, model=model, checkpoint=path.stem, dataset=images.name, **sections
    )
    if folder == path.parent and (folder / "recipe.toml").is_file():
        write_card(folder)
    if figures:
        _write_figures(folder, model, images, epsilon, batch_size, progress)
    return document


def summary(document: dict[str, Any]) -> str:
    """The document as lines for a terminal, with the half-widths of 95 % Wilson intervals."""
    lines = [
        f"{document['checkpoint']} on {document['dataset']}, epsilon {document['epsilon'] * 255:.3g}/255"
    ]
    for name, entry in document["results"].items():
        accuracy, n = entry["accuracy"], entry["n"]
        half = wilson_half_width(accuracy, n)
        label = NAMES.get(name, name.upper().replace("PGD", "PGD-"))
        lines.append(
            f"  {label:<11}{100 * accuracy:6.2f} % +- {100 * half:.2f}  (n = {n}, {entry['seconds']:.1f} s)"
        )
        lines += [f"    warning: {text}" for text in entry.get("warnings", [])]
    if "alignment" in document:
        alignment = document["alignment"]
        lines.append(
            f"  gradient alignment with the teacher: GD {alignment['gd']:.4f}, GC {alignment['gc']:.4f}"
        )
    return "\n".join(lines)


def check_measures(names: Sequence[str]) -> None:
    """Raise ValueError unless every name is one that `evaluate_source` can measure."""
    for name in names:
        if name not in ("remainder", "cka", "pointwise") and not re.fullmatch(r"probe:.+", name):
            raise ValueError(f"measures: got {name!r}; accepted: remainder, cka, probe:DATA, pointwise")


def _probe(
    model: nn.Module,
    data: Dataset,
    image_size: tuple[int, int],
    epsilon: float,
    batch_size: int,
    progress: bool | Listener,
) -> dict[str, float]:
    probe = linear_probe(
        model,
        data.x_train,
        data.y_train,
        num_classes=data.num_classes,
        image_size=image_size,
        batch_size=batch_size,
    )
    results = evaluate(
        probe,
        data.x_test,
        data.y_test,
        attacks=("clean", "pgd20"),
        epsilon=epsilon,
        step_size=epsilon / 4,
        batch_size=batch_size,
        progress=progress,
    )
    return {"n": results.n, **{name: entry["accuracy"] for name, entry in results.items()}}


def _locate(source: str | os.PathLike, checkpoint: str) -> tuple[Path, Recipe | None]:
    from .core import checkpoint as checkpoints

    path = Path(source)
    if path.is_dir():
        file = path / f"{checkpoint}.pt"
        if not file.exists():
            raise FileNotFoundError(
                f"source: {path} has no {file.name}; accepted: a run folder made by `fastrd train`"
            )
        return file, Recipe.load(path / "recipe.toml")
    if not path.exists():
        if path.suffix in (".pt", ".pth", ".safetensors") or path.parent != Path("."):
            raise FileNotFoundError(
                f"source: no file {path}; accepted: a run folder, a checkpoint, a RobustBench id"
            )
        return path, None
    try:
        return path, Recipe.from_dict(checkpoints.read(path)["recipe"], where=str(path))
    except (ValueError, KeyError):
        return path, None  # not ours: load_teacher says what is wrong if nobody can read it


def _load(source: str | os.PathLike, images: Dataset, arch: str | None, device: torch.device) -> nn.Module:
    return load_teacher(source, arch=arch, dataset=images.name, device=device, **images.network_shape)


def _write_figures(
    folder: Path,
    model: nn.Module,
    images: Dataset,
    epsilon: float,
    batch_size: int,
    progress: bool | Listener,
) -> None:
    x, y = images.x_test, images.y_test
    epsilons = [multiple * epsilon for multiple in CURVE]
    accuracies = robustness_curve(model, x, y, epsilons, batch_size=batch_size, progress=progress)
    atomic_write(
        folder / "curve.json",
        json.dumps({"epsilons": epsilons, "accuracies": accuracies, "n": len(x)}) + "\n",
    )
    examples = adversarial_examples(model, x, y, PANEL_IMAGES, epsilon=epsilon)
    arrays = {
        "clean": examples.clean.permute(0, 2, 3, 1).numpy(),
        "adv": examples.adversarial.permute(0, 2, 3, 1).numpy(),
        "label": examples.labels.numpy(),
        "pred_clean": examples.clean_predictions.numpy(),
        "pred_adv": examples.adversarial_predictions.numpy(),
        "class_names": np.array(images.class_names),
    }
    with atomic_writer(folder / "panel.npz") as file:
        np.savez_compressed(file, **arrays)
