"""AKD: adversarial knowledge distillation with hard labels (Maroto et al. 2022, arXiv 2203.07159)."""

from __future__ import annotations

from torch import Tensor

from ..losses.functional import distillation_kl
from .base import Step, Term, base, unit_interval
from .views import View, student, teacher


@base("akd")
class AKD(Term):
    """(1 - weight) CE(S(x'), y) + weight KL(P_T(x') || P_S(x')), batchmean. The weight 0.5 is our choice."""

    def __init__(self, *, weight: float = 0.5) -> None:
        super().__init__()
        unit_interval(weight=weight)
        self.weight, self.smoothed = weight, weight < 1

    def views(self, epoch: int) -> frozenset[View]:
        return student("adv") | teacher("adv")

    def forward(self, step: Step) -> dict[str, Tensor]:
        logits = step.student("adv").logits
        return {
            "ce": (1 - self.weight) * step.cross_entropy(logits),
            "kl_adv": self.weight * distillation_kl(logits, step.teacher("adv").logits),
        }
