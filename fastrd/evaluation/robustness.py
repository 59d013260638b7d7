"""Accuracy under attack: one resumable runner for every attack, from the clean images to AutoAttack.

An attack is a list of stages (the restarts of C&W, the four parts of AutoAttack, the radii of a robustness
curve). Each stage sees, in batches, only the images that are still classified right after the stages before
it. Which images make a batch, and the random numbers it draws, follow from the earlier verdicts alone, so an
evaluation that was stopped goes on from its last batch to the verdicts it would have reached.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import attacks as inner
from ..core.arguments import check_logits
from ..core.files import atomic_write
from ..core.fingerprint import data_digest, fingerprint
from ..core.images import as_images, as_labels
from ..core.process_environment import contention
from ..core.schema import nearest
from ..core.seeding import derive_seed
from ..core.values import check_number, shown
from . import autoattack
from .inputs import batches, describe, evaluating, fast, pixels

Logits = Callable[[Tensor], Tensor]
Listener = Callable[["Progress"], None]

_STANDING, _NEVER_RIGHT = -1, -2
_GRADIENT = 3  # cost of a forward pass with its gradient, in forward passes
_REPORT_EVERY = 0.2  # seconds


class Progress(NamedTuple):
    """Where an evaluation is, told after each batch and a few times a second within one."""

    attack: str
    stage: str
    done: int  # images this stage has dealt with
    of: int  # images this stage was given
    robust: int  # images that no stage of this attack has broken yet
    n: int  # all images
    fraction: float  # of the attack's work
    seconds_left: float


class Evaluation(dict[str, dict[str, Any]]):
    """Attack name -> {"accuracy", "seconds", "n"} and, where there are any, "stages" and "warnings".

    `verdicts[name]` is bool (n,): which images are classified right under that attack. `worst` is the
    fraction right under all of them.
    """

    def __init__(self, *, n: int, epsilon: float, device: str) -> None:
        super().__init__()
        self.n, self.epsilon, self.device = n, epsilon, device
        self.verdicts: dict[str, np.ndarray] = {}

    @property
    def worst(self) -> float:
        return float(np.logical_and.reduce(list(self.verdicts.values())).mean())


class AdversarialExamples(NamedTuple):
    """For a picture: n images, float32 on the CPU; labels and predictions int64 (n,)."""

    clean: Tensor  # (n, C, H, W) in [0, 1]
    adversarial: Tensor  # (n, C, H, W) in [0, 1]
    delta: Tensor  # adversarial - clean, in [-epsilon, epsilon]
    labels: Tensor
    clean_predictions: Tensor
    adversarial_predictions: Tensor


def evaluate(
    model: nn.Module,
    x: Tensor | np.ndarray,
    y: Any,
    *,
    attacks: Sequence[str] | str = ("clean", "fgsm", "pgd20", "cw", "aa"),
    epsilon: float = 8 / 255,
    step_size: float = 2 / 255,
    batch_size: int = 250,
    seed: int = 0,
    device: torch.device | str | None = None,
    state_dir: str | os.PathLike | None = None,
    progress: bool | Listener = True,
    compile: bool | None = None,
) -> Evaluation:
    """Accuracy of `model` under l-infinity attacks, in eval mode and float32; the model is left as it was.

    What is attacked is a copy with the batch norms folded into the convolutions (`fastrd.models.Folded`): the same
    function up to rounding, in a fraction of the time.

    An image counts as robust when it is classified right clean AND after the attack, so images that are wrong
    clean are not attacked. Images with a non-finite logit count as wrong.

    Args:
        model: images (N, C, H, W) in [0, 1] -> logits (N, classes), any normalisation inside.
        x: float (N, C, H, W) in [0, 1], or uint8 (N, H, W, C).
        y: (N,) class indices.
        attacks: names, or one comma-separated string; run cheapest first.
            "clean"; "fgsm": one step of size epsilon from x (Goodfellow et al. 2015);
            "pgdN", e.g. "pgd20": N steps on cross-entropy from a uniform start (Madry et al. 2018);
            "cw": 10 restarts of 50 steps on the margin loss max_{k != y} z_k - z_y (Carlini and Wagner 2017,
            by PGD), "cw-quick": 1 of 30;
            "aa": AutoAttack standard, by the package `pyautoattack`, and its parts "apgd-ce", "apgd-t",
            "fab-t", "square" alone. "aa" reaches the verdicts of the package called once on all images with
            this seed and batch size, with min(9, classes - 1) target classes.
        epsilon, step_size: fractions of the pixel range; `step_size` is that of "pgdN" and "cw".
        batch_size: images per batch. Random starts depend on it.
        seed: of random starts and of AutoAttack.
        device: the model is moved there for the evaluation and back; None: where it is.
        state_dir: folder for verdicts reached so far. A stopped evaluation called again with the same
            model, data, options and versions goes on from there; anything that differs starts anew beside it.
        progress: True shows bars on a terminal (stderr), False nothing; a function gets each `Progress`.
        compile: attack `torch.compile` of the network; None: on CUDA where AutoAttack is asked for, which runs long
            enough to be worth the wait.

    Raises:
        ValueError: a bad argument; AutoAttack with fewer than 4 classes.
        TypeError: the model is not an nn.Module.
        ImportError: AutoAttack without `pyautoattack`.
    """
    names = check_attacks(attacks)
    _check_fraction("epsilon", epsilon)
    _check_fraction("step_size", step_size)
    images, labels = as_images(x), as_labels(y, len(x))
    with evaluating(model, device=device) as place:
        classes = _count_classes(model, images, labels, place)
        for name in names:
            autoattack.check(_PARTS.get(name, ()), classes)
        state_dir = None if state_dir is None else Path(state_dir)
        if compile is None:
            compile = place.type == "cuda" and any(name in _PARTS for name in names)
        network = fast(model, pixels(images[:2], place), compile=compile)
        runner = _Runner(model, network, images, labels, place, batch_size, seed, progress, state_dir)
        result = Evaluation(n=len(images), epsilon=epsilon, device=describe(place))
        clean = runner.clean()
        for name in names:
            if name == "clean":
                tally = clean
            else:
                build = _builder(
                    name, classes=classes, epsilon=epsilon, step_size=step_size, seed=seed, device=place
                )
                options = {"epsilon": epsilon, "step_size": step_size}
                tally = runner.run(name, build, standing=clean.robust, options=options)
            result[name] = _entry(tally, clean)
            result.verdicts[name] = tally.robust
    return result


def robustness_curve(
    model: nn.Module,
    x: Tensor | np.ndarray,
    y: Any,
    epsilons: Iterable[float],
    *,
    steps: int = 20,
    batch_size: int = 250,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool | Listener = True,
) -> list[float]:
    """Accuracy at each of `epsilons` under PGD on CE: `steps` steps of 2.5 epsilon / steps, uniform start.

    An image broken at a radius counts as broken at every larger one, whose ball contains the same image: the
    curve never rises, and starts from the clean accuracy at 0. Other arguments as in `evaluate`.
    """
    epsilons = [float(epsilon) for epsilon in epsilons]
    for epsilon in epsilons:
        if epsilon:
            _check_fraction("epsilons", epsilon)
    radii = sorted(set(epsilons) - {0.0})
    images, labels = as_images(x), as_labels(y, len(x))

    def build(logits: Logits, notes: Counter[str]) -> list[_Stage]:
        return [
            _pgd(
                f"epsilon {radius:.4f}",
                logits,
                notes,
                inner.cross_entropy,
                steps,
                radius,
                2.5 * radius / steps,
            )
            for radius in radii
        ]

    with evaluating(model, device=device) as place:
        _count_classes(model, images, labels, place)
        network = fast(model, pixels(images[:2], place))
        runner = _Runner(model, network, images, labels, place, batch_size, seed, progress, None)
        clean = runner.clean()
        tally = runner.run("curve", build, standing=clean.robust)
    accuracies = dict(zip((0.0, *radii), (clean.accuracy(), *tally.accuracies().values()), strict=True))
    return [accuracies[epsilon] for epsilon in epsilons]


def adversarial_examples(
    model: nn.Module,
    x: Tensor | np.ndarray,
    y: Any,
    n: int,
    *,
    epsilon: float = 8 / 255,
    step_size: float = 2 / 255,
    steps: int = 20,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> AdversarialExamples:
    """The first `n` images (fewer if there are not as many) before and after PGD on cross-entropy."""
    if n < 1:
        raise ValueError(f"n: got {n}; accepted: an int >= 1")
    _check_fraction("epsilon", epsilon)
    images, labels = as_images(x[:n]), as_labels(y[:n], len(x[:n]))
    with evaluating(model, device=device) as place:
        _count_classes(model, images, labels, place)
        clean, target = pixels(images, place), labels.to(place)
        generator = torch.Generator(place).manual_seed(derive_seed(seed, "examples"))
        network = fast(model, clean[:2])
        adversarial = inner.pgd(
            network,
            clean,
            inner.cross_entropy(target),
            epsilon=epsilon,
            step_size=step_size,
            steps=steps,
            generator=generator,
        )
        with torch.no_grad():
            predictions = [network(images).argmax(1).cpu() for images in (clean, adversarial)]
    clean, adversarial = clean.cpu(), adversarial.cpu()
    return AdversarialExamples(clean, adversarial, adversarial - clean, labels, *predictions)


_MARGIN = {"cw": (50, 10), "cw-quick": (30, 1)}  # steps, restarts
_PARTS = {"aa": autoattack.STAGES, **{stage: (stage,) for stage in autoattack.STAGES}}
_PGD = re.compile(r"pgd([1-9][0-9]{0,6})")  # Python reads no number of thousands of digits
_ACCEPTED = ("clean", "fgsm", "pgd20", "pgd100", *_MARGIN, *_PARTS)


def check_attacks(attacks: Sequence[str] | str) -> list[str]:
    """Returns the attack names, each once, cheapest first.

    Raises errors as `check_names`, and ImportError when an attack's package is missing.
    """
    names = check_names(attacks)
    if any(name in _PARTS for name in names):
        autoattack.package()
    return sorted(dict.fromkeys(names), key=_rank)


def check_names(attacks: Sequence[str] | str) -> list[str]:
    """Returns the attack names of a list or a comma-separated string.

    Raises ValueError for none or an unknown one, with the nearest known one, and TypeError for anything but names.
    """
    if not isinstance(attacks, (str, list, tuple)) or not all(isinstance(name, str) for name in attacks):
        raise TypeError(
            f"attacks: got {shown(attacks)}; accepted: a list of names or a comma-separated string"
        )
    names = [name.strip() for name in (attacks.split(",") if isinstance(attacks, str) else attacks)]
    if not names:
        raise ValueError(f"attacks: none given; accepted: any of {', '.join(_ACCEPTED)}")
    for name in names:
        if name not in _ACCEPTED and not _PGD.fullmatch(name):
            raise ValueError(
                f"attacks: got {shown(name)}; accepted: {', '.join(_ACCEPTED)}, or any pgdN with N >= 1 steps"
                f"{nearest(name, _ACCEPTED)}"
            )
    return names


def _rank(name: str) -> int:
    if name in _PARTS:
        return 10_000 * len(_PARTS[name])
    if name in _MARGIN:
        steps, restarts = _MARGIN[name]
        return steps * restarts
    pgd = _PGD.fullmatch(name)
    return int(pgd[1]) if pgd else ("clean", "fgsm").index(name)


class _Stage(NamedTuple):
    name: str
    cost: float  # forward passes per image that survives, a gradient counting for two more
    stands: Callable[[Tensor, Tensor, torch.Generator], Tensor]  # (x, y, generator) -> bool (N,)


Builder = Callable[[Logits, Counter[str]], list[_Stage]]


def _builder(
    name: str, *, classes: int, epsilon: float, step_size: float, seed: int, device: torch.device
) -> Builder:
    """The stages of attack `name`, as a function of the network and of where to count warnings."""

    def build(logits: Logits, notes: Counter[str]) -> list[_Stage]:
        if name in _PARTS:
            stages = autoattack.stages(
                _PARTS[name], logits, classes=classes, epsilon=epsilon, seed=seed, device=device, notes=notes
            )
            return [
                _Stage(
                    stage,
                    autoattack.cost(stage, classes),
                    _ignoring_generator(stands),
                )
                for stage, stands in stages.items()
            ]
        if name == "fgsm":
            return [_pgd(name, logits, notes, inner.cross_entropy, 1, epsilon, epsilon, random_start=False)]
        if name in _MARGIN:
            steps, restarts = _MARGIN[name]
            return [
                _pgd(f"restart {k}", logits, notes, inner.margin, steps, epsilon, step_size)
                for k in range(1, restarts + 1)
            ]
        steps = int(name.removeprefix("pgd"))
        return [_pgd(name, logits, notes, inner.cross_entropy, steps, epsilon, step_size)]

    return build


def _ignoring_generator(stands: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, y, generator: stands(x, y)


def _pgd(
    name: str,
    logits: Logits,
    notes: Counter[str],
    objective: Callable[[Tensor], inner.Objective],
    steps: int,
    epsilon: float,
    step_size: float,
    *,
    random_start: bool = True,
) -> _Stage:
    def stands(x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        x_adv = inner.pgd(
            logits,
            x,
            objective(y),
            epsilon=epsilon,
            step_size=step_size,
            steps=steps,
            start=None if random_start else x,
            generator=generator,
        )
        return _right(logits, x_adv, y, notes)

    return _Stage(name, _GRADIENT * steps + 1, stands)


@torch.no_grad()
def _right(logits: Logits, x: Tensor, y: Tensor, notes: Counter[str]) -> Tensor:
    output = logits(x)
    finite = output.isfinite().all(dim=1)
    if not finite.all():
        notes["non-finite logits; the image counts as wrong"] += int((~finite).sum())
    return (output.argmax(dim=1) == y) & finite


@dataclass
class _Tally:
    """What is known of one attack so far; `stage` and `position` say where it goes on."""

    fell: np.ndarray  # (n,) int: the stage that broke each image, _STANDING, or _NEVER_RIGHT
    stages: tuple[str, ...]
    stage: int = 0
    position: int = 0
    work: float = 0.0
    seconds: float = 0.0
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def robust(self) -> np.ndarray:
        return self.fell == _STANDING

    def accuracy(self) -> float:
        return float(self.robust.mean())

    def accuracies(self) -> dict[str, float]:
        """Accuracy after each stage."""
        return {name: float((self.robust | (self.fell > s)).mean()) for s, name in enumerate(self.stages)}

    def dumps(self) -> str:
        return json.dumps({**asdict(self), "fell": self.fell.tolist()})

    @classmethod
    def loads(cls, text: str, stages: tuple[str, ...]) -> _Tally:
        stored = json.loads(text)
        stored |= {"fell": np.array(stored["fell"]), "stages": stages, "notes": Counter(stored["notes"])}
        return cls(**stored)


@dataclass
class _Runner:
    """Runs stages over the images, in batches, from wherever the state on disk says they were left."""

    model: nn.Module  # whose identity the state on disk is filed under
    network: Logits  # the form of it that is attacked
    images: Tensor
    labels: Tensor
    device: torch.device
    batch_size: int
    seed: int
    progress: bool | Listener
    state_dir: Path | None

    def clean(self) -> _Tally:
        def build(logits: Logits, notes: Counter[str]) -> list[_Stage]:
            return [_Stage("clean", 1, lambda x, y, generator: _right(logits, x, y, notes))]

        return replace(self, state_dir=None).run("clean", build, standing=np.ones(len(self.images), bool))

    def run(
        self, attack: str, build: Builder, *, standing: np.ndarray, options: dict[str, Any] | None = None
    ) -> _Tally:
        with _listener(self.progress) as listen:
            meter = _Meter(self.network, attack, listen)
            notes: Counter[str] = Counter()
            stages = build(meter.logits, notes)
            names = tuple(stage.name for stage in stages)
            path = self._state_path(attack, names, standing, options)
            tally = _stored(path, names) or _Tally(np.where(standing, _STANDING, _NEVER_RIGHT), names)
            notes.update(tally.notes)
            tally.notes = notes
            for s in range(tally.stage, len(stages)):
                self._run_stage(attack, stages, s, tally, meter, path)
        return tally

    def _run_stage(
        self, attack: str, stages: list[_Stage], s: int, tally: _Tally, meter: _Meter, path: Path | None
    ) -> None:
        stage = stages[s]
        if tally.stage != s:
            tally.stage, tally.position = s, 0
        given = np.flatnonzero((tally.fell == _STANDING) | (tally.fell == s))
        later = sum(stage.cost for stage in stages[s + 1 :])
        for part in batches(len(given), self.batch_size):
            if part.start < tally.position:
                continue
            began = time.perf_counter()
            index = torch.from_numpy(given[part])
            meter.start(stage, tally, len(index), len(given), later)
            x, y = pixels(self.images[index], self.device), self.labels[index].to(self.device)
            generator = torch.Generator(self.device).manual_seed(
                derive_seed(self.seed, attack, s, part.start)
            )
            stands = stage.stands(x, y, generator).cpu()
            tally.fell[index[~stands]] = s
            tally.position += len(index)
            tally.work += stage.cost * len(index)
            tally.seconds += time.perf_counter() - began
            if path:
                atomic_write(path, tally.dumps())
            meter.finish(tally)

    @cached_property
    def _subject(self) -> tuple[str, str]:
        return fingerprint(self.model), data_digest(self.images, self.labels)

    def _state_path(
        self, attack: str, stages: tuple[str, ...], standing: np.ndarray, options: dict[str, Any] | None
    ) -> Path | None:
        """A file named after everything the verdicts depend on, so that stale state is never even opened."""
        if self.state_dir is None:
            return None
        facts = {
            "subject": self._subject,
            # Weights do not say what a forward pass does with them; its verdicts do.
            "clean": hashlib.sha256(standing.tobytes()).hexdigest(),
            "attack": (attack, stages, options),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "device": self.device.type,
            "torch": str(torch.__version__),
            "pyautoattack": autoattack.package().__version__ if attack in _PARTS else None,
        }
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return self.state_dir / f"{attack}-{key[:16]}.json"


class _Meter:
    """Counts forward passes of the attacked model, to say within a long batch how far it is."""

    def __init__(self, network: Logits, attack: str, listen: Listener) -> None:
        self._network, self._attack, self._listen = network, attack, listen
        self._session_work, self._session_began = 0.0, time.perf_counter()
        self._told = self._spent = 0.0

    def logits(self, x: Tensor) -> Tensor:
        self._spent = min(self._spent + len(x) * (_GRADIENT if x.requires_grad else 1), self._batch_work)
        if time.perf_counter() - self._told > _REPORT_EVERY:
            contention.look(torch.get_num_threads())
            self._tell(self._spent)
        return self._network(x)

    def start(self, stage: _Stage, tally: _Tally, batch: int, given: int, later: float) -> None:
        self._stage, self._tally, self._given, self._later = stage, tally, given, later
        self._batch_work, self._spent = stage.cost * batch, 0.0

    def finish(self, tally: _Tally) -> None:
        self._session_work += self._batch_work
        self._tell(0.0)

    def _tell(self, spent: float) -> None:
        self._told = time.perf_counter()
        tally, robust = self._tally, int(self._tally.robust.sum())
        left = self._stage.cost * (self._given - tally.position) + self._later * robust - spent
        done = tally.work + spent
        session = self._session_work + spent
        elapsed = self._told - self._session_began
        self._listen(
            Progress(
                attack=self._attack,
                stage=self._stage.name,
                done=tally.position,
                of=self._given,
                robust=robust,
                n=len(tally.fell),
                fraction=done / (done + left),
                seconds_left=elapsed / session * left,
            )
        )


@contextmanager
def _listener(progress: bool | Listener) -> Iterator[Listener]:
    if callable(progress):
        yield progress
        return
    bar = None

    def show(now: Progress) -> None:
        nonlocal bar
        where = now.attack if now.stage == now.attack else f"{now.attack} {now.stage}"
        counts = f"{now.done}/{now.of} images, {now.robust}/{now.n} robust"
        line = f"{where:14} |{{bar:24}}| {counts}, {tqdm.format_interval(now.seconds_left)} left"
        if bar is None:
            # disable=None: no bar where stderr is not a terminal.
            bar = tqdm(total=1.0, bar_format=line, disable=None if progress else True)
        bar.bar_format, bar.n = line, now.fraction
        bar.refresh()

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()


def _stored(path: Path | None, stages: tuple[str, ...]) -> _Tally | None:
    if path is None or not path.exists():
        return None
    try:
        return _Tally.loads(path.read_text(), stages)
    except (ValueError, KeyError, TypeError) as error:
        warnings.warn(
            f"{path}: cannot be read as evaluation state ({error}); this attack starts anew", stacklevel=2
        )
        return None


def _entry(tally: _Tally, clean: _Tally) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "accuracy": tally.accuracy(),
        "seconds": round(tally.seconds, 3),
        "n": len(tally.fell),
    }
    notes = tally.notes.copy()
    if len(tally.stages) > 1:
        entry["stages"] = tally.accuracies()
        if "square" in tally.stages:
            autoattack.flag_square({"clean": clean.accuracy(), **entry["stages"]}, notes)
    if notes:
        entry["warnings"] = [
            f"{note} [{count} times]" if count > 1 else note for note, count in notes.items()
        ]
    return entry


@torch.no_grad()
def _count_classes(model: nn.Module, images: Tensor, labels: Tensor, device: torch.device) -> int:
    image = pixels(images[:1], device).clone()
    before = image.clone()
    try:
        output = model(image)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"model: fails on an image {tuple(image.shape[1:])}: {reason}; accepted: a network of such images"
        ) from error
    check_logits(output, 1)
    if not torch.equal(image, before):
        raise ValueError("model: changes its input in place; accepted: a network that leaves x as it is")
    classes = output.shape[1]
    if labels.max() >= classes:
        raise ValueError(
            f"y: got label {labels.max().item()}; accepted: 0 to {classes - 1}, the outputs of the model"
        )
    return classes


def _check_fraction(name: str, value: float) -> None:
    check_number(above=0, most=1, what="a fraction of the pixel range, such as 8/255,", **{name: value})
