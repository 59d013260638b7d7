"""Convolutions on a CPU, one after the other on a few images at a time, and their gradient for the images.

On a whole batch each layer reads from memory what the one before has written there. Here a few images go through all
layers, or back through all, before the next ones do, and what is between layers stays in a core's caches. The gradient
needs no more of it than where ReLU made something: a bit for each number.

    v[0] = x,    v[i + 1] = relu_i( conv_i(v[x_i]) + b_i + v[add_i] ),    y[n, k] = mean over pixels of the last v[n, k]

or, where batch normalisation follows a sum and cannot be folded into a convolution,

    v[i + 1] = relu_i( s_i v[x_i] + t_i ).

Between layers there are zeros for as many more channels as fill a vector. In float32 (cpu/chain.cpp), or in bfloat16
where a processor multiplies tiles of it (cpu/chain_bf16.cpp): then all v but the images, the weights and the gradients
between layers are rounded to bfloat16, and every sum is one of float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import native
from .conv2d import MOST_TAPS, addressed, sides, square

Shape = tuple[int, int, int]
"""Of an image or of what a layer makes of one: height, width, channels."""

# As in cpu/chain.cpp, and in cpu/chain_bf16.cpp with the second names.
WINOGRAD, TAPS, MEAN, SPREAD, SCALE, DEPTHWISE = range(6)
IMAGES, TILES = WINOGRAD, TAPS
NOWHERE, GIVEN, WANTED = -1, -2, -3
NUMBERS = (
    *("kind", "n", "h", "w", "c", "y_h", "y_w", "k", "rows", "columns", "stride", "padding", "transposed"),
    *("x", "add", "y", "signs", "relu"),
)


class _Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in NUMBERS] + [(name, ctypes.c_void_p) for name in ("weight", "bias")]


TOGETHER, TOGETHER_SMALL = 4, 16
"""Images at a time: few, so that their values stay in the caches; more where the images are small, for which weights
are read anew each time."""
CACHE = 1 << 18
"""Floats between layers that stay in them."""
OUTWEIGHS = 64
"""Times as many numbers in all weights as between the layers of an image: then it is weights that do not stay."""
TOGETHER_LARGE = {torch.float32: 16, torch.bfloat16: 8}
"""Images at a time then; the fastest of 2, 4, 8, 16, 32 for ResNet-18 and WRN-28-10."""
FEW = 3
"""Output channels too few for Winograd's transforms to pay, as in cpu/strided.h."""


