"""A training batch out of uint8 images: rows picked, cropped, flipped, erased and scaled to [0, 1] in one pass.

    out[b, c, y, x] = images[rows[b], y + top_b - padding, x' + left_b - padding, c] / 255,   x' = x or W - 1 - x

and 0 outside the image or inside the Cutout square (DeVries & Taylor 2017) around (row_b, column_b). One byte is read
and one number written per pixel and channel; a quotient is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .runtime.aot import Launch, recorded
from .runtime.jit import AVAILABLE, interpreted, kernel, tl

DRAWS = 5
"""Columns of a draw: top, left, flipped, row and column of the Cutout centre."""
BLOCK = 1024


@kernel
def _augment(
    images_ptr,  # (N, HEIGHT, WIDTH, CHANNELS)
    rows_ptr,  # (B,), or unused
    draws_ptr,  # (B, 5), or unused
    out_ptr,  # (B, HEIGHT, WIDTH, CHANNELS) in memory if LAST, else (B, CHANNELS, HEIGHT, WIDTH)
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    PICK: tl.constexpr,
    PADDING: tl.constexpr,
    FLIP: tl.constexpr,
    CUTOUT: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    SIZE: tl.constexpr = HEIGHT * WIDTH * CHANNELS
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    image = (tl.program_id(0) // BLOCKS).to(tl.int64)
    place = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    valid = place < SIZE
    if LAST:
        line, column, channel = place // (WIDTH * CHANNELS), place // CHANNELS % WIDTH, place % CHANNELS
    else:
        line, column, channel = place // WIDTH % HEIGHT, place % WIDTH, place // (HEIGHT * WIDTH)
    inside = valid
    draw_ptr = draws_ptr + image * 5
    if CUTOUT > 0:
        below = line - (tl.load(draw_ptr + 3).to(tl.int32) - CUTOUT // 2)
        right = column - (tl.load(draw_ptr + 4).to(tl.int32) - CUTOUT // 2)
        inside &= ~((below >= 0) & (below < CUTOUT) & (right >= 0) & (right < CUTOUT))
    if FLIP:
        column = tl.where(tl.load(draw_ptr + 2) != 0, WIDTH - 1 - column, column)
    if PADDING > 0:
        line += tl.load(draw_ptr).to(tl.int32) - PADDING
        column += tl.load(draw_ptr + 1).to(tl.int32) - PADDING
        inside &= (line >= 0) & (line < HEIGHT) & (column >= 0) & (column < WIDTH)
    row = tl.load(rows_ptr + image) if PICK else image
    pixel = tl.load(images_ptr + row * SIZE + (line * WIDTH + column) * CHANNELS + channel, mask=inside, other=0)
    tl.store(out_ptr + image * SIZE + place, tl.div_rn(pixel.to(tl.float32), 255.0), mask=valid)


def _launch(
    images: Tensor,
    rows: Tensor | None,
    draws: Tensor | None,
    padding: int,
    flip: bool,
    cutout: int,
    out: Tensor,
) -> None:
    """`images`, `rows` and `draws` contiguous; `out` (B, C, H, W) dense in one of the two memory formats."""
    batch, channels, height, width = out.shape
    blocks = -(-height * width * channels // BLOCK)
    if not batch:
        return
    _augment[(batch * blocks,)](
        images,
        images if rows is None else rows,
        images if draws is None else draws,
        out,
        HEIGHT=height,
        WIDTH=width,
        CHANNELS=channels,
        PICK=rows is not None,
        PADDING=padding if draws is not None else 0,
        FLIP=flip and draws is not None,
        CUTOUT=cutout if draws is not None else 0,
        LAST=out.is_contiguous(memory_format=torch.channels_last),
        BLOCK=BLOCK,
        num_warps=4,
    )


def augment(
    images: Tensor,
    rows: Tensor | None = None,
    draws: Tensor | None = None,
    *,
    padding: int = 0,
    flip: bool = False,
    cutout: int = 0,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    backend: str = "auto",
) -> Tensor:
    """The batch (B, C, H, W) in [0, 1], of `dtype`, that networks train on.

    Args:
        images: uint8 (N, H, W, C).
        rows: int64 (B,), which of the images; None takes all in their order.
        draws: int64 (B, 5), what happens to each: top and left of the crop in the padded image, 0..2*padding; mirrored
            or not; row and column of the Cutout centre. None changes nothing.
        padding: zeros on every side before the crop, in pixels; 0 does not crop.
        flip: whether the third column of `draws` counts.
        cutout: side of the erased square in pixels, cut off at the borders; 0 erases nothing.
        channels_last: memory format of the batch.
        backend: "auto" takes the Triton kernel on CUDA and PyTorch elsewhere, "triton" and "torch" insist.

    Raises:
        ValueError: images, rows or draws of another dtype, shape or device, or a backend that cannot run here.
    """
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise ValueError(f"images: got {images.dtype} {tuple(images.shape)}; accepted: uint8 (N, H, W, C)")
    if rows is not None and (rows.dtype != torch.int64 or rows.dim() != 1 or rows.device != images.device):
        raise ValueError(
            f"rows: got {rows.dtype} {tuple(rows.shape)} on {rows.device}; accepted: int64 (B,) on {images.device}"
        )
    batch = len(images if rows is None else rows)
    _check_draws(draws, batch, images)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype: got {dtype}; accepted: a floating point type")
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend: got {backend!r}; accepted: 'auto', 'torch', 'triton'")
    fused = AVAILABLE and dtype != torch.float64 and (images.is_cuda or (backend == "triton" and interpreted()))
    if backend == "triton" and not fused:
        raise ValueError(f"backend: got 'triton' with {dtype} on {images.device}; accepted: 'auto' or 'torch' here")
    if backend == "torch" or not fused:
        if draws is not None:
            images = transform(images, rows, draws, padding=padding, flip=flip, cutout=cutout)
        elif rows is not None:
            images = images.index_select(0, rows)
        return _scaled(images, dtype, channels_last)
    _, height, width, channels = images.shape
    out = torch.empty(
        batch,
        channels,
        height,
        width,
        dtype=dtype,
        device=images.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    rows, draws = (None if x is None else x.contiguous() for x in (rows, draws))
    _launch(images.contiguous(), rows, draws, padding, flip, cutout, out)
    return out


def transform(images: Tensor, rows: Tensor | None, draws: Tensor, *, padding: int, flip: bool, cutout: int) -> Tensor:
    """Crop, flip and Cutout alone, in PyTorch, to uint8 (B, H, W, C); the arguments are those of `augment`."""
    _check_draws(draws, len(images if rows is None else rows), images)
    if padding or flip:
        images = _crop_and_flip(images, rows, draws, padding, flip)
    elif rows is not None:
        images = images.index_select(0, rows)
    return _erase(images, draws[:, 3], draws[:, 4], cutout) if cutout else images


def _check_draws(draws: Tensor | None, batch: int, images: Tensor) -> None:
    if draws is not None and (
        draws.shape != (batch, DRAWS) or draws.dtype != torch.int64 or draws.device != images.device
    ):
        raise ValueError(
            f"draws: got {draws.dtype} {tuple(draws.shape)} on {draws.device}; accepted: int64 {(batch, DRAWS)} on "
            f"{images.device}"
        )


class Crops:
    """Images on a CPU kept padded, and once more mirrored, so that a random crop is a copy of lines and nothing else.

    `crops(rows, draws, ...)` is `augment(images, rows, draws, padding=, flip=, cutout=, ...)`, twice as fast, for up
    to 2 (1 + 2 padding / side)^2 times the memory of the images.
    """

    def __init__(self, images: Tensor, *, padding: int, flip: bool, cutout: int) -> None:
        self._padding, self._flip, self._cutout = padding, flip, cutout
        n, height, width, channels = self._shape = images.shape
        self._padded = images.new_zeros(n, 1 + flip, height + 2 * padding, width + 2 * padding, channels)
        inside = self._padded[:, :, padding : padding + height, padding : padding + width]
        inside[:, 0] = images
        if flip:
            inside[:, 1] = images.flip(2)

    @staticmethod
    def size(shape: tuple[int, ...], *, padding: int, flip: bool, cutout: int) -> int:
        """Bytes it takes for uint8 images (N, H, W, C)."""
        n, height, width, channels = shape
        return n * (1 + flip) * (height + 2 * padding) * (width + 2 * padding) * channels

    def __call__(self, rows: Tensor, draws: Tensor, *, dtype: torch.dtype, channels_last: bool) -> Tensor:
        top, left, flipped = _places(draws, self._padding, self._flip)
        whole, mirrored, *_ = self._padded.stride()
        images = _lines(self._padded, rows * whole + flipped * mirrored, top, left, self._shape[1:])
        if self._cutout:
            images = _erase(images, draws[:, 3], draws[:, 4], self._cutout)
        return _scaled(images, dtype, channels_last)


def _crop_and_flip(images: Tensor, rows: Tensor | None, draws: Tensor, padding: int, flip: bool) -> Tensor:
    _, height, width, channels = images.shape
    batch = len(draws)
    top, left, flipped = _places(draws, padding, flip)
    place = torch.arange(batch, device=images.device)
    mirrored = 0
    if flip:
        # Those to be mirrored come first, in one piece.
        order = flipped.argsort(descending=True)
        rows = order if rows is None else rows.index_select(0, order)
        place = torch.empty_like(place).index_copy_(0, order, place)
        mirrored = int(flipped.sum())
    if rows is not None:
        images = images.index_select(0, rows)
    padded = images.new_zeros(batch, height + 2 * padding, width + 2 * padding, channels)
    inside = padded[:, padding : padding + height, padding : padding + width]
    inside[:mirrored] = images[:mirrored].flip(2)
    inside[mirrored:] = images[mirrored:]
    return _lines(padded, place * padded.stride(0), top, left, (height, width, channels))


def _places(draws: Tensor, padding: int, flip: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Top and left of each crop in the padded image, and whether that is mirrored: mirrored before the crop, whose
    place mirrors with it."""
    top, left, flipped, *_ = draws.unbind(1)
    if not padding:
        top = left = torch.zeros_like(top)
    flipped = flipped != 0 if flip else torch.zeros_like(flipped, dtype=torch.bool)
    return top, torch.where(flipped, 2 * padding - left, left), flipped


