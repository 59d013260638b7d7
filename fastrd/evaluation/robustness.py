"""Accuracy under attack, from the clean images to AutoAttack: which stages each attack has.

An attack is a list of stages (the restarts of C&W, the four parts of AutoAttack, the radii of a robustness
curve). Each stage sees, in batches, only the images that are still classified right after the stages before it.
`runner` runs them.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .. import attacks as inner
from ..core.arguments import check_flags
from ..core.files import atomic_writer, check_path, check_writable
from ..core.images import as_images, as_labels, pixels
from ..core.seeding import derive_seed
from ..core.values import check_integer, nearest, shown
from . import autoattack
from .inputs import Logits, count_classes, describe, evaluating, optimized
from .runner import (
    ALONE,
    GRADIENT_COST,
    Listener,
    Outcome,
    Runner,
    Share,
    Stage,
    Tally,
    check_run,
    is_correct,
    note_masked,
)


class Evaluation(dict[str, dict[str, Any]]):
    """Attack name -> {"accuracy", "seconds", "n"} and, where there are any, "stages", "warnings", "accuracy_8bit".

    `verdicts[name]` is bool (n,): which images are classified right under that attack. `worst` is the
    fraction right under all of them. `images` is the SHA-256 of the images and labels.
    """

    def __init__(self, *, n: int, norm: str, epsilon: float, device: str, images: str) -> None:
        super().__init__()
        self.n, self.norm, self.epsilon, self.device, self.images = n, norm, epsilon, device, images
        self.verdicts: dict[str, np.ndarray] = {}

    @property
    def worst(self) -> float:
        return float(np.logical_and.reduce(list(self.verdicts.values())).mean())


class Curve(list[float]):
    """Accuracies by radius, and what there is to warn of."""

    warnings: list[str]


class AdversarialExamples(NamedTuple):
    """For a picture: n images, float32 on the CPU; labels and predictions int64 (n,)."""

    clean: Tensor  # (n, C, H, W) in [0, 1]
    adversarial: Tensor  # (n, C, H, W) in [0, 1]
    delta: Tensor  # adversarial - clean
    labels: Tensor
    clean_predictions: Tensor
    adversarial_predictions: Tensor


def evaluate(
    model: nn.Module,
    x: Tensor | np.ndarray,
    y: Any,
    *,
    attacks: Sequence[str] | str = ("clean", "fgsm", "pgd20", "cw", "aa"),
    norm: str = "linf",
    epsilon: float | None = None,
    step_size: float | None = None,
    batch_size: int = 250,
    seed: int = 0,
    device: torch.device | str | None = None,
    state_dir: str | os.PathLike | None = None,
    progress: bool | Listener = True,
    compile: bool | None = None,
    save_adversarial: str | os.PathLike | None = None,
    share: Share = ALONE,
) -> Evaluation:
    """Returns the accuracy of `model` under attack, in eval mode and float32; the model is left as it was.

    What is attacked is a copy with the batch norms folded into the convolutions (`fastrd.models.Folded`): the same
    function up to rounding, in a fraction of the time.

    An image counts as robust when it is classified right clean AND after the attack, so images that are wrong
    clean are not attacked. Images with a non-finite logit count as wrong; inside
    AutoAttack the package decides, by the largest logit.

    Args:
        model: images (N, C, H, W) in [0, 1] -> logits (N, classes), any normalisation inside.
        x: float (N, C, H, W) in [0, 1], or uint8 (N, H, W, C).
        y: (N,) class indices.
        attacks: names, or one comma-separated string; run cheapest first.
            "clean"; "fgsm": one step of size epsilon from x (Goodfellow et al. 2015; in l2 along the gradient, FGM);
            "pgdN", e.g. "pgd20": N steps on cross-entropy from a random start (Madry et al. 2018);
            "cw": 10 restarts of 50 steps on the margin loss max_{k != y} z_k - z_y (Carlini and Wagner 2017,
            by PGD), "cw-quick": 1 of 30;
            "aa": AutoAttack standard, by the package `pyautoattack`, and its parts "apgd-ce", "apgd-t",
            "fab-t", "square" alone. "aa" reaches the verdicts of the package called once on all images with
            this seed and batch size, with min(9, classes - 1) target classes.
        norm: "linf" or "l2", of the change of an image.
        epsilon: its largest norm, in pixels of [0, 1]; None: 8/255 in l-infinity, 0.5 in l2.
        step_size: of "pgdN" and "cw"; None: 2/255 in l-infinity, epsilon / 4 in l2.
        batch_size: images per batch. Random starts depend on it.
        seed: of random starts and of AutoAttack.
        device: the model is moved there for the evaluation and back; None: where it is.
        state_dir: folder for verdicts reached so far. A stopped evaluation called again with the same
            model, data, options and versions goes on from there; anything that differs starts anew beside it.
        progress: True shows bars on a terminal (stderr), False nothing; a function gets each `Progress`.
        compile: attack `torch.compile` of the network; None: on CUDA where AutoAttack is asked for, which runs long
            enough to be worth the wait.
        save_adversarial: .npz file for the adversarial images: `labels`, and for each attack NAME an array NAME
            (n, C, H, W) float32 of the last image tried (AutoAttack gives an image that survives back unchanged),
            NAME_robust and NAME_robust_8bit, bool (n,). The result then
            has "accuracy_8bit" too: the accuracy on these images rounded to 8 bits, as a file of pictures holds them.
        share: this process among those that share the work; all of them call `evaluate` with equal arguments, on
            equal models, and get the result that one process would.

    Raises:
        ValueError: a bad argument; AutoAttack with fewer than 4 classes.
        TypeError: the model is not an nn.Module.
        ImportError: AutoAttack without `pyautoattack`.
    """
    names = check_attacks(attacks)
    check_run(batch_size, seed, progress, share)
    if compile is not None:
        check_flags(compile=compile)
    if share.rank == 0:
        check_saving(save_adversarial)
    images, labels = as_images(x), as_labels(y, len(x))
    if epsilon is None:
        epsilon = inner.EPSILON.get(norm, 0.0)
    if step_size is None:
        step_size = 2 / 255 if norm == "linf" else epsilon / 4
    radii: dict[str, Any] = {"epsilon": epsilon, "step_size": step_size}
    inner.check_settings(norm=norm, shape=images.shape[1:], zero=False, **radii)
    with evaluating(model, device=device) as place:
        classes = count_classes(model, images, labels, place)
        for name in names:
            autoattack.check(_PARTS.get(name, ()), classes, norm, *pixels(images[:1], place).shape[2:])
        if compile is None:
            compile = place.type == "cuda" and any(name in _PARTS for name in names)
        network = optimized(model, pixels(images[:2], place), compile=compile)
        folder, keep = None if state_dir is None else check_path(state_dir=state_dir), save_adversarial is not None
        runner = Runner(model, network, images, labels, place, batch_size, seed, progress, folder, keep, share)
        result = Evaluation(n=len(images), norm=norm, epsilon=epsilon, device=describe(place), images=runner.digest)
        saved: dict[str, Any] = {"labels": labels.numpy(force=True)}
        clean = runner.clean()
        for name in names:
            if name == "clean":
                tally = clean
            else:
                build = partial(_stages, name, norm=norm, **radii, classes=classes, seed=seed, device=place)
                options = radii if norm == "linf" else {"norm": norm, **radii}
                version = autoattack.package().__version__ if name in _PARTS else None
                tally = runner.run(name, build, standing=clean.robust, options=options, version=version)
            result[name] = _entry(tally, clean)
            result.verdicts[name] = tally.robust
            if runner.keep:
                rounded = runner.survives_rounding(tally, clean)
                result[name]["accuracy_8bit"] = float(rounded.mean())
                if tally.images is not None:
                    saved |= {name: tally.images, f"{name}_robust": tally.robust, f"{name}_robust_8bit": rounded}
    if save_adversarial is not None and runner.share.rank == 0:
        with atomic_writer(save_adversarial) as file:
            np.savez(file, **saved)
    return result


def check_saving(save_adversarial: str | os.PathLike | None) -> None:
    """Raises where adversarial images could not be saved, see `evaluate`. None: they are not to be."""
    if save_adversarial is None:
        return
    if check_path(save_adversarial=save_adversarial).suffix != ".npz":
        raise ValueError(f"save_adversarial: got {os.fspath(save_adversarial)!r}; accepted: a file name.npz")
    check_writable(save_adversarial)


def robustness_curve(
    model: nn.Module,
    x: Tensor | np.ndarray,
    y: Any,
    epsilons: Iterable[float],
    *,
    norm: str = "linf",
    steps: int = 20,
    batch_size: int = 250,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool | Listener = True,
) -> Curve:
    """Returns the accuracy at each of `epsilons` under PGD on CE: `steps` steps of 2.5 epsilon / steps, random start.

    An image broken at a radius counts as broken at every larger one, whose ball contains the same image: the
    curve never rises, and starts from the clean accuracy at 0. Other arguments as in `evaluate`.
    """
    if isinstance(epsilons, str) or not isinstance(epsilons, Iterable) or getattr(epsilons, "ndim", 1) != 1:
        raise TypeError(f"epsilons: got {shown(epsilons)}; accepted: a list of radii")
    given = [epsilon.item() if isinstance(epsilon, Tensor) and epsilon.ndim == 0 else epsilon for epsilon in epsilons]
    if not given:
        raise ValueError("epsilons: got none; accepted: a list of radii")
    check_run(batch_size, seed, progress)
    check_integer(least=1, steps=steps)
    images, labels = as_images(x), as_labels(y, len(x))
    for epsilon in given:
        inner.check_settings(norm=norm, shape=images.shape[1:], epsilons=epsilon)
    epsilons = [float(epsilon) for epsilon in given]
    radii = sorted(set(epsilons) - {0.0})

    def build(logits: Logits, notes: Counter[str]) -> list[Stage]:
        pgd = partial(_pgd, logits, notes, norm=norm, steps=steps)
        return [
            pgd(f"epsilon {radius:.4f}", first=radius == radii[0], epsilon=radius, step_size=2.5 * radius / steps)
            for radius in radii
        ]

    with evaluating(model, device=device) as place:
        count_classes(model, images, labels, place)
        network = optimized(model, pixels(images[:2], place))
        runner = Runner(model, network, images, labels, place, batch_size, seed, progress)
        clean = runner.clean()
        tally = runner.run("curve", build, standing=clean.robust)
    accuracies = dict(zip((0.0, *radii), (clean.accuracy(), *tally.accuracies().values()), strict=True))
    curve = Curve(accuracies[epsilon] for epsilon in epsilons)
    curve.warnings = _warnings(tally.notes)
    return curve


def adversarial_examples(
    model: nn.Module,
    x: Tensor | np.ndarray,
    y: Any,
    n: int,
    *,
    norm: str = "linf",
    epsilon: float = 8 / 255,
    step_size: float = 2 / 255,
    steps: int = 20,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> AdversarialExamples:
    """Returns the first `n` images (fewer if there are not as many) before and after PGD on cross-entropy."""
    check_integer(least=1, n=n)
    images = as_images(_first(x, n))
    labels = as_labels(_first(y, n), len(images))
    settings: dict[str, Any] = {"norm": norm, "epsilon": epsilon, "step_size": step_size, "steps": steps}
    inner.check_settings(shape=images.shape[1:], **settings)
    start_seed = derive_seed(seed, "examples")
    with evaluating(model, device=device) as place:
        count_classes(model, images, labels, place)
        clean, target = pixels(images, place), labels.to(place)
        generator = torch.Generator(place).manual_seed(start_seed)
        network = optimized(model, clean[:2])
        adversarial = inner.pgd(network, clean, inner.cross_entropy(target), generator=generator, **settings)
        with torch.no_grad():
            predictions = [network(images).argmax(1).cpu() for images in (clean, adversarial)]
    clean, adversarial = clean.cpu(), adversarial.cpu()
    return AdversarialExamples(clean, adversarial, adversarial - clean, labels, *predictions)


def _first(values: Any, n: int) -> Any:
    """The first n; all where there is no such part, of which the check of images or labels then says what it is."""
    try:
        return values[:n]
    except (TypeError, IndexError, RuntimeError):
        return values


_MARGIN = {"cw": (50, 10), "cw-quick": (30, 1)}  # steps, restarts
_PARTS = {"aa": autoattack.STAGES, **{stage: (stage,) for stage in autoattack.STAGES}}
_PGD = re.compile(r"pgd([1-9][0-9]{0,6})")  # Python reads no number of thousands of digits
_ACCEPTED = ("clean", "fgsm", "pgd20", "pgd100", *_MARGIN, *_PARTS)


def check_attacks(attacks: Sequence[str] | str) -> list[str]:
    """Returns the attack names, each once, cheapest first. Raises ImportError where a package is missing."""
    names = check_names(attacks)
    if any(name in _PARTS for name in names):
        autoattack.package()
    return sorted(dict.fromkeys(names), key=_rank)


def check_names(attacks: Sequence[str] | str) -> list[str]:
    """Returns the attack names of a list or a comma-separated string. Raises ValueError for none or an unknown one."""
    if not isinstance(attacks, (str, list, tuple)) or not all(isinstance(name, str) for name in attacks):
        raise TypeError(f"attacks: got {shown(attacks)}; accepted: a list of names or a comma-separated string")
    names = [name.strip() for name in (attacks.split(",") if isinstance(attacks, str) else attacks)]
    if not names:
        raise ValueError(f"attacks: none given; accepted: any of {', '.join(_ACCEPTED)}")
    for name in names:
        if name not in _ACCEPTED and not _PGD.fullmatch(name):
            accepted = f"{', '.join(_ACCEPTED)}, or any pgdN with N >= 1 steps{nearest(name, _ACCEPTED)}"
            raise ValueError(f"attacks: got {shown(name)}; accepted: {accepted}")
    return names


def _rank(name: str) -> int:
    if name in _PARTS:
        return 10_000 * len(_PARTS[name])
    if name in _MARGIN:
        steps, restarts = _MARGIN[name]
        return steps * restarts
    pgd = _PGD.fullmatch(name)
    return int(pgd[1]) if pgd else ("clean", "fgsm").index(name)


def _stages(
    name: str, logits: Logits, notes: Counter[str], *, norm: str, epsilon: float, step_size: float, **package: Any
) -> list[Stage]:
    """The stages of attack `name` on a network; warnings are counted in `notes`. package: what AutoAttack needs."""
    if name in _PARTS:
        return autoattack.stages(_PARTS[name], logits, norm=norm, epsilon=epsilon, notes=notes, **package)
    pgd = partial(_pgd, logits, notes, norm=norm, epsilon=epsilon)
    if name == "fgsm":
        return [pgd(name, random_start=False, steps=1, step_size=epsilon)]
    if name in _MARGIN:
        steps, restarts = _MARGIN[name]
        restart = partial(pgd, objective=inner.margin, steps=steps, step_size=step_size)
        return [restart(f"restart {k}", first=k == 1) for k in range(1, restarts + 1)]
    return [pgd(name, steps=int(name.removeprefix("pgd")), step_size=step_size)]


def _pgd(
    logits: Logits,
    notes: Counter[str],
    name: str,
    *,
    objective: Callable[[Tensor], inner.Objective] = inner.cross_entropy,
    random_start: bool = True,
    first: bool = True,
    **settings: Any,
) -> Stage:
    """A stage of `attacks.pgd`. first: images without a gradient are counted, which later stages see again."""

    def attack(x: Tensor, y: Tensor, generator: torch.Generator) -> Outcome:
        start = inner.uniform_start(x, settings["epsilon"], generator, norm=settings["norm"]) if random_start else x
        x_adv = inner.pgd(logits, x, objective(y), start=start, **settings)
        if first:
            # Without a gradient an image stays where it is, up to rounding.
            still = ((x_adv - start).abs() <= 1e-3 * settings["step_size"]).flatten(1).all(dim=1)
            note_masked(logits, start, objective(y), still, notes)
        return Outcome(is_correct(logits, x_adv, y, notes), x_adv)

    return Stage(name, GRADIENT_COST * settings["steps"] + 1, attack)


def _entry(tally: Tally, clean: Tally) -> dict[str, Any]:
    seconds = round(tally.seconds, 3)
    entry: dict[str, Any] = {"accuracy": tally.accuracy(), "seconds": seconds, "n": len(tally.broken_by)}
    notes = tally.notes.copy()
    if len(tally.stages) > 1:
        entry["stages"] = tally.accuracies()
        if "square" in tally.stages:
            autoattack.flag_square({"clean": clean.accuracy(), **entry["stages"]}, notes)
    if notes:
        entry["warnings"] = _warnings(notes)
    return entry


def _warnings(notes: Counter[str]) -> list[str]:
    return [f"{note} [{count} times]" if count > 1 else note for note, count in notes.items()]
