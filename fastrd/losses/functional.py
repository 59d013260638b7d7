"""The losses as functions: arguments are checked, then the kernel or the plain equations run."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.arguments import (
    check_callable,
    check_dense,
    check_features,
    check_flags,
    check_floats,
    check_indices,
    check_matrices,
    check_normalizer,
    check_rows,
    check_same_device,
    check_same_logits,
    check_same_shape,
    check_scalar,
    check_seed,
    check_table,
    check_temperature,
    check_tensor,
    check_weight,
)
from ..core.values import as_integer, check_number, check_option, non_negative, shown, unit_interval
from ..kernels import distillation as _distillation
from ..kernels import draws, reference
from ..kernels import info_nce as _info_nce
from ..kernels import nce_bank as _nce_bank
from ..kernels.runtime import jit

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

EXCHANGES = ("gather", "ring")
BACKENDS = ("auto", "torch", "triton")
DIVERGENCES = ("kl", "l1", "l2")
DISTANCES = ("mse", "cosine", "smooth_l1")
SAMPLE_REDUCTIONS = ("mean", "sum", "none")
CLASS_REDUCTIONS = ("batchmean", "mean", "sum", "none")


def log_softmax(logits: Tensor) -> Tensor:
    """Returns log softmax(logits) over classes, (N, C), in at least float32."""
    return F.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Returns KL(softmax p || softmax q) per sample, (N, C), (N, C) -> (N,); both sides get gradients."""
    log_p, log_q = log_softmax(p_logits), log_softmax(q_logits)
    return reference.xlog_ratio(log_p, log_q).sum(dim=1)


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
    exchange: str | None = None,
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Computes reweighted, class-masked InfoNCE (van den Oord et al. 2018, Eq. 4; softmax form of Bai et al. 2020).

    L_i = -log( e^{a_i.c_p/t} / (e^{a_i.c_p/t} + sum over j of another class of e^{a_i.c_j/t}) ), p = positives[i].

    Args:
        anchor: (N, D), gets a gradient.
        candidates: (M, D), gets a gradient.
        positives: (N,) int64 index of each anchor's positive among the candidates; default arange(N).
        labels: (N,) integer classes of the anchors; candidates of the same class, other than the positive, leave the
            denominator. None: every candidate counts. Within the range of int32.
        candidate_labels: (M,) classes of the candidates; default `labels` when M == N.
        weight: (N,) multiplies L_i.
        temperature: t in [1e-6, 1000].
        normalize: L2-normalise the rows of both sides first.
        reduction: "mean" = sum_i w_i L_i / N, "sum", "none" = (N,).
        exchange: under torch.distributed, "gather" or "ring" make the candidates of every rank of `group` negatives of
            this rank's anchors. Every rank calls with the same N, M and D; `positives` index its own candidates; the
            loss is of its own anchors, and the mean of the ranks' gradients, as DDP takes it, is the gradient of the
            mean loss. "gather" holds all candidates at once, "ring" one rank's at a time.
        group: the process group; default all ranks.

    Kernels and tiles compute a gradient that cannot be differentiated again (refused);
    `fastrd.kernels.reference.info_nce` can.

    Raises ValueError, TypeError: shapes, dtypes, devices or options that do not fit.
    """
    check_features(anchor=anchor, candidates=candidates)
    n, m = len(anchor), len(candidates)
    if positives is None:
        if m < n:
            raise ValueError(f"positives: got None with N = {n} > M = {m}; accepted: int64 (N,) rows of candidates")
        positives = torch.arange(n, device=anchor.device)
    else:
        check_indices(anchor, n, positives=positives)
        check_rows(m, positives=positives)
    if candidate_labels is not None and labels is None:
        raise ValueError("labels: got None beside candidate_labels; accepted: (N,) classes of the anchors")
    if labels is not None and candidate_labels is None:
        if m != n:
            raise ValueError(f"candidate_labels: got None with N = {n}, M = {m}; accepted: (M,) classes")
        candidate_labels = labels
    if labels is not None and candidate_labels is not None:
        check_indices(anchor, n, labels=labels)
        check_indices(anchor, m, candidate_labels=candidate_labels)
    check_weight(weight, anchor)
    check_temperature(temperature)
    check_flags(normalize=normalize)
    check_option("reduction", reduction, SAMPLE_REDUCTIONS)
    if exchange is not None:
        check_option("exchange", exchange, EXCHANGES)
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            accepted = "None, or call init_process_group"
            raise ValueError(f"exchange: got {exchange!r} without a process group; accepted: {accepted}")
    elif group is not None:
        accepted = "None, or exchange='gather'"
        raise ValueError(f"group: got one without exchange, which would be ignored; accepted: {accepted}")
    if torch.float64 in (anchor.dtype, candidates.dtype):
        anchor, candidates = anchor.double(), candidates.double()
    inputs: dict[str, Any] = {
        "positives": positives,
        "labels": labels,
        "candidate_labels": candidate_labels,
        "temperature": temperature,
        "normalize": normalize,
    }
    fused = _backend(backend, anchor)
    if exchange is None and not fused and reduction != "none":
        return _info_nce.info_nce_sum(anchor, candidates, weight=weight, mean=reduction == "mean", **inputs)
    if exchange is None:
        per_sample = _info_nce.info_nce(anchor, candidates, fused=fused, **inputs)
    else:
        from ..kernels.cross_rank import cross_rank_info_nce

        per_sample = cross_rank_info_nce(anchor, candidates, exchange=exchange, group=group, fused=fused, **inputs)
    return reference.reduce(per_sample, weight, reduction)


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
    seed: int | Tensor = 0,
    reduction: str = "mean",
    eps: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Computes one side of noise-contrastive estimation with a memory bank (Bai et al. 2020; Tian et al. 2020, Eq. 18).

    L_i = -[ log h(a_i, r_p) + sum over negatives n of log(1 - h(a_i, r_n)) ],
    h(a, r) = (e/Z) / (e/Z + k/M + eps), 1 - h standing for (k/M) / (e/Z + k/M + eps), e = exp(a.r / temperature).

    The whole bank is multiplied with all anchors in one pass that also gives the gradient: neither B x k rows nor, for
    a number k, a table of draws is ever stored.

    Args:
        anchor: (B, D), already L2-normalised; gets a gradient.
        bank: (M, D), constant; may be updated before the backward pass of this loss.
        positives: (B,) int64 row of each anchor's positive.
        negatives: int64 rows (B, k), where -1 is an empty place, and positives may be -1 as well, no positive; an int
            k, drawn on the device from the rows of other classes, reproducible from `seed` (see `sample_negatives`); or
            "all", every row of another class, k then being their number. An anchor without rows of another class has no
            negatives: with an int k its loss is -log h of the positive, with "all" h is 1 and the loss 0.
        normalizer: Z > 0, a float or a scalar tensor.
        labels: (M,) integer classes of the rows, or `class_table(labels)`, which saves sorting them at each call;
            needed unless `negatives` is a table.
        weight: (B,) multiplies L_i.
        temperature: in [1e-6, 1000].
        seed: of the draw when `negatives` is an int: an int of 64 bits, or an int64 scalar tensor on the device, which
            a captured graph or a compiled step can count up.
        reduction: "mean" = sum_i w_i L_i / B, "sum", "none" = (B,).
        eps: added to both denominators; the published CRD code uses 1e-7.

    Raises ValueError, TypeError: shapes, dtypes, devices or options that do not fit.
    """
    check_features(anchor=anchor, bank=bank)
    check_indices(anchor, len(anchor), positives=positives)
    if isinstance(negatives, Tensor):
        check_table(anchor, len(bank), negatives=negatives)
        check_rows(len(bank), -1, positives=positives)
        classes = None
    else:
        if not isinstance(negatives, str) or negatives != "all":
            negatives = _draws(negatives, "negatives", " or an int64 (B, k) table, or 'all'")
        if labels is None:
            raise ValueError(f"labels: got None with negatives={negatives!r}; accepted: (M,) classes of the rows")
        classes = _classes(labels, len(bank))
        check_same_device(anchor, labels=labels)
        check_rows(len(bank), positives=positives)
        check_seed(seed)
    check_normalizer(anchor, normalizer)
    check_weight(weight, anchor)
    check_temperature(temperature)
    non_negative(eps=eps)
    check_option("reduction", reduction, SAMPLE_REDUCTIONS)
    return _nce_bank.nce_bank(
        anchor,
        bank,
        positives,
        negatives=negatives,
        normalizer=normalizer if isinstance(normalizer, Tensor) else float(normalizer),
        classes=classes,
        weight=weight,
        temperature=temperature,
        seed=seed,
        reduction=reduction,
        eps=float(eps),
        fused=_backend(backend, anchor),
    )