def _lines(padded: Tensor, first: Tensor, top: Tensor, left: Tensor, shape: Sequence[int]) -> Tensor:
    """Crops of `shape` (H, W, C) out of contiguous padded images that begin at the elements `first`: (B, H, W, C)."""
    height, width, channels = shape
    line, wanted = padded.stride(-3), width * channels
    first = first + top * line + left * channels
    starts = first[:, None] + torch.arange(height, device=padded.device) * line
    # A line of the crop is contiguous in the padded image, so with every run of `wanted` bytes seen as a row
    # the crop is a selection of rows: block copies, several times faster than indexing pixels.
    runs = padded.view(-1).as_strided((max(0, padded.numel() - wanted + 1), wanted), (1, 1))
    return runs.index_select(0, starts.view(-1)).view(len(first), *shape)


def _erase(images: Tensor, row: Tensor, column: Tensor, side: int) -> Tensor:
    """Cutout: squares of `side` pixels around (row, column), int64 (B,) each, set to zero in images (B, H, W, C)."""

    def inside(centre: Tensor, length: int) -> Tensor:
        offset = torch.arange(length, device=images.device) - (centre - side // 2)[:, None]
        return (offset >= 0) & (offset < side)

    _, height, width, _ = images.shape
    square = inside(row, height)[:, :, None] & inside(column, width)[:, None, :]
    return images.masked_fill(square[..., None], 0)


def _scaled(images: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """uint8 (B, H, W, C) / 255, rounded once, as (B, C, H, W)."""
    images = images.permute(0, 3, 1, 2)
    if not channels_last:
        images = images.contiguous()
    # A tensor on the device: CUDA multiplies by the reciprocal of a host number, which rounds differently.
    return images.to(dtype).div_(torch.full((), 255, dtype=dtype, device=images.device))


def launches(target: str) -> list[Launch]:
    """The kernel on a batch of CIFAR images and on one of STL images, of a data set that holds more."""
    found = []
    for name, batch, total, side, padding in (("CIFAR", 1024, 50_000, 32, 4), ("STL", 128, 5_000, 96, 12)):
        for dtype, kind in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            images = torch.empty(total, side, side, 3, dtype=torch.uint8, device="meta")
            rows = torch.empty(batch, dtype=torch.int64, device="meta")
            draws = torch.empty(batch, DRAWS, dtype=torch.int64, device="meta")
            out = torch.empty(batch, 3, side, side, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
            moved = out.numel() * (1 + dtype.itemsize) + batch * 8 * (1 + DRAWS)
            work = {"augment": (moved, out.numel(), "fp32")}

            def run(
                arguments: tuple = (images, rows, draws, padding, True, 0, out),
            ) -> None:
                _launch(*arguments)

            found += recorded(run, target, f"{batch} of {total} {name} images, {kind}", work)
    return found
