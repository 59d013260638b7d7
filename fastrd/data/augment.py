"""Random crop and flip: what is drawn for each image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.arguments import check_flags
from ..core.values import check_integer, shown


@dataclass(frozen=True)
class Augment:
    """Zero-pads each image and crops it back at a random place, then mirrors half of them.

    Equals `torchvision.transforms.RandomCrop(size, padding)` then `RandomHorizontalFlip()` in distribution. A loader
    draws for all images of an epoch at once, so that an image's draw does not depend on the batch it comes in;
    `fastrd.kernels.augment` applies the draws.

    Args:
        padding: pixels of zero padding on every side; 0 does not crop.
        flip: mirror half of the images.

    Raises ValueError: negative padding.
    """

    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        check_integer(least=0, padding=self.padding)
        check_flags(flip=self.flip)

    @classmethod
    def for_size(cls, height: int, width: int, *, flip: bool = True) -> Augment:
        """Returns the field's padding, an eighth of the image: 4 at 32x32, 12 at 96x96, 1 at 8x8."""
        check_integer(least=1, height=height, width=width)
        return cls(padding=min(height, width) // 8, flip=flip)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Returns what happens to each of `n` images: int64 (n, 3) on the generator's device.

        Columns: top and left of the crop in the padded image, 0..2*padding; flipped, 0 or 1. The columns of what is
        switched off are drawn all the same, so that a switch leaves the others' draws alone.
        """
        check_integer(least=0, n=n)
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: got {shown(generator)}; accepted: a torch.Generator")
        bounds = (2 * self.padding + 1, 2 * self.padding + 1, 2)
        columns = [torch.randint(bound, (n,), generator=generator, device=generator.device) for bound in bounds]
        return torch.stack(columns, dim=1)

    @property
    def switches(self) -> dict[str, Any]:
        """The arguments of `fastrd.kernels.augment.augment`."""
        return {"padding": self.padding, "flip": self.flip}
