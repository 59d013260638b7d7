"""InfoNCE by Triton kernels: info_nce.py says what they compute. Logarithms are to base 2 here.

Tiles that end inside the data come first and have no masks; the ragged one comes last. Without labels only tiles that
can hold a positive are looked through for it. Normalisation is a factor per row and per column of a tile; it bounds the
scores, so that their sums need no running maximum unless the temperature is low.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import info_nce_torch as tiles
from . import reference
from .info_nce_torch import Pair
from .runtime.jit import interpreted, kernel, target_of, tl, wave

LOG2_E = math.log2(math.e)


@kernel
def _tile(
    ptr,
    index,
    size,
    stride,
    d,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TYPE: tl.constexpr,
    RAGGED: tl.constexpr = True,
):
    """Rows `index` of (size, D) from column d on; without RAGGED all of them are there."""
    column = d + tl.arange(0, BLOCK_D)
    place = ptr + index.to(tl.int64)[:, None] * stride + column[None, :]
    if D % BLOCK_D != 0:
        x = tl.load(place, mask=(index < size)[:, None] & (column < D)[None, :], other=0.0)
    elif RAGGED:
        x = tl.load(place, mask=(index < size)[:, None], other=0.0)
    else:
        x = tl.load(place)
    return x.to(TYPE)


@kernel
def _products(
    x_ptr,
    x_index,
    X,
    x_stride,
    y_ptr,
    y_index,
    Y,
    y_stride,
    D: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    product = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)
    for d in tl.range(0, D, BLOCK_D):
        x = _tile(x_ptr, x_index, X, x_stride, d, D, BLOCK_D, TYPE)
        y = _tile(y_ptr, y_index, Y, y_stride, d, D, BLOCK_D, TYPE)
        product = tl.dot(x, tl.trans(y), product, input_precision=PRECISION)
    return product


@kernel
def _vector(ptr, index, size, other, RAGGED: tl.constexpr):
    return tl.load(ptr + index, mask=index < size, other=other) if RAGGED else tl.load(ptr + index)


@kernel
def _inverse_norms(
    x_ptr,
    out_ptr,
    X,
    x_stride,
    D: tl.constexpr,
    MIN_NORM: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    total = tl.zeros((BLOCK_X,), tl.float32)
    for d in tl.range(0, D, BLOCK_D):
        x = _tile(x_ptr, index, X, x_stride, d, D, BLOCK_D, tl.float32)
        total += tl.sum(x * x, 1)
    tl.store(out_ptr + index, 1 / tl.maximum(tl.sqrt(total), MIN_NORM), mask=index < X)


@kernel
def _stream(
    a_ptr,  # (N, D)
    c_ptr,  # (M, D)
    a_norm_ptr,  # (N,) factor of each row
    c_norm_ptr,  # (M,)
    positives_ptr,  # (N,)
    a_label_ptr,  # (N,) read where LABELLED
    c_label_ptr,  # (M,)
    out_ptr,  # (splits, N) log2 of the sum over a split's columns
    N,
    M,
    a_stride,
    c_stride,
    scale,
    per_split,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LABELLED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BOUNDED: tl.constexpr,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rate = _vector(a_norm_ptr, row, N, 1.0, True) * scale
    key = _vector(a_label_ptr if LABELLED else positives_ptr, row, N, -1, True).to(tl.int32)
    least, most = tl.min(tl.where(row < N, key, M), 0), tl.max(key, 0)
    if D <= BLOCK_D:
        a = _tile(a_ptr, row, N, a_stride, 0, D, BLOCK_D, TYPE)
    # Finite, so that a row whose columns are all masked has no inf - inf.
    peak = tl.zeros((BLOCK_N,), tl.float32) + (scale if BOUNDED else -1e38)
    total = tl.zeros((BLOCK_N, BLOCK_M if BOUNDED else 1), tl.float32)
    first = tl.program_id(1) * per_split
    end = tl.minimum(first + per_split, M)
    for RAGGED in tl.static_range(2):
        stop = end if RAGGED else end - (end - first) % BLOCK_M
        for start in tl.range(first, stop, BLOCK_M):
            column = start + tl.arange(0, BLOCK_M)
            if D <= BLOCK_D:
                c = _tile(c_ptr, column, M, c_stride, 0, D, BLOCK_D, TYPE, RAGGED)
                score = tl.dot(a, tl.trans(c), input_precision=PRECISION)
            else:
                score = _products(
                    a_ptr, row, N, a_stride, c_ptr, column, M, c_stride,
                    D, BLOCK_N, BLOCK_M, BLOCK_D, TYPE, PRECISION,
                )  # fmt: skip
            if NORMALIZE:
                score *= _vector(c_norm_ptr, column, M, 1.0, RAGGED)[None, :]
            if LABELLED:
                c_key = _vector(c_label_ptr, column, M, 0, RAGGED).to(tl.int32)
                hidden = key[:, None] == c_key[None, :]
                if not BOUNDED:
                    score = tl.where(hidden, float("-inf"), score)
            elif (start <= most) & (start + BLOCK_M > least):
                # Loaded here, or the compiler would mask all tiles rather than branch.
                positive = _vector(positives_ptr, row, N, -1, True).to(tl.int32)
                score = tl.where(positive[:, None] == column[None, :], float("-inf"), score)
            if RAGGED:
                score = tl.where((column < M)[None, :], score, float("-inf"))
            if BOUNDED:
                more = total + tl.exp2(score * rate[:, None] - peak[:, None])
                # One instruction for each score, an addition with a predicate, where -inf takes two.
                total = tl.where(hidden, total, more) if LABELLED else more
            else:
                new_peak = tl.maximum(peak, tl.max(score, 1) * rate)
                more = tl.sum(tl.exp2(score * rate[:, None] - new_peak[:, None]), 1)
                total = total * tl.exp2(peak - new_peak)[:, None] + more[:, None]
                peak = new_peak
        first = stop
    tl.store(out_ptr + tl.program_id(1).to(tl.int64) * N + row, peak + tl.log2(tl.sum(total, 1)), mask=row < N)


@kernel
def _finish(
    a_ptr,  # (N, D)
    c_ptr,  # (M, D)
    a_norm_ptr,  # (N,)
    c_norm_ptr,  # (M,)
    positives_ptr,  # (N,)
    a_label_ptr,  # (N,) read where LABELLED
    c_label_ptr,  # (M,)
    partial_ptr,  # (splits, N) of _stream
    loss_ptr,  # (N,)
    lse_ptr,  # (N,) log2 of the whole denominator
    N,
    M,
    a_stride,
    c_stride,
    scale,
    splits,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LABELLED: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = row < N
    peak = tl.full((BLOCK_N,), -1e38, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    place = row.to(tl.int64)
    for _ in tl.range(0, splits):
        partial = tl.load(partial_ptr + place, mask=valid, other=0.0)
        place += N
        new_peak = tl.maximum(peak, partial)
        total = total * tl.exp2(peak - new_peak) + tl.exp2(partial - new_peak)
        peak = new_peak
    rest = peak + tl.log2(total)

    chosen = tl.load(positives_ptr + row, mask=valid, other=0)
    # An index out of range shows as NaN: raising would need the host to wait.
    inside = (chosen >= 0) & (chosen < M)
    chosen = tl.where(inside, chosen, 0)
    positive = tl.zeros((BLOCK_N,), tl.float32)
    for d in tl.range(0, D, BLOCK_D):
        a = _tile(a_ptr, row, N, a_stride, d, D, BLOCK_D, tl.float32)
        c = _tile(c_ptr, chosen, M, c_stride, d, D, BLOCK_D, tl.float32)
        positive += tl.sum(a * c, 1)
    norms = tl.load(a_norm_ptr + row, mask=valid, other=1.0) * tl.load(c_norm_ptr + chosen)
    positive = tl.where(inside, positive * norms * scale, float("nan"))
    gap = rest - positive
    soft = tl.log2(1 + tl.exp2(-tl.abs(gap)))
    loss = tl.maximum(gap, 0.0) + soft
    # From the larger of the two: at large scores positive + loss would round again.
    lse = tl.maximum(rest, positive) + soft
    if LABELLED:
        # A positive of another class was streamed among the rest.
        own = tl.load(a_label_ptr + row, mask=valid, other=0).to(tl.int32)
        counted = own != tl.load(c_label_ptr + chosen).to(tl.int32)
        loss, lse = tl.where(counted, gap, loss), tl.where(counted, rest, lse)
    tl.store(loss_ptr + row, loss * 0.6931471805599453, mask=valid)
    tl.store(lse_ptr + row, lse, mask=valid)


@kernel
def _gradient(
    x_ptr,  # (X, D) the side whose gradient this is: the anchors where ANCHORS, else the candidates
    y_ptr,  # (Y, D) the other side
    x_norm_ptr,  # (X,)
    y_norm_ptr,  # (Y,)
    x_label_ptr,  # (X,) read where LABELLED
    y_label_ptr,  # (Y,)
    positives_ptr,  # (N,) of the anchors
    loss_ptr,  # (N,)
    lse_ptr,  # (N,)
    upstream_ptr,  # (N,)
    out_ptr,  # (splits, X, D) sum over a split's rows of y, times t and, where ANCHORS, without upstream
    X,
    Y,
    x_stride,
    y_stride,
    scale,
    per_split,
    D: tl.constexpr,
    ANCHORS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LABELLED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TYPE: tl.constexpr,
    PRODUCT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    x_index = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    x_valid = x_index < X
    rate = _vector(x_norm_ptr, x_index, X, 1.0, True) * scale
    if BLOCK_K == BLOCK_D:
        x = _tile(x_ptr, x_index, X, x_stride, 0, D, BLOCK_D, TYPE)
    if LABELLED:
        x_label = _vector(x_label_ptr, x_index, X, 0, True).to(tl.int32)
    if ANCHORS:
        positive = _vector(positives_ptr, x_index, X, -1, True).to(tl.int32)
        least, most = tl.min(tl.where(x_valid, positive, Y), 0), tl.max(positive, 0)
        lse = _vector(lse_ptr, x_index, X, 0.0, True)
    gradient = tl.zeros((BLOCK_X, BLOCK_D), tl.float32)
    first = tl.program_id(1) * per_split
    end = tl.minimum(first + per_split, Y)
    for RAGGED in tl.static_range(2):
        stop = end if RAGGED else end - (end - first) % BLOCK_Y
        for start in tl.range(first, stop, BLOCK_Y):
            y_index = start + tl.arange(0, BLOCK_Y)
            y = _tile(y_ptr, y_index, Y, y_stride, 0, D, BLOCK_D, TYPE, RAGGED)
            if BLOCK_K == BLOCK_D:
                score = tl.dot(x, tl.trans(y), input_precision=PRECISION)
            else:
                score = _products(
                    x_ptr, x_index, X, x_stride, y_ptr, y_index, Y, y_stride,
                    D, BLOCK_X, BLOCK_Y, BLOCK_K, TYPE, PRECISION,
                )  # fmt: skip
            if NORMALIZE:
                y_norm = _vector(y_norm_ptr, y_index, Y, 1.0, RAGGED)
                score *= y_norm[None, :]
            if ANCHORS:
                share = tl.exp2(score * rate[:, None] - lse[:, None])
                near = (start <= most) & (start + BLOCK_Y > least)
                chosen = positive[:, None] == y_index[None, :]
            else:
                y_lse = _vector(lse_ptr, y_index, Y, 0.0, RAGGED)
                share = tl.exp2(score * rate[:, None] - y_lse[None, :])
                positive = _vector(positives_ptr, y_index, Y, -1, RAGGED).to(tl.int32)
                own = positive - tl.program_id(0) * BLOCK_X
                near = tl.max(((own >= 0) & (own < BLOCK_X)).to(tl.int32), 0) > 0
                chosen = positive[None, :] == x_index[:, None]
            if LABELLED:
                y_label = _vector(y_label_ptr, y_index, Y, 0, RAGGED).to(tl.int32)
                share = tl.where(x_label[:, None] == y_label[None, :], 0.0, share)
            if near:
                if ANCHORS:
                    positive_slope = (tl.exp(-_vector(loss_ptr, x_index, X, 0.0, True)) - 1)[:, None]
                else:
                    positive_slope = (tl.exp(-_vector(loss_ptr, y_index, Y, 0.0, RAGGED)) - 1)[None, :]
                share = tl.where(chosen, positive_slope, share)
            if RAGGED:
                share = tl.where((y_index < Y)[None, :], share, 0.0)
            if not ANCHORS:
                factor = _vector(upstream_ptr, y_index, Y, 0.0, RAGGED)
                share *= (factor * y_norm if NORMALIZE else factor)[None, :]
            elif NORMALIZE:
                share *= y_norm[None, :]
            gradient = tl.dot(share.to(PRODUCT_TYPE), y.to(PRODUCT_TYPE), gradient, input_precision=PRECISION)
        first = stop
    column = tl.arange(0, BLOCK_D)
    out = out_ptr + (tl.program_id(1).to(tl.int64) * X + x_index)[:, None] * D + column[None, :]
    tl.store(out, gradient, mask=x_valid[:, None] & (column < D)[None, :])


@kernel
def _share(
    a_ptr,  # (N, D)
    c_ptr,  # (M, D)
    a_norm_ptr,  # (N,)
    c_norm_ptr,  # (M,)
    positives_ptr,  # (N,)
    a_label_ptr,  # (N,) read where LABELLED
    c_label_ptr,  # (M,)
    loss_ptr,  # (N,)
    lse_ptr,  # (N,)
    out_ptr,  # (rows, M) P from anchor `first` on
    N,
    M,
    a_stride,
    c_stride,
    scale,
    first,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LABELLED: tl.constexpr,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    local = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = first + local
    column = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid, inside = row < N, column < M
    score = _products(
        a_ptr, row, N, a_stride, c_ptr, column, M, c_stride, D, BLOCK_N, BLOCK_M, BLOCK_D, TYPE, PRECISION
    )
    rate = tl.load(a_norm_ptr + row, mask=valid, other=1.0) * scale
    c_norm = tl.load(c_norm_ptr + column, mask=inside, other=1.0)
    lse = tl.load(lse_ptr + row, mask=valid, other=0.0)
    share = tl.exp2(score * c_norm[None, :] * rate[:, None] - lse[:, None])
    if LABELLED:
        a_key = tl.load(a_label_ptr + row, mask=valid, other=0).to(tl.int32)
        c_key = tl.load(c_label_ptr + column, mask=inside, other=0).to(tl.int32)
        share = tl.where(a_key[:, None] == c_key[None, :], 0.0, share)
    positive = tl.load(positives_ptr + row, mask=valid, other=0).to(tl.int32)
    positive_slope = tl.exp(-tl.load(loss_ptr + row, mask=valid, other=0.0)) - 1
    share = tl.where(positive[:, None] == column[None, :], positive_slope[:, None], share)
    out = out_ptr + local.to(tl.int64)[:, None] * M + column[None, :]
    tl.store(out, share, mask=valid[:, None] & inside[None, :])


@kernel
def _project(
    partial_ptr,  # (splits, X, D) of _gradient
    x_ptr,  # (X, D)
    x_norm_ptr,  # (X,)
    factor_ptr,  # (X,) of each row
    out_ptr,  # (X, D)
    X,
    splits,
    x_stride,
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    MIN_NORM: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    column = tl.arange(0, BLOCK_D)
    valid = (index < X)[:, None] & (column < D)[None, :]
    place = index.to(tl.int64)[:, None] * D + column[None, :]
    gradient = tl.zeros((BLOCK_X, BLOCK_D), tl.float32)
    source = place
    for _ in tl.range(0, splits):
        gradient += tl.load(partial_ptr + source, mask=valid, other=0.0)
        source += tl.cast(X, tl.int64) * D
    if FACTOR:
        gradient = gradient * tl.load(factor_ptr + index, mask=index < X, other=0.0)[:, None]
    if NORMALIZE:
        norm = tl.load(x_norm_ptr + index, mask=index < X, other=1.0)[:, None]
        unit = _tile(x_ptr, index, X, x_stride, 0, D, BLOCK_D, tl.float32) * norm
        norm = tl.where(norm * MIN_NORM < 1, norm, 0)  # no direction, no gradient
        gradient = (gradient - tl.sum(gradient * unit, 1)[:, None] * unit) * norm
    tl.store(out_ptr + place, gradient, mask=valid)


def _cdiv(x: int, y: int) -> int:
    return -(-x // y)


def _power_of_two(x: int) -> int:
    return 1 << (x - 1).bit_length()


class Blocks(NamedTuple):
    """Tile sizes of one kernel: rows of x, rows of y, features at a time; warps and pipeline stages."""

    x: int
    y: int
    d: int
    warps: int
    stages: int


def score_blocks(dtype: torch.dtype, D: int, target: str) -> Blocks:
    """Tiles of `_stream` and `_share`."""
    half, small = dtype.itemsize == 2, max(16, _power_of_two(D))
    if target == "gfx942":
        return Blocks(128, 64, min(64, small), 8, 2) if half else Blocks(64, 64, min(32, small), 4, 2)
    if not half:
        return Blocks(64, 64, min(32, small), 8 if target == "sm_80" else 4, 3)
    if D > 128:
        return Blocks(128, 64 if target == "sm_100" else 128, 64, 8, 4)
    if target == "sm_80":
        return Blocks(128, 128, small, 8, 3)
    return Blocks(128, 64, small, 4 if target == "sm_90" else 8, 3)


def gradient_blocks(dtype: torch.dtype, D: int, target: str) -> Blocks | None:
    """Tiles of `_gradient`, whose rows of gradients are D long; None: too long for registers."""
    half, small = dtype.itemsize == 2, max(16, _power_of_two(D))
    if (256 if half else 128) < D:
        return None
    if target == "gfx942":
        return Blocks(64, 32, small, 4, 1)
    if not half:
        new = target == "sm_100"
        return Blocks(64, 16 if D <= 64 and not new else 32, small, 4 if D > 64 and new else 8, 2)
    if dtype == torch.float16:
        # Its tiles are held twice, the second time as bfloat16.
        return Blocks(64, 32, small, 4 if D <= 128 else 8, 2)
    if D > 128:
        return Blocks(64, 64, small, 8, 2)
    if target == "sm_100":
        return Blocks(64, 64, small, 4, 2)
    # On sm_90 two programs run at once on a multiprocessor: one multiplies while the other computes exponentials.
    return Blocks(128, 32, small, 4 if target == "sm_90" else 8, 3)


def inverse_norms(x: Tensor) -> Tensor:
    """(X,) 1 / max(|x|, MIN_NORM)."""
    out = torch.empty(len(x), dtype=torch.float32, device=x.device)
    columns = min(128, max(16, _power_of_two(x.shape[1])))
    _inverse_norms[(_cdiv(len(x), 32),)](
        x,
        out,
        len(x),
        x.stride(0),
        D=x.shape[1],
        MIN_NORM=reference.MIN_NORM,
        BLOCK_X=32,
        BLOCK_D=columns,
        num_warps=4,
    )
    return out


def partials(pair: Pair) -> Tensor:
    """(splits, N) log2 of the sum of e^{s_ij} over a split's candidates that are not masked."""
    n, m = len(pair.a), len(pair.c)
    blocks, constants = _scoring(pair)
    splits, per_split = _splits(n, m, blocks, wave(pair.a.device))
    out = torch.empty(splits, n, dtype=torch.float32, device=pair.a.device)
    # Then no score exceeds the scale, and of the smallest ones 2**-120 is left: sums need no running maximum. Where a
    # loop over the depth takes longer anyway, there are no registers for a sum of each element.
    bounded = pair.normalize and pair.a.shape[1] <= blocks.d and LOG2_E / pair.temperature < 60
    _stream[(_cdiv(n, blocks.x), splits)](
        *_operands(pair), out, *_sizes(pair), per_split, NORMALIZE=pair.normalize, BOUNDED=bounded, **constants
    )
    return out


