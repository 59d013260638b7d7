"""The loader that needs nothing: torch's DataLoader, whose worker processes read the images."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .beton import PackedImages
from .loader import Images, Loader


class TorchLoader(Loader):
    """See `Loader`; `workers` processes read, for as long as an epoch runs."""

    def __init__(self, images: Images, labels: np.ndarray | Tensor, *, workers: int = 1, **options: Any) -> None:
        super().__init__(images, labels, **options)
        self._reader = _Reader(images.cpu() if isinstance(images, Tensor) else images)
        self._workers = workers

    def _source(self, parts: Sequence[Tensor], on_device: Sequence[Tensor]) -> Generator:
        if isinstance(self._reader.images, PackedImages):
            self._reader.images.file.check_unchanged()
        batches: DataLoader[Tensor] = DataLoader(
            self._reader,
            batch_size=None,
            sampler=[part.numpy() for part in parts],
            num_workers=self._workers,
            generator=torch.Generator(),  # the default draws from torch's global one
        )
        for images in batches:
            yield self._to_device(images), None


class _Reader(Dataset[Tensor]):
    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        return torch.as_tensor(np.asarray(self.images[rows]))
