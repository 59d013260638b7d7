"""IGDM: input gradient distillation matching (Lee, Cho, Kim; ICLR 2025; arXiv 2312.03286)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..losses.functional import gradient_matching
from .base import Ramped, Step, Term, addon, non_negative, positive
from .views import View, student, teacher

# Where they also run S(x) on another base, `extra_clean_bn_pass` says so.
AUTHORS_PASSES = {"adaad": ("adv", "clean", "mirror", "adv"), "rslad": ("adv", "adv", "clean", "mirror")}


@addon("igdm")
class IGDM(Ramped):
    """alpha (epoch / ramp_epochs) D(S(x + beta d) - S(x - gamma d), T(x + beta d) - T(x - gamma d)): Eq. 8, 9.

    D on logits: "kl" = KL(softmax dT || softmax dS) at temperature 1, batchmean (all published runs), "l1", "l2".
    The epoch counts from 1; `ramp_epochs` defaults to the length of the run. `alpha` means something only together
    with the base loss's reduction. The mirror image x - gamma d is left outside [0, 1] as in the published code;
    `clamp_mirror` clamps it.
    """

    def __init__(
        self,
        *,
        alpha: float,
        divergence: Literal["kl", "l1", "l2"] = "kl",
        ramp_epochs: int | None = None,
        beta: float = 1.0,
        gamma: float = 1.0,
        clamp_mirror: bool = False,
    ) -> None:
        super().__init__(alpha=alpha)
        if ramp_epochs is not None:
            positive(ramp_epochs=ramp_epochs)
        non_negative(beta=beta, gamma=gamma)
        self.ramp_epochs, self.divergence = ramp_epochs, divergence
        self.beta, self.gamma, self.clamp_mirror = beta, gamma, clamp_mirror

    @property
    def plus(self) -> str:
        return "adv" if self.beta == 1 else "plus"  # S(x + d) and S(x') are one view

    def idle(self) -> dict[str, str]:
        return {} if self.beta or self.gamma else {"alpha": "with beta = gamma = 0"}

    def views(self, epoch: int) -> frozenset[View]:
        return student(self.plus, "mirror") | teacher(self.plus, "mirror")

    def student_passes(self, epoch: int, base: Term) -> tuple[str, ...]:
        return AUTHORS_PASSES.get(base.name, ())

    def images(self, x: Tensor, x_adv: Tensor) -> dict[str, Tensor]:
        delta = x_adv - x
        mirror = x - self.gamma * delta
        images = {"mirror": mirror.clamp(0, 1) if self.clamp_mirror else mirror}
        if self.plus == "plus":
            images["plus"] = x + self.beta * delta
        return images

    def forward(self, step: Step) -> dict[str, Tensor]:
        distance = gradient_matching(
            step.student(self.plus).logits,
            step.student("mirror").logits,
            step.teacher(self.plus).logits,
            step.teacher("mirror").logits,
            divergence=self.divergence,
        )
        return {"igdm": self.weight(step) * distance}
