"""The default loader: the whole data set on the device as uint8, batches made there."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.augment import Crops
from .augment import Augment
from .loader import Images, Loader, free_memory


class ResidentLoader(Loader):
    """See `Loader`. The images are copied to the device, unless they are there already.

    On a CPU they are kept as `Crops` where those of all processes take at most a quarter of the free memory.
    """

    def __init__(self, images: Images, labels: np.ndarray | Tensor, **options: Any) -> None:
        super().__init__(images, labels, **options)
        if not isinstance(images, Tensor):
            # torch shares only memory it may write to.
            images = torch.from_numpy(np.require(np.asarray(images), requirements=["C", "W"]))
        images = images.to(self._device).contiguous()
        self._images: Any = images
        if self._augment is not None and self._has_room(images, self._augment):
            self._images = Crops(images, **self._augment.switches)

    def _has_room(self, images: Tensor, augment: Augment) -> bool:
        if self._device.type != "cpu":
            return False
        size = Crops.size(tuple(images.shape), **augment.switches)
        return size <= free_memory(self._device) // (4 * self._world_size)

    def _source(self, parts: Sequence[Tensor], on_device: Sequence[Tensor]) -> Generator:
        for rows in on_device:
            yield self._images, rows

    def _batch(self, images: Tensor | Crops, rows: Tensor | None, draws: Tensor | None) -> Tensor:
        if isinstance(images, Crops):
            assert rows is not None and draws is not None, "`_source` names rows, and crops are drawn"
            return images(rows, draws, **self._format)
        return super()._batch(images, rows, draws)
