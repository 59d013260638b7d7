"""ARD: adversarially robust distillation (Goldblum et al. 2020, arXiv 1905.09747)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..core.arguments import check_temperature
from ..losses.functional import distillation_kl
from .base import Step, Term, base, unit_interval
from .views import View, student, teacher


@base("ard")
class ARD(Term):
    """alpha t^2 KL(P_T^t(x) || P_S^t(x')) + (1 - alpha) CE(S(x), y).

    Defaults follow the IGDM and IAD re-implementations (t = 1, batchmean). The original: temperature = 30,
    reduction = "mean".
    """

    authors_passes = ("adv", "clean")

    def __init__(
        self, *, temperature: float = 1.0, alpha: float = 1.0, reduction: Literal["batchmean", "mean"] = "batchmean"
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        unit_interval(alpha=alpha)
        self.temperature, self.alpha, self.reduction = temperature, alpha, reduction
        self.smoothed = alpha < 1

    def idle(self) -> dict[str, str]:
        return {} if self.alpha else dict.fromkeys(("temperature", "reduction"), "with alpha = 0")

    def views(self, epoch: int) -> frozenset[View]:
        views = student("adv") | teacher("clean")
        return views | student("clean") if self.alpha < 1 else views

    def forward(self, step: Step) -> dict[str, Tensor]:
        adv, target = step.student("adv").logits, step.teacher("clean").logits
        kl = distillation_kl(adv, target, temperature=self.temperature, reduction=self.reduction)
        if self.alpha == 1:
            return {"kl_adv": kl}
        ce = step.cross_entropy(step.student("clean").logits)
        return {"kl_adv": self.alpha * kl, "ce": (1 - self.alpha) * ce}
