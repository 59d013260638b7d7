"""Runs the stages of an attack over images in batches, from wherever an earlier evaluation stopped.

Which images make a batch, and the random numbers it draws, follow from the earlier verdicts alone. So an evaluation
that was stopped goes on to the verdicts it would have reached, and several processes that take the batches in turns
reach those of one process.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, TypeVar

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn
from tqdm import tqdm

from ..attacks import Objective, input_gradient
from ..core.arguments import check_flags
from ..core.files import atomic_write, atomic_writer, check_regular, read_json
from ..core.fingerprint import data_digest, fingerprint
from ..core.images import pixels
from ..core.process_environment import contention
from ..core.schema import convert
from ..core.seeding import derive_seed
from ..core.values import check_integer, non_negative, shown
from .inputs import Logits, batches

T = TypeVar("T")
Listener = Callable[["Progress"], None]

SURVIVED, MISCLASSIFIED = -1, -2  # values of `Tally.broken_by` that are no stage
GRADIENT_COST = 3  # of a forward pass with its gradient, in forward passes
SECONDS_BETWEEN_REPORTS = 0.2
NO_GRADIENT = (
    "the gradient at the image is exactly zero or not finite, so the attack cannot move it: the model masks its "
    "gradients, and this accuracy says nothing about robustness; 'square' needs no gradient"
)


class Progress(NamedTuple):
    """Where an evaluation is, reported after each batch and a few times a second within one."""

    attack: str
    stage: str
    done: int  # images this stage has dealt with
    of: int  # images this stage was given
    robust: int  # images that no stage of this attack has broken yet
    n: int  # all images
    fraction: float  # of the attack's work
    seconds_left: float


class Share(NamedTuple):
    """Which of the processes that share the batches of an evaluation this one is (`torch.distributed` ranks)."""

    rank: int = 0
    size: int = 1

    def exchange(self, mine: T) -> list[T]:
        """Returns what every process gave, by rank."""
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, mine)
        return found


ALONE = Share()


def check_run(batch_size: Any, seed: Any, progress: Any, share: Any = ALONE) -> None:
    """Raises unless a `Runner` can have these options."""
    check_integer(least=1, batch_size=batch_size)
    derive_seed(seed)
    if not callable(progress):
        check_flags(progress=progress)
    if not isinstance(share, Share):
        raise TypeError(f"share: got {shown(share)}; accepted: a Share")
    size: dict[str, Any] = {"share.size": share.size}
    check_integer(least=1, **size)
    rank: dict[str, Any] = {"share.rank": share.rank}
    check_integer(least=0, most=share.size - 1, **rank)
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    # A class of the caller's own may exchange by other means.
    if type(share) is Share and share.size > 1 and (not joined or share.size != torch.distributed.get_world_size()):
        accepted = f"1, or {torch.distributed.get_world_size()}" if joined else "1, or call init_process_group first"
        raise ValueError(f"share.size: got {share.size}; accepted: {accepted}")


class Outcome(NamedTuple):
    """What a stage did to one batch."""

    survives: Tensor  # bool (N,): still classified right
    x_adv: Tensor  # (N, C, H, W) in [0, 1], the last image tried


class Stage(NamedTuple):
    name: str
    cost: float  # forward passes per image that survives, a gradient counting for two more
    attack: Callable[[Tensor, Tensor, torch.Generator], Outcome]  # (x, y, generator)


Builder = Callable[[Logits, "Counter[str]"], list[Stage]]
"""(network, where to count warnings) -> the stages of an attack"""


@torch.no_grad()
def is_correct(logits: Logits, x: Tensor, y: Tensor, notes: Counter[str]) -> Tensor:
    """Returns bool (N,): classified as y, with finite logits."""
    output = logits(x)
    finite = output.isfinite().all(dim=1)
    if not finite.all():
        notes["non-finite logits; the image counts as wrong"] += int((~finite).sum())
    return (output.argmax(dim=1) == y) & finite


def note_masked(logits: Logits, x: Tensor, objective: Objective, still: Tensor, notes: Counter[str]) -> None:
    """Counts the images without any gradient among those that an attack left `still`, bool (N,)."""
    if still.any():
        constants = (constant[still] for constant in objective.constants)
        gradient = input_gradient(logits, x[still], Objective(objective.per_sample, *constants))
        useful = (gradient != 0) & gradient.isfinite()
        if masked := int((~useful).flatten(1).all(dim=1).sum()):
            notes[NO_GRADIENT] += masked


class _Stored(TypedDict):
    """What the file of a `Tally` holds."""

    fell: list[int]  # `Tally.broken_by`
    stage: int
    position: int
    work: float
    seconds: float
    notes: dict[str, int]


@dataclass
class Tally:
    """What is known of one attack so far; `stage` and `position` say where it goes on."""

    broken_by: np.ndarray  # (n,) int: the stage that broke each image, SURVIVED, or MISCLASSIFIED without attack
    stages: tuple[str, ...]
    stage: int = 0
    position: int = 0
    work: float = 0.0
    seconds: float = 0.0
    notes: Counter[str] = field(default_factory=Counter)
    images: np.ndarray | None = None  # (n, C, H, W) float32: the last image tried of each, where they are kept
    path: Path | None = None  # of its file

    @property
    def robust(self) -> np.ndarray:
        return self.broken_by == SURVIVED

    def accuracy(self) -> float:
        return float(self.robust.mean())

    def accuracies(self) -> dict[str, float]:
        """Returns the accuracy after each stage."""
        return {name: float((self.robust | (self.broken_by > s)).mean()) for s, name in enumerate(self.stages)}

    def save(self) -> None:
        """Writes the file, where there is one."""
        if self.path is None:
            return
        if isinstance(self.images, np.memmap):
            self.images.flush()  # before the state that says they are there
        kept = {name: getattr(self, name) for name in ("stages", "stage", "position", "work", "seconds", "notes")}
        atomic_write(self.path, json.dumps({"fell": self.broken_by.tolist(), **kept}))

    @classmethod
    def stored(cls, path: Path | None, stages: tuple[str, ...], standing: np.ndarray) -> Tally | None:
        """Returns what `save` wrote, None where there is nothing about the `standing` images that can be used."""
        try:
            document = None if path is None else read_json(path)
            if document is None:
                return None
            kept = convert({key: document.get(key) for key in _Stored.__annotations__}, _Stored, f"{path}: ")
            fell, n = np.array(kept.pop("fell"), int), len(standing)
            check_integer(least=0, most=len(stages), **{f"{path}: stage": kept["stage"]})
            check_integer(least=0, most=n, **{f"{path}: position": kept["position"]})
            numbers = {"work": kept["work"], "seconds": kept["seconds"], **kept["notes"]}
            non_negative(**{f"{path}: {key}": value for key, value in numbers.items()})
            if fell.shape != (n,) or not np.isin(fell, range(MISCLASSIFIED, len(stages))).all():
                got = f"{len(fell)} numbers, {shown(np.unique(fell).tolist())}"
                raise ValueError(f"{path}: fell: got {got}; accepted: {n} of {MISCLASSIFIED}..{len(stages) - 1}")
            if not np.array_equal(fell == MISCLASSIFIED, ~standing):
                accepted = f"{MISCLASSIFIED} for exactly the {(~standing).sum()} images that are wrong without attack"
                raise ValueError(f"{path}: fell: got {(fell == MISCLASSIFIED).sum()} such images; accepted: {accepted}")
            return cls(fell, **{**kept, "stages": stages, "notes": Counter(kept["notes"]), "path": path})
        except ValueError as error:
            warnings.warn(f"{error}; this attack starts anew", stacklevel=2)
            return None


class _Result(NamedTuple):
    """One process's batch, for the others."""

    survives: np.ndarray
    x_adv: np.ndarray | None
    notes: Counter[str]
    seconds: float


