"""Losses that compute their gradient together with their value: backward only scales it.

Such a gradient is a constant to autograd, so a second derivative would silently miss it; it is refused instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .ops import define, differentiate, refuse_derivative


def _scale(upstream: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """upstream () or (B,) times gradient (..., B, C), rounded once to `dtype`."""
    if upstream.ndim == 1:
        upstream = upstream[:, None]
    out = torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, upstream, out=out)


scale_gradient = define(
    "scale_gradient",
    "(Tensor upstream, Tensor gradient, ScalarType dtype) -> Tensor",
    _scale,
    lambda upstream, gradient, dtype: torch.empty_like(gradient, dtype=dtype),
)
refuse_derivative(
    scale_gradient,
    "double backward through a fused loss: its gradient was computed with its value and cannot be differentiated "
    "again; use the functions of fastrd.kernels.reference where second derivatives are needed",
)


def loss_op(name: str, schema: str, run: Callable, empty: Callable) -> torch._ops.OpOverload:
    """`define` a loss whose first output is the value, () or (B,), and whose last are its gradients.

    These are (live, B, C), one for each of the first arguments or none.
    """
    op = define(name, schema, run, empty)

    def save(ctx: Any, arguments: tuple, outputs: tuple[Tensor, ...]) -> None:
        ctx.dtype, ctx.arguments = arguments[0].dtype, len(arguments)
        # As an output it stays tied to this node, which is how a second derivative finds its refusal.
        ctx.save_for_backward(outputs[-1])

    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple:
        slopes = scale_gradient(upstream, *ctx.saved_tensors, ctx.dtype).unbind()
        return *slopes, *[None] * (ctx.arguments - len(slopes))

    differentiate(op, save, backward)
    return op