def class_table(labels: Tensor) -> Tensor:
    """Returns the integer labels (M,) of a bank's rows, sorted once for every later draw: int32 (4, M).

    `nce_bank` and `sample_negatives` take it in place of labels.
    """
    if not isinstance(labels, Tensor) or labels.ndim == 0:
        raise TypeError(f"labels: got {shown(labels)}; accepted: integers (M,)")
    return _classes(labels, labels.shape[-1])


def sample_negatives(labels: Tensor, positives: Tensor, k: int, *, seed: int | Tensor) -> Tensor:
    """Returns the rows that `nce_bank(negatives=k, seed=seed)` scores: int64 (B, k), rows whose label is not the
    positive's.

    labels (M,) integers or their `class_table`, positives (B,) int64 rows, seed of 64 bits. The same on every device.
    Every row of another class is equally likely; each class gets its share of the k, to within the rounding; no row
    comes twice where an anchor has at least k such rows, each comes k // n or k // n + 1 times where it has n < k, and
    where it has none all are -1. The first columns are as evenly spread as all.

    Raises ValueError: k < 1 or above 2**20.
    """
    k = _draws(k, "k")
    check_seed(seed)
    classes = class_table(labels)
    check_tensor(positives=positives)
    check_indices(classes, positives.numel(), positives=positives)
    check_rows(classes.shape[1], positives=positives)
    return draws.sample_negatives(classes, positives, k, seed)


