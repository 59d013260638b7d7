"""Random crop, flip and Cutout of a whole batch on its device, in uint8."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DRAWS = 5  # columns of a draw: top, left, flipped, cutout centre row, cutout centre column


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
        """The field's padding, an eighth of the image: 4 at 32x32, 12 at 96x96, 1 at 8x8."""
        return cls(padding=min(height, width) // 8, flip=flip)

    def draw(self, n: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """What happens to each of `n` images of (height, width) `size`: int64 (n, 5) on the generator's device.

        Columns: top and left of the crop in the padded image, 0..2*padding; flipped, 0 or 1; row and column of the
        Cutout centre. The columns of what is switched off are drawn all the same, so that a switch leaves the others'
        draws alone.
        """
        bounds = (2 * self.padding + 1, 2 * self.padding + 1, 2, *size)
        columns = [
            torch.randint(bound, (n,), generator=generator, device=generator.device) for bound in bounds
        ]
        return torch.stack(columns, dim=1)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """`images` uint8 (B, H, W, C) changed as `draws` (B, 5) on the same device say; same shape and dtype.

        Raises:
            ValueError: images of another dtype or rank, or draws of another shape.
        """
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise ValueError(
                f"images: got {images.dtype} {tuple(images.shape)}; accepted: uint8 (B, H, W, C)"
            )
        if draws.shape != (images.shape[0], DRAWS):
            raise ValueError(f"draws: got shape {tuple(draws.shape)}; accepted: {(images.shape[0], DRAWS)}")
        top, left, flipped, row, column = draws.unbind(1)
        if self.padding:
            images = _crop(images, top, left, self.padding)
        if self.flip:
            images = _flip(images, flipped)
        if self.cutout:
            images = _erase(images, row, column, self.cutout)
        return images

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """A fresh draw, applied; the generator is on the images' device."""
        return self.apply(images, self.draw(images.shape[0], tuple(images.shape[1:3]), generator))


def _crop(images: Tensor, top: Tensor, left: Tensor, padding: int) -> Tensor:
    batch, height, width, channels = images.shape
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    line, wanted = padded.stride(1), width * channels
    image = torch.arange(batch, device=images.device)
    first = image * padded.stride(0) + top * line + left * channels
    starts = first[:, None] + torch.arange(height, device=images.device) * line
    # A line of the crop is contiguous in the padded image, so with every run of `wanted` bytes seen as a row
    # the crop is a selection of rows: block copies, several times faster than indexing pixels.
    runs = padded.view(-1).as_strided((padded.numel() - wanted + 1, wanted), (1, 1))
    return runs.index_select(0, starts.view(-1)).view(images.shape)


def _flip(images: Tensor, flipped: Tensor) -> Tensor:
    batch = images.shape[0]
    both = torch.cat([images, images.flip(2)])
    return both.index_select(0, torch.arange(batch, device=images.device) + batch * flipped)


def _erase(images: Tensor, row: Tensor, column: Tensor, side: int) -> Tensor:
    def inside(centre: Tensor, length: int) -> Tensor:
        offset = torch.arange(length, device=images.device) - (centre - side // 2)[:, None]
        return (offset >= 0) & (offset < side)

    _, height, width, _ = images.shape
    square = inside(row, height)[:, :, None] & inside(column, width)[:, None, :]
    return images.masked_fill(square[..., None], 0)
