"""Contrastive distillation of features: heads, memory banks and three estimators, for any trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.arguments import (
    check_features,
    check_floats,
    check_indices,
    check_matrices,
    check_rows,
    check_seed,
    check_table,
    check_temperature,
    check_tensor,
    check_weight,
)
from ..core.seeding import derive_seed
from ..core.values import check_integer, check_option, shown, unit_interval
from ..kernels.nce_bank import MAX_DRAWS
from ..kernels.reference import unit, upcast
from .functional import class_table, info_nce, nce_bank, sample_negatives, update_bank
from .heads import linear_head

CRD_EPSILON = 1e-7  # the published CRD code adds it to both denominators
TEMPERATURE = {"infonce": 0.2, "crd": 0.07, "strict": 0.07}  # estimator -> default
CANDIDATES = ("batch", "bank")


class ContrastiveDistillation(nn.Module):
    """Computes reweighted contrastive distillation: GACD (Bai et al. 2020), and CRD (Tian et al. 2020) with w = 1.

    With t_i = g_T(phi_T(x_i)), s_i = g_S(phi_S(x_i)), both L2-normalised, weights w_i,
    h(t, s) = (e/Z) / (e/Z + k/M), e = exp(t.s / temperature), M = size of the training set:

    - "infonce": -(1/B) sum_i w_i log softmax of the positive among it and the other-class students of the batch
      (`candidates = "batch"`) or of the batch and the whole student bank ("bank"). Its gradient is bounded by
      construction: over a batch the norms of the gradients with respect to the s_j, and those with respect to the t_i,
      sum to at most 2 mean(w) / temperature each, whatever the embeddings and however many candidates.
    - "crd": noise-contrastive estimation in both directions against two memory banks, w_i in every per-sample term.
      On clean images with w = 1 this is contrastive representation distillation.
    - "strict": -(1/B) sum_i w_i [log h(t_i, s_i) + sum_j log(1 - h(t_i, s_j))]; the other-class students of the batch
      first, then samples of a detached student memory bank until each anchor has k = `negatives` of them. Its gradient
      grows with k / temperature where all embeddings lie close together, as they do in the first steps: docs/gacd.md.

    "crd" and "strict" set Z on the first batch, mean(e) * M, and then freeze it. Banks are updated after scoring,
    row <- normalise(momentum * row + (1 - momentum) * new). Heads, banks and Z are the state dict; the heads train
    with the student (give `parameters()` to the optimiser) and are dropped at test.

    Args:
        student_dim, teacher_dim: widths of the features.
        labels: (M,) integer classes of the training set; everything is created on its device.
        estimator: "infonce", "crd" or "strict".
        candidates: "batch" or "bank", of "infonce".
        dim: width of the embeddings.
        temperature: above 0; default: 0.2 for "infonce" (docs/gacd.md), 0.07, CRD's, for the others.
        negatives: k of "crd" and "strict", from 1 to 2**20.
        momentum: of the banks, in [0, 1].
        seed: of heads and banks.

    Attributes:
        metrics: scalars of the last call, on the device, without gradient. "misranked": share of anchors to which some
            other-class student of the batch is at least as similar as the positive; defined alike for all estimators.
            "mi_bound" ("crd", "strict"): E log h(t, s) + log k, a lower bound of the mutual information.

    Raises ValueError: an option outside what is accepted.
    """

    normalizers: Tensor
    bank_student: Tensor
    bank_teacher: Tensor
    labels: Tensor
    classes: Tensor

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        labels: Tensor,
        *,
        estimator: Literal["infonce", "crd", "strict"] = "infonce",
        candidates: Literal["batch", "bank"] = "batch",
        dim: int = 128,
        temperature: float | None = None,
        negatives: int = 16384,
        momentum: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_integer(least=1, student_dim=student_dim, teacher_dim=teacher_dim)
        check_tensor(labels=labels)
        check_indices(labels, max(1, labels.numel()), labels=labels)  # no class table: the labels are read too
        self.check(estimator, candidates, dim, temperature, negatives, momentum)
        self.estimator, self.candidates = estimator, candidates
        self.temperature = TEMPERATURE[estimator] if temperature is None else temperature
        self.negatives, self.momentum = negatives, momentum
        self.student_head = linear_head(student_dim, dim, seed, "gacd student")
        self.teacher_head = linear_head(teacher_dim, dim, seed, "gacd teacher")
        self.register_buffer("labels", labels, persistent=False)
        self.register_buffer("classes", class_table(labels), persistent=False)
        for side in self.banks:
            # Uniform on a cube whose rows have expected squared norm 1, as in the published CRD code.
            generator = torch.Generator().manual_seed(derive_seed(seed, "bank", side))
            bound = 1 / math.sqrt(dim / 3)
            rows = torch.empty(len(labels), dim, dtype=torch.float32, device="cpu").uniform_(
                -bound, bound, generator=generator
            )
            self.register_buffer(f"bank_{side}", rows)
        self.register_buffer("normalizers", torch.zeros(2, dtype=torch.float32, device="cpu"))
        self.register_load_state_dict_post_hook(_find_normalized)
        self._normalized = False
        self.metrics: dict[str, Tensor] = {}
        self.to(labels.device, torch.get_default_dtype())  # the same draws in every dtype

    @staticmethod
    def check(
        estimator: str, candidates: str, dim: int, temperature: float | None, negatives: int, momentum: float
    ) -> None:
        """Raises ValueError unless the options are usable."""
        check_option("estimator", estimator, tuple(TEMPERATURE))
        check_option("candidates", candidates, CANDIDATES)
        check_integer(least=1, dim=dim)
        check_integer(least=1, most=MAX_DRAWS, negatives=negatives)
        if temperature is not None:
            check_temperature(temperature)
        unit_interval(momentum=momentum)

    @property
    def banks(self) -> tuple[str, ...]:
        """Sides that have a memory bank."""
        if self.estimator == "crd":
            return ("student", "teacher")
        return ("student",) if self.estimator == "strict" or self.candidates == "bank" else ()

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        index: Tensor,
        *,
        weight: Tensor | None = None,
        draw: int | Tensor | None = None,
        gather: Callable[[Tensor], Tensor] = lambda rows: rows,
    ) -> Tensor:
        """Returns the loss of a batch, a scalar; banks are updated.

        Args:
            student, teacher: (B, student_dim) and (B, teacher_dim) features of the same images,
                cast to the dtype of the heads.
            index: (B,) int64 positions of the images in the training set.
            weight: (B,) w_i, constant; None means 1.
            draw: for "crd" and "strict", a 64-bit seed of the negatives that is another in each step, or an int64
                (B, negatives) table of bank rows (-1: none) to take instead, B that of the whole batch.
            gather: rows of this process -> those of the whole batch, differentiable. Every process then scores the
                whole batch and keeps the same banks.

        Raises ValueError, TypeError, IndexError: shapes, dtypes, devices or values that do not fit.
        """
        check_floats(student=student, teacher=teacher)
        check_matrices(student=student, teacher=teacher)
        for name, x, head in (("student", student, self.student_head), ("teacher", teacher, self.teacher_head)):
            if x.shape != (len(student), head.in_features):
                raise ValueError(f"{name}: got shape {tuple(x.shape)}; accepted: ({len(student)}, {head.in_features})")
        check_indices(student, len(student), index=index)
        check_rows(len(self.labels), index=index)
        check_weight(weight, student)
        if not callable(gather):
            raise TypeError(f"gather: got {shown(gather)}; accepted: a function from rows to those of the whole batch")
        if self.estimator != "infonce":
            if draw is None:
                raise ValueError(
                    f"draw: got None with estimator {self.estimator!r}; accepted: a seed that is another in each step, "
                    "or an int64 (B, k) table of bank rows"
                )
            if not _is_table(draw):
                check_seed(draw, "draw")
        s, t = (
            gather(unit(upcast(head((x.clone() if x.is_inference() else x).to(next(head.parameters(), x).dtype)))))
            for head, x in ((self.student_head, student), (self.teacher_head, teacher))
        )
        index, weight = gather(index), None if weight is None else gather(weight.detach())
        for rows in (s, t):
            check_features(gather=rows)
        check_indices(s, len(s), index=index)
        check_weight(weight, s)
        if self.estimator != "infonce" and _is_table(draw):
            check_table(s, len(self.labels), self.negatives, draw=draw)
        y = self.labels[index]
        other = y[:, None] != y[None, :]
        with torch.autocast(s.device.type, enabled=False):
            with torch.no_grad():
                similarity = t @ s.T
                nearest = similarity.masked_fill(~other, -torch.inf).amax(dim=1)
                self.metrics = {"misranked": (nearest >= similarity.diagonal()).to(s.dtype).mean()}
            if draw is None or self.estimator == "infonce":
                loss = self._infonce(s, t, y, weight)
            elif self.estimator == "crd":
                loss = self._crd(s, t, index, weight, draw)
            else:
                loss = self._strict(s, t, index, other, weight, draw)
        for side, rows in (("student", s), ("teacher", t)):
            if side in self.banks:
                # In place before the backward pass: every estimator has its gradient, or a copy of the rows, by now.
                update_bank(getattr(self, f"bank_{side}"), index, rows.detach(), self.momentum, inplace=True)
        return loss

    def table(self, index: Tensor, draw: int | Tensor) -> Tensor:
        """Returns the drawn negatives as bank rows, int64 (B, k); -1 where an anchor has no row of another class."""
        if _is_table(draw):
            return draw
        check_tensor(index=index)
        check_indices(self.classes, index.numel(), index=index)
        check_rows(len(self.labels), index=index)
        check_seed(draw, "draw")
        return sample_negatives(self.classes, index, self.negatives, seed=draw)

    def _infonce(self, s: Tensor, t: Tensor, y: Tensor, weight: Tensor | None) -> Tensor:
        rows, labels = s, y
        if self.candidates == "bank":
            # A sample's own stored row has its label, so the class mask already keeps it out of its negatives.
            rows, labels = torch.cat([s, self.bank_student]), torch.cat([y, self.labels])
        options: dict[str, Any] = {"weight": weight, "temperature": self.temperature, "normalize": False}
        return info_nce(t, rows, labels=y, candidate_labels=labels, **options)

    def _crd(self, s: Tensor, t: Tensor, index: Tensor, weight: Tensor | None, draw: int | Tensor) -> Tensor:
        halves = ((s, self.bank_teacher), (t, self.bank_student))
        if not self._normalized:
            rows = torch.cat([index[:, None], self.table(index, draw)], dim=1)
            self._normalize(*(self._scored(a, bank, rows).exp().mean() for a, bank in halves))
        self._bound((s * self.bank_teacher[index]).sum(dim=1) / self.temperature)
        options: dict[str, Any] = {"labels": self.classes, "weight": weight, "temperature": self.temperature}
        options |= {"negatives": draw} if _is_table(draw) else {"negatives": self.negatives, "seed": draw}
        s_loss, t_loss = (
            nce_bank(anchor, bank, index, normalizer=normalizer, eps=CRD_EPSILON, **options)
            for (anchor, bank), normalizer in zip(halves, self.normalizers, strict=True)
        )
        return s_loss + t_loss

    def _strict(
        self, s: Tensor, t: Tensor, index: Tensor, other: Tensor, weight: Tensor | None, draw: int | Tensor
    ) -> Tensor:
        if len(s) > self.negatives:
            other = other & (other.cumsum(dim=1) <= self.negatives)
        fresh = t @ s.T / self.temperature
        table = self.table(index, draw)
        # Each anchor has had other.sum() negatives from the batch; the bank supplies the rest of its k.
        wanted = (self.negatives - other.sum(dim=1)).clamp(min=0)
        place = torch.arange(table.shape[1], device=table.device)
        table = torch.where(place < wanted[:, None], table, -1)
        if not self._normalized:
            with torch.no_grad():
                scored = other | torch.eye(len(s), dtype=torch.bool, device=s.device)
                stored = self._scored(t, self.bank_student, table)
                self._normalize(torch.cat([fresh[scored], stored]).exp().mean())
        log_h = self._bound(fresh.diagonal())
        log_rest = (F.logsigmoid(-self._log_odds(fresh)) * other).sum(dim=1)
        options: dict[str, Any] = {"temperature": self.temperature, "reduction": "none"}
        no_positive, normalizer = torch.full_like(index, -1), self.normalizers[0]
        from_bank = nce_bank(t, self.bank_student, no_positive, negatives=table, normalizer=normalizer, **options)
        loss = from_bank - log_h - log_rest
        return (loss if weight is None else weight * loss).mean()

    def _scored(self, anchor: Tensor, bank: Tensor, rows: Tensor) -> Tensor:
        """The scores of anchors (B, D) with bank rows (B, n), flat, without the empty places."""
        return (anchor @ bank.to(anchor.dtype).T / self.temperature).gather(1, rows.clamp(min=0))[rows >= 0]

    def _log_odds(self, score: Tensor) -> Tensor:
        """log h - log(1 - h) of scores t.s / temperature: h = sigmoid of this."""
        return score - self.normalizers[0].log() - math.log(self.negatives / len(self.labels))

    def _bound(self, score: Tensor) -> Tensor:
        """log h of the positives' scores t.s / temperature, and the bound that it gives as a metric."""
        log_h = F.logsigmoid(self._log_odds(score))
        self.metrics["mi_bound"] = log_h.detach().mean() + math.log(self.negatives)
        return log_h

    @torch.no_grad()
    def _normalize(self, *mean_exp: Tensor) -> None:
        """Set Z = mean(exp(score)) * M of each direction on the first batch."""
        self.normalizers.copy_(torch.stack(mean_exp).expand(2) * len(self.labels))
        self._normalized = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = self.normalizers
        super()._apply(fn, recurse)
        if self.normalizers.dtype.itemsize < 4:  # Z is beyond half precision
            self.normalizers = kept.to(self.normalizers.device)
        return self


def _find_normalized(module: ContrastiveDistillation, _: object) -> None:
    module._normalized = bool((module.normalizers > 0).all())


def _is_table(draw: int | Tensor | None) -> TypeGuard[Tensor]:
    return isinstance(draw, Tensor) and draw.ndim == 2
