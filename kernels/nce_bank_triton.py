"""nce_bank by Triton kernels: nce_bank.py says what they compute. Logarithms are to base 2 here."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .nce_bank_torch import Problem
from .reference import MIN_NORM
from .runtime.jit import interpreted, kernel, target_of, tl


@kernel
def _mix(x):
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0xD35A2D97
    return x ^ (x >> 15)


@kernel
def _log2_1p(e):
    """log2(1 + e) for e in [0, 1], to 2e-7 of itself for small e too: typical ones are 1e-4."""
    tail = -0.35840848 + e * (0.27564141 + e * (-0.19711897 + e * (0.11285619 + e * (-0.042567063 + e * 0.0075491820))))
    return e * (1.4426950 + e * (-0.72134018 + e * (0.48069295 + e * tail)))


@kernel
def _wrapped(x, size):
    """x, from -size up, into 0 to size - 1: as unsigned numbers the smaller of two."""
    return tl.minimum(x.to(tl.uint32), (x + size).to(tl.uint32)).to(tl.int32)


@kernel
def _times_drawn(rank, n, every, extra, shortest, offset, key_1, key_2):
    """How often the row of this rank among an anchor's n was drawn: draws.py read backwards. shortest: n // extra."""
    strata = tl.maximum(extra, 1)
    # Ranks after the turn, counted from the last one, so that no 1 need be added before they are multiplied.
    back = _wrapped(n - 1 - offset - rank, n)
    # stratum, rest = divmod((n - back) * strata - 1, n). The quotient in float32, rounded to an integer by a number
    # whose ulp is 1, is right or 1 too large. Its bits are the integer plus `zero`, and products wrap at 2**32. Factors
    # are negated, so that a product and a difference are one instruction.
    zero = 0x4B400000
    guess = (strata.to(tl.float32) + 12582912.0) - back.to(tl.float32) * (strata.to(tl.float32) / n)
    stratum = guess.to(tl.int32, bitcast=True)
    rest = (n * (strata + zero) - 1) + back * -strata + stratum * -n
    x = (stratum + (rest >> 31)).to(tl.uint32) + (key_1 - zero)
    rest = _wrapped(rest, n)
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15) ^ (key_2 ^ (key_2 >> 15))) * 0xD35A2D97
    x = (x ^ (x >> 15)) & 0xFFFFFFF8
    # The rows of this stratum have rest = head, head + strata, head + 2 strata, ... as long as it is below n: of them
    # there are `shortest`, and one more where head < longer. Of either length the row drawn is known; is it this one?
    longer = n - shortest * strata
    of_longer = (rest + tl.umulhi(x, (shortest + 1).to(tl.uint32)).to(tl.int32) * -strata).to(tl.uint32)
    of_shorter = (rest - longer + tl.umulhi(x, shortest.to(tl.uint32)).to(tl.int32) * -strata).to(tl.uint32)
    drawn = (of_longer < longer.to(tl.uint32)) | (of_shorter < (extra - longer).to(tl.uint32))
    return tl.where(drawn, every + 1, every)