@dataclass
class Runner:
    """Runs attacks on one network and one set of images."""

    model: nn.Module  # whose identity the state on disk is filed under
    network: Logits  # the form of it that is attacked
    images: Tensor
    labels: Tensor
    device: torch.device
    batch_size: int
    seed: int
    progress: bool | Listener
    state_dir: Path | None = None
    keep: bool = False  # the adversarial images
    share: Share = ALONE

    def clean(self) -> Tally:
        def build(logits: Logits, notes: Counter[str]) -> list[Stage]:
            return [Stage("clean", 1, lambda x, y, generator: Outcome(is_correct(logits, x, y, notes), x))]

        progress = self.progress if self.share.rank == 0 else False  # alone, every process is the first
        alone = replace(self, state_dir=None, share=ALONE, progress=progress)
        return alone.run("clean", build, standing=np.ones(len(self.images), bool))

    def run(
        self, attack: str, build: Builder, *, standing: np.ndarray, options: Any = None, version: str | None = None
    ) -> Tally:
        """Runs all stages on the images that are `standing`, bool (n,). `options` and `version` decide the verdicts."""
        with _listener(self.progress if self.share.rank == 0 else False) as listen:
            meter = _Meter(self.network, attack, listen, self.share.size)
            notes: Counter[str] = Counter()
            stages = build(meter.logits, notes)
            names = tuple(stage.name for stage in stages)
            path = self._state_path(attack, names, standing, options, version)
            # The first process alone keeps files; the others go on from where it says.
            stored = Tally.stored(path, names, standing)
            images = self._stored_images(path) if path and stored and self.keep else None
            found = self.share.exchange(stored if images is not None or not self.keep else None)[0]
            tally = found or Tally(np.where(standing, SURVIVED, MISCLASSIFIED), names, path=path)
            if self.keep and self.share.rank == 0:
                tally.images = self._new_images(path) if images is None else images
            for s in range(tally.stage, len(stages)):
                self._run_stage(attack, stages, s, tally, meter, notes)
        return tally

    def survives_rounding(self, tally: Tally, clean: Tally) -> np.ndarray:
        """Returns bool (n,): right without attack, and on the kept images rounded to 8 bits."""
        right = []
        for part in batches(len(self.images), self.batch_size) if tally.images is not None else ():
            x = torch.from_numpy(np.asarray(tally.images)[part]).to(self.device)
            y = self.labels[part].to(self.device)
            right.append(is_correct(self.network, (x * 255).round() / 255, y, Counter()).cpu().numpy())
        (first, *_) = self.share.exchange(np.concatenate(right) & clean.robust if right else None)
        return np.asarray(first)

    def _run_stage(
        self, attack: str, stages: list[Stage], s: int, tally: Tally, meter: _Meter, notes: Counter[str]
    ) -> None:
        stage = stages[s]
        if tally.stage != s:
            tally.stage, tally.position = s, 0
        given = np.flatnonzero((tally.broken_by == SURVIVED) | (tally.broken_by == s))
        later = sum(stage.cost for stage in stages[s + 1 :])
        parts = [part for part in batches(len(given), self.batch_size) if part.start >= tally.position]
        rank, size = self.share
        for first in range(0, len(parts), size):
            together = parts[first : first + size]
            count = sum(len(given[part]) for part in together)
            meter.start(stage, tally, count, len(given), later)
            mine = None
            if rank < len(together):
                seed = derive_seed(self.seed, attack, s, together[rank].start)
                mine = self._run_batch(stage, given[together[rank]], seed, notes)
            results = [result for result in self.share.exchange(mine) if result is not None]
            for part, result in zip(together, results, strict=True):
                index = given[part]
                tally.broken_by[index[~result.survives]] = s
                tally.position += len(index)
                tally.work += stage.cost * len(index)
                tally.notes.update(result.notes)
                if tally.images is not None:
                    tally.images[index] = result.x_adv
            tally.seconds += max(result.seconds for result in results)
            if rank == 0:
                tally.save()
            meter.finish()

    def _run_batch(self, stage: Stage, given: np.ndarray, seed: int, notes: Counter[str]) -> _Result:
        began = time.perf_counter()
        index = torch.from_numpy(given)
        x, y = pixels(self.images[index], self.device), self.labels[index].to(self.device)
        outcome = stage.attack(x, y, torch.Generator(self.device).manual_seed(seed))
        survives = outcome.survives.cpu().numpy()
        x_adv = outcome.x_adv.detach().cpu().numpy() if self.keep else None
        said = notes.copy()
        notes.clear()
        return _Result(survives, x_adv, said, time.perf_counter() - began)

    @cached_property
    def digest(self) -> str:
        """Of the images and labels."""
        return data_digest(self.images, self.labels)

    @cached_property
    def _model(self) -> str:
        return fingerprint(self.model)

    def _state_path(
        self, attack: str, stages: tuple[str, ...], standing: np.ndarray, options: Any, version: str | None
    ) -> Path | None:
        """Returns a file named after everything the verdicts depend on, so that stale state is never even opened."""
        if self.state_dir is None:
            return None
        facts = {
            "subject": (self._model, self.digest),
            # Weights do not say what a forward pass does with them; its verdicts do.
            "clean": hashlib.sha256(standing.tobytes()).hexdigest(),
            "attack": (attack, stages, options),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "device": self.device.type,
            "torch": str(torch.__version__),
            "pyautoattack": version,
            **({"keep": True} if self.keep else {}),
        }
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return self.state_dir / f"{attack}-{key[:16]}.json"

    @property
    def _shape(self) -> tuple[int, ...]:
        return (len(self.images), *pixels(self.images[:1], "cpu").shape[1:])

    def _stored_images(self, path: Path) -> np.ndarray | None:
        """Returns the adversarial images beside the state `path`; None where they are not there, or not all of them."""
        file = path.with_suffix(".npy")
        with suppress(OSError, ValueError):
            check_regular(file)
            images: np.ndarray = np.lib.format.open_memmap(file, mode="r")  # "r+" would lengthen a cut file
            if images.shape == self._shape and images.dtype == np.float32:
                return np.lib.format.open_memmap(file, mode="r+")
        return None

    def _new_images(self, path: Path | None) -> np.ndarray:
        """Returns the images to change; beside the state, where there is one, so that they outlive a stop."""
        parts = (pixels(self.images[part], "cpu").numpy() for part in batches(len(self.images), self.batch_size))
        if path is None:
            return np.concatenate(list(parts))
        # Written before it is mapped: a mapped page that finds no room on the disk kills the process.
        with atomic_writer(path.with_suffix(".npy")) as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": self._shape}
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                file.write(part.tobytes())
        images: np.ndarray = np.lib.format.open_memmap(path.with_suffix(".npy"), mode="r+")
        return images


