"""A run folder from its start to its card: training into it, and evaluating it or any other checkpoint."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .attacks import EPSILON, check_settings
from .core import checkpoint as checkpoints
from .core.arguments import check_device
from .core.defaults import ordinary_torch
from .core.documents import STATE, read_evaluation, read_state, write_json
from .core.files import atomic_write, atomic_writer, check_path, check_writable, locked
from .core.fingerprint import fingerprint
from .core.kinds import check_kinds
from .core.plugins import check_plugins, load_plugins
from .core.schema import RecipeError, convert
from .core.values import NORMS, check_integer, check_number, check_option
from .data import Dataset, add_extra, load_dataset
from .engine.distributed import is_main_process, joined
from .engine.log import check_trackers
from .engine.process import float32_precision
from .engine.trainer import Trained, Trainer, load_inputs
from .evaluation.alignment import gradient_alignment
from .evaluation.measures import MEASURES, Subject, check_measures, measured
from .evaluation.record import read_previous, same_subject, write_evaluation
from .evaluation.robustness import (
    Listener,
    adversarial_examples,
    check_attacks,
    check_saving,
    evaluate,
    robustness_curve,
)
from .models import load_teacher, with_features
from .models.foreign import Factory
from .models.teacher import CHECK_IMAGES
from .recipe import Attack, Data, EvaluationSettings, Recipe, Teacher
from .report.card import check_card, write_card
from .report.content import epsilon_text
from .report.statistics import wilson_half_width

CURVE = (0, 0.25, 0.5, 0.75, 1, 1.5, 2)  # multiples of epsilon
PANEL_IMAGES = 8
NAMES = {"clean": "clean", "fgsm": "FGSM", "cw": "C&W", "cw-quick": "C&W quick", "aa": "AutoAttack"}


@check_kinds
def train(
    recipe: Recipe,
    *,
    out: str | os.PathLike,
    data: Dataset | str | os.PathLike | None = None,
    teacher: nn.Module | str | os.PathLike | None = None,
    clean_teacher: nn.Module | str | os.PathLike | None = None,
    student: nn.Module | Factory | None = None,
    plugins: Sequence[str | os.PathLike] = (),
    log: Sequence[str] = (),
    resume: bool = False,
    download: bool = False,
    device: str | torch.device | None = None,
    progress: bool = True,
    profile: bool = False,
) -> Trained:
    """Trains a recipe's student into the run folder `out`.

    On the CPU the final weights are a function of the recipe, the data, the teachers and the thread count alone:
    interrupted and resumed any number of times, they are equal bit for bit. In processes started by `torchrun` the
    run is shared: `batch_size` is that of all together, and with `training.sync_bn` it is the run of one process.

    Args:
        recipe: what to train, see `Recipe.load`.
        out: run folder; gets recipe.toml, log.jsonl, last.pt, previous.pt and best.pt.
        data: a `Dataset`, or the folder to find the recipe's data set in (default: FASTRD_DATA, ./data, ./.data).
        teacher, clean_teacher: a module, or what `load_teacher` takes; default: the recipe's `source`.
        student: a network of your own instead of the recipe's: any module (N, C, H, W) -> logits, whose copy is trained
            from the weights it has, or what makes one. To resume or evaluate such a run give it again.
        plugins: files and modules to load first, see `fastrd.core.plugins`; the run needs them to resume.
        log: trackers that also get the log: "wandb", "mlflow", "tensorboard", through their own clients and settings.
        resume: go on from the newest good checkpoint in `out`; starts from scratch where there is none.
        download: let torchvision download an absent data set.
        device: default CUDA where available, else CPU.
        progress: show a progress bar on stderr.
        profile: print after each epoch where the time went, and leave trace.json.gz of a few steps in `out`.

    Raises:
        FileExistsError: `out` holds a run and `resume` is False.
        InUse: another process writes into `out`.
        ValueError: a device this machine does not have; resume with another recipe, data set or teacher; a missing
            teacher; unusable checkpoints.
        Interrupted: SIGINT or SIGTERM came; the state is saved first. A second SIGINT stops at once.
        NonFiniteLoss: names the term; last.pt keeps the last good state, failed.pt the failing one.
    """
    recipe = replace(recipe, plugins=load_plugins(plugins))
    recipe = Recipe.stored(recipe.to_dict(), recipe.name)  # however it was made, it is valid
    check_trackers(log)
    run, device = check_path(out=out), check_device(device)
    with joined(device) as (world, device), locked(run) if world.is_main else nullcontext(), ordinary_torch():
        state = checkpoints.load_last(run) if resume else None
        if not resume and any((run / name).exists() for name in ("last.pt", "previous.pt")):
            raise FileExistsError(f"out: {run} already holds a run; pass --resume to go on with it, or another folder")
        if world.is_main:
            check_writable(*(run / name for name in (*checkpoints.WRITTEN, STATE)))
        before = None
        if state is not None:
            if world.is_main:
                check_card(run)
            with checkpoints.restoring(state, "recipe"):
                before = Recipe.stored(state["recipe"])
            # The data of a run keep their fingerprint; its training has no test images.
            recipe = replace(recipe, data=replace(recipe.data, test_limit=before.data.test_limit))
        recipe, data, frozen = load_inputs(recipe, data, teacher, clean_teacher, download, device, before)
        with float32_precision(recipe.training.precision, device):
            trainer = Trainer(recipe, run, data, frozen, device, world, student=student, trackers=log, profile=profile)
            text = trainer.recipe.to_toml()
            if state is None:
                _check_free(run, text)
            world.barrier()  # every process has looked at the folder before one writes to it
            if state is not None:
                trainer.restore(state)
            elif world.is_main:
                atomic_write(run / "recipe.toml", text)
            trained = trainer.fit(progress=progress and world.is_main)
        if world.is_main:
            write_card(run)
        return trained


def _check_free(run: Path, recipe: str) -> None:
    """Raises FileExistsError where a new run would replace a file that none of `recipe`, killed at its start, left."""
    written = run / "recipe.toml"
    if written.is_file() and written.read_text(encoding="utf-8", errors="replace") == recipe:
        return
    for name in ("recipe.toml", "log.jsonl", "best.pt", "card.md", "evaluation.json"):
        if os.path.lexists(run / name):
            raise FileExistsError(f"out: {run} holds {name} of something else; move it away, or name another folder")


@check_kinds
def evaluate_run(
    source: str | os.PathLike,
    *,
    attacks: Sequence[str] | str | None = None,
    limit: int | None = None,
    checkpoint: str = "last",
    dataset: str | None = None,
    arch: str | None = None,
    norm: str | None = None,
    epsilon: float | str | None = None,
    batch_size: int = 250,
    teacher: str | os.PathLike | None = None,
    measures: Sequence[str] = (),
    student: nn.Module | Factory | None = None,
    plugins: Sequence[str | os.PathLike] = (),
    figures: bool = False,
    save_adversarial: str | os.PathLike | None = None,
    out: str | os.PathLike | None = None,
    data: str | os.PathLike | None = None,
    download: bool = False,
    device: str | torch.device | None = None,
    progress: bool | Listener = True,
) -> dict[str, Any]:
    """Evaluates saved weights on the TEST set and writes evaluation.json; what is there already of them is kept.

    Stopped at any point and called again, it goes on where it was (verdicts are kept in `.evaluation/` beside it).

    Args:
        source: run folder, checkpoint, state dict or RobustBench id.
        attacks: see `evaluate`; default those of the run's recipe, else clean to AutoAttack.
        limit: only so many test images, classes in their shares.
        checkpoint: "last" or "best", of a run folder. "best" writes evaluation-best.json.
        dataset, norm, epsilon: default those of the recipe it was trained with, else CIFAR-10, "linf" and the radius
            that is usual in that norm, see `evaluate`.
        teacher: measure gradient alignment against it; default the teacher the run was distilled from, if it is there.
            What was measured against another one, and is not measured anew, goes.
        progress: as in `evaluate`.
        measures: further things to measure, each a section of the document: "remainder" (see
            `remainder_proportion`), "cka" (features against the teacher's, see `cka`), "pointwise" (see
            `pointwise_distance`), "probe:DATA" (accuracy clean and under PGD-20 of a linear probe on another data set,
            see `linear_probe`), and what plugins register with `fastrd.evaluation.measure`.
        student: the network again, where its name does not build it; see `train`.
        plugins: files and modules to load first, see `fastrd.core.plugins`.
        figures: also write curve.json (robust accuracy over epsilon) and panel.npz (pictures) for the report; of "best"
            curve-best.json and panel-best.npz, of a file NAME.pt NAME-curve.json and NAME-panel.npz.
        save_adversarial: .npz file for the adversarial images, see `evaluate`.
        out: folder for the files; default the run folder, or the folder of the checkpoint.

    In processes started by `torchrun` the batches are shared, and the first process writes; the verdicts are those of
    one process.

    Returns:
        The document written to evaluation.json.

    Raises:
        FileNotFoundError, ValueError: nothing there, or nothing that can be used; names what and the remedy.
    """
    check_option("checkpoint", checkpoint, ("last", "best"))
    check_integer(least=1, batch_size=batch_size)
    check_integer(least=1, optional=True, limit=limit)
    load_plugins(plugins)
    check_measures(measures)
    path, recipe = _locate(check_path(source=source), checkpoint)
    if path.name == "last.pt" and (state := read_state(path.parent)) and not state["finished"]:
        remedy = "`fastrd train --resume` goes on with it"
        warnings.warn(
            f"{path.parent}: the run is unfinished, and is evaluated as far as it came; {remedy}", stacklevel=3
        )
    settings, trained, known = (recipe.data, recipe.attack, recipe.teacher) if recipe else (Data(), Attack(), Teacher())
    if attacks is None:
        attacks = (recipe.evaluation if recipe else EvaluationSettings()).attacks
    attacks = check_attacks(attacks)
    device = check_device(device)
    norm = trained.norm if norm is None else norm
    check_option("norm", norm, tuple(NORMS))
    if epsilon is None:
        epsilon = trained.epsilon if norm == trained.norm else EPSILON[norm]
    radius: float = convert(epsilon, float, "epsilon")
    check_number(above=0, epsilon=radius)
    folder = check_path(out=out) if out is not None else (path.parent if path.exists() else Path("."))
    stem = {"last": "evaluation", "best": "evaluation-best"}[checkpoint]
    if not Path(source).is_dir():
        stem = f"{Path(source).stem}-evaluation"
    with joined(device) as (world, device), locked(folder) if world.is_main else nullcontext():
        # Raises before the work, not after it, where its results cannot be written or added to what is there.
        read_previous(folder / f"{stem}.json")
        has_card = folder == path.parent and (folder / "recipe.toml").is_file()
        if world.is_main:
            check_writable(*(folder / name for name in (f"{stem}.json", *(_figure_files(stem) if figures else ()))))
            check_saving(save_adversarial)
            if has_card:
                check_card(folder)
        size = None if dataset else settings.image_size
        images = load_dataset(dataset or settings.name, root=data, download=download, image_size=size)
        if recipe is not None and dataset is None:
            _check_same_data(path, recipe, images)
        check_settings(norm=norm, shape=images.image_shape, zero=False, epsilon=radius)  # before anything is measured
        whole, images = len(images.y_test), images.limit(test=limit or settings.test_limit)
        # A run's own accuracy is what is evaluated; a foreign file may need options that it does not hold.
        model = _load(path, images, device, check=recipe is None, arch=arch, module=student)
        x, y = images.x_test, images.y_test

        sections: dict[str, Any] = {"data": images.source, "of": whole}
        compared = None
        if teacher is not None:
            facts = known if teacher == known.source else Teacher()
            compared = _load(teacher, images, device, **facts.layout())
        elif known.source:
            compared = _own_teacher(path.parent, known.source, images, device, **known.layout())
        if compared is not None:
            sections["alignment"] = gradient_alignment(model, compared, x, y, batch_size=batch_size)
        check_measures(measures, teacher=compared is not None)
        inner = recipe.build_method().inner if recipe else "none"
        objective = "ce" if inner == "none" else inner
        load = partial(load_dataset, root=data, download=download, test_limit=limit)
        subject = Subject(model, compared, images, load, objective, radius, norm, batch_size, progress)
        sections |= measured(measures, subject)
        results = evaluate(
            model,
            x,
            y,
            attacks=attacks,
            norm=norm,
            epsilon=radius,
            step_size=radius / 4,  # 2/255 at 8/255
            batch_size=batch_size,
            device=device,
            state_dir=folder / ".evaluation",
            progress=progress,
            save_adversarial=save_adversarial,
            share=world,
        )
        document: dict[str, Any] = {}
        if world.is_main:
            file, facts_ = folder / f"{stem}.json", {"checkpoint": path.stem, "dataset": images.name}
            document = write_evaluation(file, results, model=model, teacher=compared, **facts_, **sections)
            if has_card:
                write_card(folder)
            if figures:
                about = {key: document[key] for key in ("fingerprint", "dataset", "images", "n")}
                _write_figures(folder, stem, subject, about)
        return world.exchange(document)[0]


def add_autoattack(run: str | os.PathLike, *, limit: int, **options: Any) -> dict[str, Any]:
    """Runs AutoAttack on `limit` test images of a run that was evaluated on more, and adds the result to its
    evaluation.json, which keeps all others. `options` are those of `evaluate_run`. Returns the document.
    """
    folder = Path(run)
    with locked(folder) if is_main_process() else nullcontext():
        evaluated = partial(evaluate_run, folder, out=folder / "autoattack", **options)
        whole = read_evaluation(folder / "evaluation.json")
        # On all of its images: those that AutoAttack is given do not tell whether the others are still the same.
        if whole and not same_subject(whole, evaluated(attacks=("clean",), limit=whole.get("n")), ignore="n"):
            where = f"{folder / 'evaluation.json'} is about other weights, another data set, norm or epsilon"
            remedy = "evaluate it again without --norm, --epsilon and --dataset"
            raise ValueError(f"run: {where} than its recipe, or about other images; {remedy}")
        document = evaluated(attacks=("aa",), limit=limit)
        if not is_main_process():
            return document
        whole = whole or document
        whole["results"]["aa"] = document["results"]["aa"]
        write_json(folder / "evaluation.json", whole)
        write_card(folder)
    return whole


@check_kinds
def load_student(
    source: str | os.PathLike,
    *,
    checkpoint: str = "last",
    student: nn.Module | Factory | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Returns the trained network of a run folder or checkpoint, in eval mode, averaged where the run averaged.

    It takes images (N, C, H, W) in [0, 1] and returns logits; its parameters can be trained further.

    Args:
        checkpoint: "last" or "best", of a run folder.
        student: the network again, where its name does not build it; see `train`.

    Raises:
        FileNotFoundError, ValueError: nothing there, or nothing that can be used.
    """
    check_option("checkpoint", checkpoint, ("last", "best"))
    path, _ = _locate(check_path(source=source), checkpoint)
    return load_teacher(path, module=student, device=check_device(device)).requires_grad_(True)


