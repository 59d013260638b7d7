"""Convolutions of float32 images on a CPU: fewer multiplications, fewer passes over memory.

    y[n, k, i, j] = relu( b[k] + add[n, k, i, j] + sum over c, a, b of w[k, c, a, b] x[n, c, s i + a - p, s j + b - p] )

3 x 3 with stride 1 by Winograd's F(4 x 4, 3 x 3): 4 x 4 sums Y from the 6 x 6 pixels X around them as

    Y = A^T [ sum over c of (G w G^T) * (B^T X B) ] A      (Lavin & Gray 2016, Eq. 12, 13)

in 36 multiplications for each c instead of 144. The 36 numbers are values of polynomials at 0, +-5/8, +-3/2 and
infinity, which were searched for the least rounding: about twice that of a direct convolution, and in the weight's
gradient, summed over all images, about five times. (The usual 0, +-1, +-2 have twice as much again.) A stride of 2
leaves little to save; there the taps are summed one after the other. What gradients need is made of the same sums.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from ..runtime.ops import define, library
from . import native

FEWEST_PIXELS: ContextVar[int] = ContextVar("FEWEST_PIXELS", default=16)
"""That a convolution must make of an image to be taken over. For fewer the sums for 4 x 4 pixels save little, and with
a stride each weight is read for too little: networks for 8 x 8 images took up to five times as long as with PyTorch."""
LARGE = 1 << 16
"""Channels in times channels out beyond which the sums of a weight's gradient, 36 for each,
cost more than they save."""
NARROW = 8
"""Channels below which the gradient of a 1x1 weight is a matrix product: oneDNN of torch 2.14.1 writes beyond it
for 2 to 6 channels at stride 2, channels last, on a processor without AVX-512, and the process aborts."""
MOST_TAPS = 9
"""Of a convolution with a stride; cpu/strided.cpp has room for as many."""


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    add: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """relu(F.conv2d(x, weight, bias, stride, padding) + add), faster where there is a faster way.

    Args:
        x: (N, C, H, W). weight: (K, C, k, k). bias: (K,). add: (N, K, H', W').

    Returns:
        (N, K, H', W'), in the memory format of `x`; differentiable as often as the expression is.

    PyTorch does the work unless all are float32 on a CPU and of these shapes, `x` in channels_last, K a multiple of the
    length of a vector (16 with AVX-512, else 8), the weight 3 x 3 with stride and padding 1 or of at most 9 taps with
    stride 2, H' W' at least 16, and there is a C++ compiler. What is computed here of an image depends neither on the
    batch around it nor on the number of threads.
    """
    inputs = x, weight, bias, add
    if not _faster(*inputs, stride, padding) or _lost(weight):
        return _finish(F.conv2d(x, weight, bias, stride, padding), add, relu)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        return _Conv2d.apply(*inputs, stride, padding, relu)
    return _conv2d(*inputs, stride, padding, relu)


@contextmanager
def fewest_pixels(number: int) -> Iterator[None]:
    """Take over convolutions that make as few: 1, to see all in a trace, or more than there are, to leave all to
    PyTorch. Other threads do not notice."""
    token = FEWEST_PIXELS.set(number)
    try:
        yield
    finally:
        FEWEST_PIXELS.reset(token)


def _constant(function: Any) -> Any:
    """What torch.compiler.assume_constant_result does, without importing the compiler, which takes nearly as long as
    all else that a process imports."""
    function._dynamo_marked_constant = True
    return function


@_constant
def _fewest_pixels() -> int:
    return FEWEST_PIXELS.get()


def _finish(y: Tensor, add: Tensor | None, relu: bool) -> Tensor:
    """relu(y + add) for a y that nobody else has."""
    y = y if add is None else y + add
    return y.relu_() if relu else y


def _faster(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, stride: int, padding: int) -> bool:
    tensors = (tensor for tensor in (x, weight, bias, add) if tensor is not None)
    return (
        all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
        and not _transformed()
        and x.ndim == weight.ndim == 4
        and x.shape[1] == weight.shape[1]
        and takes_over(weight, stride, padding)
        and x.is_contiguous(memory_format=torch.channels_last)
        and min(shape := _shape(x, weight, stride, padding)) > 0
        and shape[2] * shape[3] >= _fewest_pixels()
        and (bias is None or bias.shape == shape[1:2])
        and (add is None or add.shape == shape)
        and not torch.is_autocast_enabled("cpu")
    )


def _transformed() -> bool:
    """Inside torch.func.vmap or forward-mode differentiation, for which there are no rules here."""
    if torch.compiler.is_compiling():
        return False
    transforms = torch._C._functorch.get_interpreter_stack() or ()
    grad = torch._C._functorch.TransformType.Grad
    return forward_ad._current_level >= 0 or any(transform.key() != grad for transform in transforms)


def _shape(x: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[int, int, int, int]:
    """Of the result."""
    return x.shape[0], weight.shape[0], *sides(x.shape[2], x.shape[3], weight, stride, padding)


def sides(height: int, width: int, weight: Tensor, stride: int, padding: int) -> tuple[int, int]:
    """Height and width of the result."""
    rows, columns = weight.shape[2:]
    return (height + 2 * padding - rows) // stride + 1, (width + 2 * padding - columns) // stride + 1


def _lost(weight: Tensor) -> bool:
    """An attack under torch.compile: there torch 2.11 takes the gradients of the functions below for zero."""
    return torch.compiler.is_compiling() and torch.is_grad_enabled() and not weight.requires_grad


def takes_over(weight: Tensor, stride: int, padding: int) -> bool:
    """Whether convolutions with such a weight (K, C, k, k) are made here, as far as it is for the weight to say."""
    fits = square(weight, stride, padding) or _strided(weight, stride, padding)
    return fits and _whole_vectors(weight.shape[0])


def square(weight: Tensor, stride: int, padding: int) -> bool:
    """Whether Winograd's sums are for it."""
    return stride == padding == 1 and weight.shape[2:] == (3, 3)


