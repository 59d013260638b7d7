"""The losses as `nn.Module`s whose options are fixed once."""

from __future__ import annotations

from torch import Tensor, nn

from .functional import distillation_kl, feature_alignment, gradient_matching, info_nce


class InfoNCE(nn.Module):
    """`info_nce` with its options fixed: forward(anchor, candidates, positives=None, labels=None, ...)."""

    def __init__(
        self,
        *,
        temperature: float = 0.07,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.temperature, self.normalize, self.reduction, self.backend = (
            temperature,
            normalize,
            reduction,
            backend,
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
        return info_nce(
            anchor,
            candidates,
            positives=positives,
            labels=labels,
            candidate_labels=candidate_labels,
            weight=weight,
            temperature=self.temperature,
            normalize=self.normalize,
            reduction=self.reduction,
            backend=self.backend,
        )


class GradientMatching(nn.Module):
    """`gradient_matching` with its options fixed: forward(S+, S-, T+, T-, weight=None)."""

    def __init__(self, *, divergence: str = "kl", reduction: str = "batchmean", backend: str = "auto") -> None:
        super().__init__()
        self.divergence, self.reduction, self.backend = divergence, reduction, backend

    def forward(
        self,
        student_plus: Tensor,
        student_minus: Tensor,
        teacher_plus: Tensor,
        teacher_minus: Tensor,
        *,
        weight: Tensor | None = None,
    ) -> Tensor:
        return gradient_matching(
            student_plus,
            student_minus,
            teacher_plus,
            teacher_minus,
            weight=weight,
            divergence=self.divergence,
            reduction=self.reduction,
            backend=self.backend,
        )


class DistillationKL(nn.Module):
    """`distillation_kl` with its options fixed: forward(student, teacher, weight=None)."""

    def __init__(self, *, temperature: float = 1.0, reduction: str = "batchmean", backend: str = "auto") -> None:
        super().__init__()
        self.temperature, self.reduction, self.backend = temperature, reduction, backend

    def forward(self, student: Tensor, teacher: Tensor, *, weight: Tensor | None = None) -> Tensor:
        return distillation_kl(
            student,
            teacher,
            temperature=self.temperature,
            weight=weight,
            reduction=self.reduction,
            backend=self.backend,
        )


class FeatureAlignment(nn.Module):
    """`feature_alignment` with its options fixed: forward(student, target, weight=None)."""

    def __init__(self, *, distance: str = "mse", reduction: str = "mean") -> None:
        super().__init__()
        self.distance, self.reduction = distance, reduction

    def forward(self, student: Tensor, target: Tensor, *, weight: Tensor | None = None) -> Tensor:
        return feature_alignment(student, target, distance=self.distance, weight=weight, reduction=self.reduction)