def summary(document: dict[str, Any]) -> str:
    """Returns the document as lines for a terminal, with the half-widths of 95 % Wilson intervals."""
    radius = epsilon_text(document["epsilon"], document.get("norm", "linf"))
    lines = [f"{document['checkpoint']} on {document['dataset']}, epsilon {radius}"]
    for name, entry in document["results"].items():
        accuracy, n = entry["accuracy"], entry.get("n") or document["n"]
        label = NAMES.get(name, name.upper().replace("PGD", "PGD-"))
        if accuracy is None:
            lines.append(f"  {label:<11}not measured")
            continue
        half, took = wilson_half_width(accuracy, n), entry.get("seconds") or 0.0
        lines.append(f"  {label:<11}{100 * accuracy:6.2f} % +- {100 * half:.2f}  (n = {n}, {took:.1f} s)")
        if "accuracy_8bit" in entry:
            lines.append(f"    on its images rounded to 8 bits: {100 * entry['accuracy_8bit']:.2f} %")
        lines += [f"    warning: {text}" for text in entry.get("warnings", [])]
    if alignment := document.get("alignment"):
        gd, gc = (_measured_text(alignment.get(key)) for key in ("gd", "gc"))
        lines.append(f"  gradient alignment with the teacher: GD {gd}, GC {gc}")
    lines += [f"  {name}: {_measured_text(document[name])}" for name in MEASURES if name in document]
    return "\n".join(lines)


