"""IAD: introspective adversarial distillation (Zhu et al. 2022, arXiv 2106.04928), and the term AdaIAD shares."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.arguments import check_temperature
from ..losses.functional import distillation_kl, kl, log_softmax
from .base import Step, Term, base, non_negative
from .views import View, student, teacher


class Introspection(Term):
    """t^2 KL(P_T^t(x~) || P_S^t(x')) + [epoch >= start_epoch] mean_i (1 - a_i) KL(P_S(x_i) || P_S(x'_i)).

    x~ is the image `target`, and a_i = P_T(x'_i)[y_i]^beta: where the teacher is unsure of an adversarial image the
    student trusts itself. Epochs count from 1. The authors' count from 0 and start at 60, which is the 61st. As in the
    published code the self target P_S(x) keeps its gradient; `detach_self_target` cuts it.
    """

    target = ""

    def __init__(
        self, *, temperature: float = 1.0, beta: float = 0.1, start_epoch: int = 61, detach_self_target: bool = False
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        non_negative(beta=beta, start_epoch=start_epoch)
        self.temperature, self.beta = temperature, beta
        self.start_epoch, self.detach_self_target = start_epoch, detach_self_target

    def introspective(self, epoch: int) -> bool:
        return epoch >= self.start_epoch

    def views(self, epoch: int) -> frozenset[View]:
        views = student("adv") | teacher(self.target)
        return views | student("clean") | teacher("adv") if self.introspective(epoch) else views

    def student_passes(self, epoch: int, base: Term) -> tuple[str, ...]:
        return (*self.authors_passes, "clean") if self.introspective(epoch) else self.authors_passes

    def forward(self, step: Step) -> dict[str, Tensor]:
        adv, target = step.student("adv").logits, step.teacher(self.target).logits
        losses = {"kl_adv": distillation_kl(adv, target, temperature=self.temperature)}
        if self.introspective(step.epoch):
            with torch.no_grad():
                log_true = log_softmax(step.teacher("adv").logits).gather(1, step.y[:, None]).squeeze(1)
                trust = (self.beta * log_true).exp()
            clean = step.student("clean").logits
            own = clean.detach() if self.detach_self_target else clean
            losses["kl_self"] = ((1 - trust) * kl(own, adv)).mean()
        return losses


@base("iad")
class IAD(Introspection):
    """KL(P_T(x) || P_S(x')) + [epoch >= start_epoch] mean (1 - a_i) KL(P_S(x) || P_S(x')) with a_i = P_T(x')_y^beta.

    This is IAD-I: the teacher's target is clean, and its term is not multiplied by a_i.
    """

    target = "clean"
    authors_passes = ("adv", "adv", "clean")
