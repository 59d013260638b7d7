"""AdaAD and AdaIAD: adaptive adversarial distillation (Huang et al. 2023, CVPR)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..losses.functional import distillation_kl
from .base import Step, Term, base, unit_interval
from .iad import Introspection
from .views import View, student, teacher


@base("adaad")
class AdaAD(Term):
    """lambda KL(P_T(x') || P_S(x')) + (1 - lambda) KL(P_T(x) || P_S(x)), attack through both networks.

    The authors' CIFAR-10 code reduces with "mean"; batchmean is the default.
    """

    inner = "adaad"
    authors_passes = ("clean", "adv")

    def __init__(self, *, lambda_: float = 1.0, reduction: Literal["batchmean", "mean"] = "batchmean") -> None:
        super().__init__()
        unit_interval(lambda_=lambda_)
        self.lambda_, self.reduction = lambda_, reduction

    def views(self, epoch: int) -> frozenset[View]:
        views = student("adv") | teacher("adv")
        return views | student("clean") | teacher("clean") if self.lambda_ < 1 else views

    def forward(self, step: Step) -> dict[str, Tensor]:
        kl_adv = self._kl(step, "adv")
        if self.lambda_ == 1:
            return {"kl_adv": kl_adv}
        return {"kl_adv": self.lambda_ * kl_adv, "kl_clean": (1 - self.lambda_) * self._kl(step, "clean")}

    def _kl(self, step: Step, image: str) -> Tensor:
        return distillation_kl(step.student(image).logits, step.teacher(image).logits, reduction=self.reduction)


@base("adaiad")
class AdaIAD(Introspection):
    """As iad with P_T(x') for P_T(x), and AdaAD's attack. The authors' code has temperature = 30."""

    inner = "adaad"
    target = "adv"
    authors_passes = ("clean", "adv", "clean")

    def __init__(
        self, *, temperature: float = 30.0, beta: float = 0.1, start_epoch: int = 61, detach_self_target: bool = False
    ) -> None:
        super().__init__(
            temperature=temperature, beta=beta, start_epoch=start_epoch, detach_self_target=detach_self_target
        )
