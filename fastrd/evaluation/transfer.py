"""What a network's features are worth elsewhere: a linear probe on another task, clean and under attack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.arguments import check_module
from ..core.images import as_images, as_labels, pixels
from ..core.values import check_integer, non_negative, shown
from ..models import with_features
from ..models.foreign import copied
from .inputs import batches, count_classes, evaluating


class Probe(nn.Module):
    """A frozen network's penultimate features under a linear layer of another task; (N, C, H, W) -> (N, classes).

    Images of another size than `image_size` are resized to it, antialiased, inside: attacks see the original pixels.
    """

    def __init__(self, network: nn.Module, head: nn.Linear, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.network, self.head, self.image_size = network, head, image_size

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.network(_resized(x, self.image_size), features=True)[1])


def linear_probe(
    model: nn.Module,
    x: Tensor | np.ndarray,
    y: Any,
    *,
    num_classes: int,
    image_size: tuple[int, int] | None = None,
    weight_decay: float = 1e-4,
    iterations: int = 100,
    batch_size: int = 250,
) -> Probe:
    """Fits a linear classifier on frozen features: softmax regression on standardised features, full-batch L-BFGS.

    The cross-task transfer of GACD (Bai et al. 2020). Deterministic; the model is left as it was.

    Args:
        model: images (N, C, H, W) in [0, 1] -> logits; its features are those its last linear layer reads.
        x, y: training images of the new task, float (N, C, H, W) in [0, 1] or uint8 (N, H, W, C), and its labels.
        image_size: (H, W) the network was trained on; default that of `x`.
        weight_decay: of lambda / 2 ||W||^2 beside the mean cross-entropy, on standardised features.

    Returns:
        A module that `evaluate` takes, in eval mode and frozen, around a copy of the model.
    """
    check_integer(least=1, num_classes=num_classes, iterations=iterations)
    non_negative(weight_decay=weight_decay)
    if image_size is not None:
        if isinstance(image_size, str) or not isinstance(image_size, Sequence) or len(image_size) != 2:
            raise TypeError(f"image_size: got {shown(image_size)}; accepted: (height, width)")
        for side in image_size:
            check_integer(least=1, image_size=side)
    check_module("model", model, "a torch.nn.Module that maps x to logits")
    network = with_features(copied("model", model))
    images, labels = as_images(x), as_labels(y, len(x))
    if len(images) < 2:
        raise ValueError("x: got one image; accepted: two or more, whose features have a spread")
    if labels.max() >= num_classes:
        raise ValueError(f"y: got label {labels.max().item()}; accepted: 0 to {num_classes - 1}")
    if image_size is None:
        height, width = images.shape[1:3] if images.dtype == torch.uint8 else images.shape[2:]
        image_size = (height, width)
    with evaluating(network) as device, torch.no_grad():
        count_classes(network, _resized(pixels(images[:1], device), image_size), None, device)
        parts = [
            network(_resized(pixels(images[part], device), image_size), features=True)[1]
            for part in batches(len(images), batch_size)
        ]
    features, labels = torch.cat(parts), labels.to(device)
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    features = (features - mean) / std
    weight = torch.zeros(num_classes, features.shape[1], device=device, requires_grad=True)
    bias = torch.zeros(num_classes, device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(features, weight, bias), labels)
        value = value + weight_decay / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    head = nn.Linear(features.shape[1], num_classes, device="meta").to_empty(device=device)
    with torch.no_grad():
        head.weight.copy_(weight / std)
        head.bias.copy_(bias - head.weight @ mean)
    return Probe(network, head, image_size).eval().requires_grad_(False)


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)