@torch.no_grad()
def update_bank(
    bank: Tensor, rows: Tensor, values: Tensor, momentum: float, *, inplace: bool = False, backend: str = "auto"
) -> Tensor:
    """Returns the bank (M, D) after row <- normalise(momentum * row + (1 - momentum) * value) at `rows` (B,) int64.

    values (B, D). Where a row occurs twice its last occurrence wins, from the row as it was before the call: the same
    result on every device and every run. `inplace` changes and returns `bank` itself; `nce_bank` allows that before
    its backward pass.

    Raises ValueError: momentum outside [0, 1] or shapes that do not fit.
    """
    unit_interval(momentum=momentum)
    check_flags(inplace=inplace)
    check_floats(bank=bank, values=values)
    check_matrices(bank=bank)
    check_tensor(rows=rows)
    check_indices(bank, rows.numel(), rows=rows)
    check_rows(len(bank), rows=rows)
    if values.shape != (len(rows), bank.shape[1]):
        raise ValueError(f"values: got shape {tuple(values.shape)}; accepted: {(len(rows), bank.shape[1])}")
    if inplace and any(n > 1 and not stride for n, stride in zip(bank.shape, bank.stride(), strict=True)):
        raise ValueError("bank: got an expanded tensor with inplace=True; accepted: one with a place for each element")
    bank = bank if inplace else bank.clone()
    _nce_bank.update_bank(bank, rows, values.detach(), momentum, _form(backend, bank))
    return bank


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
    """Computes indirect gradient distillation: D(S(x+d) - S(x-d), T(x+d) - T(x-d)) on logits (Lee et al. 2025, Eq. 8).

    Args:
        student_plus, student_minus: (N, C) student logits at x+d and x-d; both get gradients.
        teacher_plus, teacher_minus: (N, C) teacher logits; constant.
        weight: (N,) multiplies the per-sample losses.
        divergence: "kl" = KL(softmax dT || softmax dS) at temperature 1, "l1" = sum_c |dS - dT|,
            "l2" = sum_c (dS - dT)^2.
        reduction: "batchmean" = mean over samples, "mean" = mean over samples AND classes, "sum", "none" = (N,).

    Raises ValueError, TypeError: shapes, dtypes, devices or options that do not fit.
    """
    teachers = {"teacher_plus": teacher_plus, "teacher_minus": teacher_minus}
    check_same_logits(student_plus=student_plus, student_minus=student_minus, **teachers)
    check_weight(weight, student_plus)
    check_option("divergence", divergence, DIVERGENCES)
    check_option("reduction", reduction, CLASS_REDUCTIONS)
    options = _distillation.Options(divergence=divergence, base_reduction=reduction, difference_reduction=reduction)
    return _distillation.distillation(
        student_plus,
        student_minus,
        **teachers,
        weight=weight,
        options=options,
        backend=_form(backend, student_plus, _distillation.fits(student_plus)),
    ).total


