"""What can be measured on a network beside its accuracy, by name: sections of evaluation.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from ..core.arguments import check_callable, check_flags
from ..core.values import shown
from ..data import Dataset
from .alignment import cka, pointwise_distance, remainder_proportion
from .robustness import Listener, evaluate
from .transfer import linear_probe


@dataclass(frozen=True)
class Subject:
    """What a measure may look at."""

    model: nn.Module  # eval mode, on its device; images (N, C, H, W) in [0, 1] -> logits
    teacher: Any  # nn.Module, or None for measures that need none
    data: Dataset  # its test images are those of the evaluation
    load: Callable[[str], Dataset]  # another data set by name
    inner: str  # inner maximisation that the model was trained with, else "ce"
    epsilon: float
    norm: str
    batch_size: int
    progress: bool | Listener

    @property
    def ball(self) -> dict[str, Any]:
        """The images within epsilon: options that every measure under a change of the image takes."""
        return {"norm": self.norm, "epsilon": self.epsilon, "batch_size": self.batch_size}


@dataclass(frozen=True)
class Measure:
    compute: Callable[..., Any]
    argument: str
    needs_teacher: bool


MEASURES: dict[str, Measure] = {}


def needs_teacher(name: str) -> bool:
    """Returns whether a measure, as `fastrd eval --measure` takes it, compares with a teacher."""
    found = MEASURES.get(name.partition(":")[0])
    return found is not None and found.needs_teacher


# Of evaluation.json itself, and of `write_evaluation`.
_TAKEN = (
    *("schema", "checkpoint", "fingerprint", "dataset", "data", "images", "of", "n", "norm", "epsilon", "device"),
    *("results", "alignment", "teachers", "versions", "model", "teacher", "path"),
)


def measure(name: str, *, argument: str = "", needs_teacher: bool = False) -> Callable[[Callable], Callable]:
    """Registers a function: `fastrd eval --measure NAME` writes what the function returns, a JSON value.

    It is called with a `Subject`. With `argument`, what it is called in messages, the name is given as NAME:ARGUMENT,
    the function is called with it too, and returns a dictionary that joins those of other arguments.

    Raises ValueError: the name is taken, or holds a colon.
    """
    for key, text in (("measure", name), ("argument", argument)):
        if not isinstance(text, str):
            raise TypeError(f"{key}: got {shown(text)}; accepted: a string")
    check_flags(needs_teacher=needs_teacher)
    if not name or ":" in name or name in (*MEASURES, *_TAKEN):
        raise ValueError(f"measure: got {name!r}; accepted: a name that is not taken, without a colon")

    def register(compute: Callable) -> Callable:
        check_callable(compute=compute)
        MEASURES[name] = Measure(compute, argument, needs_teacher)
        return compute

    return register


def check_measures(names: Sequence[str], *, teacher: bool = True) -> None:
    """Raises ValueError unless every name is one that can be measured, with a teacher or without."""
    for given in names:
        name, _, argument = given.partition(":")
        found = MEASURES.get(name)
        if found is None or bool(argument) != bool(found.argument):
            accepted = ", ".join(f"{n}:{m.argument}" if m.argument else n for n, m in MEASURES.items())
            raise ValueError(f"measures: got {given!r}; accepted: {accepted}")
        if found.needs_teacher and not teacher:
            raise ValueError(f"measures: {name} compares with a teacher and none was given (--teacher CKPT)")


def measured(names: Sequence[str], subject: Subject) -> dict[str, Any]:
    """Returns the sections of all `names`, which `check_measures` accepts."""
    sections: dict[str, Any] = {}
    for given in names:
        name, _, argument = given.partition(":")
        if argument:
            sections[name] = {**sections.get(name, {}), **MEASURES[name].compute(subject, argument)}
        else:
            sections[name] = MEASURES[name].compute(subject)
    return sections


@measure("remainder")
def _remainder(subject: Subject) -> float:
    return remainder_proportion(subject.model, subject.data.x_test, **subject.ball)


@measure("cka", needs_teacher=True)
def _cka(subject: Subject) -> float:
    return cka(subject.model, subject.teacher, subject.data.x_test, batch_size=subject.batch_size)


@measure("probe", argument="DATA")
def _probe(subject: Subject, name: str) -> dict[str, Any]:
    """Accuracy, clean and under PGD-20, of a linear probe on another data set."""
    other = subject.load(name)
    probe = linear_probe(
        subject.model,
        np.asarray(other.x_train),
        other.y_train,
        num_classes=other.num_classes,
        image_size=subject.data.image_shape[1:],
        batch_size=subject.batch_size,
    )
    attack: dict[str, Any] = {"attacks": ("clean", "pgd20"), "step_size": subject.epsilon / 4, **subject.ball}
    results = evaluate(probe, other.x_test, other.y_test, **attack, progress=subject.progress)
    return {other.name: {"n": results.n, **{name: entry["accuracy"] for name, entry in results.items()}}}


@measure("pointwise", needs_teacher=True)
def _pointwise(subject: Subject) -> dict[str, Any]:
    attack: dict[str, Any] = {"inner": subject.inner, "step_size": subject.epsilon / 4, **subject.ball}
    return pointwise_distance(subject.model, subject.teacher, subject.data.x_test, subject.data.y_test, **attack)
