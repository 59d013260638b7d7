"""Input gradients matched directly: what IGDM replaces (Lee, Cho, Kim; ICLR 2025; arXiv 2312.03286, ablation)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..attacks import cross_entropy
from .base import Ramped, Setup, Step, addon
from .views import View, teacher


@addon("direct")
class Direct(Ramped):
    """alpha (epoch / epochs) mean_i ||g_S(x'_i) - g_T(x'_i)||_2 with g_f(x) = d CE(f(x), y) / dx.

    Training through g_S differentiates the student twice, which is what makes it slow and hard to optimise; IGDM takes
    differences of logits instead. Distance, point and weight are our choices. The student's own pass updates its BN
    statistics once more.
    """

    def prepare(self, setup: Setup) -> None:
        # In a tuple: as attributes the networks would be registered here, and trained and saved twice.
        self._networks: tuple[Any, Any] = (setup.student, setup.teacher)

    def views(self, epoch: int) -> frozenset[View]:
        return teacher("adv")

    def forward(self, step: Step) -> dict[str, Tensor]:
        of_student, of_teacher = self._networks
        difference = _gradient(of_student, step, create_graph=True) - _gradient(of_teacher, step)
        # The norm has no derivative at 0.
        distance = (difference.flatten(1).square().sum(dim=1) + 1e-12).sqrt().mean()
        return {"direct": self.weight(step) * distance}


def _gradient(network: nn.Module, step: Step, create_graph: bool = False) -> Tensor:
    x = step.x_adv.detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # the fused attentions have one derivative
        loss = cross_entropy(step.y)(network(x), x).sum()
    return torch.autograd.grad(loss, x, create_graph=create_graph)[0].float()
