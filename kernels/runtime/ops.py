"""How the operators of this package are registered: opaque to `torch.compile`, and never under autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..cpu import native
from .jit import interpreted

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
    _eager[op] = outside_autocast, None, 0
    return op


_eager: dict[torch._ops.OpOverload, tuple[Callable, type[torch.autograd.Function] | None, int]] = {}
"""What `call` runs of an operator: the function, its derivative and in how many of its first arguments that is."""
_ORDINARY = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float, str, tuple, list))


def watched(arguments: tuple) -> bool:
    """Whether a compiler, a mode, a transform or a subclass of Tensor must see an operator with these arguments.

    Plain loops: all() and any() with a generator take three times as long.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() or forward_ad._current_level >= 0:
        return True
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    for x in arguments:  # noqa: SIM110
        if type(x) not in _ORDINARY:
            return True
    return False


def in_cpp(tensors: tuple) -> bool:
    """Whether C++ may work on these: it is there, and nothing but autograd has to see what it does."""
    return not (watched(tensors) or interpreted() or native.library() is None)


def call(op: torch._ops.OpOverload, *arguments: Any) -> Any:
    """`op(*arguments)`, in eager mode without torch's dispatcher, which takes longer than a small kernel."""
    if watched(arguments) or not (arguments[0].is_cuda or arguments[0].is_cpu):
        return op(*arguments)
    run, function, inputs = _eager[op]
    if function is not None and torch.is_grad_enabled():
        first = arguments[:inputs]
        for x in first:
            if x is not None and x.requires_grad:
                return function.apply(run, arguments[inputs:], *first)
    return run(*arguments)


def wants_gradient(x: Tensor) -> bool:
    """Whether a gradient for x is wanted; of what is inside where torch.func.vmap has wrapped it, for that says no."""
    if not torch.compiler.is_compiling():
        while not x.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(x):
            x = torch._C._functorch.get_unwrapped(x)
    return torch.is_grad_enabled() and x.requires_grad


def scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns () on the device: a number is filled in by a kernel,
    as a copy from the host would wait for the device."""
    if isinstance(value, Tensor):
        return value.detach().to(device, dtype).reshape(())
    return torch.full((), value, dtype=dtype, device=device)


def differentiate(op: torch._ops.OpOverload, inputs: int, save: Callable, backward: Callable) -> None:
    """Give `op` a derivative in its first `inputs` arguments: `save(ctx, arguments, outputs)` after it ran,
    `backward(ctx, *upstream)` for their gradients, where upstream is None for an output that is not used."""

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, run: Callable, rest: tuple, *first: Any) -> Any:
            ctx.set_materialize_grads(False)  # zeros for each output that is not used would cost a launch
            arguments = first + rest
            outputs = run(*arguments)
            save(ctx, arguments, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *upstream: Tensor | None) -> tuple:
            return None, None, *backward(ctx, *upstream)

    def below_autograd(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    name = op._schema.name.partition("::")[2]

    def refused() -> RuntimeError:
        return RuntimeError(
            f"{name}: got called under a transform of torch.func, to which its kernels have no derivative; "
            "accepted: torch.autograd, or the function of fastrd.kernels.reference"
        )

    def run(*arguments: Any) -> Any:
        first = arguments[:inputs]
        # Through these the tangent of forward-mode differentiation would silently become zero.
        if forward_ad._current_level >= 0 and any(
            x is not None and forward_ad.unpack_dual(x).tangent is not None for x in first
        ):
            raise refused()
        if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in first)):
            return below_autograd(*arguments)
        try:
            return Differentiable.apply(below_autograd, arguments[inputs:], *first)
        except RuntimeError as error:
            # What torch.func asks of a derivative would make each of its calls a third slower.
            if "setup_context" not in str(error):
                raise
            raise refused() from None

    library.impl(name, run, "Autograd")
    _eager[op] = _eager[op][0], Differentiable, inputs


def refuse_derivative(op: torch._ops.OpOverload, inputs: int, message: str) -> None:
    """Make the derivative of `op` in its first `inputs` arguments an error rather than silently zero."""

    def refuse(*_: Any) -> tuple:
        raise RuntimeError(message)

    differentiate(op, inputs, lambda *_: None, refuse)


def _scale(upstream: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """upstream () or (B,) times gradient (..., B, C), rounded once to `dtype`."""
    if upstream.ndim == 1:
        upstream = upstream[:, None]
    if dtype == gradient.dtype:
        return gradient * upstream
    return torch.mul(gradient, upstream, out=torch.empty_like(gradient, dtype=dtype))


scale_gradient = define(
    "scale_gradient",
    "(Tensor upstream, Tensor gradient, ScalarType dtype) -> Tensor",
    _scale,
    lambda upstream, gradient, dtype: torch.empty_like(gradient, dtype=dtype),
)
refuse_derivative(
    scale_gradient,
    2,
    "double backward through a fused loss: its gradient was computed with its value and cannot be differentiated "
    "again; use the functions of fastrd.kernels.reference where second derivatives are needed",
)


def scale(upstream: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """upstream times a gradient that was computed with its value; a second derivative through it is refused."""
    # Gradients are enabled for a second derivative only.
    return (scale_gradient if torch.is_grad_enabled() else _scale)(upstream, gradient, dtype)


def loss_op(
    name: str, schema: str, run: Callable, empty: Callable, inputs: int, again: Callable[..., Tensor] | None = None
) -> torch._ops.OpOverload:
    """`define` a loss that computes its gradient together with its value: backward only scales it.

    Its first output is the value, () or (B,), and its last are the gradients (n, B, C) of the first n <= `inputs`
    arguments. They are constants to autograd, so a second derivative would silently miss them; it is taken of
    `again(*arguments)`, the value in PyTorch's operators, or refused.
    """
    op = define(name, schema, run, empty)
    # What `again` needs: the tensors, which come first, and the rest.
    count = 0 if again is None else sum("Tensor" in str(argument.type) for argument in op._schema.arguments)

    def save(ctx: Any, arguments: tuple, outputs: tuple[Tensor, ...]) -> None:
        ctx.dtype, ctx.options = arguments[0].dtype, () if again is None else arguments[count:]
        ctx.mark_non_differentiable(*outputs[1:-1])
        # As an output the gradient stays tied to this node, which is how a second derivative finds its refusal.
        ctx.save_for_backward(outputs[-1], *arguments[:count])

    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple:
        if upstream is None:
            return (None,) * inputs
        gradient, *tensors = ctx.saved_tensors
        if again is not None and torch.is_grad_enabled():  # for a second derivative only
            return second(again, upstream, tensors, ctx.options)
        gradients = scale(upstream, gradient, ctx.dtype).unbind()
        return *gradients, *[None] * (inputs - len(gradients))

    def second(value: Callable[..., Tensor], upstream: Tensor, tensors: list, options: tuple) -> tuple:
        first = tensors[:inputs]
        wanted = [x for x in first if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(value(*tensors, *options), wanted, upstream, create_graph=True))
        return tuple(next(found) if x is not None and x.requires_grad else None for x in first)

    differentiate(op, inputs, save, backward)
    return op
