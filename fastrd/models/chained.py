"""Which networks a CPU runs as a chain of convolutions, found by tracing what they do."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from ..kernels.cpu import native
from ..kernels.cpu.chain import Chain, Convolution, Normalization, multiplies_tiles
from ..kernels.cpu.conv2d import fewest_pixels
from .base import Network

aten = torch.ops.aten


def chained(network: nn.Module, example: Tensor) -> dict[torch.dtype, Chain]:
    """Returns `network.embed`, of normalised images in channels_last, as a chain in float32, and in bfloat16 where the
    processor multiplies tiles.

    Empty where it does anything else than convolutions, sums, batch normalisation, ReLU, and a mean over all pixels of
    the last result; where no C++ compiler was found; and on a GPU. Other classes than ours are not looked into: they
    may do what no trace shows.
    """
    if not isinstance(network, Network) or native.library() is None:
        return {}
    if example.device.type != "cpu" or example.dtype != torch.float32:
        return {}
    images = example.contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), fewest_pixels(sys.maxsize):
        layers = _layers(make_fx(lambda x: network.embed(x))(images))
    chains = {}
    for dtype in (torch.float32, torch.bfloat16) if multiplies_tiles() else (torch.float32,):
        with suppress(ValueError):
            chains[dtype] = Chain(layers, images, dtype=dtype)
    return chains


Layers = list[Convolution | Normalization]


def _layers(module: GraphModule) -> Layers:
    """Returns what it does, in order; nothing where some of it is no layer of a chain."""
    constants: dict[Node, Tensor] = {}
    made: dict[Node, Any] = {}  # numbers of values; else what only one of the next cases reads
    layers: Layers = []
    module.graph.eliminate_dead_code()
    for node in module.graph.nodes:
        arguments = [{**constants, **made}.get(a) if isinstance(a, Node) else a for a in node.args]
        match node.target, arguments:
            case _, _ if node.op == "placeholder":
                made[node] = 0
            case str() as name, _ if node.op == "get_attr":
                constants[node] = getattr(module, name)
            case aten.convolution.default, [
                int() as x,
                Tensor() as weight,
                bias,
                [int() as stride, stride_2],
                [int() as padding, padding_2],
                [1, 1],
                False,
                _,
                int() as groups,
            ] if (stride, padding) == (stride_2, padding_2):
                layers.append(Convolution(x, weight, bias, None, stride, padding, relu=False, groups=groups))
                made[node] = len(layers)
            case aten.native_batch_norm.default, [
                int() as x,
                Tensor() as gamma,
                Tensor() as beta,
                Tensor() as mean,
                Tensor() as var,
                False,
                _,
                float() as eps,
            ]:
                layers.append(Normalization(x, mean, var, gamma, beta, eps, relu=False))
                made[node] = "normalised", len(layers)
            case _, [("normalised", int() as x), 0]:
                made[node] = x
            case aten.add.Tensor, [int() as a, int() as b] if a != b and _alone(node, max(a, b), made, layers):
                match layers[max(a, b) - 1]:
                    case Convolution(add=None, relu=False) as last:
                        layers[max(a, b) - 1] = last._replace(add=min(a, b))
                        made[node] = max(a, b)
                    case _:
                        return []
            case aten.relu.default | aten.relu_.default, [int() as x] if _alone(node, x, made, layers):
                layers[x - 1] = layers[x - 1]._replace(relu=True)
                made[node] = x
            case aten.mean.dim, [int() as x, [2, 3]] if x == len(layers):
                made[node] = "means"
            case _, ["means"] if node.op == "output":
                return layers
            case _:
                return []
    return []


def _alone(reader: Node, value: int, made: dict[Node, Any], layers: Layers) -> bool:
    """Whether nobody but `reader` reads what a layer makes as it was until then."""
    waiting = {user for node, number in made.items() if number == value for user in node.users if user not in made}
    return value > 0 and waiting == {reader} and all(value not in (layer.x, layer.add) for layer in layers)
