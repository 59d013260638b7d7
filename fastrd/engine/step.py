"""One training step: attack -> views -> losses -> gradients."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .. import attacks, views
from ..methods import Method, Step
from ..recipe import Attack
from ..views import Output, View

TEACHER_ATTACKS = ("rslad", "adaad", "igdm")


class Distiller:
    """The student, its frozen networks and a method, as one step that fills the student's gradients.

    Args:
        method: a prepared `Method`.
        networks: "student" (trained), and as the method needs "teacher" and "clean_teacher" (frozen, eval), each
            under the contract `network(x, features=True) -> (logits, features)`.
        attack: epsilon, step size, steps and BN mode of the inner maximisation.
        precision: "fp32", or "bf16" for autocast forward passes.
        extra_clean_bn_pass: also run the student on x where no loss needs it, for its BN statistics.
    """

    def __init__(
        self,
        method: Method,
        networks: Mapping[str, nn.Module],
        attack: Attack,
        *,
        precision: str = "fp32",
        extra_clean_bn_pass: bool = False,
    ) -> None:
        self.method, self.networks, self.config = method, dict(networks), attack
        self.precision = precision
        self.extra_student_passes = ("clean",) if extra_clean_bn_pass else ()
        needed = {view.network for epoch in (1, 10**9) for view in method.views(epoch)}
        if method.inner in TEACHER_ATTACKS:
            needed.add("teacher")
        for name in sorted(needed - self.networks.keys()):
            raise ValueError(
                f"{name}: this method needs one and none was given (--{name.replace('_', '-')} CHECKPOINT)"
            )

    @property
    def student(self) -> nn.Module:
        return self.networks["student"]

    def attack(
        self,
        x: Tensor,
        y: Tensor,
        *,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
        known: dict[View, Output] | None = None,
    ) -> Tensor:
        """x' by the method's inner maximisation; (N, C, H, W) in [0, 1], constant.

        `start` replaces the random start. Teacher views the attack computes anyway are left in `known`.
        """
        inner, config, student, teacher = (
            self.method.inner,
            self.config,
            self.student,
            self.networks.get("teacher"),
        )
        if inner == "none":
            return x
        with attacks.frozen(student), _mode(student, config.attack_bn), self._autocast(x):
            if inner == "ce":
                objective = attacks.cross_entropy(y)
            elif inner == "trades":
                with torch.no_grad():
                    objective = attacks.kl_from(student(x))
            elif inner == "rslad":
                clean = views.compute(views.teacher("clean"), self.networks, {"clean": x})
                if known is not None:
                    known.update(clean)
                objective = attacks.kl_from(clean[View("teacher", "clean")].logits)
            elif inner == "adaad":
                objective = attacks.adaad(teacher)
            elif inner == "igdm":
                objective = attacks.gradient_mismatch(student, teacher, x)
            else:
                raise ValueError(f"inner: got {inner!r}; accepted: none, ce, trades, rslad, adaad, igdm")
            if start is None:
                if inner == "ce":
                    start = attacks.uniform_start(x, config.epsilon, generator)
                else:
                    start = attacks.gaussian_start(x, generator)
            return attacks.pgd(
                student,
                x,
                objective,
                epsilon=config.epsilon,
                step_size=config.step_size,
                steps=config.steps,
                start=start,
            )

    def losses(
        self,
        x: Tensor,
        y: Tensor,
        index: Tensor,
        x_adv: Tensor,
        *,
        epoch: int,
        epochs: int,
        batch: int = 0,
        known: Mapping[View, Output] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Named weighted losses, whose sum is the training loss, and logged metrics. The student trains (BN included)."""
        self.student.train()
        with self._autocast(x):
            outputs = views.compute(
                self.method.views(epoch),
                self.networks,
                self.method.images(x, x_adv),
                known=known,
                extra_student_passes=self.extra_student_passes,
            )
            step = Step(x, y, index, x_adv, epoch, epochs, batch, outputs)
            return self.method(step), step.metrics

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        index: Tensor,
        *,
        epoch: int,
        epochs: int,
        batch: int = 0,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Attack, then losses, then backward: gradients are added to the student's and the method's parameters.

        Returns detached losses and metrics by name, still on the device.
        """
        known: dict[View, Output] = {}
        x_adv = self.attack(x, y, start=start, generator=generator, known=known)
        losses, metrics = self.losses(
            x, y, index, x_adv, epoch=epoch, epochs=epochs, batch=batch, known=known
        )
        torch.stack(list(losses.values())).sum().backward()
        return {name: loss.detach() for name, loss in losses.items()}, metrics

    def _autocast(self, x: Tensor):
        return torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")


@contextmanager
def _mode(module: nn.Module, mode: str):
    """The module in "train" or "eval" mode inside the block, as it was afterwards."""
    training = module.training
    module.train(mode == "train")
    try:
        yield
    finally:
        module.train(training)
