"""AutoAttack standard (Croce and Hein 2020, arXiv 2003.01690), in l-infinity and l2: the published code, by stages.

The attack itself is the PyPI package `pyautoattack`. Here it is only asked for one stage and one batch per
call, so that an evaluation can stop between any two of them, and kept from leaving traces: random state,
trace function, loggers and counters are as before after each call.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from ..attacks import cross_entropy, input_gradient
from .runner import Outcome, Stage, note_masked

STAGES = ("apgd-ce", "apgd-t", "fab-t", "square")
"""The standard version, in its order: each stage sees only the images that those before could not break."""

_FEWEST_CLASSES = 4  # the targeted DLR loss of apgd-t divides by a difference of the four largest logits
_SMALLEST_SIDE = 5  # Square starts in l2 from tiles of a fifth of the height
_TARGETS = 9
_CHECKS = 9  # forward passes per call that look for randomised and dynamic defences and for the first verdict


def package() -> ModuleType:
    """Returns `pyautoattack`, or raises an ImportError that says how to get it."""
    try:
        return import_module("pyautoattack")
    except ImportError as error:
        raise ImportError(f"AutoAttack: pyautoattack cannot be imported ({error}): pip install pyautoattack") from error


def check(names: tuple[str, ...], classes: int, norm: str, height: int, width: int) -> None:
    """Raises ValueError where the package cannot attack: too few classes, or images that Square's tiles do not fit."""
    square, side = norm == "l2" and "square" in names, min(height, width)
    if classes < _FEWEST_CLASSES and "apgd-t" in names:
        problem = f"AutoAttack's targeted loss needs at least {_FEWEST_CLASSES} classes and the model has {classes}"
    elif square and side < _SMALLEST_SIDE:
        problem = f"Square in l2 needs images of at least {_SMALLEST_SIDE} pixels a side, got {side}"
    elif square and not _tiles_fit(height, width):
        problem = f"the tiles that Square starts from in l2 do not fit into images of {height} x {width} pixels"
    else:
        return
    raise ValueError(f"attacks: {problem}; use 'apgd-ce', 'pgd100' or 'cw' instead")


def _tiles_fit(height: int, width: int) -> bool:
    """Tells whether every tile lies in the image, as the package lays them; tiles of one pixel may lie outside."""
    tile = height // 5
    first = (height - 5 * tile) // 2
    return tile == 1 or all(first + side // tile * tile <= side for side in (height, width))


def cost(stage: str, classes: int) -> int:
    """Returns the forward passes that `stage` spends on an image it cannot break, a gradient counting for two more."""
    targets = min(_TARGETS, classes - 1)
    passes = {"apgd-ce": 101 * 3, "apgd-t": targets * 101 * 3, "fab-t": targets * 100 * 4, "square": 5001}
    return _CHECKS + passes[stage]


def stages(
    names: tuple[str, ...],
    logits: Callable[[Tensor], Tensor],
    *,
    classes: int,
    norm: str,
    epsilon: float,
    seed: int,
    device: torch.device,
    notes: Counter[str],
) -> list[Stage]:
    """Returns the named stages, with the verdicts of the package.

    With fewer than ten classes, apgd-t and fab-t try every other class instead of nine. What the package
    warns of is counted in `notes`.
    """
    adversary = package().AutoAttack(
        logits, eps=epsilon, norm=norm.capitalize(), version="standard", seed=seed, device=device
    )
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = min(_TARGETS, classes - 1)
    for part in (adversary, adversary.apgd, adversary.apgd_targeted):
        part.logger = _Listener(notes)

    def attack(name: str, x: Tensor, y: Tensor, _: torch.Generator) -> Outcome:
        adversary.attacks_to_run = [name]
        if name == names[0] != "square":
            input_gradient(logits, x[:1], cross_entropy(y[:1]))  # raises where none reaches the image
        with preserve_global_state():
            x_adv, predicted = adversary.run_standard_evaluation(x, y, batch_size=len(x))
        survives = predicted == y
        if name == names[0] != "square":
            note_masked(logits, x, cross_entropy(y), survives, notes)
        return Outcome(survives, x_adv)

    return [Stage(name, cost(name, classes), partial(attack, name)) for name in names]


def flag_square(accuracies: Mapping[str, float], notes: Counter[str]) -> None:
    """Runs the package's own check, over all images at once: Square beating the white-box stages is suspicious."""
    package().checks.check_square_sr(dict(accuracies), logger=_Listener(notes))


class _Listener:
    """Takes the place of the package's logger: warnings are counted, the running commentary is dropped."""

    def __init__(self, notes: Counter[str]) -> None:
        self._notes = notes

    def warning(self, message: object) -> None:
        self._notes[re.sub(r"^there are \d+ points", "there are points", str(message))] += 1

    def debug(self, message: object) -> None:
        pass

    info = debug


@contextmanager
def preserve_global_state() -> Iterator[None]:
    counters = package().checks.funcs
    # They count over the whole process, so a dynamic defence would be reported for every later model.
    counters.update(dict.fromkeys(counters, 0))
    trace = sys.gettrace()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        sys.settrace(trace)
