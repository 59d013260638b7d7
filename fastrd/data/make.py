"""The choice of a loader."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .beton import PackedFile, PackedImages
from .loader import Images, Loader, free_memory


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
    if workers < 1:
        raise ValueError(f"workers: got {workers}; accepted: an integer >= 1")
    device = torch.device(device)
    if kind == "auto":
        kind = _choose(images, device)
    if kind == "resident":
        from .resident import ResidentLoader

        return ResidentLoader(images, labels, device=device, **options)
    if kind == "torch":
        from .torch_loader import TorchLoader

        return TorchLoader(images, labels, device=device, workers=workers, **options)
    if kind != "ffcv":
        raise ValueError(f"loader: got {kind!r}; accepted: 'auto', 'resident', 'ffcv', 'torch'")
    if isinstance(images, PackedImages) and isinstance(images.file, PackedFile):
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


def _is_packed(images: Images) -> bool:
    return isinstance(images, PackedImages) and isinstance(images.file, PackedFile)
