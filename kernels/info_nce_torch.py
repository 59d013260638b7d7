"""InfoNCE in PyTorch on tiles of scores that stay in the processor's cache: info_nce.py without Triton.

Logarithms are natural here, where the kernels take those to base 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .cpu import native
from .reference import MIN_NORM, upcast

TILE, WIDTH = 1 << 20, 1 << 13
"""Scores in a tile on a CPU and columns of one: 4 MB of float32, so that the passes over them run in the cache."""
SPARE = 16
ROWS = 512
"""Fewest rows of a block that has the scores of all candidates, so that its products are worth their call."""
LARGEST_SCORE = 40.0
"""Sums of e^s need no running maximum up to this |s|: float32 ends at 88, and a row may have a million candidates."""


class Pair(NamedTuple):
    """Anchors (N, D) against candidates (M, D), with what is read beside them; `fused`: by the Triton kernels."""

    a: Tensor
    c: Tensor
    a_norm: Tensor
    c_norm: Tensor
    positives: Tensor
    a_labels: Tensor | None
    c_labels: Tensor | None
    temperature: float
    normalize: bool
    fused: bool


def inverse_norms(x: Tensor) -> Tensor:
    if _native(x):
        out = x.new_empty(len(x))
        native.call("inverse_norms", x, *x.shape, x.stride(0), MIN_NORM, out)
        return out
    return upcast(x).norm(dim=1).clamp_(min=MIN_NORM).reciprocal_()


def _native(x: Tensor) -> bool:
    """Whether rows go to cpu/info_nce.cpp. They are next to each other's numbers, see `pair_of`."""
    return x.is_cpu and x.dtype == torch.float32 and native.library() is not None


def partials(pair: Pair) -> Tensor:
    """(1, N) log of the sum of e^{s_ij} over the candidates that are not masked."""
    out = torch.full((1, len(pair.a)), -math.inf, dtype=pair.a_norm.dtype, device=pair.a.device)
    for rows, columns, tile, place, masked in _score_tiles(pair):
        if masked is None:
            tile.scatter_(1, place, -math.inf)
        tile = tile[:, : columns.stop - columns.start]
        if masked is not None:
            tile.masked_fill_(masked, -math.inf)
        peak = tile.amax(dim=1).clamp_(min=torch.finfo(tile.dtype).min)
        total = tile.sub_(peak[:, None]).exp_().sum(dim=1).log_().add_(peak)
        out[0, rows] = torch.logaddexp(out[0, rows], total)
    return out


