"""InfoNCE with class masks, its N x M score matrix never stored.

    L_i = log( e^{s_ip} + sum over j not hidden of e^{s_ij} ) - s_ip,    s_ij = <a_i, c_j> / t,    p = positives[i]

with rows divided by their L2 norm on request. Candidate j is hidden from anchor i where their labels are equal, or,
without labels, where j = p. With P_ij = e^{s_ij} / (e^{s_ip} + ...), zero where hidden, and P_ip = e^{-L_i} - 1,

    dL_i/da_i = sum_j P_ij c_j / t,    dL_i/dc_j = P_ij a_i / t.

Forward streams tiles of scores through a running log-sum-exp; the positive is added at the end, so that L_i is a
softplus and never the difference of two large numbers. Backward computes the tiles of P again, once for each side.
Normalisation is a factor per row and per column of a tile: no normalised copy, and no rounding of one to bfloat16.

Memory O((N + M) D). Where a row of gradients is too long for registers (D > 256, float32 D > 128) backward writes
slabs of P, each no larger than the inputs, and leaves the products to the matrix library. Without Triton all of it
runs on tiles that stay in the processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import info_nce_torch as tiles
from . import reference
from .runtime.aot import Launch, recorded
from .runtime.jit import interpreted, kernel, target_of, tl, wave
from .runtime.ops import define, differentiate, refuse_derivative

LOG2_E = math.log2(math.e)


@kernel
def _tile(ptr, index, size, stride, d, D: tl.constexpr, BLOCK_D: tl.constexpr, TYPE: tl.constexpr):
    column = d + tl.arange(0, BLOCK_D)
    valid = (index < size)[:, None]
    if D % BLOCK_D != 0:
        valid = valid & (column < D)[None, :]
    return tl.load(ptr + index.to(tl.int64)[:, None] * stride + column[None, :], mask=valid, other=0.0).to(TYPE)


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
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * per_split
    rate = tl.load(a_norm_ptr + row, mask=row < N, other=1.0) * scale
    if LABELLED:
        a_key = tl.load(a_label_ptr + row, mask=row < N, other=0).to(tl.int32)
    else:
        a_key = tl.load(positives_ptr + row, mask=row < N, other=0).to(tl.int32)
    if D <= BLOCK_D:
        a = _tile(a_ptr, row, N, a_stride, 0, D, BLOCK_D, TYPE)
    # Finite, so that a row whose columns are all hidden has no inf - inf.
    peak = tl.full((BLOCK_N,), -1e38, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.range(first, tl.minimum(first + per_split, M), BLOCK_M):
        column = start + tl.arange(0, BLOCK_M)
        if D <= BLOCK_D:
            c = _tile(c_ptr, column, M, c_stride, 0, D, BLOCK_D, TYPE)
            score = tl.dot(a, tl.trans(c), input_precision=PRECISION)
        else:
            score = _products(
                a_ptr,
                row,
                N,
                a_stride,
                c_ptr,
                column,
                M,
                c_stride,
                D,
                BLOCK_N,
                BLOCK_M,
                BLOCK_D,
                TYPE,
                PRECISION,
            )
        c_norm = tl.load(c_norm_ptr + column, mask=column < M, other=1.0)
        beyond = tl.where(column < M, 0.0, float("-inf"))
        if LABELLED:
            c_key = tl.load(c_label_ptr + column, mask=column < M, other=0).to(tl.int32)
        else:
            c_key = column
        score = score * c_norm[None, :] + beyond[None, :]
        score = tl.where(a_key[:, None] == c_key[None, :], float("-inf"), score)
        new_peak = tl.maximum(peak, tl.max(score, 1) * rate)
        total = total * tl.exp2(peak - new_peak) + tl.sum(tl.exp2(score * rate[:, None] - new_peak[:, None]), 1)
        peak = new_peak
    tl.store(out_ptr + tl.program_id(1).to(tl.int64) * N + row, peak + tl.log2(total), mask=row < N)


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
    TYPE: tl.constexpr,
    PRODUCT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    x_index = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    x_valid = x_index < X
    first = tl.program_id(1) * per_split
    rate = tl.load(x_norm_ptr + x_index, mask=x_valid, other=1.0) * scale
    if BLOCK_K == BLOCK_D:
        x = _tile(x_ptr, x_index, X, x_stride, 0, D, BLOCK_D, TYPE)
    if LABELLED:
        x_label = tl.load(x_label_ptr + x_index, mask=x_valid, other=0).to(tl.int32)
    if ANCHORS:
        positive = tl.load(positives_ptr + x_index, mask=x_valid, other=0).to(tl.int32)
        lse = tl.load(lse_ptr + x_index, mask=x_valid, other=0.0)
        pull = tl.exp(-tl.load(loss_ptr + x_index, mask=x_valid, other=0.0)) - 1
    gradient = tl.zeros((BLOCK_X, BLOCK_D), tl.float32)
    for start in tl.range(first, tl.minimum(first + per_split, Y), BLOCK_Y):
        y_index = start + tl.arange(0, BLOCK_Y)
        y_valid = y_index < Y
        y = _tile(y_ptr, y_index, Y, y_stride, 0, D, BLOCK_D, TYPE)
        if BLOCK_K == BLOCK_D:
            score = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        else:
            score = _products(
                x_ptr,
                x_index,
                X,
                x_stride,
                y_ptr,
                y_index,
                Y,
                y_stride,
                D,
                BLOCK_X,
                BLOCK_Y,
                BLOCK_K,
                TYPE,
                PRECISION,
            )
        y_norm = tl.load(y_norm_ptr + y_index, mask=y_valid, other=1.0)
        beyond = tl.where(y_valid, 0.0, float("-inf"))
        score = (score * y_norm[None, :] + beyond[None, :]) * rate[:, None]
        if ANCHORS:
            share = tl.exp2(score - lse[:, None])
            factor = y_norm
            chosen = positive[:, None] == y_index[None, :]
            replacement = pull[:, None]
        else:
            y_positive = tl.load(positives_ptr + y_index, mask=y_valid, other=-1).to(tl.int32)
            y_lse = tl.load(lse_ptr + y_index, mask=y_valid, other=0.0)
            y_pull = tl.exp(-tl.load(loss_ptr + y_index, mask=y_valid, other=0.0)) - 1
            share = tl.exp2(score - y_lse[None, :])
            factor = y_norm * tl.load(upstream_ptr + y_index, mask=y_valid, other=0.0)
            chosen = y_positive[None, :] == x_index[:, None]
            replacement = y_pull[None, :]
        if LABELLED:
            y_label = tl.load(y_label_ptr + y_index, mask=y_valid, other=0).to(tl.int32)
            share = tl.where(x_label[:, None] == y_label[None, :], 0.0, share)
        share = tl.where(chosen, replacement, share) * factor[None, :]
        gradient = tl.dot(share.to(PRODUCT_TYPE), y.to(PRODUCT_TYPE), gradient, input_precision=PRECISION)
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
    pull = tl.exp(-tl.load(loss_ptr + row, mask=valid, other=0.0)) - 1
    share = tl.where(positive[:, None] == column[None, :], pull[:, None], share)
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
        source += X * D
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
        return Blocks(64, 64, min(32, small), 4, 3)
    return Blocks(128, 128, small, 8, 3) if D <= 128 else Blocks(128, 128, 64, 8, 4)


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
    return Blocks(128, 64, small, 8, 3 if D > 64 else 2) if D <= 128 else Blocks(64, 64, small, 8, 2)


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

    @property
    def half(self) -> bool:
        return self.a.element_size() == 2

    def operands(self) -> tuple[Tensor, ...]:
        """What every kernel over anchors and candidates reads first; unread labels are some other tensor."""
        given = self.a_labels is not None and self.c_labels is not None
        labels: Any = (self.a_labels, self.c_labels) if given else (self.positives, self.positives)
        return self.a, self.c, self.a_norm, self.c_norm, self.positives, *labels

    def sizes(self) -> tuple[int | float, ...]:
        return len(self.a), len(self.c), self.a.stride(0), self.c.stride(0), LOG2_E / self.temperature

    def scoring(self) -> tuple[Blocks, dict[str, Any]]:
        """Blocks and constants of `_stream` and `_share`."""
        depth = self.a.shape[1]
        blocks = score_blocks(self.a.dtype, depth, target_of(self.a.device))
        tile = {"BLOCK_N": blocks.x, "BLOCK_M": blocks.y, "BLOCK_D": blocks.d}
        options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
        return blocks, {"D": depth, "LABELLED": self.a_labels is not None, **_dots(self.a), **tile, **options}


def inverse_norms(x: Tensor, normalize: bool, fused: bool) -> Tensor:
    """(X,) 1 / max(|x|, MIN_NORM); ones without `normalize`."""
    if not normalize:
        return torch.ones(len(x), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    if not fused:
        return tiles.inverse_norms(x)
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
    """(splits, N) log (base 2 where fused) of the sum of e^{s_ij} over a split's candidates that are not hidden."""
    if not pair.fused:
        return tiles.partials(pair)
    n, m = len(pair.a), len(pair.c)
    blocks, constants = pair.scoring()
    splits, per_split = _splits(n, m, blocks, wave(pair.a.device))
    out = torch.empty(splits, n, dtype=torch.float32, device=pair.a.device)
    _stream[(_cdiv(n, blocks.x), splits)](*pair.operands(), out, *pair.sizes(), per_split, **constants)
    return out


