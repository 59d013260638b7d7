"""nce_bank in PyTorch: all scores of some anchors at a time, those that count picked out of them.
nce_bank.py has the equations."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import draws
from .reference import unit

SCORES = 2**22
"""What the PyTorch form holds of the B x M scores at a time (16 MB; at least 16 anchors' worth), ..."""
PICKED = 2**17
"""... and of those an anchor is contrasted with: 512 kB, which stay in a core's cache."""
CAST_ROWS = 8192


class Problem(NamedTuple):
    """One call's arguments; `fastrd.losses.nce_bank` explains them."""

    anchor: Tensor
    """(B, D)"""
    bank: Tensor
    """(M, D)"""
    positives: Tensor
    """(B,) int64; with a table -1 where there is none."""
    table: Tensor | None
    """(B, k) int64 rows, -1 an empty place; None: drawn."""
    k: int
    """0: all rows of other classes."""
    classes: Tensor | None
    """(4, M) int32 of `draws.class_table`; None with a table."""
    seed: Tensor | None
    """() int64, where k rows are drawn."""
    normalizer: Tensor
    """()"""
    weight: Tensor | None
    """(B,)"""
    temperature: float
    eps: float
    reduction: str
    gradient: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.anchor.dtype, torch.float32)

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Empty: the loss, and the anchors' gradient (1, B, D), or (0, B, D) where not asked for."""
        kept = self.anchor.shape[:1] if self.reduction == "none" else ()
        shapes = kept, (int(self.gradient), *self.anchor.shape)
        loss, slopes = (self.anchor.new_empty(shape, dtype=self.dtype) for shape in shapes)
        return loss, slopes


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    anchor, bank, positives, table, k, classes, seed, normalizer, weight = problem[:9]
    temperature, eps, reduction, gradient = problem[9:]
    batch, rows = len(anchor), len(bank)
    anchor = anchor.to(problem.dtype) / temperature
    log_z = normalizer.to(problem.dtype).log()
    losses = anchor.new_empty(batch)
    _, slopes = problem.outputs()
    step = max(16, SCORES // rows)
    for start in range(0, batch, step):
        score = _scores(anchor[start : start + step], bank)
        few = max(1, PICKED // (k or rows))
        for first in range(0, len(score), few):
            part = slice(start + first, start + min(first + few, len(score)))
            chosen = None
            if table is not None:
                chosen = table[part]
            elif k and classes is not None and seed is not None:
                chosen = draws.draw(classes, positives[part], k, seed, part.start)
            losses[part] = _score_to_slope(
                score[first : first + few], positives[part, None], chosen, classes, log_z, eps
            )
        if gradient:
            slopes[0, start : start + step] = _times_bank(score, bank)
    if weight is not None:
        losses *= weight
        if gradient:
            slopes *= weight[:, None]
    mean = 1 / batch if reduction == "mean" else 1.0
    return losses if reduction == "none" else losses.sum() * mean, slopes.mul_(mean / temperature)


def _score_to_slope(
    score: Tensor, own: Tensor, chosen: Tensor | None, classes: Tensor | None, log_z: Tensor, eps: float
) -> Tensor:
    """The losses (B,) of scores (B, M), which it replaces by their gradient."""
    rows = score.shape[1]
    if chosen is not None:
        noise = torch.full_like(score[:, :1], chosen.shape[1] / rows)
        other, chosen = chosen >= 0, chosen.clamp(min=0)
    else:
        assert classes is not None, "without chosen rows all rows of other classes are"
        _, place, first, size = classes
        noise = (rows - size[own]).to(score.dtype) / rows
        other = (place < first[own]) | (place >= first[own] + size[own])
    shift = log_z + (noise + eps).log()
    has_positive, own = own >= 0, own.clamp(min=0)
    positive = score.gather(1, own) - shift
    u = (score if chosen is None else score.gather(1, chosen)).sub_(shift)
    # Where nothing is to be added noise may be 0 and u infinite.
    rest = torch.where(other, F.softplus(u).add_(torch.log1p(eps / noise)), 0).sum(dim=1)
    slope = u.sigmoid_().mul_(other)
    if chosen is not None:
        score.zero_().scatter_add_(1, chosen, slope)
    score.scatter_add_(1, own, torch.sigmoid(-positive).neg_().mul_(has_positive))
    return torch.where(has_positive, F.softplus(-positive), 0).squeeze(1) + rest


def _scores(anchor: Tensor, bank: Tensor) -> Tensor:
    if bank.dtype == anchor.dtype:
        return anchor @ bank.T
    return torch.cat([anchor @ rows.to(anchor.dtype).T for rows in bank.split(CAST_ROWS)], dim=1)


def _times_bank(slope: Tensor, bank: Tensor) -> Tensor:
    if bank.dtype == slope.dtype:
        return slope @ bank
    return sum(
        part @ rows.to(slope.dtype)
        for part, rows in zip(slope.split(CAST_ROWS, dim=1), bank.split(CAST_ROWS), strict=True)
    )


def update_in_torch(bank: Tensor, rows: Tensor, values: Tensor, momentum: float) -> None:
    """`fastrd.losses.update_bank` in place, without Triton."""
    dtype = torch.promote_types(bank.dtype, torch.float32)
    ordered, order = rows.sort(stable=True)
    last = order[torch.searchsorted(ordered, rows, right=True) - 1]
    blended = bank[rows].to(dtype).mul_(momentum).add_(values[last].to(dtype), alpha=1 - momentum)
    # The last value of a row is written by all of its occurrences, so that their order does not matter.
    bank.index_copy_(0, rows, unit(blended).to(bank.dtype))
