"""IAD: introspective adversarial distillation (Zhu et al. 2022, arXiv 2106.04928), and the term AdaIAD shares."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.arguments import check_temperature
from ..losses.functional import distillation_kl, kl, log_softmax
from .base import Step, Term, base, non_negative
from .views import View, student, teacher


class Introspection(Term):
    """[epoch >= start_epoch] mean_i (1 - a_i) KL(P_S(x_i) || P_S(x'_i)), a_i = P_T(x'_i)[y_i]^beta.

    Epochs count from 1. The authors' count from 0 and start at 60, which is the 61st.
    Where the teacher is unsure of an adversarial image the student trusts itself. As in the published code the self
    target P_S(x) keeps its gradient; `detach_self_target` cuts it.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        beta: float = 0.1,
        start_epoch: int = 61,
        detach_self_target: bool = False,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        non_negative(beta=beta, start_epoch=start_epoch)
        self.temperature, self.beta = temperature, beta
        self.start_epoch, self.detach_self_target = start_epoch, detach_self_target

    def introspective(self, epoch: int) -> bool:
        return epoch >= self.start_epoch

    def introspection_views(self, epoch: int) -> frozenset[View]:
        return student("adv", "clean") | teacher("adv") if self.introspective(epoch) else frozenset()

    def introspection(self, step: Step) -> dict[str, Tensor]:
        if not self.introspective(step.epoch):
            return {}
        with torch.no_grad():
            log_true = log_softmax(step.teacher("adv").logits).gather(1, step.y[:, None]).squeeze(1)
            trust = (self.beta * log_true).exp()
        clean = step.student("clean").logits
        target = clean.detach() if self.detach_self_target else clean
        return {"kl_self": ((1 - trust) * kl(target, step.student("adv").logits)).mean()}


@base("iad")
class IAD(Introspection):
    """IAD-I: t^2 KL(P_T^t(x) || P_S^t(x')) + introspection. The first term is not multiplied by a_i."""

    def views(self, epoch: int) -> frozenset[View]:
        return student("adv") | teacher("clean") | self.introspection_views(epoch)

    def student_passes(self, epoch: int, base: Term) -> tuple[str, ...]:
        return ("adv", "adv", "clean", "clean") if self.introspective(epoch) else ("adv", "adv", "clean")

    def forward(self, step: Step) -> dict[str, Tensor]:
        kl_adv = distillation_kl(step.student("adv").logits, step.teacher("clean").logits, temperature=self.temperature)
        return {"kl_adv": kl_adv, **self.introspection(step)}