def distillation_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
    backend: str = "auto",
) -> Tensor:
    """Computes t^2 KL(softmax(teacher / t) || softmax(student / t)), t = temperature (Hinton et al. 2015).

    Args:
        student: (N, C) logits, gets a gradient.
        teacher: (N, C) logits, constant.
        temperature: in [1e-6, 1000].
        weight: (N,) multiplies the per-sample losses.
        reduction: "batchmean" = mean over samples, "mean" = mean over samples AND classes, "sum", "none" = (N,).

    Raises ValueError, TypeError: shapes, dtypes, devices or options that do not fit.
    """
    check_same_logits(student=student, teacher=teacher)
    check_weight(weight, student)
    check_temperature(temperature)
    check_option("reduction", reduction, CLASS_REDUCTIONS)
    options = _distillation.Options(temperature=temperature, base_reduction=reduction, difference_reduction=reduction)
    return _distillation.distillation(
        student,
        teacher=teacher,
        weight=weight,
        options=options,
        backend=_form(backend, student, _distillation.fits(student)),
    ).total


class FusedLosses(NamedTuple):
    """What `fused_objective` gives. Backpropagate `total`; the rest is for the log."""

    total: Tensor
    base: Tensor
    """t^2 KL on its own, as it enters the total."""
    difference: Tensor
    """alpha * ramp * D, as it enters the total."""
    contrast: Tensor
    """The contrastive term, as it enters the total; 0 without one."""
    weight: Tensor
    """(N,) contrast_weight * P_T[y], what the contrastive term was weighed with."""


