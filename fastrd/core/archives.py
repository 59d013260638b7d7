"""Zip archives of arrays from strangers: refused before they are read where they would unpack to more than they hold."""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

# Images seldom shrink tenfold; zeros shrink a thousandfold. Small members may shrink as they like.
LARGEST_RATIO = 100
HARMLESS = 64 << 20  # bytes


def check_npz(path: str | os.PathLike) -> None:
    """Raise ValueError where an .npz member claims more than it holds, or unpacks to implausibly more than it takes.

    Only directory and headers are read: time and memory do not depend on what the file claims.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.file_size > HARMLESS and member.file_size > LARGEST_RATIO * member.compress_size:
                    raise ValueError(
                        f"{member.filename}: unpacks from {member.compress_size} to {member.file_size} bytes; accepted: at "
                        f"most {LARGEST_RATIO} times as many, save the arrays uncompressed"
                    )
                with archive.open(member) as file:
                    _check_header(member, file)
    except (zipfile.BadZipFile, zlib.error, OSError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"not a readable .npz file: {error}") from None


def check_torch(path: str | os.PathLike) -> None:
    """Raise ValueError where a zip of torch.save holds compressed members, which it never writes. Other files pass."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile:
        return  # torn, or of the older format: torch says what is wrong with it
    size = Path(path).stat().st_size
    packed = [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]
    claimed = sum(m.file_size for m in members)
    if packed or claimed > size:
        raise ValueError(
            f"{path}: {packed[0] if packed else 'its members'} would unpack to more than the file holds ({claimed} bytes "
            f"from {size}); accepted: what torch.save writes"
        )


def check_tensors(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a tensor has more elements than its storage: written out it would take their memory."""
    import torch  # data sets are read without it

    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_quantized:
            continue  # others are refused for what they are
        needed, held = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
        if needed > held:
            raise ValueError(
                f"{where}: {name} claims {tuple(tensor.shape)}, {needed} bytes, and holds {held}; accepted: plain tensors"
            )


def _check_header(member: zipfile.ZipInfo, file: Any) -> None:
    try:
        version = np.lib.format.read_magic(file)
        read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[version[0]]
        shape, _, dtype = read(file)
    except (ValueError, KeyError, EOFError) as error:
        raise ValueError(
            f"{member.filename}: not an array ({error}); accepted: what numpy.savez writes"
        ) from None
    claimed = math.prod(shape) * dtype.itemsize + file.tell()
    if not dtype.hasobject and claimed != member.file_size:
        raise ValueError(
            f"{member.filename}: claims {shape} of {dtype}, {claimed} bytes with its header, and holds {member.file_size}"
        )
