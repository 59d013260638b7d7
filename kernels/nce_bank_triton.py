"""nce_bank by Triton kernels: nce_bank.py says what they compute."""

from __future__ import annotations

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
def _log1p(e):
    """log(1 + e) for e in [0, 1], relative accuracy for small e too: typical ones are 1e-4."""
    z = e / (2 + e)
    y = z * z
    series = 1 / 7 + y * (1 / 9 + y * (1 / 11 + y * (1 / 13)))
    return 2 * z * (1 + y * (1 / 3 + y * (1 / 5 + y * series)))


@kernel
def _times_drawn(rank, n, every, extra, offset, key_1, key_2):
    """How often the row of this rank among an anchor's n was drawn: draws.py read backwards."""
    rank += offset
    rank = tl.where(rank >= n, rank - n, rank) + 1
    # stratum, rest = divmod(rank * strata - 1, n): a float32 guess, corrected by one. Their small difference survives
    # that the two products wrap at 2**32.
    strata = tl.maximum(extra, 1)
    stratum = (rank.to(tl.float32) * (strata.to(tl.float32) / n)).to(tl.int32)
    product = rank.to(tl.uint32) * strata.to(tl.uint32)
    rest = (product - stratum.to(tl.uint32) * n.to(tl.uint32)).to(tl.int32) - 1
    below, above = rest < 0, rest >= n
    stratum += above.to(tl.int32) - below.to(tl.int32)
    rest += tl.where(below, n, 0) - tl.where(above, n, 0)
    # The rows of this stratum have rest = head, head + strata, head + 2 strata, ... as long as it is below n.
    turn = (rest.to(tl.float32) * (1.0 / strata.to(tl.float32))).to(tl.int32)
    head = rest - turn * strata
    below, above = head < 0, head >= strata
    turn += above.to(tl.int32) - below.to(tl.int32)
    head += tl.where(below, strata, 0) - tl.where(above, strata, 0)
    shortest = n // strata
    length = shortest + (head < n - shortest * strata).to(tl.int32)
    x = stratum.to(tl.uint32) + key_1
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) ^ key_2
    x = (x ^ (x >> 15)) * 0xD35A2D97
    pick = tl.umulhi((x ^ (x >> 15)) & 0xFFFFFFF8, length.to(tl.uint32)).to(tl.int32)
    return every + ((pick == turn) & (extra > 0)).to(tl.int32)


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
    inv_temperature,
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
            seed = tl.load(seed_ptr)
            key = _mix(b.to(tl.uint32) * 0x9E3779B9 + seed.to(tl.uint32))
            key_1 = _mix(key ^ (seed >> 32).to(tl.uint32))
            key_2 = _mix(key_1 + 0x9E3779B9)
            offset = tl.umulhi(_mix(key_2 + 0x85EBCA6B) & 0xFFFFFFF8, n.to(tl.uint32)).to(tl.int32)
    shift = tl.log(tl.load(normalizer_ptr)) + tl.log(noise + eps)
    ratio = eps / noise
    missing = tl.log(tl.maximum(ratio, 1.0)) + _log1p(tl.minimum(ratio, 1 / tl.maximum(ratio, 1.0)))

    if D <= BLOCK_K:
        a = tl.load(anchor_rows + own[None, :], b_valid[:, None] & own_valid, 0).to(DOT)
    loss = tl.zeros((BLOCK_B,), tl.float32)
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
            times = tl.load(drawn, b_valid[:, None] & row_valid[None, :], 0)
        else:
            # Going round from the end of the anchor's class, the rows of its own class come last.
            rank = tl.load(classes_ptr + M + row, row_valid, 0)[None, :] - end[:, None]
            rank = tl.where(rank < 0, rank + M, rank)
            other = (rank < n[:, None]) & row_valid[None, :]
            if DRAW == "all":
                times = other.to(tl.int32)
            else:
                times = _times_drawn(
                    rank,
                    n[:, None],
                    every[:, None],
                    (k - every * n)[:, None],
                    offset[:, None],
                    key_1[:, None],
                    key_2[:, None],
                )
                times = tl.where(other, times, 0)

        u = score * inv_temperature - shift[:, None]
        e = tl.exp(-tl.abs(u))
        tail = _log1p(e)
        times = times.to(tl.float32)
        is_positive = row[None, :] == positive[:, None]
        loss += tl.sum(tl.where(times > 0, times * (tl.maximum(u, 0) + tail + missing[:, None]), 0), 1)
        loss += tl.sum(tl.where(is_positive, tl.maximum(-u, 0) + tail, 0), 1)
        if GRADIENT:
            if D > BLOCK_K:
                tile = tl.load(bank_rows + own[None, :], row_valid[:, None] & own_valid, 0)
            sigmoid_minus, sigmoid = tl.where(u > 0, e, 1) / (1 + e), tl.where(u > 0, 1, e) / (1 + e)
            slope = times * sigmoid - tl.where(is_positive, sigmoid_minus, 0)
            gradient = tl.dot(slope.to(GRADIENT_DOT), tile.to(GRADIENT_DOT), gradient, input_precision=PRECISION)

    out = split.to(tl.int64) * B + b
    if depth_slice == 0:
        tl.store(loss_ptr + out, loss, b_valid)
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
        norm = tl.maximum(tl.sqrt(tl.sum(blended * blended, 0)), MIN_NORM)
        tl.store(bank_ptr + row * bank_stride + d, (blended / norm).to(bank_ptr.dtype.element_ty), d < D)


MIN_SPLIT = 384
"""131 programs for a bank of 50,000 rows, one for each of an H200's 132 multiprocessors."""
PROGRAMS = 264
"""At most about as many: each leaves a block of partial gradients behind, 9 MB in all at D = 128."""
SCORE_STAGES = 2


def launch_plan(batch: int, rows: int, depth: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes, and the bank rows one program scans: from shapes and operands alone, so that results repeat.

    Whole rows of half precision fit beside the gradient; float32 operands, split in three, come 32 columns at a time.
    Of bfloat16 a tile of scores is too small for eight warps: the second four would repeat the arithmetic of the first.
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
        "num_warps": 4 if dtype == torch.bfloat16 else 8,
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
        1 / temperature,
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
