"""Losses of robust distillation, alone or in any trainer: functions, and nn.Module forms with the same options.

Shared conventions. Inputs are floating point; half precision is computed in float32 (also under autocast), float64
stays float64; the loss is at least float32. `weight` (N,) multiplies the per-sample losses and never gets a gradient.
Nothing is copied to the host and no value is inspected, so all of it can be compiled, captured or distributed.
`backend`: "auto" takes the Triton kernels on CUDA and PyTorch elsewhere, "triton" and "torch" insist.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import reference

__all__ = [
    "DistillationKL",
    "FeatureAlignment",
    "GradientMatching",
    "InfoNCE",
    "distillation_kl",
    "feature_alignment",
    "gradient_matching",
    "info_nce",
    "nce_bank",
    "sample_negatives",
    "update_bank",
]

BACKENDS = ("auto", "torch", "triton")
DIVERGENCES = ("kl", "l1", "l2")
DISTANCES = ("mse", "cosine", "smooth_l1")
SAMPLE_REDUCTIONS = ("mean", "sum", "none")
CLASS_REDUCTIONS = ("batchmean", "mean", "sum", "none")


def info_nce(
    anchor: Tensor,
    candidates: Tensor,
    *,
    positives: Tensor | None = None,
    labels: Tensor | None = None,
    candidate_labels: Tensor | None = None,
    weight: Tensor | None = None,
    temperature: float = 0.07,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Reweighted, class-masked InfoNCE (van den Oord et al. 2018, Eq. 4; GACD's softmax form, Bai et al. 2020).

    L_i = -log( e^{a_i.c_p/t} / (e^{a_i.c_p/t} + sum over j of another class of e^{a_i.c_j/t}) ), p = positives[i].

    Args:
        anchor: (N, D), gets a gradient.
        candidates: (M, D), gets a gradient.
        positives: (N,) int64 index of each anchor's positive among the candidates; default arange(N).
        labels: (N,) integer classes of the anchors; candidates of the same class, other than the positive, leave the
            denominator. None: every candidate counts.
        candidate_labels: (M,) classes of the candidates; default `labels` when M == N.
        weight: (N,) multiplies L_i.
        temperature: t > 0.
        normalize: L2-normalise the rows of both sides first.
        reduction: "mean" = sum_i w_i L_i / N, "sum", "none" = (N,).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit, named with what is accepted.
    """
    _floats(anchor=anchor, candidates=candidates)
    _matrices(anchor=anchor, candidates=candidates)
    n, m = len(anchor), len(candidates)
    if anchor.shape[1] != candidates.shape[1]:
        raise ValueError(
            f"candidates: got {candidates.shape[1]} features; accepted: those of anchor, {anchor.shape[1]}"
        )
    if positives is None and m < n:
        raise ValueError(
            f"positives: got None with N = {n} > M = {m}; accepted: an int64 (N,) index into candidates"
        )
    if candidate_labels is not None and labels is None:
        raise ValueError("labels: got None beside candidate_labels; accepted: (N,) classes of the anchors")
    if labels is not None and candidate_labels is None:
        if m != n:
            raise ValueError(
                f"candidate_labels: got None with N = {n}, M = {m}; accepted: (M,) classes when M differs from N"
            )
        candidate_labels = labels
    _indices(anchor, n, positives=positives, labels=labels)
    _indices(anchor, m, candidate_labels=candidate_labels)
    _weight(weight, anchor)
    _positive(temperature=temperature)
    _option("reduction", reduction, SAMPLE_REDUCTIONS)
    _backend(backend, anchor, fused=False)
    with _full_precision(anchor):
        return reference.info_nce(
            anchor,
            candidates,
            positives=positives,
            labels=labels,
            candidate_labels=candidate_labels,
            weight=weight,
            temperature=temperature,
            normalize=normalize,
            reduction=reduction,
        )


