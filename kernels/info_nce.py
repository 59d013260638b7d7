"""InfoNCE with class masks, its N x M score matrix never stored.

    L_i = log( e^{s_ip} + sum over j not masked of e^{s_ij} ) - s_ip,    s_ij = <a_i, c_j> / t,    p = positives[i]

with rows divided by their L2 norm on request. Candidate j is masked for anchor i where their labels are equal, or,
without labels, where j = p. With P_ij = e^{s_ij} / (e^{s_ip} + ...), zero where masked, and P_ip = e^{-L_i} - 1,

    dL_i/da_i = sum_j P_ij c_j / t,    dL_i/dc_j = P_ij a_i / t.

Forward streams tiles of scores through a running log-sum-exp; the positive is added at the end, so that L_i is a
softplus and never the difference of two large numbers. Backward computes the tiles of P again, once for each side;
without Triton a sum over the anchors computes its gradients with its value, from one pass over the scores.
Normalisation is a factor per row and per column of a tile: no normalised copy, and no rounding of one to bfloat16.

Memory O((N + M) D). Where a row of gradients is too long for registers (D > 256, float32 D > 128) backward writes
slabs of P, each no larger than the inputs, and leaves the products to the matrix library. Without Triton all of it
runs on tiles that stay in the processor's cache.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import info_nce_torch, info_nce_triton, reference
from .info_nce_torch import Pair
from .runtime.aot import SHORT_NAMES, Launch, recorded
from .runtime.ops import call, define, differentiate, refuse_derivative, scale, wants_gradient


def form(fused: bool) -> ModuleType:
    """The module that computes: both have inverse_norms, partials, finish, unit_gradients and project."""
    return info_nce_triton if fused else info_nce_torch


def inverse_norms(x: Tensor, normalize: bool, fused: bool) -> Tensor:
    """(X,) what rows are multiplied by; ones without `normalize`."""
    if normalize:
        return form(fused).inverse_norms(x)
    return torch.ones(len(x), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


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
    module = form(pair.fused)
    return *module.finish(module.partials(pair), pair), pair.a_norm, pair.c_norm


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
    return _gradients(pair, loss, lse, upstream, sides)


def _gradients(pair: Pair, loss: Tensor, lse: Tensor, upstream: Tensor, sides: list[bool]) -> tuple[Tensor, Tensor]:
    factor = upstream / pair.temperature
    module = form(pair.fused)
    a_sums, c_sums = module.unit_gradients(pair, loss, lse, factor, (sides[0], sides[1]))
    return (
        module.project(pair, a_sums, factor) if sides[0] else a_sums,
        module.project(pair, c_sums, None) if sides[1] else c_sums,
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


def _differentiate(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple:
    if upstream is None:
        return None, None
    sides = [bool(needed) for needed in ctx.needs_input_grad[-2:]]
    options = ctx.temperature, ctx.normalize, ctx.fused
    gradients = call(info_nce_backward_op, upstream.contiguous(), *ctx.saved_tensors, *options, sides)
    return tuple(g if wanted else None for g, wanted in zip(gradients, sides, strict=True))


differentiate(info_nce_op, 2, _save, _differentiate)
refuse_derivative(
    info_nce_backward_op,
    3,
    "double backward through info_nce: its gradient kernels have no derivative; use "
    "fastrd.kernels.reference.info_nce where second derivatives are needed",
)


def _run_sum(
    anchor: Tensor,
    candidates: Tensor,
    weight: Tensor,
    positives: Tensor,
    labels: Tensor | None,
    candidate_labels: Tensor | None,
    temperature: float,
    normalize: bool,
    sides: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_i w_i L_i (), and its gradients in both sides, in the dtype of w; empty where not asked for."""
    a, c = anchor.to(weight.dtype), candidates.to(weight.dtype)
    pair = pair_of(a, c, positives, labels, candidate_labels, temperature, normalize, False)
    if info_nce_torch.sums_without_maximum(pair):
        return info_nce_torch.value_and_gradients(pair, weight, (sides[0], sides[1]))
    loss, lse = info_nce_torch.finish(info_nce_torch.partials(pair), pair)
    return (weight * loss).sum(), *_gradients(pair, loss, lse, weight, sides)


