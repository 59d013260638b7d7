"""Noise-contrastive estimation against a memory bank: value and anchor gradient in one pass over the bank.

    L_i = -[ log h(a_i, r_p) + sum over negatives n of log(1 - h(a_i, r_n)) ],  h(a, r) = (e/Z) / (e/Z + k/M + eps)

with e = exp(a.r / t). Let u = a.r / t - log Z - log(k/M + eps). Then -log h = softplus(-u), -log(1 - h) = softplus(u)
+ log1p(eps M / k), and the gradient of either in a.r / t is -sigmoid(-u) or sigmoid(u).

Gathering the k rows of each anchor moves B k D numbers, through the L2 cache at best, and has no matrix product in it.
The dense form below multiplies all anchors with the whole bank instead: M/k times the flops, on tensor cores, and
each row of the bank read once. What remains is to know, for an (anchor, row) pair in registers, how often that row was
drawn, without a table of draws; draws.py draws so that this is a closed formula of the row's place and a hash.

At B = 64, k = 16384, D = 128, M = 50,000 in bfloat16 on an H200 (4.3 TB/s, 790 TFLOP/s): gathering moves 268 MB through
the L2 cache, 50 us at 5.5 TB/s; the dense form moves 12.8 MB from memory and 8.7 MB of partial sums through the cache,
5 us, and does 1.6 GFLOP, 2 us, and issues 57 instructions for each of its 3.2 million pairs, 7 us.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import nce_bank_torch, nce_bank_triton
from .cpu import native
from .nce_bank_torch import Problem
from .reference import MIN_NORM
from .runtime.aot import SHORT_NAMES, Launch, recorded
from .runtime.ops import call, define, in_cpp, loss_op, scalar, wants_gradient

MAX_ROWS = 2**24
MAX_DRAWS = 2**20
"""Above these a rank or a stratum would not survive its passage through float32 inside the kernel."""


def _run(*arguments) -> tuple[Tensor, Tensor]:
    *inputs, fused = arguments
    return (nce_bank_triton if fused else nce_bank_torch).run(Problem(*inputs))


def _empty(*arguments) -> tuple[Tensor, Tensor]:
    return Problem(*arguments[:-1]).outputs()


nce_bank_op = loss_op(
    "nce_bank",
    "(Tensor anchor, Tensor bank, Tensor positives, Tensor? table, SymInt k, Tensor? classes, Tensor? seed, "
    "Tensor normalizer, Tensor? weight, float temperature, float eps, str reduction, bool gradient, bool fused) "
    "-> (Tensor loss, Tensor gradient)",
    _run,
    _empty,
    inputs=1,
)


def nce_bank(
    anchor: Tensor,
    bank: Tensor,
    positives: Tensor,
    *,
    negatives: Tensor | int | str,
    normalizer: float | Tensor,
    classes: Tensor | None = None,
    weight: Tensor | None = None,
    temperature: float = 0.07,
    seed: int | Tensor = 0,
    reduction: str = "mean",
    eps: float = 0.0,
    fused: bool = False,
) -> Tensor:
    """The loss of `fastrd.losses.nce_bank`, with labels given as their `draws.class_table`; arguments unchecked."""
    table = negatives if isinstance(negatives, Tensor) else None
    k: Any = table.shape[1] if table is not None else 0 if negatives == "all" else negatives
    drawn = table is None and k > 0
    loss, _ = call(
        nce_bank_op,
        anchor,
        bank.detach(),
        positives,
        table,
        k,
        None if table is not None else classes,
        scalar(seed, torch.int64, anchor.device) if drawn else None,
        scalar(normalizer, torch.promote_types(anchor.dtype, torch.float32), anchor.device),
        None if weight is None else weight.detach(),
        temperature,
        eps,
        reduction,
        wants_gradient(anchor),
        fused,
    )
    return loss


def _update(bank: Tensor, rows: Tensor, values: Tensor, momentum: float) -> None:
    nce_bank_triton.launch_update(bank, rows, values, momentum)
    torch.autograd.graph.increment_version(bank)


update_bank_op = define(
    "update_bank",
    "(Tensor(a!) bank, Tensor rows, Tensor values, float momentum) -> ()",
    _update,
    lambda *_: None,
)


def update_bank(bank: Tensor, rows: Tensor, values: Tensor, momentum: float, backend: str) -> None:
    """`fastrd.losses.update_bank` in place. backend: "triton", which must be able to; "auto", C++ where it can."""
    if not torch.compiler.is_compiling() and values.untyped_storage()._cdata == bank.untyped_storage()._cdata:
        values = values.clone()  # all are read before any row is written
    if backend == "triton":
        call(update_bank_op, bank, rows, values, momentum)
    elif backend == "auto" and _native(bank, rows, values):
        tensors = bank, rows.contiguous(), values.contiguous()
        native.call("update_bank", *tensors, *values.shape, bank.stride(0), float(momentum), MIN_NORM)
        torch.autograd.graph.increment_version(bank)
    else:
        nce_bank_torch.update_in_torch(bank, rows, values, momentum)


def _native(bank: Tensor, rows: Tensor, values: Tensor) -> bool:
    whole_rows = bank.stride(1) == 1 or bank.shape[1] == 1
    float32_rows = bank.is_cpu and bank.dtype == values.dtype == torch.float32 and whole_rows
    return float32_rows and in_cpp((bank, rows, values))


def launches(target: str) -> list[Launch]:
    """What a step launches at B = 64, k = 16384, D = 128, M = 50,000."""
    batch, rows, depth, k = 64, 50_000, 128, 16_384
    found = []
    for draw, dtype in (
        ("sample", torch.bfloat16),
        ("sample", torch.float16),
        ("sample", torch.float32),
        ("table", torch.bfloat16),
        ("all", torch.bfloat16),
    ):
        plan = nce_bank_triton.launch_plan(batch, rows, depth, dtype)
        splits = -(-rows // plan["rows_per_split"])
        tiles = -(-batch // plan["BLOCK_B"]) * -(-rows // plan["BLOCK_M"]) if dtype != torch.float32 else 0
        drawn = 4 * (batch * rows if draw == "table" else rows)
        unit = "tf32x3" if dtype == torch.float32 else "bf16"
        work = {
            "score_kernel": (rows * depth * dtype.itemsize + drawn, 4 * batch * rows * depth, unit, tiles),
            "finish_kernel": (4 * batch * (splits + 1) * (depth + 1), batch * splits * depth, "fp32"),
            "update_kernel": (
                3 * batch * depth * dtype.itemsize + 8 * batch * batch,
                6 * batch * depth,
                "fp32",
            ),
        }

        def run(draw: str = draw, dtype: torch.dtype = dtype) -> None:
            anchor, bank = (torch.empty(n, depth, dtype=dtype, device="meta") for n in (batch, rows))
            positives = torch.empty(batch, dtype=torch.int64, device="meta")
            problem = Problem(
                anchor,
                bank,
                positives,
                table=positives[:, None].expand(batch, k) if draw == "table" else None,
                k=0 if draw == "all" else k,
                classes=None if draw == "table" else torch.empty(4, rows, dtype=torch.int32, device="meta"),
                seed=positives[0] if draw == "sample" else None,
                normalizer=torch.empty((), device="meta"),
                weight=torch.empty(batch, device="meta"),
                temperature=0.07,
                eps=0.0,
                reduction="mean",
                gradient=True,
            )
            nce_bank_triton.run(problem)
            nce_bank_triton.launch_update(bank, positives, anchor, 0.5)

        problem = f"{draw}, B = {batch}, M = {rows}, D = {depth}, {SHORT_NAMES[dtype]}"
        found += recorded(run, target, problem, work)
    return found
