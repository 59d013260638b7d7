"""Which networks a CPU runs as a chain of convolutions, found by writing down what they do."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from ..kernels.cpu.chain import Chain, Convolution, multiplies_tiles
from ..kernels.cpu.conv2d import fewest_pixels
from .base import Network


def chained(network: nn.Module, example: Tensor) -> dict[torch.dtype, Chain]:
    """Returns `network.embed`, of normalised images in channels_last, as a chain in float32, and in bfloat16 where the
    processor multiplies tiles.

    Empty where it does anything else than convolutions that `kernels.conv2d` takes over, and a mean over all pixels of
    the last; and on a GPU. Other classes than ours are not looked into: they may do what cannot be written down.
    """
    if not isinstance(network, Network) or example.device.type != "cpu" or example.dtype != torch.float32:
        return {}
    images = example.contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), fewest_pixels(1):
        graph = make_fx(lambda x: network.embed(x))(images)
    values: dict[Node, Any] = {}
    convolutions: list[Convolution] = []
    for node in graph.graph.nodes:
        arguments = [values.get(a, a) if isinstance(a, Node) else a for a in node.args]
        match node.op, node.target, arguments:
            case "placeholder", _, _:
                values[node] = 0
            case "get_attr", _, _:
                values[node] = getattr(graph, node.target)
            case _, torch.ops.fastrd.conv2d.default, [int(), Tensor(), _, None | int(), _, _, _]:
                convolutions.append(Convolution(*arguments))
                values[node] = len(convolutions)
            case _, torch.ops.aten.mean.dim, [int() as x, [2, 3]] if x == len(convolutions) > 0:
                values[node] = "means"
            case "output", _, ["means"]:
                continue
            case _:
                return {}
    chains = {}
    for dtype in (torch.float32, torch.bfloat16) if multiplies_tiles() else (torch.float32,):
        with suppress(ValueError):
            chains[dtype] = Chain(convolutions, images, dtype=dtype)
    return chains