def fused_objective(
    student_plus: Tensor,
    student_minus: Tensor,
    teacher_plus: Tensor,
    teacher_minus: Tensor,
    *,
    labels: Tensor,
    alpha: float,
    ramp: float | Tensor = 1.0,
    teacher: Tensor | None = None,
    confidence: Tensor | None = None,
    temperature: float = 1.0,
    divergence: str = "kl",
    reduction: str = "batchmean",
    difference_reduction: str = "batchmean",
    reweight: Collection[str] = ("contrast",),
    contrast: Callable[..., Tensor] | None = None,
    contrast_weight: float = 0.8,
    backend: str = "auto",
) -> FusedLosses:
    """Computes base distillation + IGDM + GACD: one launch for all logits, one forward pass for all features.

    For trainers that have all logits at hand and many classes. The methods of this package call the losses one by one:
    beside the networks of a step, launches saved on 10 to 100 classes are not seen.

    total = reduce(t^2 KL(softmax(T/t) || softmax(S+/t))) + alpha * ramp * reduce(D(S+ - S-, T+ - T-))
            + contrast_weight * contrast,   contrast and, on request, the others weighed by w_i = softmax(R_i)[y_i]

    Args:
        student_plus, student_minus: (N, C) student logits at x+d and x-d; both get gradients. S+ is the base loss's
            student too.
        teacher_plus, teacher_minus: (N, C) teacher logits; constant.
        labels: (N,) int64 true classes y.
        alpha: coefficient of the difference term.
        ramp: its schedule, epoch / epochs; a scalar tensor on the device can change inside a captured graph.
        teacher: (N, C) T, the base loss's target; default teacher_plus.
        confidence: (N, C) R, the teacher's logits at the image whose confidence weighs the sample; default
            teacher_plus.
        temperature: t > 0 of the base loss.
        divergence: of the difference term, see `gradient_matching`.
        reduction, difference_reduction: "batchmean", "mean" or "sum" of the base and the difference term.
        reweight: which terms w_i multiplies, of "base", "difference", "contrast".
        contrast: called with weight=(N,), gives the feature term as a scalar, its weight included:
            `functools.partial(info_nce, t, s, labels=y)`, or `nce_bank` or a sum of two likewise.
        contrast_weight: multiplies the contrastive term.

    Raises ValueError, TypeError: shapes, dtypes, devices or options that do not fit.
    """
    teachers: dict[str, Any] = {
        "teacher_plus": teacher_plus,
        "teacher_minus": teacher_minus,
        "teacher": teacher_plus if teacher is None else teacher,
        "confidence": teacher_plus if confidence is None else confidence,
    }
    check_same_logits(student_plus=student_plus, student_minus=student_minus, **teachers)
    check_indices(student_plus, len(student_plus), labels=labels)
    check_rows(student_plus.shape[1], labels=labels)
    check_temperature(temperature)
    check_number(alpha=alpha, contrast_weight=contrast_weight)
    alpha, contrast_weight = float(alpha), float(contrast_weight)
    if isinstance(ramp, Tensor):
        check_scalar(student_plus, ramp=ramp)
        ramp = ramp.reshape(())
    else:
        check_number(ramp=ramp)
        ramp = float(ramp)
    if contrast is not None:
        check_callable(contrast=contrast)
    check_option("divergence", divergence, DIVERGENCES)
    for name, chosen in (("reduction", reduction), ("difference_reduction", difference_reduction)):
        check_option(name, chosen, CLASS_REDUCTIONS[:-1])
    if isinstance(reweight, (str, Tensor)) or not isinstance(reweight, Collection):
        raise TypeError(f"reweight: got {shown(reweight)}; accepted: a list of names")
    for term in reweight:
        check_option("reweight", term, ("base", "difference", "contrast"))
    on_device = ramp if isinstance(ramp, Tensor) else None
    total, terms, weight = _distillation.distillation(
        student_plus,
        student_minus,
        **teachers,
        labels=labels,
        ramp=on_device,
        options=_distillation.Options(
            temperature=temperature,
            difference_coefficient=alpha if on_device is not None else alpha * float(ramp),
            base_reduction=reduction,
            difference_reduction=difference_reduction,
            divergence=divergence,
            weight_scale=contrast_weight,
            weigh_base="base" in reweight,
            weigh_difference="difference" in reweight,
        ),
        backend=_form(backend, student_plus, _distillation.fits(student_plus)),
    )
    base, difference = terms.unbind()
    if "contrast" not in reweight:
        weight = torch.full_like(weight, contrast_weight)
    if contrast is None:
        return FusedLosses(total, base, difference, torch.zeros_like(base), weight)
    features = contrast(weight=weight)
    check_scalar(total, contrast=features)
    features = features.reshape(())
    return FusedLosses(total + features, base, difference, features.detach(), weight)