class _Format(NamedTuple):
    """How numbers lie in memory between layers."""

    dtype: torch.dtype
    prefix: str  # of the functions in C++
    lanes: int  # numbers whose signs are kept together

    @property
    def half(self) -> bool:
        return self.dtype == torch.bfloat16

    def images(self, shape: Shape) -> Shape:
        """Of images between layers: in bfloat16 each number is two, what it keeps of that and what of the rest, with
        zeros for as many as make a multiple of 8."""
        height, width, channels = shape
        return height, width, -(-2 * channels // 8) * 8 if self.half else channels

    def channels(self, number: int) -> int:
        """Of what a layer makes, with those that fill the last vector."""
        return -(-number // self.lanes) * self.lanes

    def size(self, shape: Shape) -> int:
        """Numbers of an image; in bfloat16 with the zeros around, as in cpu/chain_bf16.cpp."""
        height, width, channels = shape
        if not self.half:
            return height * width * channels
        line = -(-(width + 1) // 2) * 2 if channels % 32 else width + 1
        return -(-(((height + 2) * line + 1) * channels + 32) // 32) * 32


def _format(dtype: torch.dtype) -> _Format:
    if native.library() is None:
        raise RuntimeError(
            "a chain is compiled where it runs, for which no C++ compiler was found ($CXX, g++, clang++)"
        )
    if dtype == torch.float32:
        return _Format(dtype, "chain", native.library().lanes())
    if native.library().chain_bf16_runs() == 0:
        raise RuntimeError("the system does not let this process use the processor's tiles (AMX)")
    return _Format(dtype, "chain_bf16", 16)


def multiplies_tiles() -> bool:
    """Whether a chain in bfloat16 runs on the processor's matrix unit for tiles (AMX)."""
    return native.library() is not None and native.library().chain_bf16_runs() == 2


class Convolution(NamedTuple):
    """v[.] = relu(conv2d(v[x], weight, bias) + v[add]), as in `conv2d`."""

    x: int
    weight: Tensor  # (K, C / groups, k, k)
    bias: Tensor | None
    add: int | None
    stride: int
    padding: int
    relu: bool
    groups: int = 1  # or C = K: each channel by itself

    @property
    def channels(self) -> int:
        return self.weight.shape[0]

    def tensors(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]


class Normalization(NamedTuple):
    """v[.] = relu((v[x] - mean) gamma / sqrt(var + eps) + beta), for each channel."""

    x: int
    mean: Tensor  # (K,), as the others
    var: Tensor
    gamma: Tensor
    beta: Tensor
    eps: float
    relu: bool
    add: None = None

    @property
    def channels(self) -> int:
        return self.mean.shape[0]

    def tensors(self) -> list[Tensor]:
        return [self.mean, self.var, self.gamma, self.beta]


class Chain:
    """y (N, K) of images x (N, C, H, W), float32 on a CPU in channels_last; differentiable once, with respect to x
    alone.

    layers: convolutions of at most 9 taps with a stride of 1 or 2, the first of the images and in one group; and
        normalisations of what they make. Their tensors, float32 on a CPU, are looked at anew in each call; changes
        through `.data`, which leave no trace, are not seen.
    example: images of any number and of the size that is expected.
    dtype: float32 or bfloat16, of what is between layers and of the products. In bfloat16 a kernel is of 3 x 3 taps at
        most, and the first convolution alone reads the images.

    Raises:
        ValueError: layers that do not fit one another or are none of these; or gradients that would have to be added up
            in an order that is not provided for: each result must be read, added once at most, and then be read by no
            later layer and, made by ReLU, by one up to then. When called: x of another kind or number of channels, or
            so small that a layer makes nothing of it.
        RuntimeError: there is no C++ compiler that takes it, or the system refuses what it needs.
    """

    def __init__(
        self,
        layers: Sequence[Convolution | Normalization],
        example: Tensor,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._format = _format(dtype)
        channels = _check(layers, half=self._format.half)
        self._images, self._made = channels[0], channels[-1]
        padded = [self._images, *map(self._format.channels, channels[1:])]
        pairs = list(zip(layers, [padded[layer.x] for layer in layers], padded[1:], strict=True))
        self._forward = [_Parameters(layer, self._format, c, k, transposed=False) for layer, c, k in pairs]
        self._backward = [_Parameters(layer, self._format, k, c, transposed=True) for layer, c, k in pairs]
        self._programs: dict[torch.Size, _Programs] = {}
        self._programs_for(example.shape)

    def __call__(self, x: Tensor) -> Tensor:
        right = x.ndim == 4 and x.shape[1] == self._images and x.dtype == torch.float32 and x.device.type == "cpu"
        if not (right and x.is_contiguous(memory_format=torch.channels_last)):
            raise ValueError(
                f"x: got {x.dtype} {tuple(x.shape)}, strides {x.stride()}, on {x.device}; accepted: float32 "
                f"(N, {self._images}, H, W) in channels_last on a CPU"
            )
        if torch.is_grad_enabled() and x.requires_grad:
            return _Run.apply(x, self)
        return self.run(x)[0]

    def versions(self) -> list[int]:
        """Changes with every change in place of the tensors of the layers."""
        return [tensor._version for parameters in self._forward for tensor in parameters.layer.tensors()]

    def run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y, and the signs that its gradient needs."""
        programs = self._programs_for(x.shape)
        _refresh(self._forward)
        y = x.new_empty(len(x), self._forward[-1].made)
        signs = x.new_empty(len(x) * programs.signs, dtype=torch.uint8)
        programs.forward.run(x, y, signs)
        return y[:, : self._made], signs

    def backward(self, gradient: Tensor, shape: torch.Size, signs: Tensor) -> Tensor:
        """The gradient for x, of that shape, of what has `gradient` for y."""
        n, c, h, w = shape
        _refresh(self._backward)
        gradient = F.pad(gradient, (0, self._backward[-1].read - self._made))
        dx = gradient.new_empty(n, h, w, c).permute(0, 3, 1, 2)
        self._programs_for(shape).backward.run(gradient.contiguous(), dx, signs)
        return dx

    def _programs_for(self, shape: torch.Size) -> _Programs:
        key = shape[1:]
        if key not in self._programs:
            self._programs[key] = _programs(self._format, self._forward, self._backward, shape)
        return self._programs[key]


def _check(layers: Sequence[Convolution | Normalization], *, half: bool) -> list[int]:
    """Of what does not depend on the images' size. Returns the channels of each value."""
    if not layers or isinstance(layers[0], Normalization):
        raise ValueError(f"layers: got {len(layers)}; accepted: at least one, the first a convolution")
    channels = [layers[0].weight.shape[1]]
    for number, layer in enumerate(layers):
        where = f"layers[{number}]"
        if any(not 0 <= value <= number for value in _reads(layer)):
            raise ValueError(f"{where}: got x={layer.x}, add={layer.add}; accepted: values from 0 to {number}")
        tensors = layer.tensors()
        if any(tensor.dtype != torch.float32 or tensor.device.type != "cpu" for tensor in tensors):
            got = ", ".join(f"{tensor.dtype} on {tensor.device}" for tensor in tensors)
            raise ValueError(f"{where}: got {got}; accepted: float32 on a CPU")
        if isinstance(layer, Normalization):
            if layer.x == 0 or {tensor.shape for tensor in tensors} != {(channels[layer.x],)}:
                raise ValueError(
                    f"{where}: got x={layer.x} and {[tuple(tensor.shape) for tensor in tensors]}; accepted: what a "
                    f"layer made, and four of {channels[layer.x]} numbers"
                )
        else:
            _check_convolution(layer, where, channels[layer.x], half and number > 0, half)
        channels.append(layer.channels)
    return channels


def _check_convolution(conv: Convolution, where: str, channels: int, inner: bool, half: bool) -> None:
    shape = conv.weight.shape
    taps = shape[2] * shape[3] if len(shape) == 4 else 0
    grouped = conv.groups == 1 or (conv.groups == channels == shape[0] and conv.x > 0)
    if not (1 <= taps <= MOST_TAPS and conv.stride in (1, 2) and conv.padding >= 0 and grouped):
        raise ValueError(
            f"{where}: got a weight {tuple(shape)}, stride {conv.stride}, padding {conv.padding}, {conv.groups} groups"
            f"; accepted: (K, C, k, k) of at most {MOST_TAPS} taps, stride 1 or 2, or (K, 1, k, k) of as many groups"
        )
    given = shape[1] * conv.groups, *(conv.bias.shape if conv.bias is not None else shape[:1])
    if given != (channels, shape[0]):
        raise ValueError(f"{where}: got weight and bias for {given} channels; accepted: {channels} in")
    if half and (max(shape[2:]) > 3 or conv.padding > 1 or (inner and conv.x == 0) or conv.add == 0):
        raise ValueError(
            f"{where}: got a weight {tuple(shape)}, padding {conv.padding}, x={conv.x}, add={conv.add}; accepted in "
            f"bfloat16: 3 x 3 taps at most, padding 0 or 1, and x=0 in the first alone"
        )


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, chain: Chain) -> Tensor:
        y, ctx.signs = chain.run(x)
        ctx.chain, ctx.shape, ctx.versions = chain, x.shape, chain.versions()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        if ctx.chain.versions() != ctx.versions:
            raise RuntimeError("a tensor of the chain was modified in place between the forward and the backward pass")
        return ctx.chain.backward(upstream, ctx.shape, ctx.signs), None


class _Parameters:
    """A layer's, or its gradient's, as the C++ reads them: copies."""

    def __init__(
        self, layer: Convolution | Normalization, form: _Format, read: int, made: int, *, transposed: bool
    ) -> None:
        self.layer, self.transposed, self.read, self.made, self._form = layer, transposed, read, made, form
        like = layer.tensors()[0]  # float32 on a CPU, whatever the defaults are
        self.bias = None if transposed or len(layer.tensors()) == 1 else like.new_zeros(made)
        self._copied: list[tuple[int, int]] = []
        if isinstance(layer, Normalization):
            self.kind, self.weight = SCALE, like.new_zeros(made)
            return
        if layer.groups > 1:
            self.kind, self.weight = DEPTHWISE, like.new_zeros(layer.weight[0].numel(), made)
            return
        self.kind = TAPS
        self._twice = form.half and layer.x == 0 and not transposed
        if self._twice:
            *_, self.read = form.images((0, 0, read))
        elif not form.half and square(layer.weight, layer.stride, layer.padding):
            self.kind = WINOGRAD if read % form.lanes == 0 and made > FEW else TAPS
        size = getattr(native.library(), f"{form.prefix}_weight_size")
        self.weight = like.new_empty(size(*self._numbers(layer, 0, 0, 0)), dtype=form.dtype)

    def refresh(self) -> None:
        """Copy them anew if they have changed."""
        now = [(source.data_ptr(), source._version) for source in self.layer.tensors()]
        if now == self._copied:
            return
        bias, k = self._refreshed(self.layer), self.layer.channels
        if self.bias is not None and bias is not None:
            self.bias[:k] = bias.detach()
        self._copied = now

    def _refreshed(self, layer: Convolution | Normalization) -> Tensor | None:
        """Copies the weight and returns the bias."""
        if isinstance(layer, Normalization):
            scale = layer.gamma.detach() * (layer.var + layer.eps).rsqrt()
            self.weight[: layer.channels] = scale
            return layer.beta - layer.mean * scale
        k, c = layer.weight.shape[:2]
        if layer.groups > 1:
            self.weight[:, :k] = layer.weight.detach().reshape(k, -1).t()
            return layer.bias
        k_all = self.read if self.transposed else self.made
        c_all = self._form.channels(c) if layer.x else self.read // 2 if self._twice else c
        weight = F.pad(layer.weight.detach(), (0, 0, 0, 0, 0, c_all - c, 0, k_all - k)).contiguous()
        upside_down = self.transposed and self.kind == WINOGRAD
        first, strides = addressed(weight, transposed=self.transposed, upside_down=upside_down)
        native.call(f"{self._form.prefix}_weight", *self._numbers(layer, *strides), first, self.weight)
        return layer.bias

    def _numbers(self, conv: Convolution, *strides: int) -> tuple[ctypes.c_int64, ctypes.Array]:
        shape = *conv.weight.shape[2:], self.read, self.made, conv.stride, conv.padding, self.transposed
        way = self._twice if self._form.half else self.kind
        return ctypes.c_int64(way), (ctypes.c_int64 * 10)(*shape, *strides)


def _refresh(parameters: Iterable[_Parameters]) -> None:
    for each in parameters:
        each.refresh()


class _Program:
    """Layers in order."""

    def __init__(self, form: _Format, weights: int) -> None:
        self.form, self._weights = form, weights
        self._layers: list[_Layer] = []
        self.memory = _Places(form.size)

    def add(self, kind: int, read: Shape, made: Shape, parameters: _Parameters | None = None, **numbers: int) -> None:
        layer = _Layer(kind, 1, *read, *made, add=NOWHERE, signs=NOWHERE)
        if parameters is not None:
            if isinstance(conv := parameters.layer, Convolution):
                layer.rows, layer.columns = conv.weight.shape[2:]
                layer.stride, layer.padding, layer.transposed = conv.stride, conv.padding, parameters.transposed
            layer.weight = parameters.weight.data_ptr()
            layer.bias = None if parameters.bias is None else parameters.bias.data_ptr()
        for name, number in numbers.items():
            setattr(layer, name, number)
        self._layers.append(layer)

    def done(self) -> _Program:
        self._array = (_Layer * len(self._layers))(*self._layers)
        return self

    def run(self, given: Tensor, wanted: Tensor, signs: Tensor) -> None:
        fitting = min(max(CACHE // self.memory.size, TOGETHER), TOGETHER_SMALL)
        large = self._weights > OUTWEIGHS * self.memory.size
        together = TOGETHER_LARGE[self.form.dtype] if large else fitting
        together = max(1, min(together, -(-len(given) // torch.get_num_threads())))  # no thread without work
        tensors, n = (given, wanted, signs), len(given)
        native.call(self.form.prefix, self._array, len(self._array), self.memory.size, *tensors, n, together)


class _Places:
    """Of one image: places for what is between layers."""

    def __init__(self, measure: Callable[[Shape], int]) -> None:
        self.size, self._measure = 0, measure
        self._taken: dict[int, int] = {}

    def take(self, shape: Shape) -> int:
        """The first place with room for it."""
        numbers, place = self._measure(shape), 0
        for start, length in sorted(self._taken.items()):
            if start - place >= numbers:
                break
            place = start + length
        self._taken[place] = numbers
        self.size = max(self.size, place + numbers)
        return place

    def free(self, place: int) -> None:
        self._taken.pop(place, None)


class _Programs(NamedTuple):
    """For images of one shape."""

    forward: _Program
    backward: _Program
    signs: int  # bytes for an image


def _programs(form: _Format, forward: list[_Parameters], backward: list[_Parameters], shape: torch.Size) -> _Programs:
    lanes = form.lanes
    _, c, h, w = shape
    shapes, signs, vectors = [(h, w, c)], [NOWHERE], 0
    for parameters in forward:
        layer, k = parameters.layer, parameters.made
        h, w, _ = shapes[layer.x]
        if isinstance(layer, Convolution):
            h, w = sides(h, w, layer.weight, layer.stride, layer.padding)
        shapes.append((h, w, k))
        if layer.add is not None and shapes[layer.add] != shapes[-1]:
            raise ValueError(f"layers: got {shapes[layer.add]} to be added to {shapes[-1]} (height, width, channels)")
        signs.append(vectors if layer.relu else NOWHERE)
        vectors += h * w * k // lanes if layer.relu else 0
    if min(map(min, shapes)) < 1:
        raise ValueError(f"x: got shape {tuple(shape)}; accepted: images of which every layer leaves something")
    weights = sum(parameters.weight.numel() for parameters in forward)
    return _Programs(
        _forward_program(_Program(form, weights), forward, shapes, signs),
        _backward_program(_Program(form, weights), backward, shapes, signs),
        vectors * lanes // 8,
    )


def _forward_program(
    program: _Program, parameters: list[_Parameters], shapes: list[Shape], signs: list[int]
) -> _Program:
    last = {value: number for number, each in enumerate(parameters) for value in _reads(each.layer)}
    places = {0: GIVEN}
    if program.form.half:
        given, shapes = shapes[0], [program.form.images(shapes[0]), *shapes[1:]]
        places[0] = program.memory.take(shapes[0])
        program.add(IMAGES, given, shapes[0], x=GIVEN, y=places[0])
    for number, each in enumerate(parameters):
        layer, value = each.layer, number + 1
        # A result may take the place of what is added to it, which is not read elsewhere in the same layer.
        over = layer.add is not None and layer.add not in (0, layer.x) and last[layer.add] == number
        places[value] = places[layer.add or 0] if over else program.memory.take(shapes[value])
        add = NOWHERE if layer.add is None else places[layer.add]
        flow = {"x": places[layer.x], "add": add, "y": places[value], "signs": signs[value], "relu": layer.relu}
        program.add(each.kind, shapes[layer.x], shapes[value], each, **flow)
        for read in _reads(layer):
            if last[read] == number and places[read] != places[value]:
                program.memory.free(places[read])
    *_, k = shapes[-1]
    program.add(MEAN, shapes[-1], (1, 1, k), x=places[len(parameters)], y=WANTED)
    return program.done()


def _backward_program(
    program: _Program, parameters: list[_Parameters], shapes: list[Shape], signs: list[int]
) -> _Program:
    """Gradients are cleared where ReLU made nothing by whoever adds to them last, which is then no sum."""
    numbered = list(enumerate(parameters))[::-1]
    first = {value: number for number, each in numbered for value in _reads(each.layer)}
    *_, k = shapes[-1]
    sums = {len(parameters): program.memory.take(shapes[-1])}
    program.add(SPREAD, (1, 1, k), shapes[-1], x=GIVEN, y=sums[len(parameters)], signs=signs[-1])
    for number, each in numbered:
        layer, value = each.layer, number + 1
        if value not in sums:
            raise ValueError(f"layers: got v[{value}], which none reads")
        g = sums.pop(value)
        if layer.add is not None:
            final = first[layer.add] == number and layer.add != layer.x
            if layer.add in sums or layer.add == 0 or (final and signs[layer.add] != NOWHERE):
                raise ValueError(f"layers: got v[{layer.add}] added to v[{value}] before it is read")
            sums[layer.add] = g
        add = sums.get(layer.x, NOWHERE)
        final = first[layer.x] == number
        if layer.x == 0 and final:
            place = WANTED
        else:
            place = program.memory.take(shapes[layer.x]) if add in (NOWHERE, g) else add
            sums[layer.x] = place
        flow = {"x": g, "add": add, "y": place, "signs": signs[layer.x] if final else NOWHERE}
        program.add(each.kind, shapes[value], shapes[layer.x], each, **flow)
        if g not in sums.values():
            program.memory.free(g)
    return program.done()


def _reads(layer: Convolution | Normalization) -> set[int]:
    return {layer.x} if layer.add is None else {layer.x, layer.add}
