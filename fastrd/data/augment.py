"""Random crop, flip and Cutout of a whole batch on its device, in uint8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.augment import transform


@dataclass(frozen=True)
class Augment:
    """Each image on its own: zero-pad and crop back at a random place, flip left-right, erase a square.

    The first two equal `torchvision.transforms.RandomCrop(size, padding)` then `RandomHorizontalFlip()` in
    distribution; the third is Cutout (DeVries & Taylor 2017). Drawing and applying are separate, so that a loader can
    fix an image's draw without fixing the batch it comes in.

    Args:
        padding: pixels of zero padding on every side; 0 does not crop.
        flip: mirror half of the images.
        cutout: side in pixels of the square set to zero, cut off at the borders; 0 erases nothing.

    Raises:
        ValueError: negative padding or cutout.
    """

    padding: int = 4
    flip: bool = True
    cutout: int = 0

    def __post_init__(self) -> None:
        for name, value in (("padding", self.padding), ("cutout", self.cutout)):
            if value < 0:
                raise ValueError(f"{name}: got {value}; accepted: a number of pixels >= 0")

    @classmethod
    def for_size(cls, height: int, width: int, *, flip: bool = True) -> Augment:
        """Returns the field's padding, an eighth of the image: 4 at 32x32, 12 at 96x96, 1 at 8x8."""
        return cls(padding=min(height, width) // 8, flip=flip)

    def draw(self, n: int, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Returns what happens to each of `n` images of (height, width) `size`: int64 (n, 5) on the generator's device.

        Columns: top and left of the crop in the padded image, 0..2*padding; flipped, 0 or 1; row and column of the
        Cutout centre. The columns of what is switched off are drawn all the same, so that a switch leaves the others'
        draws alone.
        """
        bounds = (2 * self.padding + 1, 2 * self.padding + 1, 2, *size)
        columns = [torch.randint(bound, (n,), generator=generator, device=generator.device) for bound in bounds]
        return torch.stack(columns, dim=1)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Returns `images` uint8 (B, H, W, C) changed as `draws` (B, 5) on the same device say; same shape and dtype.

        Raises:
            ValueError: images of another dtype or rank, or draws of another shape.
        """
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise ValueError(f"images: got {images.dtype} {tuple(images.shape)}; accepted: uint8 (B, H, W, C)")
        return transform(images, None, draws, **self.switches)

    @property
    def switches(self) -> dict[str, Any]:
        """The arguments of the kernel that does all of it in one pass, see `fastrd.kernels.augment`."""
        return {"padding": self.padding, "flip": self.flip, "cutout": self.cutout}

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """A fresh draw, applied; the generator is on the images' device."""
        return self.apply(images, self.draw(images.shape[0], tuple(images.shape[1:3]), generator))