def finish(partial: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """L_i and the log2 of its whole denominator, (N,) each, from the sums over all candidates."""
    n, depth = pair.a.shape
    loss = torch.empty(n, dtype=torch.float32, device=pair.a.device)
    lse = torch.empty_like(loss)
    _finish[(_cdiv(n, 32),)](
        *_operands(pair),
        partial,
        loss,
        lse,
        *_sizes(pair),
        len(partial),
        D=depth,
        BLOCK_N=32,
        BLOCK_D=min(64, max(16, _power_of_two(depth))),
        LABELLED=pair.a_labels is not None,
        num_warps=8,
    )
    return loss, lse


def unit_gradients(
    pair: Pair, loss: Tensor, lse: Tensor, factor: Tensor, sides: tuple[bool, bool] = (True, True)
) -> tuple[Tensor, Tensor]:
    """Partial sums (splits, N, D), (splits, M, D) of the gradients in the normalised rows, the first without `factor`.

    factor (N,) is the upstream gradient of L_i divided by the temperature. A side not asked for is empty.
    """
    blocks = gradient_blocks(pair.a.dtype, pair.a.shape[1], target_of(pair.a.device))
    if blocks is None:
        dtype = torch.bfloat16 if _half(pair) else torch.float32
        return tiles.sum_products(pair, factor, _share_slabs(pair, loss, lse), sides, dtype)
    empty = pair.a.new_empty(0)
    return (
        _launch_gradient(pair, loss, lse, factor, True, blocks) if sides[0] else empty,
        _launch_gradient(pair, loss, lse, factor, False, blocks) if sides[1] else empty,
    )


def project(pair: Pair, partial: Tensor, factor: Tensor | None) -> Tensor:
    """The gradient from its partial sums (splits, X, D) in the normalised rows.

    It is that of the anchors, each row times factor (N,), or, without factor, that of the candidates.
    """
    x, norm = (pair.c, pair.c_norm) if factor is None else (pair.a, pair.a_norm)
    size, depth = x.shape
    if depth > 1024:
        return tiles.project(pair, partial, factor)
    out = torch.empty(size, depth, dtype=x.dtype, device=x.device)
    columns = max(16, _power_of_two(depth))
    rows = max(1, 4096 // columns)
    _project[(_cdiv(size, rows),)](
        partial,
        x,
        norm,
        norm if factor is None else factor,
        out,
        size,
        len(partial),
        x.stride(0),
        D=depth,
        NORMALIZE=pair.normalize,
        MIN_NORM=reference.MIN_NORM,
        FACTOR=factor is not None,
        BLOCK_X=rows,
        BLOCK_D=columns,
        num_warps=4,
    )
    return out


def _launch_gradient(pair: Pair, loss: Tensor, lse: Tensor, factor: Tensor, anchors: bool, blocks: Blocks) -> Tensor:
    a, c, a_norm, c_norm, positives, a_labels, c_labels = _operands(pair)
    sides = [(a, c), (a_norm, c_norm), (a_labels, c_labels)]
    if not anchors:
        sides = [(y, x) for x, y in sides]
    x, y = sides[0]
    size, depth = x.shape
    # Partial sums may take as much memory as the inputs, not more.
    splits, per_split = _splits(size, len(y), blocks, wave(x.device), limit=1 + len(y) // size)
    out = torch.empty(splits, size, depth, dtype=torch.float32, device=x.device)
    _gradient[(_cdiv(size, blocks.x), splits)](
        *(tensor for side in sides for tensor in side),
        positives,
        loss,
        lse,
        factor,
        out,
        size,
        len(y),
        x.stride(0),
        y.stride(0),
        LOG2_E / pair.temperature,
        per_split,
        D=depth,
        ANCHORS=anchors,
        BLOCK_X=blocks.x,
        BLOCK_Y=blocks.y,
        BLOCK_D=blocks.d,
        BLOCK_K=blocks.d if _half(pair) else min(32, blocks.d),
        LABELLED=pair.a_labels is not None,
        NORMALIZE=pair.normalize,
        **_dots(x),
        PRODUCT_TYPE=_product_type(x),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return out


def _splits(outer: int, inner: int, blocks: Blocks, programs: int, limit: int = 1 << 16) -> tuple[int, int]:
    """Into how many ranges the inner rows are cut so that `programs` run at once, and the length of each."""
    wanted = min(programs // _cdiv(outer, blocks.x), _cdiv(inner, 2 * blocks.y), limit)
    per_split = _cdiv(_cdiv(inner, max(1, wanted)), blocks.y) * blocks.y
    return _cdiv(inner, per_split), per_split


def _dots(x: Tensor) -> dict[str, Any]:
    """How scores are multiplied: in the inputs' type, float32 in three tf32 products or, where the user has allowed
    tf32 in matrix products, in one."""
    import triton.language as tl

    if x.dtype == torch.float32:
        if target_of(x.device).startswith("gfx"):
            return {"TYPE": tl.float32, "PRECISION": "ieee"}
        # Of torch's flags the one that can always be read.
        allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
        return {"TYPE": tl.float32, "PRECISION": "tf32" if allowed else "tf32x3"}
    if x.dtype == torch.float16:
        return {"TYPE": tl.float16, "PRECISION": "ieee"}
    # The interpreter multiplies bfloat16 wrongly.
    return {"TYPE": tl.float32 if interpreted() else tl.bfloat16, "PRECISION": "ieee"}


def _product_type(x: Tensor) -> Any:
    """Shares times upstream gradients leave the range of float16, never that of bfloat16."""
    import triton.language as tl

    return tl.float32 if interpreted() or x.dtype == torch.float32 else tl.bfloat16


def _share_slabs(pair: Pair, loss: Tensor, lse: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    n, m, depth = len(pair.a), len(pair.c), pair.a.shape[1]
    blocks, constants = _scoring(pair)
    rows = min(n, max(blocks.x, (n + m) * depth // m // blocks.x * blocks.x))
    slab = torch.empty(rows, m, dtype=torch.bfloat16 if _half(pair) else torch.float32, device=pair.a.device)
    for first in range(0, n, rows):
        part = slice(first, min(n, first + rows))
        out = slab[: part.stop - first]
        grid = (_cdiv(len(out), blocks.x), _cdiv(m, blocks.y))
        _share[grid](*_operands(pair), loss, lse, out, *_sizes(pair), first, **constants)
        yield part, slice(0, m), out


def _half(pair: Pair) -> bool:
    return pair.a.element_size() == 2


def _operands(pair: Pair) -> tuple[Tensor, ...]:
    """What every kernel over anchors and candidates reads first; unread labels are some other tensor."""
    given = pair.a_labels is not None and pair.c_labels is not None
    labels: Any = (pair.a_labels, pair.c_labels) if given else (pair.positives, pair.positives)
    return pair.a, pair.c, pair.a_norm, pair.c_norm, pair.positives, *labels


def _sizes(pair: Pair) -> tuple[int | float, ...]:
    return len(pair.a), len(pair.c), pair.a.stride(0), pair.c.stride(0), LOG2_E / pair.temperature


def _scoring(pair: Pair) -> tuple[Blocks, dict[str, Any]]:
    """Blocks and constants of `_stream` and `_share`."""
    depth = pair.a.shape[1]
    blocks = score_blocks(pair.a.dtype, depth, target_of(pair.a.device))
    tile = {"BLOCK_N": blocks.x, "BLOCK_M": blocks.y, "BLOCK_D": blocks.d}
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return blocks, {"D": depth, "LABELLED": pair.a_labels is not None, **_dots(pair.a), **tile, **options}