def _measured_text(value: Any) -> str:
    """Returns what a measure found, a JSON value, in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_measured_text(found)}" for key, found in value.items())
    return f"{value:.4g}" if isinstance(value, float) else "not measured" if value is None else str(value)


def _locate(path: Path, checkpoint: str) -> tuple[Path, Recipe | None]:
    if path.is_dir():
        file = path / f"{checkpoint}.pt"
        if not file.exists():
            raise FileNotFoundError(f"source: {path} has no {file.name}; accepted: a run folder made by `fastrd train`")
        return file, Recipe.stored(path / "recipe.toml")
    if not path.exists():
        if path.suffix in (".pt", ".pth", ".safetensors") or path.parent != Path("."):
            raise FileNotFoundError(f"source: no file {path}; accepted: a run folder, a checkpoint, a RobustBench id")
        return path, None
    try:
        table = checkpoints.read(path)["recipe"]
    except (ValueError, KeyError):
        return path, None  # a foreign file: load_teacher raises where nothing can read it
    check_plugins(table.get("plugins", ()), str(path))
    try:
        return path, Recipe.stored(table, str(path))
    except RecipeError:
        return path, None


def _check_same_data(path: Path, recipe: Recipe, images: Dataset) -> None:
    """Raises ValueError where the data of this name are not those that a run was trained on, by their contents."""
    if not isinstance(images.x_train, np.ndarray):
        return  # a packed file or a folder of images: to read it all would take long
    for file in dict.fromkeys((path, path.with_name("last.pt"))):
        try:
            trained = checkpoints.read(file).get("identity", {}).get("data")
        except (ValueError, OSError):
            continue
        if trained is not None:
            same = images.limit(recipe.data.train_limit, recipe.data.test_limit)
            if recipe.data.extra is not None:
                same = add_extra(same, recipe.data.extra)
            if same.fingerprint != trained:
                remedy = "name the data to evaluate on with dataset= (--dataset NAME or FILE)"
                other = f"{file} was trained on other data than {recipe.data.name} in {images.source}"
                raise ValueError(f"dataset: {other} (contents differ); {remedy}")
            return


def _load(
    source: str | os.PathLike, images: Dataset, device: torch.device, *, check: bool = True, **options: Any
) -> nn.Module:
    """Returns the network of `source` for `images`, measured on some of them where `check`; see `load_teacher`."""
    small = images.limit(test=CHECK_IMAGES)
    labelled = (small.x_test, small.y_test) if check else None
    return load_teacher(source, dataset=images.name, device=device, check=labelled, **options, **images.network_shape)


def _own_teacher(run: Path, source: str, images: Dataset, device: torch.device, **layout: Any) -> nn.Module | None:
    """Returns the teacher that a run was distilled from; None, with a warning, where it is not there any more."""
    trained = (read_state(run) or {"identity": {}})["identity"].get("teacher")
    network = _load(source, images, device, **layout) if Path(source).exists() else None
    if network is not None and trained in (None, fingerprint(with_features(network))):
        return network
    found = "is not there" if network is None else "holds other weights now"
    text = f"the teacher {source} of this run {found}; its gradients are not compared (GD, GC). "
    warnings.warn(text + "--teacher CKPT says where it is now", stacklevel=4)
    return None


def _figure_files(stem: str) -> tuple[str, str]:
    before, _, after = stem.rpartition("evaluation")
    return f"{before}curve{after}.json", f"{before}panel{after}.npz"


def _write_figures(folder: Path, stem: str, subject: Subject, about: dict[str, Any]) -> None:
    """Writes the curve and the pictures, which say what they are `about`, named like the evaluation called `stem`."""
    curve_file, panel_file = (folder / name for name in _figure_files(stem))
    model, norm, epsilon = subject.model, subject.norm, subject.epsilon
    x, y = subject.data.x_test, subject.data.y_test
    epsilons = [multiple * epsilon for multiple in CURVE]
    options: dict[str, Any] = {"batch_size": subject.batch_size, "progress": subject.progress}
    accuracies = robustness_curve(model, x, y, epsilons, norm=norm, **options)
    curve = {"norm": norm, "epsilons": epsilons, "accuracies": accuracies, "n": len(x)}
    atomic_write(curve_file, json.dumps({**about, **curve, "warnings": accuracies.warnings}) + "\n")
    examples = adversarial_examples(model, x, y, PANEL_IMAGES, norm=norm, epsilon=epsilon, step_size=epsilon / 4)
    arrays: dict[str, Any] = {
        "clean": examples.clean.permute(0, 2, 3, 1).numpy(),
        "adv": examples.adversarial.permute(0, 2, 3, 1).numpy(),
        "label": examples.labels.numpy(),
        "pred_clean": examples.clean_predictions.numpy(),
        "pred_adv": examples.adversarial_predictions.numpy(),
        "class_names": np.array(subject.data.class_names),
        **{key: np.array(about[key]) for key in ("fingerprint", "images")},
    }
    with atomic_writer(panel_file) as file:
        np.savez_compressed(file, **arrays)
