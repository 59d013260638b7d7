"""One step of projected gradient ascent in the l-infinity ball, in one pass over memory.

    x' <- clamp( min( max( x' + step sign(g), x - eps ), x + eps ), low, high )        (Madry et al. 2018, Eq. 2.1)

Three reads and one write per pixel, computed in float32 and rounded once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .cpu import native
from .reference import upcast
from .runtime.aot import SHORT_NAMES, Launch, recorded
from .runtime.jit import interpreted, kernel, launches_kernels, tl
from .runtime.ops import call, define

BLOCK = 2048


@kernel
def _step(
    x_adv_ptr,  # (size,)
    gradient_ptr,  # (size,)
    x_ptr,  # (size,)
    out_ptr,  # (size,) may be x_adv
    size,
    step_size,
    epsilon,
    low,
    high,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = place < size
    gradient = tl.load(gradient_ptr + place, mask=valid, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + place, mask=valid, other=0.0).to(tl.float32)
    x_adv = tl.load(x_adv_ptr + place, mask=valid, other=0.0).to(tl.float32)
    x_adv += tl.where(gradient > 0, step_size, 0.0) - tl.where(gradient < 0, step_size, 0.0)
    x_adv = tl.maximum(x_adv, x - epsilon, propagate_nan=tl.PropagateNan.ALL)
    x_adv = tl.minimum(x_adv, x + epsilon, propagate_nan=tl.PropagateNan.ALL)
    x_adv = tl.maximum(x_adv, low, propagate_nan=tl.PropagateNan.ALL)
    x_adv = tl.minimum(x_adv, high, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + place, x_adv, mask=valid)


def _launch(
    x_adv: Tensor,
    gradient: Tensor,
    x: Tensor,
    step_size: float,
    epsilon: float,
    low: float,
    high: float,
    out: Tensor,
) -> None:
    """All four tensors dense, of one shape and with the same strides; `out` may be `x_adv`."""
    size = x_adv.numel()
    if size:
        grid = (-(-size // BLOCK),)
        _step[grid](x_adv, gradient, x, out, size, step_size, epsilon, low, high, BLOCK=BLOCK, num_warps=8)


def _run(x_adv: Tensor, gradient: Tensor, x: Tensor, *settings: Any) -> None:
    *numbers, out = settings
    if x_adv.is_cuda or interpreted():
        _launch(x_adv, gradient, x, *settings)
    else:
        native.call("pgd_step", x_adv, gradient, x, out, out.numel(), *map(float, numbers))
    torch.autograd.graph.increment_version(out)


pgd_step_op = define(
    "pgd_step",
    "(Tensor x_adv, Tensor gradient, Tensor x, float step_size, float epsilon, float low, float high, Tensor(a!) out)"
    " -> ()",
    _run,
    lambda *_: None,
)


def pgd_step(
    x_adv: Tensor,
    gradient: Tensor,
    x: Tensor,
    *,
    step_size: float,
    epsilon: float,
    bounds: tuple[float, float] = (0.0, 1.0),
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The next iterate, not differentiable; written over `x_adv` where `inplace`.

    Args:
        x_adv, gradient, x: one shape and device, floating point of any dtypes; `x` the clean images in `bounds`.
        step_size, epsilon: fractions of the pixel range, e.g. 2/255 and 8/255.
        backend: "auto" takes the Triton kernel on CUDA, compiled C++ for float32 on a CPU, PyTorch elsewhere; "triton"
            and "torch" insist.

    Returns:
        Shape, dtype and memory format of `x_adv`.

    Raises:
        ValueError: shapes or devices that differ, or a backend that cannot run here.
    """
    for name, other in (("gradient", gradient), ("x", x)):
        if other.shape != x_adv.shape or other.device != x_adv.device:
            raise ValueError(
                f"{name}: got {tuple(other.shape)} on {other.device}; accepted: shape and device of x_adv, "
                f"{tuple(x_adv.shape)} on {x_adv.device}"
            )
    fused = launches_kernels(backend, x_adv.dtype, x_adv.device)
    x_adv, gradient, x = x_adv.detach(), gradient.detach(), x.detach()
    if backend == "torch" or not (fused or _native(x_adv, gradient, x)):
        return _in_torch(x_adv, gradient, x, step_size, epsilon, bounds, inplace)
    out = x_adv if inplace and _dense(x_adv) else torch.empty_like(x_adv)
    start, gradient, x = (_like(tensor, out) for tensor in (x_adv, gradient, x))
    call(pgd_step_op, start, gradient, x, step_size, epsilon, *bounds, out)
    return x_adv.copy_(out) if inplace and out is not x_adv else out


def _in_torch(
    x_adv: Tensor,
    gradient: Tensor,
    x: Tensor,
    step_size: float,
    epsilon: float,
    bounds: tuple[float, float],
    inplace: bool,
) -> Tensor:
    out = x_adv if inplace else torch.empty_like(x_adv)
    moved, centre = torch.add(upcast(x_adv), upcast(gradient).sign(), alpha=step_size), upcast(x)
    return out.copy_(moved.clamp_(centre - epsilon, centre + epsilon).clamp_(*bounds))


def _native(*tensors: Tensor) -> bool:
    """Whether these may go to the C++ of cpu/pgd_step.cpp. Compiled, PyTorch fuses as much by itself."""
    return (
        all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
        and not interpreted()
        and not torch.compiler.is_compiling()
        and native.library() is not None
    )


def _dense(x: Tensor) -> bool:
    """Whether x fills its memory without gaps, in whatever order."""
    return torch.empty_like(x).stride() == x.stride()


def _like(x: Tensor, out: Tensor) -> Tensor:
    """x laid out in memory as `out` is."""
    return x if x.stride() == out.stride() else torch.empty_like(out, dtype=x.dtype).copy_(x)


def launches(target: str) -> list[Launch]:
    """The kernel on a batch of CIFAR images."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        images = torch.empty(1024, 3, 32, 32, dtype=dtype, device="meta")
        work = {"step": (4 * images.numel() * dtype.itemsize, 8 * images.numel(), "fp32")}
        run = partial(_launch, images, images, images, 2 / 255, 8 / 255, 0.0, 1.0, images)
        found += recorded(run, target, f"1024 x 3 x 32 x 32, {SHORT_NAMES[dtype]}", work)
    return found
