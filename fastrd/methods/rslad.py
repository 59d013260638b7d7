"""RSLAD: robust soft label adversarial distillation (Zi et al. 2021, arXiv 2108.07969)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..losses.functional import distillation_kl
from .base import Step, Term, base, positive, unit_interval
from .views import View, student, teacher


@base("rslad")
class RSLAD(Term):
    """scale (weight_adv KL(P_T(x) || P_S(x')) + (1 - weight_adv) KL(P_T(x) || P_S(x))).

    The published loss averages over classes too (reduction "mean") and is multiplied by 10 on CIFAR-100
    (scale = 10).
    """

    inner = "rslad"
    authors_passes = ("adv", "clean")

    def __init__(
        self, *, weight_adv: float = 5 / 6, scale: float = 1.0, reduction: Literal["batchmean", "mean"] = "mean"
    ) -> None:
        super().__init__()
        unit_interval(weight_adv=weight_adv)
        positive(scale=scale)
        self.weight_adv, self.scale, self.reduction = weight_adv, scale, reduction

    def views(self, epoch: int) -> frozenset[View]:
        return student("adv", "clean") | teacher("clean")

    def forward(self, step: Step) -> dict[str, Tensor]:
        target = step.teacher("clean").logits
        kl_adv = distillation_kl(step.student("adv").logits, target, reduction=self.reduction)
        kl_clean = distillation_kl(step.student("clean").logits, target, reduction=self.reduction)
        return {
            "kl_adv": self.scale * self.weight_adv * kl_adv,
            "kl_clean": self.scale * (1 - self.weight_adv) * kl_clean,
        }