def nce_bank(
    anchor: Tensor,
    bank: Tensor,
    positives: Tensor,
    *,
    negatives: Tensor | int | str,
    normalizer: float | Tensor,
    labels: Tensor | None = None,
    weight: Tensor | None = None,
    temperature: float = 0.07,
    seed: int = 0,
    reduction: str = "mean",
    eps: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """One side of noise-contrastive estimation against a memory bank (Bai et al. 2020; Tian et al. 2020, Eq. 18).

    L_i = -[ log h(a_i, r_p) + sum over negatives n of log(1 - h(a_i, r_n)) ],
    h(a, r) = (e/Z) / (e/Z + k/M + eps), 1 - h standing for (k/M) / (e/Z + k/M + eps), e = exp(a.r / temperature).

    Args:
        anchor: (B, D), already L2-normalised; gets a gradient.
        bank: (M, D), constant; may be updated before the backward pass of this loss.
        positives: (B,) int64 row of each anchor's positive.
        negatives: int64 rows (B, k); an int k, drawn on the device from the rows of other classes, reproducible from
            `seed` (see `sample_negatives`); or "all", every row of another class, k then being their number.
        normalizer: Z > 0, a float or a scalar tensor.
        labels: (M,) integer classes of the rows; needed unless `negatives` is a table.
        weight: (B,) multiplies L_i.
        temperature: > 0.
        seed: of the draw when `negatives` is an int.
        reduction: "mean" = sum_i w_i L_i / B, "sum", "none" = (B,).
        eps: added to both denominators; the published CRD code uses 1e-7.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit, named with what is accepted.
    """
    _floats(anchor=anchor, bank=bank)
    _matrices(anchor=anchor, bank=bank)
    if anchor.shape[1] != bank.shape[1]:
        raise ValueError(f"bank: got {bank.shape[1]} features; accepted: those of anchor, {anchor.shape[1]}")
    _indices(anchor, len(anchor), positives=positives)
    if isinstance(negatives, Tensor):
        if negatives.ndim != 2 or len(negatives) != len(anchor) or negatives.shape[1] == 0:
            raise ValueError(
                f"negatives: got a table of shape {tuple(negatives.shape)}; accepted: (B, k) with B = {len(anchor)}, k >= 1"
            )
        if negatives.dtype != torch.int64:
            raise TypeError(f"negatives: got {negatives.dtype}; accepted: int64 rows of the bank")
        _same_device(anchor, negatives=negatives)
    else:
        if negatives != "all" and (isinstance(negatives, (bool, str)) or not isinstance(negatives, int)):
            raise ValueError(
                f"negatives: got {negatives!r}; accepted: an int64 (B, k) table, an int k >= 1 or 'all'"
            )
        if isinstance(negatives, int) and negatives < 1:
            raise ValueError(f"negatives: got {negatives}; accepted: an int k >= 1")
        if labels is None:
            raise ValueError(
                f"labels: got None with negatives={negatives!r}; accepted: (M,) classes of the bank's rows"
            )
    _indices(anchor, len(bank), labels=labels)
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(
                f"normalizer: got shape {tuple(normalizer.shape)}; accepted: a float or a scalar tensor"
            )
        _same_device(anchor, normalizer=normalizer)
        normalizer = normalizer.detach().reshape(())
    else:
        _positive(normalizer=normalizer)
    _weight(weight, anchor)
    _positive(temperature=temperature)
    if not eps >= 0:
        raise ValueError(f"eps: got {eps}; accepted: a number >= 0")
    _option("reduction", reduction, SAMPLE_REDUCTIONS)
    _backend(backend, anchor, fused=False)
    with _full_precision(anchor):
        return reference.nce_bank(
            anchor,
            bank,
            positives,
            negatives=negatives,
            normalizer=normalizer,
            labels=labels,
            weight=weight,
            temperature=temperature,
            seed=seed,
            reduction=reduction,
            eps=eps,
        )


def sample_negatives(labels: Tensor, positives: Tensor, k: int, *, seed: int) -> Tensor:
    """The rows `nce_bank(negatives=k, seed=seed)` scores: int64 (B, k), rows whose label is not the positive's.

    labels (M,) integers, positives (B,) int64 rows. Uniform; without replacement where an anchor has at least k such
    rows, with replacement where it has fewer.

    Raises:
        ValueError: k < 1.
    """
    if k < 1:
        raise ValueError(f"k: got {k}; accepted: an int >= 1")
    return reference.sample_negatives(labels, positives, k, seed=seed)


@torch.no_grad()
def update_bank(bank: Tensor, rows: Tensor, values: Tensor, momentum: float) -> Tensor:
    """The bank (M, D) after row <- normalise(momentum * row + (1 - momentum) * value) at `rows` (B,) int64.

    values (B, D). Where a row occurs twice its last occurrence wins, from the row as it was before the call: the same
    result on every device and every run.

    Raises:
        ValueError: momentum outside [0, 1] or shapes that do not fit.
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum: got {momentum}; accepted: a number in [0, 1]")
    if values.shape != (len(rows), bank.shape[1]):
        raise ValueError(f"values: got shape {tuple(values.shape)}; accepted: {(len(rows), bank.shape[1])}")
    return reference.update_bank(bank, rows, values, momentum)


def gradient_matching(
    student_plus: Tensor,
    student_minus: Tensor,
    teacher_plus: Tensor,
    teacher_minus: Tensor,
    *,
    weight: Tensor | None = None,
    divergence: str = "kl",
    reduction: str = "batchmean",
    backend: str = "auto",
) -> Tensor:
    """Indirect gradient distillation: D(S(x+d) - S(x-d), T(x+d) - T(x-d)) on logits (Lee et al. 2025, Eq. 8).

    Args:
        student_plus, student_minus: (N, C) student logits at x+d and x-d; both get gradients.
        teacher_plus, teacher_minus: (N, C) teacher logits; constant.
        weight: (N,) multiplies the per-sample losses.
        divergence: "kl" = KL(softmax dT || softmax dS) at temperature 1, "l1" = sum_c |dS - dT|,
            "l2" = sum_c (dS - dT)^2.
        reduction: "batchmean" = mean over samples, "mean" = mean over samples AND classes, "sum", "none" = (N,).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit, named with what is accepted.
    """
    _floats(
        student_plus=student_plus,
        student_minus=student_minus,
        teacher_plus=teacher_plus,
        teacher_minus=teacher_minus,
    )
    _matrices(student_plus=student_plus)
    _same_shape(
        "student_plus",
        student_plus,
        student_minus=student_minus,
        teacher_plus=teacher_plus,
        teacher_minus=teacher_minus,
    )
    _weight(weight, student_plus)
    _option("divergence", divergence, DIVERGENCES)
    _option("reduction", reduction, CLASS_REDUCTIONS)
    _backend(backend, student_plus, fused=False)
    return reference.gradient_matching(
        student_plus,
        student_minus,
        teacher_plus,
        teacher_minus,
        weight=weight,
        divergence=divergence,
        reduction=reduction,
    )


def distillation_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
    backend: str = "auto",
) -> Tensor:
    """t^2 KL(softmax(teacher / t) || softmax(student / t)), t = temperature (Hinton et al. 2015).

    Args:
        student: (N, C) logits, gets a gradient.
        teacher: (N, C) logits, constant.
        temperature: > 0.
        weight: (N,) multiplies the per-sample losses.
        reduction: "batchmean" = mean over samples, "mean" = mean over samples AND classes, "sum", "none" = (N,).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit, named with what is accepted.
    """
    _floats(student=student, teacher=teacher)
    _matrices(student=student)
    _same_shape("student", student, teacher=teacher)
    _weight(weight, student)
    _positive(temperature=temperature)
    _option("reduction", reduction, CLASS_REDUCTIONS)
    _backend(backend, student, fused=False)
    return reference.distillation_kl(
        student, teacher, temperature=temperature, weight=weight, reduction=reduction
    )


def feature_alignment(
    student: Tensor,
    target: Tensor,
    *,
    distance: str = "mse",
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Distance of student features to constant target features (VFD-Adv, Cao et al. 2022; a documented choice).

    Args:
        student: (N, ...) features, gets a gradient; everything after the first dimension is one feature vector.
        target: same shape, constant.
        distance: per sample, "mse" = mean over features of the squared difference, "cosine" = 1 - cosine similarity,
            "smooth_l1" = mean over features of Huber's loss with threshold 1.
        weight: (N,) multiplies the per-sample distances.
        reduction: "mean" over samples, "sum", "none" = (N,).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit, named with what is accepted.
    """
    _floats(student=student, target=target)
    if student.ndim < 2 or student.numel() == 0:
        raise ValueError(f"student: got shape {tuple(student.shape)}; accepted: non-empty (N, ...) features")
    _same_shape("student", student, target=target)
    _weight(weight, student)
    _option("distance", distance, DISTANCES)
    _option("reduction", reduction, SAMPLE_REDUCTIONS)
    s, t = reference.upcast(student).flatten(1), reference.upcast(target.detach()).flatten(1)
    if distance == "mse":
        per_sample = (s - t).square().mean(dim=1)
    elif distance == "cosine":
        per_sample = 1 - F.cosine_similarity(s, t, dim=1)
    else:
        per_sample = F.smooth_l1_loss(s, t, reduction="none").mean(dim=1)
    return reference.reduce(per_sample, weight, reduction)


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

    def __init__(
        self, *, divergence: str = "kl", reduction: str = "batchmean", backend: str = "auto"
    ) -> None:
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

    def __init__(
        self, *, temperature: float = 1.0, reduction: str = "batchmean", backend: str = "auto"
    ) -> None:
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
        return feature_alignment(
            student, target, distance=self.distance, weight=weight, reduction=self.reduction
        )


def _full_precision(x: Tensor) -> torch.autocast:
    """Autocast would turn the float32 matrix products into half-precision ones."""
    return torch.autocast(x.device.type, enabled=False)


def _backend(backend: str, x: Tensor, fused: bool) -> bool:
    """Whether to take the Triton kernel; `fused` says whether one exists."""
    _option("backend", backend, BACKENDS)
    if backend == "triton" and not fused:
        raise ValueError("backend: got 'triton'; accepted: 'auto', 'torch' (this loss has no Triton kernel)")
    return fused and (backend == "triton" or (backend == "auto" and x.is_cuda))


def _option(name: str, value: str, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise ValueError(f"{name}: got {value!r}; accepted: {', '.join(map(repr, accepted))}")


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}: got {value}; accepted: a number > 0")


def _floats(**tensors: Tensor) -> None:
    first_name, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}; accepted: a floating point tensor")
        if not x.is_floating_point():
            raise TypeError(f"{name}: got {x.dtype}; accepted: a floating point tensor")
        if x.device != first.device:
            raise ValueError(
                f"{name}: got a tensor on {x.device}; accepted: the device of {first_name}, {first.device}"
            )


def _same_device(first: Tensor, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.device != first.device:
            raise ValueError(
                f"{name}: got a tensor on {x.device}; accepted: the device of the inputs, {first.device}"
            )


def _matrices(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.ndim != 2 or x.numel() == 0:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}; accepted: two dimensions, neither empty")


def _same_shape(first_name: str, first: Tensor, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.shape != first.shape:
            raise ValueError(
                f"{name}: got shape {tuple(x.shape)}; accepted: that of {first_name}, {tuple(first.shape)}"
            )


def _indices(first: Tensor, length: int, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is None:
            continue
        if x.shape != (length,):
            raise ValueError(f"{name}: got shape {tuple(x.shape)}; accepted: ({length},)")
        if x.is_floating_point() or x.dtype == torch.bool or (name == "positives" and x.dtype != torch.int64):
            wanted = "int64" if name == "positives" else "integers"
            raise TypeError(f"{name}: got {x.dtype}; accepted: {wanted}")
        _same_device(first, **{name: x})


def _weight(weight: Tensor | None, first: Tensor) -> None:
    if weight is None:
        return
    if weight.shape != (len(first),):
        raise ValueError(f"weight: got shape {tuple(weight.shape)}; accepted: ({len(first)},)")
    _same_device(first, weight=weight)
