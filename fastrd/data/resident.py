"""The default loader: the whole data set on the device as uint8, batches made there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .augment import Augment
from .checks import check_images, check_labels
from .seeding import derive_seed


class Batch(NamedTuple):
    x: Tensor  # (B, C, H, W), floating point in [0, 1]
    y: Tensor  # (B,) int64 labels
    index: Tensor  # (B,) int64 positions in the `images` the loader was made of


class ResidentLoader:
    """Batches of a data set that stays on the device.

    The order of an epoch is a function of (seed, epoch), the augmentation of an image of (seed, epoch, its index), so
    batch b of epoch e is the same whatever ran before: a resumed run asks for `epoch(e, start=b)` and has no random
    state to restore. Both are drawn on the CPU: every device trains on the same pixels.

    INDEX SPACE. `Batch.index` counts in the `images` given here, 0..num_samples-1, also when `indices` selects a part
    of them. A memory bank with a row for each sample therefore has `num_samples` rows, `labels` being their classes.
    Rows outside `indices` are never visited; to leave them out of the index space, pass `images[indices]` instead.

    Args:
        images: uint8 (N, H, W, C), numpy or torch. Not copied where it is on `device` already: do not write to it.
        labels: integers (N,), numpy or torch.
        batch_size: images in a batch.
        device: where the data set and the batches live.
        seed: of the order and the augmentation.
        augment: None serves the images as they are.
        shuffle: a new random order each epoch; False keeps the order of `indices`.
        drop_last: leave out an incomplete last batch.
        indices: integers in [0, N), the images to serve; None serves all.
        channels_last: memory format of `Batch.x`.
        dtype: floating point type of `Batch.x`; pixel values are uint8 / 255, rounded once.

    Attributes:
        num_samples: N, the size of the index space.
        labels: int64 (N,) on the device, in index space.
        batch_size: as given.

    Raises:
        ValueError: images or labels of another dtype or shape, indices out of range or empty, a batch size below 1 or
            with `drop_last` above the number of images, a dtype that is not floating point.
    """

    def __init__(
        self,
        images: np.ndarray | Tensor,
        labels: np.ndarray | Tensor,
        *,
        batch_size: int,
        device: str | torch.device = "cpu",
        seed: int = 0,
        augment: Augment | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        indices: np.ndarray | Tensor | None = None,
        channels_last: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_images("images", images)
        labels = check_labels("labels", _numpy(labels), len(images))
        selected = _indices(indices, len(images))
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}; accepted: an integer >= 1")
        if drop_last and batch_size > len(selected):
            raise ValueError(
                f"batch_size: got {batch_size} for {len(selected)} images, which with drop_last gives no batch at all; "
                f"accepted: at most {len(selected)}, or drop_last=False"
            )
        if not dtype.is_floating_point:
            raise ValueError(f"dtype: got {dtype}; accepted: a floating point type")

        if isinstance(images, np.ndarray):
            # torch shares only memory it may write to.
            images = torch.from_numpy(np.require(images, requirements=["C", "W"]))
        self.num_samples = len(images)
        self.labels = torch.from_numpy(labels).to(device)
        self.batch_size = batch_size
        self._images = images.to(device).contiguous()
        self._selected = selected
        self._seed = seed
        self._augment = augment
        self._shuffle = shuffle
        self._drop_last = drop_last
        self._channels_last = channels_last
        # As a tensor on the device: CUDA multiplies by the reciprocal of a host number, which rounds differently.
        self._white = torch.tensor(255, dtype=dtype, device=device)

    def __len__(self) -> int:
        """Batches in an epoch."""
        full, rest = divmod(len(self._selected), self.batch_size)
        return full + bool(rest and not self._drop_last)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch number `epoch` from number `start` on, counting from 0; `start == len(self)` gives none.

        Raises:
            ValueError: `start` is not in 0..len(self).
        """
        if not 0 <= start <= len(self):
            raise ValueError(f"start: got {start}; accepted: a batch number in 0..{len(self)}")
        return self._batches(epoch, start)

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        device = self._images.device
        order = self._selected
        if self._shuffle:
            order = order[torch.randperm(len(order), generator=self._generator("order", epoch))]
        order = order.to(device)
        draws = None
        if self._augment is not None:
            size = tuple(self._images.shape[1:3])
            draws = self._augment.draw(self.num_samples, size, self._generator("augment", epoch)).to(device)
        for number in range(start, len(self)):
            # A copy: without shuffling, `order` is the loader's own.
            index = order[number * self.batch_size : (number + 1) * self.batch_size].clone()
            images = self._images.index_select(0, index)
            if draws is not None:
                images = self._augment.apply(images, draws.index_select(0, index))
            yield Batch(self._to_network(images), self.labels.index_select(0, index), index)

    def _generator(self, purpose: str, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self._seed, purpose, epoch))

    def _to_network(self, images: Tensor) -> Tensor:
        images = images.permute(0, 3, 1, 2)
        if not self._channels_last:
            images = images.contiguous()
        return images.to(self._white.dtype).div_(self._white)


def _numpy(values: np.ndarray | Tensor) -> np.ndarray:
    return values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _indices(indices: np.ndarray | Tensor | None, n: int) -> Tensor:
    if indices is None:
        return torch.arange(n)
    indices = _numpy(indices)
    if indices.ndim != 1 or indices.dtype.kind not in "iu" or indices.size == 0:
        raise ValueError(
            f"indices: got {indices.dtype} of shape {indices.shape}; accepted: a list of integers, at least one"
        )
    least, most = int(indices.min()), int(indices.max())
    if least < 0 or most >= n:
        raise ValueError(f"indices: got numbers {least}..{most}; accepted: 0..{n - 1} for {n} images")
    return torch.from_numpy(indices.astype(np.int64))