def finish(partial: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """L_i and the log (base 2 where fused) of its whole denominator, (N,) each, from the sums over all candidates."""
    if not pair.fused:
        return tiles.finish(partial, pair)
    n, depth = pair.a.shape
    loss = torch.empty(n, dtype=torch.float32, device=pair.a.device)
    lse = torch.empty_like(loss)
    _finish[(_cdiv(n, 32),)](
        *pair.operands(),
        partial,
        loss,
        lse,
        *pair.sizes(),
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
    if pair.fused and blocks is not None:
        empty = pair.a.new_empty(0)
        return (
            _launch_gradient(pair, loss, lse, factor, True, blocks) if sides[0] else empty,
            _launch_gradient(pair, loss, lse, factor, False, blocks) if sides[1] else empty,
        )
    shares = _share_slabs(pair, loss, lse) if pair.fused else tiles.shares(pair, loss, lse)
    dtype = torch.bfloat16 if pair.fused and pair.half else pair.a_norm.dtype
    return tiles.unit_gradients(pair, factor, shares, sides, dtype)


def project(pair: Pair, partial: Tensor, factor: Tensor | None) -> Tensor:
    """The gradient from its partial sums (splits, X, D) in the normalised rows.

    It is that of the anchors, each row times factor (N,), or, without factor, that of the candidates.
    """
    x, norm = (pair.c, pair.c_norm) if factor is None else (pair.a, pair.a_norm)
    size, depth = x.shape
    if not pair.fused or depth > 1024:
        return tiles.project(partial, x, norm, factor, pair.normalize)
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
    a, c, a_norm, c_norm, positives, a_labels, c_labels = pair.operands()
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
        BLOCK_K=blocks.d if pair.half else min(32, blocks.d),
        LABELLED=pair.a_labels is not None,
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
    blocks, constants = pair.scoring()
    rows = min(n, max(blocks.x, (n + m) * depth // m // blocks.x * blocks.x))
    slab = torch.empty(rows, m, dtype=torch.bfloat16 if pair.half else torch.float32, device=pair.a.device)
    for first in range(0, n, rows):
        part = slice(first, min(n, first + rows))
        out = slab[: part.stop - first]
        grid = (_cdiv(len(out), blocks.x), _cdiv(m, blocks.y))
        _share[grid](*pair.operands(), loss, lse, out, *pair.sizes(), first, **constants)
        yield part, slice(0, m), out


def pair_of(
    anchor: Tensor,
    candidates: Tensor,
    positives: Tensor,
    labels: Tensor | None,
    candidate_labels: Tensor | None,
    temperature: float,
    normalize: bool,
    fused: bool,
    norms: tuple[Tensor, Tensor] | None = None,
) -> Pair:
    """The pair, its rows contiguous, with its norms where they are not known."""
    a, c = (x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous() for x in (anchor, candidates))
    if norms is None:
        norms = inverse_norms(a, normalize, fused), inverse_norms(c, normalize, fused)
    return Pair(a, c, *norms, positives, labels, candidate_labels, temperature, normalize, fused)


def _run(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L_i (N,), the log of its denominator (N,), and the factors that normalise anchors (N,) and candidates (M,)."""
    pair = pair_of(*arguments)
    return *finish(partials(pair), pair), pair.a_norm, pair.c_norm


def _empty(anchor: Tensor, candidates: Tensor, *_: Any) -> tuple[Tensor, ...]:
    kind = torch.promote_types(anchor.dtype, torch.float32)
    sizes = (len(anchor), len(anchor), len(anchor), len(candidates))
    return tuple(anchor.new_empty(size, dtype=kind) for size in sizes)


def _run_backward(upstream: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Gradients of both sides; empty where not asked for."""
    a, c, positives, labels, candidate_labels, loss, lse, a_norm, c_norm, *options, sides = arguments
    temperature, normalize, fused = options
    norms = a_norm, c_norm
    pair = pair_of(a, c, positives, labels, candidate_labels, temperature, normalize, fused, norms)
    factor = upstream / temperature
    a_sums, c_sums = unit_gradients(pair, loss, lse, factor, (sides[0], sides[1]))
    return (
        project(pair, a_sums, factor) if sides[0] else a_sums,
        project(pair, c_sums, None) if sides[1] else c_sums,
    )


def _empty_backward(upstream: Tensor, anchor: Tensor, candidates: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    wanted = zip((anchor, candidates), rest[-1], strict=True)
    return tuple(x.new_empty(x.shape) if side else x.new_empty(0) for x, side in wanted)


_INPUTS = "Tensor anchor, Tensor candidates, Tensor positives, Tensor? labels, Tensor? candidate_labels"
_OPTIONS = "float temperature, bool normalize, bool fused"

info_nce_op = define("info_nce", f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)", _run, _empty)
info_nce_backward_op = define(
    "info_nce_backward",
    f"(Tensor upstream, {_INPUTS}, Tensor loss, Tensor lse, Tensor anchor_norm, Tensor candidate_norm, {_OPTIONS}, "
    "bool[] sides) -> (Tensor, Tensor)",
    _run_backward,
    _empty_backward,
)


def _save(ctx: Any, arguments: tuple, outputs: tuple[Tensor, ...]) -> None:
    *inputs, ctx.temperature, ctx.normalize, ctx.fused = arguments
    ctx.mark_non_differentiable(*outputs[1:])
    ctx.save_for_backward(*inputs, *outputs)


def _differentiate(ctx: Any, upstream: Tensor, *_: Any) -> tuple:
    sides = [bool(needed) for needed in ctx.needs_input_grad[:2]]
    options = ctx.temperature, ctx.normalize, ctx.fused
    gradients = info_nce_backward_op(upstream.contiguous(), *ctx.saved_tensors, *options, sides)
    return *(g if wanted else None for g, wanted in zip(gradients, sides, strict=True)), *(None,) * 6


differentiate(info_nce_op, _save, _differentiate)
refuse_derivative(
    info_nce_backward_op,
    "double backward through info_nce: its gradient kernels have no derivative; use "
    "fastrd.kernels.reference.info_nce where second derivatives are needed",
)


def info_nce(
    anchor: Tensor,
    candidates: Tensor,
    *,
    positives: Tensor,
    labels: Tensor | None,
    candidate_labels: Tensor | None,
    temperature: float,
    normalize: bool,
    fused: bool,
) -> Tensor:
    """Per-sample losses (N,); see `fastrd.losses.info_nce` for the arguments. `fused`: by the Triton kernels."""
    if not fused and len(anchor) * len(candidates) <= tiles.TILE:
        # One tile would hold all scores: computing them again in backward would save no memory and cost time.
        with torch.autocast(anchor.device.type, enabled=False):
            return reference.info_nce(
                anchor,
                candidates,
                positives=positives,
                labels=labels,
                candidate_labels=candidate_labels,
                temperature=temperature,
                normalize=normalize,
                reduction="none",
            )
    dtype = torch.promote_types(anchor.dtype, candidates.dtype)
    keys = (None if x is None else x.contiguous() for x in (positives, labels, candidate_labels))
    return info_nce_op(anchor.to(dtype), candidates.to(dtype), *keys, temperature, normalize, fused)[0]


def launches(target: str) -> list[Launch]:
    """What forward and backward launch on `target`, on three problems."""
    found = []
    for dtype, n, depth in (
        (torch.bfloat16, 32768, 128),
        (torch.float32, 32768, 128),
        (torch.bfloat16, 8192, 2048),
    ):
        name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
        rows, sums, product = n * depth * dtype.itemsize, n * depth * 4, 2 * n * n * depth
        unit = "tf32x3" if dtype == torch.float32 else "bf16"
        work = {
            "inverse_norms": (rows, 2 * n * depth, "fp32"),
            "stream": (2 * rows, product, unit),
            "finish": (2 * rows, 2 * n * depth, "fp32"),
            "gradient": (2 * rows + sums, 2 * product, unit),
            "share": (2 * rows + n * n * dtype.itemsize, product, unit),
            "project": (2 * rows + sums, 8 * n * depth, "fp32"),
        }

        def run(dtype: torch.dtype = dtype, n: int = n, depth: int = depth) -> None:
            x = torch.empty(n, depth, dtype=dtype, device="meta")
            keys = [torch.empty(n, dtype=torch.int64, device="meta")] * 3
            saved = _run(x, x, *keys, 0.07, True, True)
            _run_backward(saved[0], x, x, *keys, *saved, 0.07, True, True, [True, True])

        found += recorded(run, target, f"N = M = {n}, D = {depth}, {name}", work)
    return found