class _Meter:
    """Counts forward passes of the attacked model, to say within a long batch how far it is."""

    def __init__(self, network: Logits, attack: str, listen: Listener, processes: int) -> None:
        self._network, self._attack, self._listen, self._processes = network, attack, listen, processes
        self._session_work, self._session_began = 0.0, time.perf_counter()
        self._reported = self._spent = 0.0

    def logits(self, x: Tensor) -> Tensor:
        images = self._processes * len(x)  # the others are about as far
        self._spent = min(self._spent + images * (GRADIENT_COST if x.requires_grad else 1), self._batch_work)
        if time.perf_counter() - self._reported > SECONDS_BETWEEN_REPORTS:
            contention.look(torch.get_num_threads())
            self._report(self._spent)
        return self._network(x)

    def start(self, stage: Stage, tally: Tally, count: int, given: int, later: float) -> None:
        self._stage, self._tally, self._given, self._later = stage, tally, given, later
        self._batch_work, self._spent = stage.cost * count, 0.0

    def finish(self) -> None:
        self._session_work += self._batch_work
        self._report(0.0)

    def _report(self, spent: float) -> None:
        self._reported = time.perf_counter()
        tally, stage, robust = self._tally, self._stage, int(self._tally.robust.sum())
        left = stage.cost * (self._given - tally.position) + self._later * robust - spent
        done = tally.work + spent
        images = (tally.position, self._given, robust, len(tally.broken_by))
        seconds_left = (self._reported - self._session_began) / (self._session_work + spent) * left
        self._listen(Progress(self._attack, stage.name, *images, done / (done + left), seconds_left))


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
