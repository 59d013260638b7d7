"""Losses that compute their gradient together with their value: backward only scales it.

Such a gradient is a constant to autograd, so a second derivative would silently miss it; it is refused instead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

library = torch.library.Library("fastrd", "FRAGMENT")
"""Ops registered by hand: `torch.library.custom_op` takes up to 0.3 ms a call, more than what is launched."""


@torch.library.custom_op(
    "fastrd::scale_gradient",
    mutates_args=(),
    schema="(Tensor upstream, Tensor gradient, ScalarType dtype) -> Tensor",
)
def scale_gradient(upstream: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """upstream () or (B,) times gradient (..., B, C), rounded once to `dtype`."""
    if upstream.ndim == 1:
        upstream = upstream[:, None]
    out = torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, upstream, out=out)


@scale_gradient.register_fake
def _(upstream: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


def _refuse(ctx, grad: Tensor) -> None:
    raise RuntimeError(
        "double backward through a fused loss: its gradient was computed with its value and cannot be differentiated "
        "again; use the functions of fastrd.kernels.reference where second derivatives are needed"
    )


scale_gradient.register_autograd(_refuse)


def loss_op(name: str, schema: str, run: Callable, empty: Callable) -> torch._ops.OpOverload:
    """Register fastrd::`name`, `run` on the CPU and on GPUs, `empty` for shapes alone.

    The first output is the loss, () or (B,), the last its gradients (live, B, C), one for each of the first arguments
    or none.
    """
    library.define(f"{name}{schema}")
    for device in ("CPU", "CUDA"):
        library.impl(name, run, device)
    torch.library.register_fake(f"fastrd::{name}", empty, lib=library)
    op = getattr(torch.ops.fastrd, name).default

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            with torch._C._AutoDispatchBelowAutograd():
                outputs = op(*arguments)
            ctx.dtype, ctx.arguments = arguments[0].dtype, len(arguments)
            # As an output it stays tied to this node, which is how a second derivative finds its refusal.
            ctx.save_for_backward(outputs[-1])
            return outputs

        @staticmethod
        def backward(ctx, upstream, *_):
            slopes = scale_gradient(upstream, *ctx.saved_tensors, ctx.dtype).unbind()
            return *slopes, *[None] * (ctx.arguments - len(slopes))

    def differentiable(*arguments):
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            return Loss.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    library.impl(name, differentiable, "Autograd")
    return op
