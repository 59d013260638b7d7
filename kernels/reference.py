"""The losses as the equations read, in plain PyTorch: oracle of every kernel and baseline of every benchmark.

Half-precision inputs are computed in float32, float64 stays float64. Nothing here branches on a tensor's values.
`weight` (N,) never gets a gradient. Reductions of per-sample losses: "none" (N,), "sum", and

- contrastive and feature losses: "mean" = sum_i w_i L_i / N;
- losses over classes: "batchmean" = sum over classes, mean over samples; "mean" = mean over samples AND classes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import draws


def upcast(x: Tensor) -> Tensor:
    """x in the precision its losses are computed in: at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


MIN_NORM = 2.0**-20
"""Rows of features are divided by max(L2 norm, MIN_NORM). One whose norm is not above has no direction:
its gradient is 0."""


def unit(x: Tensor) -> Tensor:
    """Rows (N, D) divided by max(L2 norm, MIN_NORM); those of norm <= MIN_NORM get no gradient."""
    norm = x.norm(dim=1, keepdim=True)
    rows = x / norm.clamp_min(MIN_NORM)
    return torch.where(norm > MIN_NORM, rows, rows.detach())


def xlog_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q), elementwise from logarithms, with 0 log 0 = 0 and a finite gradient where p is 0."""
    p = log_p.exp()
    return p * (log_p - log_q).masked_fill(p == 0, 0.0)


def reduce(per_sample: Tensor, weight: Tensor | None, reduction: str, num_classes: int = 1) -> Tensor:
    """Weight (N,) losses and reduce them; `num_classes` is what "mean" divides by beside N."""
    if weight is not None:
        per_sample = per_sample * weight.detach().to(per_sample.dtype)
    if reduction == "none":
        return per_sample
    total = per_sample.sum()
    if reduction == "sum":
        return total
    divisor = len(per_sample) * (num_classes if reduction == "mean" else 1)
    return total / divisor


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
) -> Tensor:
    """L_i = -log softmax of the positive among {positive, candidates of another class}, van den Oord et al. 2018, Eq.
    4.

    anchor (N, D), candidates (M, D), positives (N,) int64 default arange(N); labels (N,) and candidate_labels (M,)
    hide same-class candidates other than the positive.
    """
    a, c = upcast(anchor), upcast(candidates)
    if normalize:
        a, c = unit(a), unit(c)
    if positives is None:
        positives = torch.arange(len(a), device=a.device)
    logits = a @ c.T / temperature
    if labels is not None:
        other = labels if candidate_labels is None else candidate_labels
        hidden = (labels[:, None] == other[None, :]).scatter(1, positives[:, None], False)
        logits = logits.masked_fill(hidden, float("-inf"))
    per_sample = logits.logsumexp(dim=1) - logits.gather(1, positives[:, None]).squeeze(1)
    return reduce(per_sample, weight, reduction)


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
) -> Tensor:
    """L_i = -[log h(positive) + sum over negatives of log(1 - h)], h = (e/Z) / (e/Z + k/M), e = exp(anchor.row / t).

    anchor (B, D) already normalised, bank (M, D) constant, positives (B,) int64 rows. `negatives`: rows (B, k), -1 an
    empty place, beside which a positive may be -1 too, none; a number k, drawn by `draws.sample_negatives`; or "all",
    every row whose label is not the positive's, k being their number for each anchor. `eps` is added to both
    denominators, as the published CRD code does with 1e-7.
    """
    a, rows = upcast(anchor), upcast(bank.detach())
    if isinstance(negatives, int):
        assert labels is not None, "drawn negatives are of other classes"
        negatives = draws.sample_negatives(draws.class_table(labels), positives, negatives, seed)
    if isinstance(negatives, str):
        assert labels is not None, "all rows of other classes"
        chosen = labels[positives][:, None] != labels[None, :]
        score = a @ rows.T / temperature
        count = chosen.sum(dim=1, keepdim=True).to(a.dtype)
        positive = score.gather(1, positives[:, None])
    else:
        chosen = negatives >= 0
        score = (a[:, None, :] * rows[negatives]).sum(dim=2) / temperature
        count = torch.full_like(score[:, :1], negatives.shape[1])
        positive = (a * rows[positives]).sum(dim=1, keepdim=True) / temperature

    # h is the sigmoid of log(e/Z) - log(k/M + eps); 1 - h keeps the numerator k/M, hence the constant `short`.
    noise = count / len(bank)
    log_z = normalizer.log() if isinstance(normalizer, Tensor) else math.log(normalizer)
    offset = log_z + (noise + eps).log()
    log_rest = torch.where(chosen, F.logsigmoid(offset - score) - torch.log1p(eps / noise), 0.0)
    log_h = torch.where(positives[:, None] >= 0, F.logsigmoid(positive - offset), 0.0)
    per_sample = -(log_h.squeeze(1) + log_rest.sum(dim=1))
    return reduce(per_sample, weight, reduction)


def update_bank(bank: Tensor, rows: Tensor, values: Tensor, momentum: float) -> Tensor:
    """A bank with row <- normalise(momentum * row + (1 - momentum) * value) at `rows` (B,), from `values` (B, D).

    Where a row occurs twice in `rows` its last occurrence wins, starting from the row as it was before the call; the
    result does not depend on the order in which a device writes.
    """
    blended = momentum * upcast(bank[rows]) + (1 - momentum) * upcast(values.detach())
    blended = unit(blended).to(bank.dtype)
    place = torch.arange(len(rows), device=rows.device)
    last = torch.where(rows[:, None] == rows[None, :], place, -1).amax(dim=1)
    return bank.index_copy(0, rows, blended[last])


def gradient_matching(
    student_plus: Tensor,
    student_minus: Tensor,
    teacher_plus: Tensor,
    teacher_minus: Tensor,
    *,
    weight: Tensor | None = None,
    divergence: str = "kl",
    reduction: str = "batchmean",
) -> Tensor:
    """D(S+ - S-, T+ - T-) on logits (N, C), IGDM Eq. 8; D is KL(softmax dT || softmax dS), |.|_1 or |.|_2^2 of dS - dT.

    Both student branches carry gradient, the teacher's carry none.
    """
    student = upcast(student_plus) - upcast(student_minus)
    teacher = (upcast(teacher_plus) - upcast(teacher_minus)).detach()
    if divergence == "kl":
        return distillation_kl(student, teacher, weight=weight, reduction=reduction)
    difference = student - teacher
    per_class = difference.abs() if divergence == "l1" else difference.square()
    return reduce(per_class.sum(dim=1), weight, reduction, student.shape[1])


def distillation_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """t^2 KL(softmax(teacher / t) || softmax(student / t)) on logits (N, C), Hinton et al. 2015; teacher constant."""
    log_q = F.log_softmax(upcast(student) / temperature, dim=1)
    log_p = F.log_softmax(upcast(teacher.detach()) / temperature, dim=1)
    per_sample = xlog_ratio(log_p, log_q).sum(dim=1) * temperature**2
    return reduce(per_sample, weight, reduction, student.shape[1])


def pgd_step(
    x_adv: Tensor,
    gradient: Tensor,
    x: Tensor,
    *,
    step_size: float,
    epsilon: float,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """clamp(min(max(x_adv + step_size sign(gradient), x - epsilon), x + epsilon), *bounds), Madry et al. 2018."""
    moved = upcast(x_adv) + step_size * upcast(gradient).sign()
    centre = upcast(x)
    moved = torch.minimum(torch.maximum(moved, centre - epsilon), centre + epsilon)
    return moved.clamp(*bounds).to(x_adv.dtype)


def augment(
    images: Tensor,
    rows: Tensor,
    draws: Tensor,
    *,
    padding: int,
    flip: bool,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows of uint8 images (N, H, W, C), one by one: pad, slice, mirror; (B, C, H, W) in [0, 1]."""
    _, height, width, _ = images.shape
    batch = []
    for image, (top, left, flipped) in zip(images[rows], draws.tolist(), strict=True):
        image = F.pad(image, (0, 0, padding, padding, padding, padding))
        image = image[top : top + height, left : left + width] if padding else image
        image = image.flip(1) if flip and flipped else image.clone()
        batch.append(image.permute(2, 0, 1))
    return torch.stack(batch).to(dtype).div_(torch.full((), 255, dtype=dtype, device=images.device))