def _strided(weight: Tensor, stride: int, padding: int) -> bool:
    return stride == 2 and padding >= 0 and weight.shape[2] * weight.shape[3] <= MOST_TAPS


@_constant
def _whole_vectors(channels: int) -> bool:
    functions = native.library()
    return functions is not None and channels % functions.lanes() == 0


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, stride: int, padding: int, relu: bool
) -> Tensor:
    """The equation above, not differentiable, for arguments that `conv2d` would not leave to PyTorch."""
    if not _whole_vectors(x.shape[1]):  # the first layer of a network
        return _finish(F.conv2d(x, weight, bias, stride, padding), add, relu)
    y = _forward_empty(x, weight, bias, add, stride, padding, relu)
    x, weight, add = _dense(x), _collapsed(weight), _dense(add)
    bias = None if bias is None else bias.contiguous()
    if stride == 1:
        _winograd(x, None, *addressed(weight), bias, add, y, None, relu)
    else:
        _taps(x, weight, bias, add, y, stride, padding, False, relu)
    return y


def _forward_empty(
    x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, stride: int, padding: int, relu: bool
) -> Tensor:
    return _images(x, *_shape(x, weight, stride, padding)[1:])


def input_gradient(
    g: Tensor,
    weight: Tensor,
    active: Tensor | None,
    stride: int,
    padding: int,
    height: int,
    width: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """dx[n, c, h, w] = sum over k and s i + a - p = h, s j + b - p = w of w[k, c, a, b] g'[n, k, i, j].

    g' is g where `active` is above zero, else 0; without `active`, g. Returns dx and g', the latter empty unless
    `keep`.
    """
    dx, masked = _input_gradient_empty(g, weight, height, width, keep)
    g, weight, active = _dense(g), _collapsed(weight), _dense(active)
    if stride == 1:
        last = addressed(weight, transposed=True, upside_down=True)
        _winograd(g, active, *last, None, None, dx, masked if keep else None, False)
        return dx, masked
    if active is not None:
        g = torch.ops.aten.threshold_backward.grad_input(
            g, active, 0, grad_input=masked if keep else torch.empty_like(g)
        )
    _taps(g, weight, None, None, dx, stride, padding, True, False)
    return dx, masked


def _input_gradient_empty(g: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, height, width, keep = rest
    masked = _images(g, *g.shape[1:]) if keep else g.new_empty(0)
    return _images(g, weight.shape[1], height, width), masked


def _weight_gradient(g: Tensor, x: Tensor, rows: int, columns: int, stride: int, padding: int) -> Tensor:
    """dw[k, c, a, b] = sum over n, i, j of g[n, k, i, j] x[n, c, s i + a - p, s j + b - p]."""
    dw = _weight_gradient_empty(g, x, rows, columns, stride, padding)
    k, c = dw.shape[:2]
    if (rows, columns, padding) == (1, 1, 0) and min(c, k) < NARROW:
        return dw.copy_(torch.einsum("nkij,ncij->kc", g, x[..., ::stride, ::stride])[..., None, None])
    if not square(dw, stride, padding) or not _whole_vectors(c) or c * k > LARGE:
        geometry = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1
        return torch.ops.aten.convolution_backward(g, x, dw, None, *geometry, [False, True, False])[1]
    x, g = _dense(x), _dense(g)
    n, _, height, width = x.shape
    _launch("conv2d_winograd_weight", (x, g, dw), n, height, width, c, k)
    return dw


def _weight_gradient_empty(g: Tensor, x: Tensor, rows: int, columns: int, stride: int, padding: int) -> Tensor:
    return g.new_empty((g.shape[1], rows, columns, x.shape[1])).permute(0, 3, 1, 2)


def _winograd(
    x: Tensor,
    active: Tensor | None,
    weight: int,
    strides: tuple[int, int, int],
    bias: Tensor | None,
    add: Tensor | None,
    y: Tensor,
    masked: Tensor | None,
    relu: bool,
) -> None:
    n, c, height, width = x.shape
    tensors = x, active, weight, bias, add, y, masked
    _launch("conv2d_winograd", tensors, n, height, width, c, y.shape[1], *strides, relu)


def _taps(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    add: Tensor | None,
    y: Tensor,
    stride: int,
    padding: int,
    transposed: bool,
    relu: bool,
) -> None:
    n, c, height, width = x.shape
    _, k, y_height, y_width = y.shape
    grid = n, height, width, c, y_height, y_width, k, *weight.shape[2:], stride, padding, transposed
    first, strides = addressed(weight, transposed=transposed)
    _launch("conv2d_strided", (x, first, bias, add, y), *grid, *strides, relu)


def _launch(name: str, arguments: tuple[Tensor | int | None, ...], *numbers: int) -> None:
    """Call a function of cpu/*.cpp on `arguments`, integers being addresses, and an array of `numbers`."""
    native.call(name, *arguments, (ctypes.c_int64 * len(numbers))(*numbers))


def _images(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    return like.new_empty((like.shape[0], height, width, channels)).permute(0, 3, 1, 2)


def _dense(x: Any) -> Any:
    return None if x is None else x.contiguous(memory_format=torch.channels_last)


def _collapsed(weight: Tensor) -> Tensor:
    """Whose taps lie at equal distances."""
    return weight if weight.stride(2) == weight.shape[3] * weight.stride(3) else weight.contiguous()


def addressed(
    weight: Tensor, *, transposed: bool = False, upside_down: bool = False
) -> tuple[int, tuple[int, int, int]]:
    """Where cpu/*.cpp begins to read a collapsed weight, and its strides from one channel out, channel in and tap to
    the next.

    Those of the transpose, whose channels change places; Winograd's sums want that turned upside down, last tap first.
    """
    k, c, tap = weight.stride(0), weight.stride(1), weight.stride(3)
    out, into = (c, k) if transposed else (k, c)
    if upside_down:
        return weight.data_ptr() + 8 * tap * weight.itemsize, (out, into, -tap)
    return weight.data_ptr(), (out, into, tap)


ON_CPU = ("CPU",)
_conv2d = define(
    "conv2d",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? add, int stride, int padding, bool relu) -> Tensor",
    forward,
    _forward_empty,
    ON_CPU,
)
_conv2d_input = define(
    "conv2d_input_gradient",
    "(Tensor g, Tensor weight, Tensor? active, int stride, int padding, int height, int width, bool keep)"
    " -> (Tensor, Tensor)",
    input_gradient,
    _input_gradient_empty,
    ON_CPU,
)
_conv2d_weight = define(
    "conv2d_weight_gradient",
    "(Tensor g, Tensor x, int rows, int columns, int stride, int padding) -> Tensor",
    _weight_gradient,
    _weight_gradient_empty,
    ON_CPU,
)

for _name in ("conv2d", "conv2d_input_gradient", "conv2d_weight_gradient"):
    # The derivatives are those of the functions below; without this torch 2.11 warns, and drops them when it compiles.
    library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


@register_flop_formula([torch.ops.fastrd.conv2d, torch.ops.fastrd.conv2d_input_gradient])
def _operations(images: torch.Size, weight: torch.Size, *rest: Any, out_shape: Any, **options: Any) -> int:
    """Of the definition, as every convolution's are counted; `images` are x, or the gradient for y."""
    y = out_shape if isinstance(out_shape, torch.Size) else images
    return 2 * y.numel() * weight[1:].numel()


@register_flop_formula(torch.ops.fastrd.conv2d_weight_gradient)
def _weight_operations(g: torch.Size, x: torch.Size, rows: int, columns: int, *rest: Any, **options: Any) -> int:
    return 2 * g.numel() * x[1] * rows * columns


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        add: Tensor | None,
        stride: int,
        padding: int,
        relu: bool,
    ) -> Tensor:
        return _conv2d(x, weight, bias, add, stride, padding, relu)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, _, _, ctx.stride, ctx.padding, relu = inputs
        ctx.save_for_backward(x, weight, output if relu else None)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple:
        x, weight, active = ctx.saved_tensors
        to_x, to_weight, to_bias, to_add = ctx.needs_input_grad[:4]
        geometry = ctx.stride, ctx.padding
        # Not masked by the operator where nobody wants its dx, or all this is to be differentiated again.
        if active is not None and (torch.is_grad_enabled() or not to_x):
            upstream, active = torch.ops.aten.threshold_backward(upstream, active, 0), None
        dx = None
        if active is not None:
            keep = to_weight or to_bias or to_add
            dx, upstream = _conv2d_input(upstream, weight, active, *geometry, *x.shape[2:], keep)
        elif to_x:
            dx = _InputGradient.apply(upstream, weight, *geometry, *x.shape[2:])
        return (
            dx,
            _WeightGradient.apply(upstream, x, *weight.shape[2:], *geometry) if to_weight else None,
            upstream.sum((0, 2, 3)) if to_bias else None,
            upstream if to_add else None,
            *[None] * 3,
        )


class _InputGradient(torch.autograd.Function):
    @staticmethod
    def forward(g: Tensor, weight: Tensor, stride: int, padding: int, height: int, width: int) -> Tensor:
        return _conv2d_input(g, weight, None, stride, padding, height, width, False)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.geometry = inputs[2:4]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple:
        g, weight = ctx.saved_tensors
        to_g, to_weight = ctx.needs_input_grad[:2]
        return (
            _Conv2d.apply(upstream, weight, None, None, *ctx.geometry, False) if to_g else None,
            _WeightGradient.apply(g, upstream, *weight.shape[2:], *ctx.geometry) if to_weight else None,
            *[None] * 4,
        )


class _WeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(g: Tensor, x: Tensor, rows: int, columns: int, stride: int, padding: int) -> Tensor:
        return _conv2d_weight(g, x, rows, columns, stride, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.geometry = inputs[4:]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple:
        g, x = ctx.saved_tensors
        to_g, to_x = ctx.needs_input_grad[:2]
        return (
            _Conv2d.apply(x, upstream, None, None, *ctx.geometry, False) if to_g else None,
            _InputGradient.apply(g, upstream, *ctx.geometry, *x.shape[2:]) if to_x else None,
            *[None] * 4,
        )
