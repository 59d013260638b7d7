"""GACD: guided adversarial contrastive distillation (Bai et al. 2020, arXiv 2009.09922), and CRD as its special case.

A reconstruction: the paper fixes teacher anchors, class-wise negatives, the noise-contrastive loss and the
reweighting by the teacher's confidence; every other choice is an option below.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.seeding import derive_seed
from ..kernels.reference import unit, upcast
from ..losses.divergence import log_softmax
from ..losses.functional import class_table, info_nce, nce_bank, sample_negatives, update_bank
from .base import Setup, Step, Term, addon, non_negative, positive, unit_interval
from .heads import linear_head
from .views import View, student, teacher

CRD_EPSILON = 1e-7  # the published CRD code adds it to both denominators


@addon("gacd")
class GACD(Term):
    """weight * L_GACD over t_i = g_T(phi_T(x~_i)), s_i = g_S(phi_S(x~_i)), both L2-normalised; x~ = x' or x.

    With h(t, s) = (e/Z) / (e/Z + k/M), e = exp(t.s / temperature), M = size of the training set, and
    w_i = P_T(x~_i)[y_i] detached (1 when `reweight` is off):

    - "strict":  -(1/B) sum_i w_i [log h(t_i, s_i) + sum_j log(1 - h(t_i, s_j))]; the other-class students of the batch
      first, then samples of a detached student memory bank until each anchor has k = `negatives` of them.
    - "crd": both directions against two memory banks, w_i in every per-sample term. With `reweight = false` and
      `input = "clean"` this IS contrastive representation distillation (Tian et al. 2020).
    - "infonce": -(1/B) sum_i w_i log softmax of the positive among it and the other-class students of the batch
      (`candidates = "batch"`) or of the batch and the whole student bank ("bank").

    Z is set on the first batch, mean(e) * M, and then frozen. Banks are updated after scoring,
    row <- normalise(momentum * row + (1 - momentum) * new). Heads and banks are part of the checkpoint; heads are
    dropped at test. Logs `mi_bound` = E log h(t, s) + log k, a lower bound of the mutual information, for the
    noise-contrastive estimators.
    """

    def __init__(
        self,
        *,
        weight: float = 0.8,
        estimator: Literal["strict", "crd", "infonce"] = "strict",
        input: Literal["adv", "clean"] = "adv",
        reweight: bool = True,
        dim: int = 128,
        temperature: float = 0.07,
        negatives: int = 16384,
        momentum: float = 0.5,
        candidates: Literal["batch", "bank"] = "batch",
    ) -> None:
        super().__init__()
        non_negative(weight=weight)
        positive(dim=dim, temperature=temperature, negatives=negatives)
        unit_interval(momentum=momentum)
        self.weight, self.estimator, self.input, self.reweight = weight, estimator, input, reweight
        self.dim, self.temperature, self.negatives, self.momentum = dim, temperature, negatives, momentum
        self.candidates = candidates

    @property
    def active(self) -> bool:
        return self.weight > 0

    def prepare(self, setup: Setup) -> None:
        self.seed = setup.seed
        self.student_head = linear_head(setup.feature_dims["student"], self.dim, setup, "gacd student")
        self.teacher_head = linear_head(setup.feature_dims["teacher"], self.dim, setup, "gacd teacher")
        self.register_buffer("labels", setup.labels, persistent=False)
        self.register_buffer("classes", class_table(setup.labels), persistent=False)
        for side in self._banks():
            self.register_buffer(f"bank_{side}", self._initial_bank(side, setup))
        self.register_buffer("normalizers", torch.zeros(2, device=setup.device))
        self._normalized = False
        self.register_load_state_dict_post_hook(GACD._after_load)

    def _banks(self) -> tuple[str, ...]:
        if self.estimator == "crd":
            return ("student", "teacher")
        needs_bank = self.estimator == "strict" or self.candidates == "bank"
        return ("student",) if needs_bank else ()

    def _initial_bank(self, side: str, setup: Setup) -> Tensor:
        """Uniform on a cube whose rows have expected squared norm 1, as in the published CRD code."""
        generator = torch.Generator().manual_seed(derive_seed(setup.seed, "bank", side))
        bound = 1 / math.sqrt(self.dim / 3)
        rows = torch.empty(len(setup.labels), self.dim).uniform_(-bound, bound, generator=generator)
        return rows.to(setup.device)

    def _after_load(self, _: object) -> None:
        self._normalized = bool((self.normalizers > 0).all())

    def views(self, epoch: int) -> frozenset[View]:
        return student(self.input) | teacher(self.input)

    def forward(self, step: Step) -> dict[str, Tensor]:
        target = step.teacher(self.input)
        s = _unit(self.student_head(step.student(self.input).features))
        t = _unit(self.teacher_head(target.features))
        weight = None
        if self.reweight:
            weight = log_softmax(target.logits).gather(1, step.y[:, None]).squeeze(1).exp()
            weight = step.gather(weight)
        # Every process scores the whole batch and keeps the same banks.
        s, t = step.gather(s), step.gather(t)
        step = replace(step, y=step.gather(step.y), index=step.gather(step.index))
        loss = getattr(self, f"_{self.estimator}")(step, s, t, weight)
        for side, rows in (("student", s), ("teacher", t)):
            if side in self._banks():
                # In place before the backward pass: every estimator has its gradient, or a copy of the rows, by now.
                bank = getattr(self, f"bank_{side}")
                update_bank(bank, step.index, rows.detach(), self.momentum, inplace=True)
        return {"gacd": self.weight * loss}

    def draw(self, step: Step) -> dict[str, int | Tensor]:
        """Which negatives this step scores, as arguments of `nce_bank`: k of them, seeded by the step's place in the run."""
        return {
            "negatives": self.negatives,
            "seed": derive_seed(self.seed, "negatives", step.epoch, step.batch),
        }

    def _table(self, step: Step) -> Tensor:
        """The drawn negatives as bank rows, int64 (B, k); -1 where an anchor has no row of another class."""
        drawn = self.draw(step)
        if isinstance(drawn["negatives"], Tensor):
            return drawn["negatives"]
        return sample_negatives(self.classes, step.index, drawn["negatives"], seed=drawn["seed"])

    @torch.no_grad()
    def _normalize(self, *mean_exp: Tensor) -> None:
        """Set Z = mean(exp(score)) * M of each direction on the first batch; frozen afterwards."""
        if not self._normalized:
            self.normalizers.copy_(torch.stack([m.expand(()) for m in mean_exp]).expand(2) * len(self.labels))
            self._normalized = True

    def _log_odds(self, score: Tensor, normalizer: Tensor) -> Tensor:
        """log h - log(1 - h) of scores t.s / temperature: h = sigmoid of this."""
        return score - normalizer.log() - math.log(self.negatives / len(self.labels))

    def _bound(self, step: Step, score: Tensor, normalizer: Tensor) -> None:
        """Log the bound from the positives' scores t.s / temperature."""
        with torch.no_grad():
            log_h = F.logsigmoid(self._log_odds(score, normalizer))
            step.metrics["mi_bound"] = log_h.mean() + math.log(self.negatives)

    def _strict(self, step: Step, s: Tensor, t: Tensor, weight: Tensor | None) -> Tensor:
        other = step.y[:, None] != step.y[None, :]
        fresh = t @ s.T / self.temperature
        table = self._table(step)
        # Each anchor has had other.sum() negatives from the batch; the bank supplies the rest of its k.
        wanted = (self.negatives - other.sum(dim=1)).clamp(min=0)
        place = torch.arange(table.shape[1], device=table.device)
        table = torch.where(place < wanted[:, None], table, -1)
        if not self._normalized:
            with torch.no_grad():
                scored = other | torch.eye(len(s), dtype=torch.bool, device=s.device)
                stored = self._scored(t, self.bank_student, table)
                self._normalize(torch.cat([fresh[scored], stored]).exp().mean())
        normalizer = self.normalizers[0]
        score = fresh.diagonal()
        self._bound(step, score, normalizer)
        log_rest = (F.logsigmoid(-self._log_odds(fresh, normalizer)) * other).sum(dim=1)
        from_bank = nce_bank(
            t,
            self.bank_student,
            torch.full_like(step.index, -1),
            negatives=table,
            normalizer=normalizer,
            temperature=self.temperature,
            reduction="none",
        )
        loss = from_bank - F.logsigmoid(self._log_odds(score, normalizer)) - log_rest
        return (loss if weight is None else weight * loss).mean()

    def _scored(self, anchor: Tensor, bank: Tensor, rows: Tensor) -> Tensor:
        """The scores of anchors (B, D) with bank rows (B, n), flat, without the empty places."""
        return (anchor @ bank.T / self.temperature).gather(1, rows.clamp(min=0))[rows >= 0]

    def _crd(self, step: Step, s: Tensor, t: Tensor, weight: Tensor | None) -> Tensor:
        halves = ((s, self.bank_teacher), (t, self.bank_student))
        if not self._normalized:
            rows = torch.cat([step.index[:, None], self._table(step)], dim=1)
            self._normalize(*(self._scored(a, bank, rows).exp().mean() for a, bank in halves))
        score = (s * self.bank_teacher[step.index]).sum(dim=1) / self.temperature
        self._bound(step, score, self.normalizers[0])
        return sum(
            nce_bank(
                anchor,
                bank,
                step.index,
                **self.draw(step),
                normalizer=normalizer,
                labels=self.classes,
                weight=weight,
                temperature=self.temperature,
                eps=CRD_EPSILON,
            )
            for (anchor, bank), normalizer in zip(halves, self.normalizers, strict=True)
        )

    def _infonce(self, step: Step, s: Tensor, t: Tensor, weight: Tensor | None) -> Tensor:
        rows, labels = s, step.y
        if self.candidates == "bank":
            # A sample's own stored row has its label, so the class mask already keeps it out of its negatives.
            rows, labels = torch.cat([s, self.bank_student]), torch.cat([step.y, self.labels])
        return info_nce(
            t,
            rows,
            labels=step.y,
            candidate_labels=labels,
            weight=weight,
            temperature=self.temperature,
            normalize=False,
        )


def _unit(rows: Tensor) -> Tensor:
    """L2-normalised rows, in at least float32 (banks are float32, heads may run under autocast)."""
    return unit(upcast(rows))
