"""Post-activation ResNets for small images (He et al. 2016), with the parameter names the field publishes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .base import Conv2d, Network, activated, global_pool, stem_layers

BLOCKS: dict[int, tuple[int, ...]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    **{6 * n + 2: (n, n, n) for n in (1, 2, 3, 5, 7, 9, 18)},
}
"""Depth -> blocks per stage: the four-stage networks, and the 6n+2 layers of the three-stage CIFAR ones."""


class BasicBlock(nn.Module):
    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = Conv2d(in_width, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_width != width:
            projection = Conv2d(in_width, width, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = activated(self.bn1, self.conv1, x)
        return activated(self.bn2, self.conv2, out, self.shortcut(x))


class Staged(Network):
    """A stem and `layer1`, `layer2`, ...: the first `width` wide, each further one wider and smaller by 2."""

    def __init__(
        self,
        blocks: tuple[int, ...],
        block: Callable[[int, int, int], nn.Module],
        *,
        num_classes: int,
        stem: str,
        width: int,
        **images: Any,
    ) -> None:
        super().__init__(**images)
        self.conv1, self.pool = stem_layers(self.in_channels, width, stem)
        self.stages = len(blocks)
        in_width = width
        for stage, count in enumerate(blocks):
            out_width, stride = width << stage, 1 if stage == 0 else 2
            rest = [block(out_width, out_width, 1) for _ in range(count - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(block(in_width, out_width, stride), *rest))
            in_width = out_width
        self.linear = nn.Linear(in_width, num_classes)

    def run_stages(self, x: Tensor) -> Tensor:
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return x


class ResNet(Staged):
    def __init__(self, blocks: tuple[int, ...], *, stem: str = "cifar", width: int = 64, **shape: Any) -> None:
        super().__init__(blocks, BasicBlock, stem=stem, width=width, **shape)
        self.bn1 = nn.BatchNorm2d(width)

    def embed(self, x: Tensor) -> Tensor:
        return global_pool(self.run_stages(self.pool(activated(self.bn1, self.conv1, x))))
