"""MTARD: a robust and an accurate teacher at once (Zhao, Yu, Sun, Zhang, Wei; ECCV 2022)."""

from __future__ import annotations

from torch import Tensor

from ..core.arguments import check_temperature
from ..losses.functional import distillation_kl
from .base import Step, Term, addon, non_negative
from .views import View, clean_teacher, student, teacher


@addon("mtard")
class MTARD(Term):
    """adv t^2 KL(P_T^t(x') || P_S^t(x')) + clean t^2 KL(P_C^t(x) || P_S^t(x)), batchmean.

    T is the robust teacher, C the accurate one (`clean_teacher`). The weights are constants; the paper adapts them
    during training, which is not done here. The inner maximisation is that of the base loss.
    """

    def __init__(self, *, adv: float = 0.5, clean: float = 0.5, temperature: float = 1.0) -> None:
        super().__init__()
        non_negative(adv=adv, clean=clean)
        check_temperature(temperature)
        self.adv, self.clean, self.temperature = adv, clean, temperature

    @property
    def active(self) -> bool:
        return self.adv > 0 or self.clean > 0

    def views(self, epoch: int) -> frozenset[View]:
        views: frozenset[View] = frozenset()
        if self.adv > 0:
            views |= student("adv") | teacher("adv")
        if self.clean > 0:
            views |= student("clean") | clean_teacher("clean")
        return views

    def forward(self, step: Step) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for name, weight, image, source in (
            ("mtard_adv", self.adv, "adv", step.teacher),
            ("mtard_clean", self.clean, "clean", step.clean_teacher),
        ):
            if weight > 0:
                student_logits, target = step.student(image).logits, source(image).logits
                losses[name] = weight * distillation_kl(student_logits, target, temperature=self.temperature)
        return losses
