"""What counts as images and labels, for data sets and loaders alike."""

from __future__ import annotations

from typing import Any

import numpy as np


def check_images(name: str, images: Any) -> None:
    """`images` (numpy or torch) is uint8 (N, H, W, C) with at least one image, or ValueError."""
    dtype, shape = str(images.dtype).removeprefix("torch."), tuple(images.shape)
    if dtype != "uint8":
        raise ValueError(
            f"{name}: got dtype {dtype}; accepted: uint8 pixels 0..255 (images in [0, 1]: multiply by 255 and round)"
        )
    if len(shape) != 4 or 0 in shape:
        raise ValueError(f"{name}: got shape {shape}; accepted: (N, height, width, channels), none of them 0")
    if shape[1] in (1, 3) and shape[3] not in (1, 3, 4):
        raise ValueError(
            f"{name}: got shape {shape}, which looks channels first; accepted: (N, height, width, channels), "
            "use transpose(0, 2, 3, 1)"
        )


def check_labels(
    name: str, labels: Any, images: int, classes: int | None = None, unlabelled: bool = False
) -> np.ndarray:
    """`labels` as int64 (images,) in [0, classes), or ValueError.

    `classes` None: any label >= 0; `unlabelled`: -1 too, for an image without a label.
    """
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{name}: got dtype {labels.dtype}; accepted: integer class numbers")
    if labels.shape != (images,):
        raise ValueError(f"{name}: got shape {labels.shape}; accepted: ({images},), one label for each image")
    least, most = int(labels.min()), int(labels.max())
    floor = -1 if unlabelled else 0
    if least < floor or (classes is not None and most >= classes):
        accepted = (
            f"numbers >= {floor}" if classes is None else f"{floor}..{classes - 1} for {classes} classes"
        )
        raise ValueError(f"{name}: got labels {least}..{most}; accepted: {accepted}")
    return labels.astype(np.int64)


def grey_channel(images: np.ndarray) -> np.ndarray:
    """(N, H, W) grey images, as MNIST is published, as (N, H, W, 1); any other array as it is."""
    return images[..., None] if images.ndim == 3 else images
