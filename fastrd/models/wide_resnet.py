"""Wide ResNets (Zagoruyko & Komodakis 2016) of the two families robust checkpoints come in.

Both compute the same blocks. The TRADES family uses ReLU and symmetric padding; the DeepMind family (Gowal
2020, Rebuffi 2021, Wang 2023, Cui 2023) uses SiLU and, where it strides, the padding that TensorFlow calls
SAME. Parameter names are the TRADES family's for both; `layouts.py` renames DeepMind files.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..core.values import check_option
from .base import Conv2d, Network, global_pool, stem_layers

_ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}


def _pad_same(x: Tensor) -> Tensor:
    """Padding of a 3x3 convolution with stride 2: an even side gets its one extra row at the end only."""
    return F.pad(x, (x.shape[3] % 2, 1, x.shape[2] % 2, 1))


class WideBlock(nn.Module):
    def __init__(self, in_width: int, width: int, stride: int, activation: str, same_padding: bool) -> None:
        super().__init__()
        self.same_padding = same_padding and stride == 2
        self.bn1 = nn.BatchNorm2d(in_width)
        self.conv1 = Conv2d(in_width, width, 3, stride=stride, padding=0 if self.same_padding else 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = Conv2d(width, width, 3, padding=1, bias=False)
        self.convShortcut = None if in_width == width else Conv2d(in_width, width, 1, stride=stride, bias=False)
        self.act = _ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        active = self.act(self.bn1(x))
        out = self.conv1(_pad_same(active) if self.same_padding else active)
        out = self.conv2(self.act(self.bn2(out)))
        return out + (x if self.convShortcut is None else self.convShortcut(active))


class WideStage(nn.Module):
    def __init__(self, count: int, in_width: int, width: int, stride: int, activation: str, same_padding: bool) -> None:
        super().__init__()
        first = WideBlock(in_width, width, stride, activation, same_padding)
        rest = [WideBlock(width, width, 1, activation, same_padding) for _ in range(count - 1)]
        self.layer = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(Network):
    """WRN-`depth`-`widen`; depth = 6n + 4. He-normal initialisation over the fan-out, as in both families."""

    head_name = "fc"

    def __init__(
        self,
        depth: int,
        widen: int,
        same_padding: bool = False,
        *,
        num_classes: int,
        stem: str = "cifar",
        activation: str = "relu",
        **images: Any,
    ) -> None:
        super().__init__(**images)
        check_option("activation", activation, _ACTIVATIONS)
        count, wide = (depth - 4) // 6, 16 * widen
        self.conv1, self.pool = stem_layers(self.in_channels, 16, stem)
        self.block1 = WideStage(count, 16, wide, 1, activation, same_padding)
        self.block2 = WideStage(count, wide, 2 * wide, 2, activation, same_padding)
        self.block3 = WideStage(count, 2 * wide, 4 * wide, 2, activation, same_padding)
        self.bn1 = nn.BatchNorm2d(4 * wide)
        self.act = _ACTIVATIONS[activation]()
        self.fc = nn.Linear(4 * wide, num_classes)
        for module in self.modules():
            if same_padding and isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.01  # as DeepMind's networks train
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def embed(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.pool(self.conv1(x)))))
        return global_pool(self.act(self.bn1(x)))