def _empty_sum(anchor: Tensor, candidates: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    wanted = zip((anchor, candidates), rest[-1], strict=True)
    return weight.new_empty(()), *(weight.new_empty(x.shape if side else 0) for x, side in wanted)


info_nce_sum_op = define(
    "info_nce_sum",
    "(Tensor anchor, Tensor candidates, Tensor weight, Tensor positives, Tensor? labels, Tensor? candidate_labels, "
    "float temperature, bool normalize, bool[] sides) -> (Tensor, Tensor, Tensor)",
    _run_sum,
    _empty_sum,
)


def _save_sum(ctx: Any, arguments: tuple, outputs: tuple[Tensor, ...]) -> None:
    ctx.dtype = arguments[0].dtype
    ctx.save_for_backward(*outputs[1:])


def _differentiate_sum(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple:
    if upstream is None:
        return None, None
    wanted = zip(ctx.saved_tensors, ctx.needs_input_grad[-2:], strict=True)
    return tuple(scale(upstream, gradient, ctx.dtype) if needed else None for gradient, needed in wanted)


differentiate(info_nce_sum_op, 2, _save_sum, _differentiate_sum)


def info_nce_sum(
    anchor: Tensor,
    candidates: Tensor,
    *,
    positives: Tensor,
    labels: Tensor | None,
    candidate_labels: Tensor | None,
    weight: Tensor | None,
    temperature: float,
    normalize: bool,
    mean: bool,
) -> Tensor:
    """sum_i w_i L_i (), or that divided by N, without Triton; its gradients are computed with it."""
    dtype = torch.promote_types(anchor.dtype, candidates.dtype)
    kind = torch.promote_types(dtype, torch.float32)
    weight = anchor.new_ones(len(anchor), dtype=kind) if weight is None else weight.detach().to(kind).contiguous()
    keys = (None if x is None else x.contiguous() for x in (positives, labels, candidate_labels))
    sides = [wants_gradient(anchor), wants_gradient(candidates)]
    inputs = anchor.to(dtype), candidates.to(dtype), weight / len(anchor) if mean else weight
    return call(info_nce_sum_op, *inputs, *keys, temperature, normalize, sides)[0]


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
    if not fused and len(anchor) * len(candidates) <= info_nce_torch.TILE:
        # One tile would hold all scores: computing them again in backward would save no memory and cost time.
        device = "cpu" if anchor.is_meta else anchor.device.type  # there is no autocast of shapes alone
        with torch.autocast(device, enabled=False):
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
    return call(info_nce_op, anchor.to(dtype), candidates.to(dtype), *keys, temperature, normalize, fused)[0]


def launches(target: str) -> list[Launch]:
    """What forward and backward launch on `target`, on four problems."""
    found = []
    for dtype, n, depth, labelled in (
        (torch.bfloat16, 32768, 128, False),
        (torch.bfloat16, 32768, 128, True),
        (torch.float32, 32768, 128, True),
        (torch.bfloat16, 8192, 2048, True),
    ):
        rows, sums, product = n * depth * dtype.itemsize, n * depth * 4, 2 * n * n * depth
        unit = "tf32x3" if dtype == torch.float32 else "bf16"
        score = info_nce_triton.score_blocks(dtype, depth, target)
        gradient = info_nce_triton.gradient_blocks(dtype, depth, target) or score
        # Other loops have a loop over the depth inside, whose trips a count of instructions does not know.
        flat = dtype == torch.bfloat16 and depth <= 128
        work = {
            "inverse_norms": (rows, 2 * n * depth, "fp32"),
            "stream": (2 * rows, product, unit, flat * -(-n // score.x) * -(-n // score.y)),
            "finish": (2 * rows, 2 * n * depth, "fp32"),
            "gradient": (
                2 * rows + sums,
                2 * product,
                unit,
                flat * -(-n // gradient.x) * -(-n // gradient.y),
            ),
            "share": (2 * rows + n * n * dtype.itemsize, product, unit),
            "project": (2 * rows + sums, 8 * n * depth, "fp32"),
        }

        def run(dtype: torch.dtype = dtype, n: int = n, depth: int = depth, labelled: bool = labelled) -> None:
            x = torch.empty(n, depth, dtype=dtype, device="meta")
            positives = torch.empty(n, dtype=torch.int64, device="meta")
            keys = [positives, *2 * [positives if labelled else None]]
            saved = _run(x, x, *keys, 0.07, True, True)
            _run_backward(saved[0], x, x, *keys, *saved, 0.07, True, True, [True, True])

        problem = f"N = M = {n}, D = {depth}, {SHORT_NAMES[dtype]}{', classes' * labelled}"
        found += recorded(run, target, problem, work)
    return found
