"""The default loader: the whole data set on the device as uint8, batches made there."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.augment import erase, scaled
from .augment import Augment
from .loader import Images, Loader, free_memory


class ResidentLoader(Loader):
    """See `Loader`. The images are copied to the device, unless they are there already.

    On a CPU they are kept as `_Crops` where those of all processes take at most a quarter of the free memory.
    """

    def __init__(self, images: Images, labels: np.ndarray | Tensor, **options: Any) -> None:
        super().__init__(images, labels, **options)
        if not isinstance(images, Tensor):
            # torch shares only memory it may write to.
            images = torch.from_numpy(np.require(np.asarray(images), requirements=["C", "W"]))
        self._images = images.to(self._device).contiguous()
        on_cpu, augment = self._device.type == "cpu", self._augment
        room = free_memory(self._device) // (4 * self._world_size)
        fits = augment is not None and _Crops.size(images, augment) <= room
        self._crops = _Crops(self._images, augment) if on_cpu and fits else None

    def _source(self, parts: Sequence[Tensor], on_device: Sequence[Tensor]) -> Generator:
        for rows in on_device:
            yield self._images, rows

    def _batch(self, images: Tensor, rows: Tensor, draws: Tensor | None) -> Tensor:
        if self._crops is None:
            return super()._batch(images, rows, draws)
        return scaled(self._crops(rows, draws), **self._format)


class _Crops:
    """Every image padded, and once more mirrored: a random crop is then a copy of lines and nothing else.

    Twice as fast on a CPU as to pad and mirror each batch, for up to 2 (1 + 2 padding / side)^2 times the memory.
    """

    def __init__(self, images: Tensor, augment: Augment) -> None:
        self._augment, pad = augment, augment.padding
        n, height, width, channels = self._shape = images.shape
        padded = images.new_zeros(n, 1 + augment.flip, height + 2 * pad, width + 2 * pad, channels)
        inside = padded[:, :, pad : pad + height, pad : pad + width]
        inside[:, 0] = images
        if augment.flip:
            inside[:, 1] = images.flip(2)
        self._image, self._mirrored, self._line, self._pixel, _ = padded.stride()
        # Every run of as many bytes as a line of a crop has, seen as a row.
        wanted = width * channels
        self._runs = padded.view(-1).as_strided((padded.numel() - wanted + 1, wanted), (1, 1))
        self._lines = torch.arange(height) * self._line

    @staticmethod
    def size(images: Tensor, augment: Augment) -> int:
        """Bytes."""
        n, height, width, channels = images.shape
        return (
            n * (1 + augment.flip) * (height + 2 * augment.padding) * (width + 2 * augment.padding) * channels
        )

    def __call__(self, rows: Tensor, draws: Tensor) -> Tensor:
        """What `kernels.augment.transform` makes of the images `rows`: uint8 (B, H, W, C)."""
        top, left, flipped, row, column = draws.unbind(1)
        if not self._augment.padding:
            top = left = torch.zeros_like(top)
        first = rows * self._image + top * self._line
        if self._augment.flip:
            # A crop mirrored is a crop of the mirrored image, at the mirrored place.
            flipped = flipped != 0
            left = torch.where(flipped, 2 * self._augment.padding - left, left)
            first = first + flipped * self._mirrored
        starts = (first + left * self._pixel)[:, None] + self._lines
        images = self._runs.index_select(0, starts.view(-1)).view(-1, *self._shape[1:])
        cutout = self._augment.cutout
        return erase(images, row, column, cutout) if cutout else images