@kernel
def _score_kernel(
    anchor_ptr,  # (B, D), rows anchor_stride apart
    bank_ptr,  # (M, D), rows bank_stride apart
    positives_ptr,  # (B,) int64
    counts_ptr,  # (B, M) int32, how often each row stands in an anchor's table; DRAW == "table" only
    classes_ptr,  # (4, M) int32 of class_table; not for "table"
    seed_ptr,  # () int64; "sample" only
    normalizer_ptr,  # () float32
    loss_ptr,  # (splits, B) float32
    gradient_ptr,  # (splits, B, D) float32; GRADIENT only
    B,
    M,
    k,
    rows_per_split,
    anchor_stride,
    bank_stride,
    scale,
    eps,
    D: tl.constexpr,
    DRAW: tl.constexpr,
    GRADIENT: tl.constexpr,
    DOT: tl.constexpr,
    GRADIENT_DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    split, depth_slice = tl.program_id(0), tl.program_id(2)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    b_valid = b < B
    own = depth_slice * BLOCK_D + tl.arange(0, BLOCK_D)
    own_valid = (own < D)[None, :] if D % BLOCK_D != 0 else True
    anchor_rows = anchor_ptr + b.to(tl.int64)[:, None] * anchor_stride
    positive = tl.load(positives_ptr + b, b_valid, 0).to(tl.int32)

    noise = tl.full((BLOCK_B,), k, tl.float32) / M
    if DRAW != "table":
        size = tl.load(classes_ptr + 3 * M + positive)
        end = tl.load(classes_ptr + 2 * M + positive) + size
        n = M - size
        if DRAW == "all":
            noise = n.to(tl.float32) / M
        else:
            every = k // tl.maximum(n, 1)
            extra = k - every * n
            shortest = n // tl.maximum(extra, 1)
            seed = tl.load(seed_ptr)
            key = _mix(b.to(tl.uint32) * 0x9E3779B9 + seed.to(tl.uint32))
            key_1 = _mix(key ^ (seed >> 32).to(tl.uint32))
            key_2 = _mix(key_1 + 0x9E3779B9)
            offset = tl.umulhi(_mix(key_2 + 0x85EBCA6B) & 0xFFFFFFF8, n.to(tl.uint32)).to(tl.int32)
    # Finite where no row is of another class: what counts 0 times is multiplied by 0.
    shift = tl.log2(tl.load(normalizer_ptr)) + tl.where(noise + eps > 0, tl.log2(noise + eps), -1e30)
    ratio = tl.where(noise > 0, eps / noise, 0)
    missing = tl.log2(tl.maximum(ratio, 1.0)) + _log2_1p(tl.minimum(ratio, 1 / tl.maximum(ratio, 1.0)))

    if D <= BLOCK_K:
        a = tl.load(anchor_rows + own[None, :], b_valid[:, None] & own_valid, 0).to(DOT)
    loss = tl.zeros((BLOCK_B, BLOCK_M), tl.float32)
    gradient = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)

    stop = tl.minimum((split + 1) * rows_per_split, M)
    for start in range(split * rows_per_split, stop, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        row_valid = row < stop
        bank_rows = bank_ptr + row.to(tl.int64)[:, None] * bank_stride
        if D <= BLOCK_K:
            tile = tl.load(bank_rows + own[None, :], row_valid[:, None] & own_valid, 0)
            score = tl.dot(a, tl.trans(tile.to(DOT)), input_precision=PRECISION)
        else:
            score = tl.zeros((BLOCK_B, BLOCK_M), tl.float32)
            for d_start in range(0, D, BLOCK_K):
                d = d_start + tl.arange(0, BLOCK_K)
                a = tl.load(anchor_rows + d[None, :], b_valid[:, None] & (d < D)[None, :], 0).to(DOT)
                tile = tl.load(bank_rows + d[None, :], row_valid[:, None] & (d < D)[None, :], 0).to(DOT)
                score = tl.dot(a, tl.trans(tile), score, input_precision=PRECISION)

        if DRAW == "table":
            drawn = counts_ptr + b.to(tl.int64)[:, None] * M + row[None, :]
            times = tl.load(drawn, b_valid[:, None] & row_valid[None, :], 0).to(tl.float32)
        else:
            # Going round from the end of the anchor's class, the rows of its own class come last.
            rank = tl.load(classes_ptr + M + row, row_valid, 1 << 30)[None, :] - end[:, None]
            rank = _wrapped(rank, M)
            times = 1.0
            if DRAW == "sample":
                times = _times_drawn(
                    rank,
                    n[:, None],
                    every.to(tl.float32)[:, None],
                    extra[:, None],
                    shortest[:, None],
                    offset[:, None],
                    key_1[:, None],
                    key_2[:, None],
                )
            times = tl.where(rank < n[:, None], times, 0.0)

        u = score * scale - shift[:, None]
        e = tl.exp2(-tl.abs(u))
        tail = _log2_1p(e)
        loss += times * (tl.maximum(u, 0) + tail + missing[:, None])
        slope = times * tl.exp2(tl.minimum(u, 0) - tail)
        if tl.max(((positive >= start) & (positive < start + BLOCK_M)).to(tl.int32), 0) > 0:
            is_positive = row[None, :] == positive[:, None]
            loss += tl.where(is_positive, tl.maximum(-u, 0) + tail, 0)
            slope -= tl.where(is_positive, tl.exp2(tl.minimum(-u, 0) - tail), 0)
        if GRADIENT:
            if D > BLOCK_K:
                tile = tl.load(bank_rows + own[None, :], row_valid[:, None] & own_valid, 0)
            gradient = tl.dot(slope.to(GRADIENT_DOT), tile.to(GRADIENT_DOT), gradient, input_precision=PRECISION)

    out = split.to(tl.int64) * B + b
    if depth_slice == 0:
        tl.store(loss_ptr + out, tl.sum(loss, 1) * 0.6931471805599453, b_valid)
    if GRADIENT:
        valid = b_valid[:, None] & own_valid
        tl.store(gradient_ptr + out[:, None] * D + own[None, :], gradient, valid)


@kernel
def _finish_kernel(
    partial_loss_ptr,  # (splits, B) float32
    partial_gradient_ptr,  # (splits, B, D) float32
    weight_ptr,  # (B,); WEIGHTED only
    loss_ptr,  # () or (B,) float32
    gradient_ptr,  # (B, D) float32
    splits,
    B,
    D,
    loss_scale,
    gradient_scale,
    WEIGHTED: tl.constexpr,
    REDUCE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program 0 sums the losses, each other one an anchor's gradient, always in the same order."""
    if tl.program_id(0) == 0:
        total = tl.zeros((BLOCK,), tl.float32)
        for b_start in range(0, B, BLOCK):
            b = b_start + tl.arange(0, BLOCK)
            loss = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, splits, BLOCK):
                split = start + tl.arange(0, BLOCK)
                valid = (split < splits)[:, None] & (b < B)[None, :]
                loss += tl.sum(tl.load(partial_loss_ptr + split[:, None] * B + b[None, :], valid, 0), 0)
            if WEIGHTED:
                loss *= tl.load(weight_ptr + b, b < B, 0).to(tl.float32)
            if REDUCE:
                total += loss
            else:
                tl.store(loss_ptr + b, loss, b < B)
        if REDUCE:
            tl.store(loss_ptr, tl.sum(total, 0) * loss_scale)
    else:
        b = tl.program_id(0) - 1
        scale = gradient_scale
        if WEIGHTED:
            scale *= tl.load(weight_ptr + b).to(tl.float32)
        for d_start in range(0, D, BLOCK_D):
            d = d_start + tl.arange(0, BLOCK_D)
            gradient = tl.zeros((BLOCK_D,), tl.float32)
            for start in range(0, splits, BLOCK):
                split = start + tl.arange(0, BLOCK)
                valid = (split < splits)[:, None] & (d < D)[None, :]
                rows = partial_gradient_ptr + (split.to(tl.int64) * B + b)[:, None] * D
                gradient += tl.sum(tl.load(rows + d[None, :], valid, 0), 0)
            tl.store(gradient_ptr + b.to(tl.int64) * D + d, gradient * scale, d < D)


@kernel
def _update_kernel(
    bank_ptr,  # (M, D), rows bank_stride apart
    rows_ptr,  # (B,) int64
    values_ptr,  # (B, D), rows value_stride apart
    B,
    D,
    bank_stride,
    value_stride,
    momentum,
    MIN_NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a value; only the last value of a row writes."""
    own = tl.program_id(0)
    row = tl.load(rows_ptr + own)
    later = 0
    for start in range(own + 1, B, BLOCK):
        other = start + tl.arange(0, BLOCK)
        later += tl.sum((tl.load(rows_ptr + other, other < B, -1) == row).to(tl.int32), 0)
    if later == 0:
        d = tl.arange(0, BLOCK_D)
        old = tl.load(bank_ptr + row * bank_stride + d, d < D, 0).to(tl.float32)
        new = tl.load(values_ptr + own.to(tl.int64) * value_stride + d, d < D, 0).to(tl.float32)
        blended = momentum * old + (1 - momentum) * new
        norm = tl.sqrt(tl.sum(blended * blended, 0))
        norm = tl.where(norm < MIN_NORM, MIN_NORM, norm)  # a NaN stays one
        tl.store(bank_ptr + row * bank_stride + d, (blended / norm).to(bank_ptr.dtype.element_ty), d < D)


MIN_SPLIT = 384
"""131 programs for a bank of 50,000 rows, one for each of an H200's 132 multiprocessors."""
PROGRAMS = 264
"""At most about as many: each leaves a block of partial gradients behind, 9 MB in all at D = 128."""
SCORE_STAGES = 2


def launch_plan(batch: int, rows: int, depth: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes, and the bank rows one program scans: from shapes and operands alone, so that results repeat.

    Whole rows of half precision fit beside the gradient; float32 operands, split in three, come 32 columns at a time.
    Of half precision a tile of scores is too small for eight warps: the second four would repeat some arithmetic.
    """
    half = dtype != torch.float32
    block_m = 32
    block_d = min(128, max(16, 1 << (depth - 1).bit_length()))
    block_k = block_d if depth <= (128 if half else 32) else (64 if half else 32)
    block_b = 64 if batch > 32 else 32 if batch > 16 else 16
    blocks = -(-batch // block_b) * -(-depth // block_d)
    per_split = max(MIN_SPLIT, -(-rows // max(1, PROGRAMS // blocks)))
    return {
        "BLOCK_B": block_b,
        "BLOCK_M": block_m,
        "BLOCK_D": block_d,
        "BLOCK_K": block_k,
        "rows_per_split": -(-per_split // block_m) * block_m,
        "num_warps": 4 if half else 8,
    }


def dot_types(anchor: torch.dtype, bank: torch.dtype, target: str) -> dict[str, object]:
    """Two equal half precisions are multiplied as they are, anything else in float32 to float32's accuracy.

    The gradient's coefficients are around 1e-4, too small for float16: there they travel as tf32, whose mantissa is the
    same. Triton's interpreter cannot multiply bfloat16.
    """
    import triton.language as tl

    amd = target.startswith("gfx")
    exact = "ieee" if amd else "tf32x3"
    if anchor == bank == torch.bfloat16 and not interpreted():
        return {"DOT": tl.bfloat16, "GRADIENT_DOT": tl.bfloat16, "PRECISION": exact}
    if anchor == bank == torch.float16:
        return {"DOT": tl.float16, "GRADIENT_DOT": tl.float32, "PRECISION": "ieee" if amd else "tf32"}
    return {"DOT": tl.float32, "GRADIENT_DOT": tl.float32, "PRECISION": exact}


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    anchor, bank, positives, table, k, classes, seed, normalizer, weight = problem[:9]
    temperature, eps, reduction, gradient = problem[9:]
    (batch, depth), rows = anchor.shape, len(bank)
    anchor, bank = (x if x.stride(1) == 1 else x.contiguous() for x in (anchor, bank))
    weight = None if weight is None else weight.contiguous()
    counts = None
    if table is not None:
        counts = torch.zeros(batch, rows, dtype=torch.int32, device=bank.device)
        counts.scatter_add_(1, table.clamp(min=0), (table >= 0).to(torch.int32))
    plan = launch_plan(batch, rows, depth, anchor.dtype if anchor.dtype == bank.dtype else torch.float32)
    splits = -(-rows // plan["rows_per_split"])
    slices = -(-depth // plan["BLOCK_D"])
    partial_loss = anchor.new_empty(splits, batch, dtype=torch.float32)
    partial_gradient = anchor.new_empty(splits, batch, depth if gradient else 0, dtype=torch.float32)
    loss, out = problem.outputs()
    draw = "table" if table is not None else "sample" if k else "all"
    _score_kernel[(splits, -(-batch // plan["BLOCK_B"]), slices if gradient else 1)](
        anchor,
        bank,
        positives.contiguous(),
        counts,
        classes,
        seed,
        normalizer,
        partial_loss,
        partial_gradient,
        batch,
        rows,
        k,
        plan.pop("rows_per_split"),
        anchor.stride(0),
        bank.stride(0),
        1 / (temperature * math.log(2)),
        eps,
        D=depth,
        DRAW=draw,
        GRADIENT=gradient,
        **dot_types(anchor.dtype, bank.dtype, target_of(anchor.device)),
        **plan,
        num_stages=SCORE_STAGES,
    )
    mean = 1 / batch if reduction == "mean" else 1.0
    _finish_kernel[(1 + batch * gradient,)](
        partial_loss,
        partial_gradient,
        weight,
        loss,
        out,
        splits,
        batch,
        depth,
        mean,
        mean / temperature,
        WEIGHTED=weight is not None,
        REDUCE=reduction != "none",
        BLOCK=64,
        BLOCK_D=plan["BLOCK_D"],
    )
    return loss, out


def launch_update(bank: Tensor, rows: Tensor, values: Tensor, momentum: float) -> None:
    if bank.stride(1) != 1:
        dense = bank.contiguous()
        launch_update(dense, rows, values, momentum)
        bank.copy_(dense)
        return
    values = values if values.stride(1) == 1 else values.contiguous()
    _update_kernel[(len(rows),)](
        bank,
        rows.contiguous(),
        values,
        len(rows),
        bank.shape[1],
        bank.stride(0),
        values.stride(0),
        momentum,
        MIN_NORM=MIN_NORM,
        BLOCK=256,
        BLOCK_D=1 << (bank.shape[1] - 1).bit_length(),
    )