def feature_alignment(
    student: Tensor, target: Tensor, *, distance: str = "mse", weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Computes the distance of student features to constant target features (VFD-Adv, Cao et al. 2022; our choice).

    Args:
        student: (N, ...) features, gets a gradient; everything after the first dimension is one feature vector.
        target: same shape, constant.
        distance: per sample, "mse" = mean over features of the squared difference, "cosine" = 1 - cosine similarity,
            "smooth_l1" = mean over features of Huber's loss with threshold 1.
        weight: (N,) multiplies the per-sample distances.
        reduction: "mean" over samples, "sum", "none" = (N,).

    Raises ValueError, TypeError: shapes, dtypes, devices or options that do not fit.
    """
    check_floats(student=student, target=target)
    if student.ndim < 2 or student.numel() == 0:
        raise ValueError(f"student: got shape {tuple(student.shape)}; accepted: non-empty (N, ...) features")
    check_same_shape(student=student, target=target)
    check_weight(weight, student)
    check_option("distance", distance, DISTANCES)
    check_option("reduction", reduction, SAMPLE_REDUCTIONS)
    s, t = reference.upcast(student).flatten(1), reference.upcast(target.detach()).flatten(1)
    if distance == "mse":
        per_sample = (s - t).square().mean(dim=1)
    elif distance == "cosine":
        per_sample = 1 - (reference.unit(s) * reference.unit(t)).sum(dim=1)
    else:
        per_sample = F.smooth_l1_loss(s, t, reduction="none").mean(dim=1)
    return reference.reduce(per_sample, weight, reduction)


def _backend(backend: str, x: Tensor, fused: bool = True) -> bool:
    """Whether to launch the Triton kernels; `fused` says whether the loss has any."""
    check_option("backend", backend, BACKENDS)
    if backend == "torch" or (backend == "auto" and not x.is_cuda):
        return False
    obstacle = None
    if not fused:
        obstacle = "a loss that has no kernel"
    elif not jit.AVAILABLE:
        obstacle = "Triton not installed"
    elif x.dtype == torch.float64:
        obstacle = "float64 inputs"
    elif not x.is_cuda and not jit.interpreted():
        obstacle = f"inputs on {x.device}"
    if backend == "triton" and obstacle is not None:
        raise ValueError(f"backend: got 'triton' with {obstacle}; accepted: 'auto' or 'torch' here")
    return obstacle is None


def _form(backend: str, x: Tensor, fused: bool = True) -> str:
    """The backend: "triton" in place of "auto" where the kernels run."""
    return "triton" if _backend(backend, x, fused) else backend


def _draws(k: Any, name: str, others: str = "") -> int:
    accepted = f"an int from 1 to {_nce_bank.MAX_DRAWS}{others}"
    number = as_integer(k)
    if number is None or not 1 <= number <= _nce_bank.MAX_DRAWS:
        raise ValueError(f"{name}: got {shown(k)}; accepted: {accepted}")
    return number


def _classes(labels: Tensor, rows: int) -> Tensor:
    """The class table of `labels`, which may be one already."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: got {type(labels).__name__}; accepted: integers ({rows},)")
    if not rows:
        raise ValueError(f"labels: got shape {tuple(labels.shape)}; accepted: (M,), M >= 1")
    if rows > _nce_bank.MAX_ROWS:
        raise ValueError(f"bank: got {rows} rows; accepted: up to {_nce_bank.MAX_ROWS} where negatives are drawn")
    if labels.shape == (4, rows) and labels.dtype == torch.int32:
        looked_at = labels.device.type == "cpu" and not torch.compiler.is_compiling()  # a GPU would be waited for
        if looked_at and not draws.is_class_table(labels):
            got = f"int32 {tuple(labels.shape)} that are not of class_table"
            raise ValueError(f"labels: got {got}; accepted: integers ({rows},) or their class_table")
        check_dense(labels=labels)
        return labels.contiguous()
    check_indices(labels, rows, labels=labels)
    return draws.class_table(labels)
