"""JPEG by FFCV's decoder and encoder, and FFCV's side effects kept from the caller. Importing this imports FFCV."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def threads_kept() -> Iterator[None]:
    """Restores the numbers of torch's and numba's threads, which FFCV sets at import and for every loader."""
    torch_threads, numba_threads = torch.get_num_threads(), numba.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(torch_threads)
        numba.set_num_threads(numba_threads)


try:
    import numba

    with threads_kept():
        from ffcv.fields.rgb_image import encode_jpeg
        from ffcv.libffcv import imdecode
except (ImportError, OSError) as error:
    raise ImportError(
        f"ffcv: {error}; `fastrd doctor` prints the command that installs it. The loaders 'resident' and 'torch' do "
        "without"
    ) from error


def decode_jpeg(data: np.ndarray, image: np.ndarray) -> None:
    """Decodes JPEG bytes (uint8) into `image` (H, W, 3) with FFCV's decoder. Raises ValueError where it cannot."""
    height, width, _ = image.shape
    if imdecode(data, image, height, width, height, width):
        raise ValueError(f"image: {len(data)} bytes that are no JPEG of {height}x{width}")


def jpeg(image: np.ndarray, quality: int) -> bytes:
    """Returns an image, uint8 (H, W, 3), as FFCV's writer compresses it; quality 1..100."""
    return encode_jpeg(np.ascontiguousarray(image), quality).tobytes()
