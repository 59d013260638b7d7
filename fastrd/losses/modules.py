"""The losses as `nn.Module`s whose options are fixed once, kept as attributes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..core.arguments import check_temperature
from ..core.values import check_option
from .functional import (
    BACKENDS,
    CLASS_REDUCTIONS,
    DISTANCES,
    DIVERGENCES,
    SAMPLE_REDUCTIONS,
    distillation_kl,
    feature_alignment,
    gradient_matching,
    info_nce,
)

CHOICES = {"divergence": DIVERGENCES, "distance": DISTANCES, "backend": BACKENDS}


class _Loss(nn.Module):
    def __init__(self, reductions: tuple[str, ...], **options: Any) -> None:
        super().__init__()
        for name, accepted in {**CHOICES, "reduction": reductions}.items():
            if name in options:
                check_option(name, options[name], accepted)
        if "temperature" in options:
            check_temperature(options["temperature"])
        self.__dict__.update(options)
        self._names = tuple(options)

    @property
    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}


class InfoNCE(_Loss):
    """`info_nce` with its options fixed: forward(anchor, candidates, positives=None, labels=None, ...)."""

    def __init__(
        self, *, temperature: float = 0.07, normalize: bool = True, reduction: str = "mean", backend: str = "auto"
    ) -> None:
        super().__init__(
            SAMPLE_REDUCTIONS, temperature=temperature, normalize=normalize, reduction=reduction, backend=backend
        )

    def forward(
        self,
        anchor: Tensor,
        candidates: Tensor,
        *,
        positives: Tensor | None = None,
        labels: Tensor | None = None,
        candidate_labels: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        rows: Any = {"positives": positives, "labels": labels, "candidate_labels": candidate_labels, "weight": weight}
        return info_nce(anchor, candidates, **rows, **self._options)


class GradientMatching(_Loss):
    """`gradient_matching` with its options fixed: forward(S+, S-, T+, T-, weight=None)."""

    def __init__(self, *, divergence: str = "kl", reduction: str = "batchmean", backend: str = "auto") -> None:
        super().__init__(CLASS_REDUCTIONS, divergence=divergence, reduction=reduction, backend=backend)

    def forward(
        self,
        student_plus: Tensor,
        student_minus: Tensor,
        teacher_plus: Tensor,
        teacher_minus: Tensor,
        *,
        weight: Tensor | None = None,
    ) -> Tensor:
        logits = (student_plus, student_minus, teacher_plus, teacher_minus)
        return gradient_matching(*logits, weight=weight, **self._options)


class DistillationKL(_Loss):
    """`distillation_kl` with its options fixed: forward(student, teacher, weight=None)."""

    def __init__(self, *, temperature: float = 1.0, reduction: str = "batchmean", backend: str = "auto") -> None:
        super().__init__(CLASS_REDUCTIONS, temperature=temperature, reduction=reduction, backend=backend)

    def forward(self, student: Tensor, teacher: Tensor, *, weight: Tensor | None = None) -> Tensor:
        return distillation_kl(student, teacher, weight=weight, **self._options)


class FeatureAlignment(_Loss):
    """`feature_alignment` with its options fixed: forward(student, target, weight=None)."""

    def __init__(self, *, distance: str = "mse", reduction: str = "mean") -> None:
        super().__init__(SAMPLE_REDUCTIONS, distance=distance, reduction=reduction)

    def forward(self, student: Tensor, target: Tensor, *, weight: Tensor | None = None) -> Tensor:
        return feature_alignment(student, target, weight=weight, **self._options)
