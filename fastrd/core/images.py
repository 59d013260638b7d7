"""What counts as images and labels, everywhere: data sets, training, attacks, evaluation.

Images are uint8 (N, H, W, C) with pixels 0..255, as data sets are stored, or floating point (N, C, H, W) with pixels in
[0, 1], as networks take them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .arguments import check_dense


def check_images(name: str, images: Any) -> None:
    """Raises ValueError unless `images` (numpy or torch) is uint8 (N, H, W, C) with at least one image."""
    if not hasattr(images, "dtype") or not hasattr(images, "shape"):
        raise ValueError(f"{name}: got {type(images).__name__}; accepted: a uint8 array (N, height, width, channels)")
    dtype, shape = str(images.dtype).removeprefix("torch."), tuple(images.shape)
    if dtype != "uint8":
        accepted = "uint8 pixels 0..255 (images in [0, 1]: multiply by 255 and round)"
        raise ValueError(f"{name}: got dtype {dtype}; accepted: {accepted}")
    if len(shape) != 4 or 0 in shape:
        raise ValueError(f"{name}: got shape {shape}; accepted: (N, height, width, channels), none of them 0")
    if _has_channels_at(shape, 1, instead_of=3):
        accepted = "(N, height, width, channels), use transpose(0, 2, 3, 1)"
        raise ValueError(f"{name}: got shape {shape}, which looks channels first; accepted: {accepted}")


def check_pixels(x: Tensor, bounds: tuple[float, float] = (0.0, 1.0), *, wait: bool = False) -> None:
    """Raises a ValueError unless x is floating point, not channels last, and within `bounds` everywhere.

    On CUDA the device itself compares, and stops the program, so that nothing waits for it; `wait` makes it a
    ValueError there too. In a compiled function only dtype and shape are checked.
    """
    low, high = bounds
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x: got {type(x).__name__}; accepted: a tensor of images in [{low:g}, {high:g}]")
    if not x.is_floating_point() or x.dtype.itemsize < 2:
        raise ValueError(f"x: got dtype {x.dtype}; accepted: floating point images in [{low:g}, {high:g}]")
    check_dense(x=x)
    if x.ndim < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}; accepted: images (N, channels, height, width)")
    if x.ndim == 4 and _has_channels_at(x.shape, 3, instead_of=1):
        accepted = "float (N, channels, height, width), use permute(0, 3, 1, 2)"
        raise ValueError(f"x: got shape {tuple(x.shape)}, which looks channels last; accepted: {accepted}")
    if torch.compiler.is_compiling() or not x.numel():
        return
    if not x.is_cuda:  # the tests of waiting take meta tensors for a GPU's
        check_held("x", x)
    least, most = x.detach().aminmax()
    inside = (least >= low) & (most <= high)
    if x.is_cuda and not wait:
        torch._assert_async(inside, f"x: pixels outside [{low:g}, {high:g}]; normalisation belongs inside the model")
    elif not inside:
        accepted = f"pixels in [{low:g}, {high:g}]. Normalisation belongs inside the model"
        raise ValueError(f"x: got values from {least.item():.4g} to {most.item():.4g}; accepted: {accepted}")


def as_images(x: Any) -> Tensor:
    """Returns images as uint8 (N, H, W, C) or float32 (N, C, H, W) in [0, 1], whichever they came as."""
    try:
        place = x.device if isinstance(x, Tensor) else "cpu"  # and not the default one, if that is another
        x = torch.as_tensor(np.ascontiguousarray(x) if isinstance(x, np.ndarray) else x, device=place).detach()
    except (RuntimeError, TypeError, ValueError):
        x = None
    if x is None or x.ndim != 4 or len(x) == 0:
        got = "no array" if x is None else f"shape {tuple(x.shape)}"
        raise ValueError(f"x: got {got}; accepted: float (N, C, H, W) in [0, 1] or uint8 (N, H, W, C), N >= 1")
    if x.is_inference():
        with torch.inference_mode(False):
            x = x.clone()  # attacks need its gradient
    check_dense(x=x)
    if x.dtype == torch.uint8:
        check_images("x", x)
        check_held("x", x)
        return x
    check_pixels(x, wait=True)
    return x.float()


def as_labels(y: Any, count: int) -> Tensor:
    """Returns the labels of `count` images as int64 (N,) on the CPU, all >= 0."""
    return torch.from_numpy(check_labels("y", y, count))


def pixels(x: Tensor, device: torch.device | str) -> Tensor:
    """Returns a batch of `as_images` as contiguous float32 (N, C, H, W) on `device`."""
    x = x.to(device)
    if x.dtype == torch.uint8:
        x = x.permute(0, 3, 1, 2).float() / 255
    return x.contiguous()


def check_labels(
    name: str, labels: Any, images: int, classes: int | None = None, unlabelled: bool = False
) -> np.ndarray:
    """Returns `labels` (numpy, torch or a list) as int64 (images,) in [0, classes), or raises ValueError.

    `classes` None: any label >= 0; `unlabelled`: -1 too, for an image without a label.
    """
    array = None
    with suppress(RuntimeError, TypeError, ValueError):
        array = np.asarray(labels.cpu() if hasattr(labels, "cpu") else labels)
    if array is None or array.dtype.kind not in "iu":
        got = type(labels).__name__ if array is None or array.dtype == object else f"dtype {array.dtype}"
        raise ValueError(f"{name}: got {got}; accepted: integer class numbers")
    labels = array
    if labels.shape != (images,):
        raise ValueError(f"{name}: got shape {labels.shape}; accepted: ({images},), one label for each image")
    least, most = int(labels.min()), int(labels.max())
    floor = -1 if unlabelled else 0
    if least < floor or most >= (2**63 if classes is None else classes):
        accepted = f"numbers >= {floor}" if classes is None else f"{floor}..{classes - 1} for {classes} classes"
        raise ValueError(f"{name}: got labels {least}..{most}; accepted: {accepted}{', as int64' * (most >= 2**63)}")
    return labels.astype(np.int64)


def grey_channel(images: np.ndarray) -> np.ndarray:
    """Returns (N, H, W) grey images, as MNIST is published, as (N, H, W, 1); any other array as it is."""
    return images[..., None] if images.ndim == 3 else images


def check_held(name: str, x: Tensor) -> None:
    """Raises ValueError for a tensor on meta, which has a shape alone."""
    if x.is_meta:
        raise ValueError(f"{name}: got a tensor on meta, which holds no pixels; accepted: one on cpu or cuda")


def _has_channels_at(shape: Sequence[int], place: int, *, instead_of: int) -> bool:
    return shape[place] in (1, 3) and shape[instead_of] not in (1, 3, 4)
