"""The three kinds of loader, and the choice of one."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..core.arguments import check_device
from ..core.images import check_images
from ..core.values import check_integer, check_option
from .beton import PackedFile, PackedImages
from .loader import Images, Loader, free_memory


class ResidentLoader(Loader):
    """Makes batches on the device, to which all images are copied unless they are there; see `Loader`."""

    def __init__(self, images: Images, labels: np.ndarray | Tensor, **options: Any) -> None:
        super().__init__(images, labels, **options)
        if not isinstance(images, Tensor):
            # torch shares only memory it may write to.
            images = torch.from_numpy(np.require(np.asarray(images), requirements=["C", "W"]))
        self._images = images.to(self._device).contiguous()

    def _source(self, parts: Sequence[Tensor], on_device: Sequence[Tensor]) -> Generator:
        for rows in on_device:
            yield self._images, rows


class TorchLoader(Loader):
    """Reads images in `workers` processes of torch's DataLoader, for as long as an epoch runs; see `Loader`."""

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
        return torch.as_tensor(np.asarray(self.images[rows]), device="cpu")


def make_loader(
    kind: str,
    images: Images,
    labels: np.ndarray | Tensor,
    *,
    device: str | torch.device = "cpu",
    workers: int = 1,
    **options: Any,
) -> Loader:
    """Returns a loader of the given kind; they differ in where the images wait, and in nothing else.

    Args:
        kind: "resident" keeps all images on the device; "ffcv" reads a packed file (`fastrd pack`) through FFCV, for
            data that do not fit; "torch" is a DataLoader with worker processes, for when FFCV cannot be installed.
            "auto": resident where the images take at most half of the device's free memory or are in the CPU's
            already, else ffcv for a packed file if FFCV is there, else torch.
        workers: threads that decode (ffcv) or processes that read (torch), at least 1; "resident" has none.
        options: of `Loader`.

    Raises:
        ValueError: an unknown kind, "ffcv" for images that are not in a packed file, what `Loader` refuses.
        ImportError: FFCV is needed and cannot be imported.
    """
    check_integer(least=1, workers=workers)
    check_option("loader", kind, ("auto", "resident", "ffcv", "torch"))
    check_images("images", images)
    device = check_device(device)
    if kind == "auto":
        kind = _choose(images, device)
    if kind == "resident":
        return ResidentLoader(images, labels, device=device, **options)
    if kind == "torch":
        return TorchLoader(images, labels, device=device, workers=workers, **options)
    if _is_packed(images):
        from .ffcv import FFCVLoader

        return FFCVLoader(images, labels, device=device, workers=workers, **options)
    place = "in a folder" if isinstance(images, PackedImages) else "in memory"
    raise ValueError(
        f"loader: got 'ffcv' for images {place}; accepted: a packed file, made by e.g. `fastrd pack cifar10 "
        "cifar10.beton` and named as data.name"
    )


def _choose(images: Images, device: torch.device) -> str:
    if device.type == "cpu" and not isinstance(images, PackedImages):
        return "resident"
    if int(np.prod(images.shape, dtype=np.int64)) <= free_memory(device) // 2:
        return "resident"
    if not _is_packed(images):
        return "torch"
    try:
        from . import ffcv  # noqa: F401
    except ImportError:
        return "torch"
    return "ffcv"


def _is_packed(images: Images) -> TypeGuard[PackedImages]:
    return isinstance(images, PackedImages) and isinstance(images.file, PackedFile)
