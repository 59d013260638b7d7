"""What a method is: terms over views.

One training step is inner maximisation x base loss x add-ons. A `Term` is a base loss or an add-on: it says which
views it needs and turns them into named, already weighted scalars. Its keyword-only constructor arguments ARE its
recipe options: name, type and default are read from the signature, so a new method is one class in one file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.values import non_negative, positive, shown, unit_interval  # noqa: F401  checks for the methods' options
from .views import Output, View

BASES: dict[str, type[Term]] = {}
"""The registered base losses by the name that recipes use."""
ADDONS: dict[str, type[Term]] = {}
"""The registered add-ons by the name that recipes use."""


def base(name: str) -> Callable[[type[Term]], type[Term]]:
    """Registers a class as the base loss that a recipe calls `name` under `[base]`."""
    return _register(BASES, name)


def addon(name: str) -> Callable[[type[Term]], type[Term]]:
    """Registers a class as the add-on that a recipe table `[name]` switches on."""
    return _register(ADDONS, name)


def _register(registry: dict[str, type[Term]], name: str) -> Callable[[type[Term]], type[Term]]:
    if not isinstance(name, str):
        raise TypeError(f"method: got {shown(name)}; accepted: a name")

    def decorate(cls: type[Term]) -> type[Term]:
        taken = registry.get(name, cls)
        if (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"method: got {name!r}; accepted: a name that is not taken")
        registry[name] = cls
        cls.name = name
        return cls

    return decorate


@dataclass(frozen=True)
class Setup:
    """What a term may need to know before training starts."""

    num_classes: int
    feature_dims: Mapping[str, int]  # network name -> width of its penultimate features
    labels: Tensor  # (M,) int64, on the device, by sample index; -1: none
    student: nn.Module
    device: torch.device
    seed: int
    teacher: nn.Module | None = None


@dataclass
class Step:
    """One batch after its inner maximisation, and the outputs its terms asked for."""

    x: Tensor  # (N, C, H, W) in [0, 1]
    y: Tensor  # (N,) int64; of an image without a label the class that the teacher predicts
    index: Tensor  # (N,) int64, positions in the training set
    x_adv: Tensor  # (N, C, H, W), constant
    epoch: int  # counted from 1
    epochs: int
    batch: int  # number within the epoch, counted from 0
    outputs: Mapping[View, Output]
    metrics: dict[str, Tensor] = field(default_factory=dict)  # logged, not part of the loss
    # (N, ...) of this process -> that of the whole batch, differentiable; one process has all of it
    gather: Callable[[Tensor], Tensor] = lambda rows: rows
    label_smoothing: float = 0.0

    def student(self, image: str) -> Output:
        return self.outputs[View("student", image)]

    def teacher(self, image: str) -> Output:
        return self.outputs[View("teacher", image)]

    def clean_teacher(self, image: str) -> Output:
        return self.outputs[View("clean_teacher", image)]

    def cross_entropy(self, logits: Tensor) -> Tensor:
        """Returns the mean cross-entropy of (N, classes) logits with the labels, smoothed where the recipe says so."""
        return F.cross_entropy(logits, self.y, label_smoothing=self.label_smoothing)


class Term(nn.Module):
    """A base loss or an add-on. Subclasses are nn.Modules: heads and banks they own are trained and checkpointed."""

    name = ""
    inner = "ce"  # base losses: the inner maximisation used unless the recipe says otherwise
    smoothed = False  # whether the loss has a `Step.cross_entropy`
    authors_passes: tuple[str, ...] = ()  # see `student_passes`

    @property
    def active(self) -> bool:
        """Whether the term's weight is not zero; else none of its views is computed, and the rest is bit for bit."""
        return True

    def prepare(self, setup: Setup) -> None:
        """Creates what depends on networks and data (heads, banks). Called once, before the optimiser exists."""

    def views(self, epoch: int) -> frozenset[View]:
        raise NotImplementedError(f"{type(self).__name__} declares no views")

    def idle(self) -> dict[str, str]:
        """Returns the options that decide nothing beside the others, and beside which: "with estimator = 'infonce'"."""
        return {}

    def student_passes(self, epoch: int, base: Term) -> tuple[str, ...]:
        """Returns the images in the order in which the authors' code runs the student on them in one step, by the names
        of `views.IMAGES`; () where it is not known. `base` is the method's base loss, which may be this term."""
        return self.authors_passes

    def images(self, x: Tensor, x_adv: Tensor) -> dict[str, Tensor]:
        """Returns further images the term's views look at, by the names of `views.IMAGES`."""
        return {}

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Returns named weighted scalars, whose sum enters the loss."""
        raise NotImplementedError(f"{type(self).__name__} computes no loss")


class Ramped(Term):
    """An add-on whose weight grows: alpha (epoch / ramp_epochs), the epoch counted from 1. Without alpha it is off."""

    ramp_epochs: int | None = None  # the length of the run

    def __init__(self, *, alpha: float) -> None:
        super().__init__()
        non_negative(alpha=alpha)
        self.alpha = alpha

    @property
    def active(self) -> bool:
        return self.alpha > 0

    def weight(self, step: Step) -> float:
        return self.alpha * (step.epoch / (self.ramp_epochs or step.epochs))


class Method(nn.Module):
    """A base loss with its inner maximisation and any number of add-ons."""

    def __init__(self, base: Term, addons: Mapping[str, Term] | None = None, inner: str | None = None) -> None:
        super().__init__()
        if addons is not None and not isinstance(addons, Mapping):
            raise TypeError(f"addons: got {shown(addons)}; accepted: a table of Terms by name")
        for name, term in {"base": base, **(addons or {})}.items():
            if not isinstance(term, Term):
                raise TypeError(f"{name}: got {shown(term)}; accepted: a Term")
        if inner is not None and not isinstance(inner, str):
            raise TypeError(f"inner: got {shown(inner)}; accepted: the name of an inner maximisation")
        self.inner = inner or base.inner
        self.terms = nn.ModuleDict({"base": base, **(addons or {})})

    @property
    def base(self) -> Term:
        return cast(Term, self.terms["base"])

    def addon(self, name: str) -> Term:
        return cast(Term, self.terms[name])

    @property
    def active_terms(self) -> list[Term]:
        return [term for term in self.terms.values() if isinstance(term, Term) and term.active]

    def prepare(self, setup: Setup) -> None:
        for term in self.active_terms:
            term.prepare(setup)

    def views(self, epoch: int) -> frozenset[View]:
        return frozenset().union(*(term.views(epoch) for term in self.active_terms))

    def student_passes(self, epoch: int) -> tuple[str, ...]:
        """Returns the authors' passes of the student, as the last term declares them; () where it declares none."""
        return self.active_terms[-1].student_passes(epoch, self.base)

    def images(self, x: Tensor, x_adv: Tensor) -> dict[str, Tensor]:
        images = {"clean": x, "adv": x_adv}
        for term in self.active_terms:
            _join(images, term.images(x, x_adv), f"{term.name}: the image")
        return images

    def forward(self, step: Step) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for term in self.active_terms:
            _join(losses, term(step), f"{term.name}: the loss")
        return losses


def _join(tensors: dict[str, Tensor], more: Mapping[str, Tensor], what: str) -> None:
    """Adds `more`. Raises ValueError: a name that another term has taken."""
    for name in more:
        if name in tensors:
            raise ValueError(f"{what} {name!r} is another term's too; accepted: a name of its own")
    tensors.update(more)
