"""GACD: guided adversarial contrastive distillation (Bai et al. 2020, arXiv 2009.09922), and CRD as its special case.

A reconstruction: the paper fixes teacher anchors, class-wise negatives, the noise-contrastive loss and the
reweighting by the teacher's confidence; every other choice is an option below.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..core.seeding import derive_seed
from ..losses.contrastive import ContrastiveDistillation
from ..losses.functional import log_softmax
from .base import Setup, Step, Term, addon, non_negative
from .views import View, student, teacher


@addon("gacd")
class GACD(Term):
    """weight * `ContrastiveDistillation` of the features at x~ = x' or x, with w_i = P_T(x~_i)[y_i] detached.

    `reweight = false` sets w_i = 1. An image without a label (-1) has the weight of the teacher's confidence in its own
    prediction, max P_T(x~_i), and a class of its own: which negatives share its class is unknown, so that only itself
    is left out. With `estimator = "crd"`, `reweight = false` and `input = "clean"` this is
    contrastive representation distillation (Tian et al. 2020). Logs `misranked` and, for the noise-contrastive
    estimators, `mi_bound`.
    """

    def __init__(
        self,
        *,
        weight: float = 0.8,
        estimator: Literal["infonce", "crd", "strict"] = "infonce",
        input: Literal["adv", "clean"] = "adv",
        reweight: bool = True,
        dim: int = 128,
        temperature: float | None = None,
        negatives: int = 16384,
        momentum: float = 0.5,
        candidates: Literal["batch", "bank"] = "batch",
    ) -> None:
        super().__init__()
        non_negative(weight=weight)
        self.weight, self.input, self.reweight = weight, input, reweight
        self.options: dict[str, Any] = {
            "estimator": estimator,
            "candidates": candidates,
            "dim": dim,
            "temperature": temperature,
            "negatives": negatives,
            "momentum": momentum,
        }
        ContrastiveDistillation.check(**self.options)
        self.register_load_state_dict_pre_hook(_name_contrast)

    @property
    def active(self) -> bool:
        return self.weight > 0

    def idle(self) -> dict[str, str]:
        estimator, candidates = self.options["estimator"], self.options["candidates"]
        why = f"with estimator = {estimator!r}"
        if estimator != "infonce":
            return {"candidates": why}
        return {"negatives": why} | ({"momentum": f"{why} and no bank"} if candidates == "batch" else {})

    def prepare(self, setup: Setup) -> None:
        self.seed = setup.seed
        dims, labels = setup.feature_dims, setup.labels
        self._unlabelled = (labels < 0,) if bool((labels < 0).any()) else ()
        own = setup.num_classes + torch.arange(len(labels), device=labels.device)
        labels = torch.where(labels < 0, own, labels)
        self.contrast = ContrastiveDistillation(
            dims["student"], dims["teacher"], labels, seed=setup.seed, **self.options
        ).to(setup.device)

    def views(self, epoch: int) -> frozenset[View]:
        return student(self.input) | teacher(self.input)

    def forward(self, step: Step) -> dict[str, Tensor]:
        own, target, weight = step.student(self.input), step.teacher(self.input), None
        if self.reweight:
            confidence = log_softmax(target.logits)
            weight = confidence.gather(1, step.y[:, None]).squeeze(1)
            for unlabelled in self._unlabelled:
                weight = torch.where(unlabelled[step.index], confidence.amax(dim=1), weight)
            weight = weight.exp()
        draw = derive_seed(self.seed, "negatives", step.epoch, step.batch)
        loss = self.contrast(own.features, target.features, step.index, weight=weight, draw=draw, gather=step.gather)
        step.metrics.update(self.contrast.metrics)
        return {"gacd": self.weight * loss}


def _name_contrast(term: GACD, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Renames the keys of checkpoints from before heads and banks were a module of their own."""
    for key in [key for key in state if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        if not name.startswith("contrast."):
            state[f"{prefix}contrast.{name}"] = state.pop(key)
