"""Pre-activation ResNets for small images (He et al. 2016, arXiv 1603.05027), the field's parameter names."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..core.values import check_option
from .base import Conv2d, activated, global_pool
from .resnet import Staged


class PreActBlock(nn.Module):
    def __init__(self, in_width: int, width: int, stride: int, *, shortcut: str) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_width)
        self.conv1 = Conv2d(in_width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = None
        self.shortcut_reads_input = shortcut == "input"
        if stride != 1 or in_width != width:
            self.shortcut = nn.Sequential(Conv2d(in_width, width, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        out = self.conv2(activated(self.bn2, self.conv1, active))
        if self.shortcut is not None:
            x = self.shortcut(x if self.shortcut_reads_input else active)
        return out + x


class PreActResNet(Staged):
    """Published variants differ in two ways, of which only the first shows in a state dict.

    `final_bn`: a batch norm and ReLU before pooling (Rice 2020 L2, Kireev 2021, Addepalli 2021), or none, the
    default. `shortcut`: the projection reads the "activated" input of its block (default) or the raw "input"
    (Wong 2020, Andriushchenko 2020).
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        *,
        stem: str = "cifar",
        width: int = 64,
        final_bn: bool = False,
        shortcut: str = "activated",
        **shape: Any,
    ) -> None:
        check_option("shortcut", shortcut, ("activated", "input"))
        super().__init__(blocks, partial(PreActBlock, shortcut=shortcut), stem=stem, width=width, **shape)
        self.bn = nn.BatchNorm2d(self.feature_dim) if final_bn else None

    def embed(self, x: Tensor) -> Tensor:
        x = self.run_stages(self.pool(self.conv1(x)))
        if self.bn is not None:
            x = F.relu(self.bn(x))
        return global_pool(x)