def finish(partial: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """L_i and the log of its whole denominator, (N,) each, from the sums over all candidates."""
    chosen = pair.positives
    positive = (upcast(pair.a) * upcast(pair.c[chosen])).sum(dim=1)
    positive *= pair.a_norm * pair.c_norm[chosen] / pair.temperature
    return _with_positive(partial.logsumexp(dim=0), positive, pair)


def _with_positive(rest: Tensor, positive: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """`finish` from the log of the other candidates' sum and the scores of the positives, (N,) each."""
    gap = rest - positive
    soft = torch.log1p(torch.exp(-gap.abs()))
    loss = gap.clamp(min=0) + soft
    lse = torch.maximum(rest, positive) + soft
    if pair.a_labels is not None and pair.c_labels is not None:
        counted = pair.a_labels != pair.c_labels[pair.positives]
        loss, lse = torch.where(counted, gap, loss), torch.where(counted, rest, lse)
    return loss, lse


def shares(pair: Pair, loss: Tensor, lse: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Tiles of P: rows, columns, values; each overwritten by the next."""
    for rows, columns, tile, place, masked in _score_tiles(pair):
        share = tile[:, : columns.stop - columns.start]
        share.sub_(lse[rows, None]).exp_()
        if masked is not None:
            share.masked_fill_(masked, 0)
        tile.scatter_(1, place, torch.expm1(-loss[rows, None]))
        yield rows, columns, share


def unit_gradients(
    pair: Pair, loss: Tensor, lse: Tensor, factor: Tensor, sides: tuple[bool, bool] = (True, True)
) -> tuple[Tensor, Tensor]:
    """Partial sums (1, N, D), (1, M, D) of the gradients in the normalised rows, the first without `factor`.

    factor (N,) is the upstream gradient of L_i divided by the temperature. A side not asked for is empty.
    """
    return sum_products(pair, factor, shares(pair, loss, lse), sides, pair.a_norm.dtype)


def sum_products(
    pair: Pair,
    factor: Tensor,
    tiles: Iterator[tuple[slice, slice, Tensor]],
    sides: tuple[bool, bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`unit_gradients` from `tiles` of P, with products taken in `dtype`."""
    gradients = [
        torch.zeros(1, *x.shape, dtype=pair.a_norm.dtype, device=x.device) if wanted else x.new_empty(0)
        for x, wanted in zip((pair.a, pair.c), sides, strict=True)
    ]
    unit_c = (upcast(pair.c) * pair.c_norm[:, None]).to(dtype) if sides[0] else pair.c
    scaled_a = (upcast(pair.a) * (pair.a_norm * factor)[:, None]).to(dtype) if sides[1] else pair.a
    for rows, columns, share in tiles:
        if sides[0]:
            _add_product(gradients[0][0, rows], share, unit_c[columns])
        if sides[1]:
            _add_product(gradients[1][0, columns], share.T, scaled_a[rows])
    return gradients[0], gradients[1]


def project(pair: Pair, partial: Tensor, factor: Tensor | None) -> Tensor:
    """The gradient from its partial sums (splits, X, D) in the normalised rows.

    It is that of the anchors, each row times factor (N,), or, without factor, that of the candidates.
    """
    x, norm = (pair.c, pair.c_norm) if factor is None else (pair.a, pair.a_norm)
    gradient = partial.sum(0) if len(partial) > 1 else partial[0]
    if pair.normalize and _native(x) and _native(gradient):
        native.call("project", gradient, factor, x, x.stride(0), norm, *gradient.shape, MIN_NORM)
        return gradient
    if factor is not None:
        gradient *= factor[:, None]
    if pair.normalize:
        unit = upcast(x) * norm[:, None]
        norm = torch.where(norm * MIN_NORM < 1, norm, 0.0)  # no direction, no gradient
        along = (gradient * unit).sum(dim=1, keepdim=True)
        gradient.addcmul_(along, unit, value=-1).mul_(norm[:, None])
    return gradient.to(x.dtype)


def value_and_gradients(pair: Pair, weight: Tensor, sides: tuple[bool, bool]) -> tuple[Tensor, Tensor, Tensor]:
    """sum_i w_i L_i (), and its gradients in both sides, each empty where not asked for.

    Scores are computed once: a block of rows has those of all its candidates. The anchors' products take e^s, for
    their share of the denominator is a factor of the row; the candidates' follow once that is known. Only for pairs of
    which `sums_without_maximum` is true.
    """
    unit_a, unit_c = (upcast(x) * norm[:, None] for x, norm in ((pair.a, pair.a_norm), (pair.c, pair.c_norm)))
    n, m = len(unit_a), len(unit_c)
    losses = unit_a.new_empty(n)
    a_sums = torch.empty_like(unit_a) if sides[0] else pair.a.new_empty(0)
    c_sums = torch.zeros_like(unit_c) if sides[1] else pair.c.new_empty(0)
    factor = torch.empty_like(losses)
    height = min(n, max(ROWS, TILE // m))
    buffer = unit_a.new_empty(height, m)
    for top in range(0, n, height):
        rows = slice(top, top + height)
        labels = None if pair.a_labels is None else pair.a_labels[rows]
        part = pair._replace(positives=pair.positives[rows], a_labels=labels)
        share = torch.mm(unit_a[rows], unit_c.T, out=buffer[: len(part.positives)])
        _scores_to_shares(share, part, weight[rows], losses[rows], factor[rows])
        if sides[0]:
            torch.mm(share, unit_c, out=a_sums[rows])
        if sides[1]:
            c_sums.addmm_(share.T, unit_a[rows] * factor[rows, None])
    return (
        torch.dot(weight, losses),
        project(pair, a_sums[None], factor) if sides[0] else a_sums,
        project(pair, c_sums[None], None) if sides[1] else c_sums,
    )


def _scores_to_shares(score: Tensor, pair: Pair, weight: Tensor, losses: Tensor, factor: Tensor) -> None:
    """From scores (N, M), times the temperature, to P, less a factor (N,), in their place; losses (N,)."""
    labels, others = pair.a_labels, pair.c_labels
    if _native(score):
        keys = (None if x is None else x.int() for x in (labels, others))
        options = pair.positives, *keys, weight, pair.temperature, losses, factor
        native.call("info_nce_shares", score, *score.shape, *options)
        return
    place = pair.positives[:, None]
    positive = score.div_(pair.temperature).gather(1, place).squeeze(1)
    score.exp_()
    if labels is None or others is None:
        score.scatter_(1, place, 0)
    else:
        score.masked_fill_(labels[:, None] == others[None, :], 0)
    losses[:], lse = _with_positive(score.sum(dim=1).log_(), positive, pair)
    total = lse.exp_()
    score.scatter_(1, place, (torch.expm1(-losses) * total)[:, None])
    torch.div(weight, total.mul_(pair.temperature), out=factor)


def sums_without_maximum(pair: Pair) -> bool:
    """Whether no score can exceed LARGEST_SCORE; not asked on a device that would have to be waited for."""
    if pair.a.device.type != "cpu":
        return False
    longest = 1.0 if pair.normalize else float(pair.a.norm(dim=1).amax() * pair.c.norm(dim=1).amax())
    return longest <= LARGEST_SCORE * pair.temperature


def _score_tiles(pair: Pair) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor | None]]:
    """Tiles of s: rows, columns, scores, where each row's positive is in a tile, and what is masked by labels.

    The tile is a view of a buffer with spare columns: a positive outside the tile is "in" the first of them.
    """
    unit_a = upcast(pair.a) * (pair.a_norm / pair.temperature)[:, None]
    unit_c = upcast(pair.c) * pair.c_norm[:, None]
    n, m = len(unit_a), len(unit_c)
    elements = TILE if unit_a.device.type == "cpu" else 32 * TILE
    width = min(m, WIDTH)
    height = min(n, max(16, elements // width))
    buffer = torch.empty(height, width + SPARE, dtype=unit_a.dtype, device=unit_a.device)
    for left in range(0, m, width):
        columns = slice(left, min(m, left + width))
        size = columns.stop - left
        for top in range(0, n, height):
            rows = slice(top, min(n, top + height))
            tile = buffer[: rows.stop - top]
            torch.mm(unit_a[rows], unit_c[columns].T, out=tile[:, :size])
            place = pair.positives[rows] - left
            place = torch.where((place >= 0) & (place < size), place, size)[:, None]
            masked = None
            if pair.a_labels is not None and pair.c_labels is not None:
                masked = pair.a_labels[rows, None] == pair.c_labels[None, columns]
            yield rows, columns, tile, place, masked


def _add_product(out: Tensor, x: Tensor, y: Tensor) -> None:
    if out.dtype == x.dtype:
        out.addmm_(x, y)
    else:
        out.add_(x @ y)
