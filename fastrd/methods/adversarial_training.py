"""Training without a teacher: natural, PGD-AT, TRADES, MART."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..losses.functional import kl, log_softmax
from ..models import classifier
from .base import Setup, Step, Term, base, non_negative
from .views import View, student


@base("natural")
class Natural(Term):
    """CE(S(x), y), no attack: clean teachers."""

    inner = "none"
    smoothed = True

    def views(self, epoch: int) -> frozenset[View]:
        return student("clean")

    def forward(self, step: Step) -> dict[str, Tensor]:
        return {"ce": step.cross_entropy(step.student("clean").logits)}


@base("pgd_at")
class PGDAT(Term):
    """CE(S(x'), y) (Madry et al. 2018)."""

    smoothed = True

    def views(self, epoch: int) -> frozenset[View]:
        return student("adv")

    def forward(self, step: Step) -> dict[str, Tensor]:
        return {"ce": step.cross_entropy(step.student("adv").logits)}


@base("trades")
class TRADES(Term):
    """CE(S(x), y) + beta KL(P_S(x) || P_S(x')), gradient through both branches (Zhang et al. 2019)."""

    inner = "trades"
    smoothed = True
    authors_passes = ("clean", "adv", "clean")

    def __init__(self, *, beta: float = 6.0) -> None:
        super().__init__()
        non_negative(beta=beta)
        self.beta = beta

    def views(self, epoch: int) -> frozenset[View]:
        return student("adv", "clean")

    def forward(self, step: Step) -> dict[str, Tensor]:
        adv, clean = step.student("adv").logits, step.student("clean").logits
        return {"ce": step.cross_entropy(clean), "kl_self": self.beta * kl(clean, adv).mean()}


@base("mart")
class MART(Term):
    """BCE(S(x'), y) + beta mean[KL(P_S(x) || P_S(x')) (1.0000001 - P_S(x)_y)] (Wang et al. 2020).

    BCE = CE(S(x'), y) - log(1.0001 - max_{k != y} P_S(x')_k + 1e-12). Attacked on CE from x + 0.001 N(0, 1), as in
    the authors' code.
    """

    inner = "mart"
    smoothed = True
    authors_passes = ("clean", "adv")

    def __init__(self, *, beta: float = 5.0) -> None:
        super().__init__()
        non_negative(beta=beta)
        self.beta = beta

    def views(self, epoch: int) -> frozenset[View]:
        return student("adv", "clean")

    def forward(self, step: Step) -> dict[str, Tensor]:
        adv, clean = step.student("adv").logits, step.student("clean").logits
        true = step.y[:, None]
        runner_up = log_softmax(adv).exp().scatter(1, true, 0.0).amax(dim=1)
        boundary = -torch.log(1.0001 - runner_up + 1e-12)
        missing = 1.0000001 - log_softmax(clean).exp().gather(1, true).squeeze(1)
        return {
            "ce": step.cross_entropy(adv),
            "margin": boundary.mean(),
            "kl_self": self.beta * (kl(clean, adv) * missing).mean(),
        }


@base("feature_only")
class FeatureOnly(Term):
    """No loss on the backbone: an add-on (GACD) trains the features, CE trains only the last layer on top of them.

    The linear probe of cross-task transfer, trained along: features reach the classifier detached, so the backbone
    is what the add-on alone makes it, and the classifier is there for the attack and the evaluation.
    """

    smoothed = True

    def __init__(self, *, input: Literal["adv", "clean"] = "adv") -> None:
        super().__init__()
        self.input = input

    def prepare(self, setup: Setup) -> None:
        # In a tuple: as a plain attribute the layer would be registered here too, and trained and saved twice.
        self._classifier = (classifier(setup.student),)

    def views(self, epoch: int) -> frozenset[View]:
        return student(self.input)

    def forward(self, step: Step) -> dict[str, Tensor]:
        features = step.student(self.input).features.detach()
        return {"probe": step.cross_entropy(self._classifier[0](features))}
