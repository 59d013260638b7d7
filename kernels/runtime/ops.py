"""How the operators of this package are registered: opaque to `torch.compile`, and never under autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

library = torch.library.Library("fastrd", "FRAGMENT")
"""By hand, for `torch.library.custom_op` takes up to 0.3 ms a call, more than what is launched."""


def define(
    name: str, schema: str, run: Callable, empty: Callable, devices: tuple[str, ...] = ("CPU", "CUDA")
) -> torch._ops.OpOverload:
    """Register fastrd::`name`: `run` on `devices`, `empty` for shapes alone. The first argument is a tensor.

    `run` sees no autocast, which would lower the precision of its matrix products.
    """

    def outside_autocast(first: Tensor, *rest: Any) -> Any:
        if not torch.is_autocast_enabled(first.device.type):  # entering the context costs more than a launch
            return run(first, *rest)
        with torch.autocast(first.device.type, enabled=False):
            return run(first, *rest)

    library.define(f"{name}{schema}")
    for device in devices:
        library.impl(name, outside_autocast, device)
    torch.library.register_fake(f"fastrd::{name}", empty, lib=library)
    op = getattr(torch.ops.fastrd, name).default
    _implementations[op] = outside_autocast
    return op


_implementations: dict[torch._ops.OpOverload, Callable] = {}
_with_derivative: dict[torch._ops.OpOverload, Callable] = {}


def call(op: torch._ops.OpOverload, *arguments: Any) -> Any:
    """`op(*arguments)`, in eager mode without torch's dispatcher, which takes longer than a small kernel."""
    if torch.compiler.is_compiling() or not _plain(arguments):
        return op(*arguments)
    return _with_derivative[op](*arguments)


def _plain(arguments: tuple) -> bool:
    """Whether these are ordinary tensors and no mode or transform looks on."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and arguments[0].device.type in ("cpu", "cuda")
        and all(type(x) in (Tensor, torch.nn.Parameter) for x in arguments if isinstance(x, Tensor))
    )


def _below_autograd(op: torch._ops.OpOverload, arguments: tuple) -> Any:
    """`op` without its derivative."""
    if _plain(arguments):
        return _implementations[op](*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns () on the device: a number is filled in by a kernel,
    as a copy from the host would wait for the device."""
    if isinstance(value, Tensor):
        return value.detach().to(device, dtype).reshape(())
    return torch.full((), value, dtype=dtype, device=device)


def differentiate(op: torch._ops.OpOverload, save: Callable, backward: Callable) -> None:
    """Give `op` a derivative: `save(ctx, arguments, outputs)` after it ran, `backward(ctx,
    *upstream)` as in autograd."""

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            outputs = _below_autograd(op, arguments)
            save(ctx, arguments, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *upstream: Tensor) -> tuple:
            return backward(ctx, *upstream)

    def run(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            return Differentiable.apply(*arguments)
        return _below_autograd(op, arguments)

    library.impl(op._schema.name.partition("::")[2], run, "Autograd")
    _with_derivative[op] = run


def refuse_derivative(op: torch._ops.OpOverload, message: str) -> None:
    """Make the derivative of `op` an error rather than silently zero."""

    def refuse(*_: Any) -> tuple:
        raise RuntimeError(message)

    differentiate(op, lambda *_: None, refuse)


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
    """`define` a loss that computes its gradient together with its value: backward only scales it.

    Its first output is the value, () or (B,), and its last are the gradients (live, B, C), one for each of the first
    arguments or none. They are constants to autograd, so a second derivative would silently miss them; it is refused.
    """
    op = define(name, schema, run, empty)

    def save(ctx: Any, arguments: tuple, outputs: tuple[Tensor, ...]) -> None:
        ctx.dtype, ctx.arguments = arguments[0].dtype, len(arguments)
        ctx.mark_non_differentiable(*outputs[1:-1])
        # As an output it stays tied to this node, which is how a second derivative finds its refusal.
        ctx.save_for_backward(outputs[-1])

    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple:
        slopes = call(scale_gradient, upstream, *ctx.saved_tensors, ctx.dtype).unbind()
        return *slopes, *[None] * (ctx.arguments - len(slopes))

    differentiate(op, save, backward)
    return op
