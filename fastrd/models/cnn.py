"""A network that a CPU can train adversarially in minutes, for images of any size from 8x8 up."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .base import Conv2d, Network, activated, global_pool, stem_layers


class CNN(Network):
    """Four 3x3 convolutions with batch norm and ReLU, `width` to 8 `width` wide.

    All but the second halve the image. Halving it at once, rather than after a first layer at full
    resolution, leaves time for more training steps, which is worth more on a CPU.
    """

    def __init__(self, *, num_classes: int, stem: str = "cifar", width: int = 16, **images: Any) -> None:
        super().__init__(**images)
        self.conv1, self.pool = stem_layers(self.in_channels, width, stem, stride=2)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.conv3 = Conv2d(2 * width, 4 * width, 3, stride=2, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.conv4 = Conv2d(4 * width, 8 * width, 3, stride=2, padding=1, bias=False)
        self.bn4 = nn.BatchNorm2d(8 * width)
        self.linear = nn.Linear(8 * width, num_classes)

    def embed(self, x: Tensor) -> Tensor:
        x = self.pool(activated(self.bn1, self.conv1, x))
        x = activated(self.bn2, self.conv2, x)
        x = activated(self.bn3, self.conv3, x)
        return global_pool(activated(self.bn4, self.conv4, x))
