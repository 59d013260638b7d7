"""One meaning of a training batch, whatever holds the images: which images, in what order, with which crops."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core.arguments import check_dense, check_device, check_flags
from ..core.images import check_held, check_images, check_labels
from ..core.seeding import derive_seed
from ..core.values import as_integer, check_integer, check_number, shown
from ..kernels.augment import augment as transformed
from .augment import Augment
from .beton import PackedImages

Images = np.ndarray | Tensor | PackedImages


class Batch(NamedTuple):
    """One batch of training images."""

    x: Tensor  # (B, C, H, W), floating point in [0, 1]
    y: Tensor  # (B,) int64 labels
    index: Tensor  # type: ignore[assignment]  # hides tuple.index; (B,) int64 positions in the `images` the loader was made of


class Loader(ABC):
    """Batches of a data set; `make_loader` makes one of the three kinds.

    The order of an epoch is a function of (seed, epoch), the augmentation of an image of (seed, epoch, its index), so
    batch b of epoch e is the same whatever ran before: a resumed run asks for `epoch(e, start=b)` and has no random
    state to restore. Both are drawn on the CPU and do not depend on the kind of loader: on every device, and from
    memory, worker processes or a packed file, one trains on the same pixels. (A packed file of JPEGs holds other pixels
    than the data set it was made of, but these too are the same for every kind.)

    INDEX SPACE. `Batch.index` counts in the `images` given here, 0..num_samples-1. A memory bank with a row for each
    sample therefore has `num_samples` rows, `labels` being their classes.

    RANKS. `batch_size` is that of all processes together. Rank r takes rows r, r + world_size, ... of every batch, so
    that batch b of all ranks is batch b of a single process. An incomplete last batch may leave a rank fewer rows than
    another, or none.

    Args:
        images: uint8 (N, H, W, C): numpy, torch, or a part of a packed file. Do not write to them.
        labels: integers (N,), numpy or torch; -1 for images without a label.
        batch_size: images in a batch.
        device: where the batches live.
        seed: of the order and the augmentation.
        augment: None serves the images as they are.
        shuffle: a new random order each epoch; False keeps that of `images`.
        drop_last: leave out an incomplete last batch.
        extra: so many of the last images are further ones: each batch takes `extra_fraction` of its images from them,
            and the rest from those before. An epoch keeps its number of batches; which of either kind are in it is
            drawn anew each time.
        extra_fraction: in [0, 1); rounded to whole images of a batch.
        channels_last: memory format of `Batch.x`.
        rank, world_size: which of how many processes this is.

    Attributes:
        num_samples: N, the size of the index space.
        labels: int64 (N,) on the device, in index space.
        batch_size: as given.
        stall_seconds: how long callers have waited for batches, on the host, since the loader was made.

    Raises ValueError: images or labels of another dtype or shape, a batch size below 1, or with `drop_last` above the
    number of images, or that the ranks cannot share evenly, an `extra_fraction` of whole batches, a rank outside the
    world.
    """

    def __init__(
        self,
        images: Images,
        labels: np.ndarray | Tensor,
        *,
        batch_size: int,
        device: str | torch.device = "cpu",
        seed: int = 0,
        augment: Augment | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        extra: int = 0,
        extra_fraction: float = 0.5,
        channels_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_images("images", images)
        if isinstance(images, Tensor):
            check_dense(images=images)
            check_held("images", images)
        labels = check_labels("labels", labels, len(images), unlabelled=True)
        check_integer(least=1, batch_size=batch_size, world_size=world_size)
        check_integer(least=0, most=len(images) - 1, extra=extra)
        check_integer(least=0, rank=rank)
        check_number(least=0, below=1, extra_fraction=extra_fraction)
        check_flags(shuffle=shuffle, drop_last=drop_last, channels_last=channels_last)
        derive_seed(seed)
        if augment is not None and not isinstance(augment, Augment):
            raise TypeError(f"augment: got {shown(augment)}; accepted: an Augment, or None")
        # torch splits by integers of Python alone.
        batch_size, extra, rank, world_size = int(batch_size), int(extra), int(rank), int(world_size)
        if rank >= world_size:
            raise ValueError(f"rank: got {rank} of world_size {world_size}; accepted: 0..world_size-1")
        if batch_size % world_size:
            accepted = f"an integer >= 1 and a multiple of world_size {world_size}"
            raise ValueError(f"batch_size: got {batch_size}; accepted: {accepted}")
        own = len(images) - extra
        if drop_last and batch_size > own:
            got = f"{batch_size} for {own} images, which with drop_last gives no batch at all"
            raise ValueError(f"batch_size: got {got}; accepted: at most {own}, or drop_last=False")

        self.num_samples = len(images)
        self.labels = torch.from_numpy(labels).to(check_device(device))
        self.batch_size = batch_size
        self.stall_seconds = 0.0
        self._device = self.labels.device
        self._own, self._extra = torch.arange(len(images), device="cpu").split([own, extra])
        self._extra_share = round(extra_fraction * batch_size) if extra else 0
        if extra and not 1 <= self._extra_share < batch_size:
            got = f"{extra_fraction}, {self._extra_share} of {batch_size} images of a batch"
            raise ValueError(f"extra_fraction: got {got}; accepted: a fraction that takes at least one and leaves one")
        self._seed, self._augment = seed, augment
        self._shuffle, self._drop_last, self._channels_last = shuffle, drop_last, channels_last
        self._rank, self._world_size = rank, world_size

    def __len__(self) -> int:
        """Batches in an epoch."""
        full, rest = divmod(len(self._own), self.batch_size)
        return full + bool(rest and not self._drop_last)

    @property
    def last_batch(self) -> int:
        """Images of all processes in the last batch of an epoch."""
        each = self.batch_size - self._extra_share
        return min(each, len(self._own) - (len(self) - 1) * each) + self._extra_share

    def images_in(self, start: int, stop: int) -> int:
        """Returns how many images, of all processes, are in the batches start..stop - 1 of an epoch."""
        ends = start < stop == len(self)
        return (stop - start - ends) * self.batch_size + ends * self.last_batch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Returns the batches of epoch number `epoch` from number `start` on, counting from 0; `len(self)` gives none.

        A loop over it may be left early: the threads and processes it uses end with the iterator.

        Raises ValueError: `start` is not in 0..len(self).
        """
        check_integer(least=0, epoch=epoch)
        if as_integer(start) is None or not 0 <= start <= len(self):
            raise ValueError(f"start: got {start}; accepted: a batch number in 0..{len(self)}")
        return self._batches(epoch, start)

    @abstractmethod
    def _source(
        self, parts: Sequence[Tensor], on_device: Sequence[Tensor]
    ) -> Generator[tuple[Tensor, Tensor | None], None, None]:
        """For each batch: uint8 images on the device, and which of them are in it (None: all, in their order).

        parts: the positions in `images` that each batch is made of, on the CPU; on_device: the same on the device. The
        images are looked at before the next batch is asked for, and not after.
        """

    def _to_device(self, x: Tensor) -> Tensor:
        """`x` of the CPU on the device; a GPU fetches it from pinned memory, for which the host does not wait."""
        if self._device.type != "cuda":
            return x.to(self._device)
        return x.pin_memory().to(self._device, non_blocking=True)

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        asked = time.perf_counter()
        if not (parts := self._parts(epoch)[start:]):
            return
        # One copy to the device for the whole epoch; a copy also where it is the CPU, as a batch may be written to.
        on_device = self._to_device(torch.cat(parts)).split([len(part) for part in parts])
        draws, switches = None, {}
        if self._augment is not None:
            switches = self._augment.switches
            draws = self._to_device(self._augment.draw(self.num_samples, self._generator("augment", epoch)))
        with closing(self._source(parts, on_device)) as source:
            for index, (images, rows) in zip(on_device, source, strict=True):
                drawn = None if draws is None else draws.index_select(0, index)
                x = transformed(images, rows, drawn, **switches, channels_last=self._channels_last)
                batch = Batch(x, self.labels.index_select(0, index), index)
                self.stall_seconds += time.perf_counter() - asked
                yield batch
                asked = time.perf_counter()

    def _parts(self, epoch: int) -> list[Tensor]:
        """This rank's share of every batch of an epoch."""
        batches = self._ordered(self._own, "order", epoch).split(self.batch_size - self._extra_share)
        batches = batches[: len(self)]
        if self._extra_share:
            rounds = -(-len(batches) * self._extra_share // len(self._extra))
            extra = [self._ordered(self._extra, "extra", epoch, number) for number in range(rounds)]
            parts = torch.cat(extra).split(self._extra_share)
            batches = [torch.cat(pair) for pair in zip(batches, parts, strict=False)]
        return [batch[self._rank :: self._world_size] for batch in batches]

    def _ordered(self, images: Tensor, *place: str | int) -> Tensor:
        """`images` in the order of an epoch."""
        if not self._shuffle:
            return images
        return images[torch.randperm(len(images), generator=self._generator(*place), device="cpu")]

    def _generator(self, *place: str | int) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self._seed, *place))


def free_memory(device: torch.device) -> int:
    """Returns the free memory of a device in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
