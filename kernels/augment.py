"""A training batch out of uint8 images: rows picked, cropped, flipped and scaled to [0, 1] in one pass.

    out[b, c, y, x] = images[rows[b], y + top_b - padding, x' + left_b - padding, c] / 255,   x' = x or W - 1 - x

and 0 outside the image. One byte is read and one number written per pixel and channel; a quotient is rounded once.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .cpu import native
from .runtime.aot import SHORT_NAMES, Launch, recorded
from .runtime.jit import interpreted, kernel, launches_kernels, tl

DRAWS = 3
"""Columns of a draw: top, left, flipped."""
BLOCK = 1024


@kernel
def _augment(
    images_ptr,  # (N, HEIGHT, WIDTH, CHANNELS)
    rows_ptr,  # (B,), or unused
    draws_ptr,  # (B, 3), or unused
    out_ptr,  # (B, HEIGHT, WIDTH, CHANNELS) in memory if LAST, else (B, CHANNELS, HEIGHT, WIDTH)
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    PICK: tl.constexpr,
    PADDING: tl.constexpr,
    FLIP: tl.constexpr,
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
    draw_ptr = draws_ptr + image * 3
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
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    backend: str = "auto",
) -> Tensor:
    """The batch (B, C, H, W) in [0, 1], of `dtype`, that networks train on.

    Args:
        images: uint8 (N, H, W, C).
        rows: int64 (B,), which of the images; None takes all in their order.
        draws: int64 (B, 3), what happens to each: top and left of the crop in the padded image, 0..2*padding; mirrored
            or not. None changes nothing.
        padding: zeros on every side before the crop, in pixels; 0 does not crop.
        flip: whether the third column of `draws` counts.
        channels_last: memory format of the batch.
        backend: "auto" takes the Triton kernel on CUDA, compiled C++ for float32 on a CPU, PyTorch elsewhere; "triton"
            and "torch" insist.

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
    if draws is not None and (
        draws.shape != (batch, DRAWS) or draws.dtype != torch.int64 or draws.device != images.device
    ):
        raise ValueError(
            f"draws: got {draws.dtype} {tuple(draws.shape)} on {draws.device}; accepted: int64 {(batch, DRAWS)} on "
            f"{images.device}"
        )
    if not dtype.is_floating_point:
        raise ValueError(f"dtype: got {dtype}; accepted: a floating point type")
    fused = launches_kernels(backend, dtype, images.device)
    if backend == "torch" or not (fused or _native(images, dtype)):
        return _in_torch(images, rows, draws, padding, flip, dtype, channels_last)
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
    images = images.contiguous()
    rows, draws = (None if x is None else x.contiguous() for x in (rows, draws))
    if fused:
        _launch(images, rows, draws, padding, flip, out)
    else:
        _call(images, rows, draws, padding, flip, channels_last, out)
    return out


def _native(images: Tensor, dtype: torch.dtype) -> bool:
    on_cpu = images.device.type == "cpu" and dtype == torch.float32
    return on_cpu and not interpreted() and native.library() is not None


def _call(
    images: Tensor,
    rows: Tensor | None,
    draws: Tensor | None,
    padding: int,
    flip: bool,
    channels_last: bool,
    out: Tensor,
) -> None:
    """The C++ of cpu/augment.cpp; the arguments are those of `_launch`."""
    if rows is not None and len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(images):
        raise IndexError(f"rows: got {int(rows.min())}..{int(rows.max())}; accepted: 0..{len(images) - 1}")
    sizes = len(out), *images.shape[1:], padding
    native.call("augment", images, rows, draws, out, *sizes, flip, channels_last)


def _in_torch(
    images: Tensor,
    rows: Tensor | None,
    draws: Tensor | None,
    padding: int,
    flip: bool,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    _, height, width, channels = images.shape
    if rows is not None:
        images = images.index_select(0, rows)
    if draws is not None and flip:
        images = torch.where(draws[:, 2, None, None, None] != 0, images.flip(2), images)
    if draws is not None and padding:
        padded = torch.nn.functional.pad(images, (0, 0, *4 * (padding,))).contiguous()
        left = draws[:, 1] if not flip else torch.where(draws[:, 2] != 0, 2 * padding - draws[:, 1], draws[:, 1])
        first = torch.arange(len(images), device=images.device) * padded.stride(0)
        first += draws[:, 0] * padded.stride(1) + left * channels
        starts = first[:, None] + torch.arange(height, device=images.device) * padded.stride(1)
        # A line of the crop is contiguous in the padded image, so with every run of that many bytes seen as a row the
        # crop is a selection of rows: block copies, several times faster than indexing pixels.
        wanted = width * channels
        runs = padded.view(-1).as_strided((max(0, padded.numel() - wanted + 1), wanted), (1, 1))
        images = runs.index_select(0, starts.view(-1)).view(len(images), height, width, channels)
    images = images.permute(0, 3, 1, 2)
    if not channels_last:
        images = images.contiguous()
    # A tensor on the device: CUDA multiplies by the reciprocal of a host number, which rounds differently.
    return images.to(dtype).div_(torch.full((), 255, dtype=dtype, device=images.device))


def launches(target: str) -> list[Launch]:
    """The kernel on a batch of CIFAR images and on one of STL images, of a data set that holds more."""
    found = []
    for name, batch, total, side, padding in (("CIFAR", 1024, 50_000, 32, 4), ("STL", 128, 5_000, 96, 12)):
        for dtype in (torch.float32, torch.bfloat16):
            images = torch.empty(total, side, side, 3, dtype=torch.uint8, device="meta")
            rows = torch.empty(batch, dtype=torch.int64, device="meta")
            draws = torch.empty(batch, DRAWS, dtype=torch.int64, device="meta")
            out = torch.empty(batch, 3, side, side, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
            moved = out.numel() * (1 + dtype.itemsize) + batch * 8 * (1 + DRAWS)
            work = {"augment": (moved, out.numel(), "fp32")}
            run = partial(_launch, images, rows, draws, padding, True, out)
            found += recorded(run, target, f"{batch} of {total} {name} images, {SHORT_NAMES[dtype]}", work)
    return found
