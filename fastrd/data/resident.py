"""The default loader: the whole data set on the device as uint8, batches made there."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .loader import Images, Loader


class ResidentLoader(Loader):
    """See `Loader`. The images are copied to the device, unless they are there already."""

    def __init__(self, images: Images, labels: np.ndarray | Tensor, **options: Any) -> None:
        super().__init__(images, labels, **options)
        if not isinstance(images, Tensor):
            # torch shares only memory it may write to.
            images = torch.from_numpy(np.require(np.asarray(images), requirements=["C", "W"]))
        self._images = images.to(self._device).contiguous()

    def _source(self, parts: Sequence[Tensor], on_device: Sequence[Tensor]) -> Generator:
        for rows in on_device:
            yield self._images, rows
