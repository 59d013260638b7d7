"""MobileNetV2 for small images (Sandler et al. 2018): early strides removed, the field's parameter names."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Network, global_pool, stem_layers

# expansion, width, blocks, stride of the first
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class InvertedResidual(nn.Module):
    def __init__(self, in_width: int, width: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = expansion * in_width
        self.conv1 = nn.Conv2d(in_width, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.residual = stride == 1
        self.shortcut = nn.Sequential()
        if self.residual and in_width != width:
            self.shortcut = nn.Sequential(nn.Conv2d(in_width, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return out + self.shortcut(x) if self.residual else out


class MobileNetV2(Network):
    def __init__(self, *, num_classes: int, stem: str = "cifar", **images: Any) -> None:
        super().__init__(**images)
        self.conv1, self.pool = stem_layers(self.in_channels, 32, stem)
        self.bn1 = nn.BatchNorm2d(32)
        layers, in_width = [], 32
        for expansion, width, count, stride in _STAGES:
            for block in range(count):
                layers.append(InvertedResidual(in_width, width, expansion, stride if block == 0 else 1))
                in_width = width
        self.layers = nn.Sequential(*layers)
        self.conv2 = nn.Conv2d(in_width, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.linear = nn.Linear(1280, num_classes)

    def embed(self, x: Tensor) -> Tensor:
        x = self.layers(self.pool(F.relu(self.bn1(self.conv1(x)))))
        return global_pool(F.relu(self.bn2(self.conv2(x))))
