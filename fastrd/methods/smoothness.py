"""Regularisers of the student alone, which IGDM is compared with (Lee, Cho, Kim; ICLR 2025; arXiv 2312.03286,
Table 16)."""

from __future__ import annotations

from torch import Tensor

from ..losses.functional import kl
from .base import Ramped, Step, addon
from .views import View, student


class _Smoothness(Ramped):
    """alpha (epoch / epochs) KL(P_S(reference) || P_S(x')), batchmean, gradient through both: in the place of IGDM."""

    reference = ""

    def views(self, epoch: int) -> frozenset[View]:
        return student("adv", self.reference)

    def forward(self, step: Step) -> dict[str, Tensor]:
        distance = kl(step.student(self.reference).logits, step.student("adv").logits).mean()
        return {self.name: self.weight(step) * distance}


@addon("smooth_clean")
class SmoothClean(_Smoothness):
    """alpha (epoch / epochs) KL(P_S(x) || P_S(x')), the regulariser of TRADES."""

    reference = "clean"


@addon("smooth_mirror")
class SmoothMirror(_Smoothness):
    """alpha (epoch / epochs) KL(P_S(x - d) || P_S(x + d)). The direction is our choice; x - d as in IGDM."""

    reference = "reflection"  # not IGDM's "mirror", which may be clamped or nearer

    def images(self, x: Tensor, x_adv: Tensor) -> dict[str, Tensor]:
        return {"reflection": 2 * x - x_adv}
