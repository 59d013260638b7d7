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
        with torch.autocast(first.device.type, enabled=False):
            return run(first, *rest)

    library.define(f"{name}{schema}")
    for device in devices:
        library.impl(name, outside_autocast, device)
    torch.library.register_fake(f"fastrd::{name}", empty, lib=library)
    return getattr(torch.ops.fastrd, name).default


def differentiate(op: torch._ops.OpOverload, save: Callable, backward: Callable) -> None:
    """Give `op` a derivative: `save(ctx, arguments, outputs)` after it ran, `backward(ctx, *upstream)` as in autograd."""

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                outputs = op(*arguments)
            save(ctx, arguments, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *upstream: Tensor) -> tuple:
            return backward(ctx, *upstream)

    def run(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            return Differentiable.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    library.impl(op._schema.name.partition("::")[2], run, "Autograd")


def refuse_derivative(op: torch._ops.OpOverload, message: str) -> None:
    """Make the derivative of `op` an error rather than silently zero."""

    def refuse(*_: Any) -> tuple:
        raise RuntimeError(message)

    differentiate(op, lambda *_: None, refuse)
