"""VFD-Adv: vanilla feature distillation for adversarial training (Cao et al. 2022, arXiv 2206.02158).

A reconstruction: the abstract fixes the idea, the choices below are ours.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from ..losses.functional import feature_alignment
from ..losses.heads import linear_head
from .base import Setup, Step, Term, addon, non_negative
from .views import View, clean_teacher, student


@addon("vfd")
class VFD(Term):
    """lambda / 2 [w_adv D(phi_S(x'), phi_C(x)) + w_clean D(phi_S(x), phi_C(x))], phi_C a frozen clean model's features.

    The clean model is not robust, so its features at x' mean nothing: the target is phi_C(x) for both. Where widths
    differ a linear projector maps phi_S to phi_C; it trains with the student and is dropped at test.
    `lambda_` (key `lambda` in a recipe) has no published value.
    """

    def __init__(
        self,
        *,
        lambda_: float = 10.0,
        distance: Literal["mse", "cosine", "smooth_l1"] = "mse",
        weight_adv: float = 1.0,
        weight_clean: float = 1.0,
    ) -> None:
        super().__init__()
        non_negative(lambda_=lambda_, weight_adv=weight_adv, weight_clean=weight_clean)
        self.lambda_, self.distance = lambda_, distance
        self.weight_adv, self.weight_clean = weight_adv, weight_clean
        self.projector: nn.Module = nn.Identity()

    @property
    def active(self) -> bool:
        return self.lambda_ > 0 and (self.weight_adv > 0 or self.weight_clean > 0)

    def prepare(self, setup: Setup) -> None:
        source, target = setup.feature_dims["student"], setup.feature_dims["clean_teacher"]
        if source != target:
            self.projector = linear_head(source, target, setup.seed, "vfd").to(setup.device)

    def views(self, epoch: int) -> frozenset[View]:
        return student("adv", "clean") | clean_teacher("clean")

    def forward(self, step: Step) -> dict[str, Tensor]:
        target = step.clean_teacher("clean").features
        terms = {"vfd_adv": ("adv", self.weight_adv), "vfd_clean": ("clean", self.weight_clean)}
        losses: dict[str, Tensor] = {}
        for name, (image, weight) in terms.items():
            features = self.projector(step.student(image).features)
            losses[name] = self.lambda_ * 0.5 * weight * feature_alignment(features, target, distance=self.distance)
        return losses
