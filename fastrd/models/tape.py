"""A frozen network on a CPU as one operation of autograd.

A network that a CPU can train spends a good part of an attack between its layers: in Python, in autograd, in passes over
memory that add one gradient to another. Here the layers are written down once. The gradient for the input is then a walk
back over the list, in which a layer adds its gradient to what is there already while it makes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from ..kernels import conv2d

Values = list[Tensor | None]
"""The network's input, then each layer's result."""
Sums = dict[int, Tensor]
"""What is known so far of the gradients for some of them."""

aten = torch.ops.aten


class Place(int):
    """Of a value."""


class Tape:
    """`tape(x)` is `network(x)` for images x (N, C, H, W), differentiable once, and with respect to x alone.

    The network's parameters and buffers are read where they lie: they may change in place.
    """

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers
        self._last_reader = {place: number for number, layer in enumerate(layers) for place in layer.reads}

    @staticmethod
    def of(network: nn.Module, example: Tensor) -> Tape | None:
        """The layers that `network` runs on `example`; None where one is not among those known here."""
        with torch.no_grad():
            graph = make_fx(network)(example)
        known: dict[Node, Any] = {}
        layers = []
        for node in graph.graph.nodes:
            arguments = [known.get(a, a) if isinstance(a, Node) else a for a in node.args]
            if node.op == "placeholder":
                known[node] = Place(0)
            elif node.op == "get_attr":
                known[node] = getattr(graph, node.target)
            elif node.target is aten.t.default and isinstance(arguments[0], Tensor):
                known[node] = arguments[0].t()
            elif node.op == "call_function":
                layer = None if node.kwargs else _read(node.target, arguments)
                if layer is None:
                    return None
                layers.append(layer)
                known[node] = Place(len(layers))
        return Tape(layers)

    def __call__(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return _Run.apply(x, self)
        return self.run(x, keep=False)[-1]

    def run(self, x: Tensor, *, keep: bool) -> Values:
        """All values; without `keep` a value is dropped once the last layer that reads it has run."""
        values: Values = [x]
        for number, layer in enumerate(self.layers):
            values.append(layer.run(values))
            for place in layer.reads:
                if not keep and self._last_reader[place] == number:
                    values[place] = None
        return values

    def pull(self, values: Values, gradient: Tensor) -> Tensor:
        """The gradient for x of what has `gradient` for the last value."""
        sums: Sums = {len(self.layers): gradient}
        for place in range(len(self.layers), 0, -1):
            self.layers[place - 1].pull(sums.pop(place), values[place], values, sums)
        return sums[0]


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tape: Tape) -> Tensor:
        *ctx.values, result = tape.run(x, keep=True)
        ctx.tape = tape
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return ctx.tape.pull([*ctx.values, None], upstream), None


def _add(sums: Sums, place: int, gradient: Tensor) -> None:
    sums[place] = sums[place] + gradient if place in sums else gradient


@dataclass(frozen=True)
class Layer:
    """One result from the value at x."""

    x: Place

    @property
    def reads(self) -> tuple[Place, ...]:
        return (self.x,)

    def run(self, values: Values) -> Tensor:
        raise NotImplementedError

    def pull(self, gradient: Tensor, result: Tensor | None, values: Values, sums: Sums) -> None:
        """Add to `sums`, for each value that was read, the gradient that `gradient` for the result makes of it."""
        raise NotImplementedError


@dataclass(frozen=True)
class Convolution(Layer):
    """relu(conv2d(x) + add)"""

    weight: Tensor
    bias: Tensor | None
    add: Place | None
    stride: int
    padding: int
    relu: bool

    @property
    def reads(self) -> tuple[Place, ...]:
        return (self.x,) if self.add is None else (self.x, self.add)

    def run(self, values: Values) -> Tensor:
        add = None if self.add is None else values[self.add]
        return conv2d.forward(
            values[self.x], self.weight, self.bias, add, self.stride, self.padding, self.relu
        )

    def pull(self, gradient: Tensor, result: Tensor | None, values: Values, sums: Sums) -> None:
        active, keep = (result, self.add is not None) if self.relu else (None, False)
        geometry = self.stride, self.padding, *values[self.x].shape[2:]
        sums[self.x], masked = conv2d.input_gradient(
            gradient, self.weight, active, sums.get(self.x), *geometry, keep
        )
        if self.add is not None:
            _add(sums, self.add, masked if keep else gradient)


@dataclass(frozen=True)
class Shift(Layer):
    """x - shift"""

    shift: Tensor

    def run(self, values: Values) -> Tensor:
        return values[self.x] - self.shift

    def pull(self, gradient: Tensor, result: Tensor | None, values: Values, sums: Sums) -> None:
        _add(sums, self.x, gradient)


@dataclass(frozen=True)
class Scale(Layer):
    """x / scale"""

    scale: Tensor

    def run(self, values: Values) -> Tensor:
        return values[self.x] / self.scale

    def pull(self, gradient: Tensor, result: Tensor | None, values: Values, sums: Sums) -> None:
        _add(sums, self.x, gradient / self.scale)


@dataclass(frozen=True)
class Pool(Layer):
    """Means over whole images."""

    def run(self, values: Values) -> Tensor:
        return values[self.x].mean((2, 3))

    def pull(self, gradient: Tensor, result: Tensor | None, values: Values, sums: Sums) -> None:
        shape = values[self.x].shape
        _add(sums, self.x, (gradient / (shape[2] * shape[3]))[:, :, None, None].expand(shape))


@dataclass(frozen=True)
class Linear(Layer):
    """x weight + bias"""

    weight: Tensor
    bias: Tensor

    def run(self, values: Values) -> Tensor:
        return torch.addmm(self.bias, values[self.x], self.weight)

    def pull(self, gradient: Tensor, result: Tensor | None, values: Values, sums: Sums) -> None:
        _add(sums, self.x, gradient @ self.weight.t())


def _read(target: Any, arguments: list[Any]) -> Layer | None:
    """The layer that an operator is on these arguments."""
    match target, arguments:
        case torch.ops.fastrd.conv2d.default, [Place(), Tensor(), _, None | Place(), _, _, _]:
            return Convolution(*arguments)
        case aten.sub.Tensor, [Place(), Tensor()]:
            return Shift(*arguments)
        case aten.div.Tensor, [Place(), Tensor()]:
            return Scale(*arguments)
        case aten.mean.dim, [Place() as x, [2, 3]]:
            return Pool(x)
        case aten.addmm.default, [Tensor() as bias, Place() as x, Tensor() as weight]:
            return Linear(x, weight, bias)
    return None
