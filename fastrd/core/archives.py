"""Reads .npz and torch files that others made: nothing in them is executed, and what they claim costs no memory.

Every problem of a file, whatever a parser raises for it, is one ValueError that names the file and, where there is one,
the entry.
"""

from __future__ import annotations

import io
import math
import os
import re
import reprlib
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .files import check_regular
from .values import one_line

# Images seldom shrink tenfold; zeros shrink a thousandfold. Small members may shrink as they like.
MAX_COMPRESSION_RATIO = 100
MAX_UNCHECKED_BYTES = 64 << 20
MAX_ENTRIES = 100_000  # of all containers of a file, each counted as often as it is reached
MAX_DEPTH = 64

_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"
_NUMBERS = "?bhilqBHILQefdFD"


def check_npz(path: str | os.PathLike) -> None:
    """Raises ValueError where an .npz member claims more than it holds, or unpacks to implausibly more than it takes.

    Only directory and headers are read: time and memory do not depend on what the file claims.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.file_size > max(MAX_UNCHECKED_BYTES, MAX_COMPRESSION_RATIO * member.compress_size):
                    raise ValueError(
                        f"{member.filename}: unpacks from {member.compress_size} to {member.file_size} bytes; "
                        f"accepted: at most {MAX_COMPRESSION_RATIO} times as many, save the arrays uncompressed"
                    )
                with archive.open(member) as file:
                    _check_header(member, file)
    except Exception as error:
        raise _reason("not a readable .npz file", error) from None


def read_npz(
    path: str | os.PathLike, required: Collection[str], optional: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """Returns the arrays of these names that an .npz file holds, none of Python objects.

    Raises ValueError, naming the file, where a required one is missing, the file is not what numpy.savez writes, or
    claims more than it holds.
    """
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("not an .npz file")
        check_npz(path)
        with np.load(path, allow_pickle=False) as file:
            if missing := [name for name in required if name not in file]:
                raise ValueError(f"{', '.join(missing)}: missing; it holds {', '.join(file) or 'nothing'}")
            return {name: file[name] for name in (*required, *optional) if name in file}
    except Exception as error:
        wanted = f"accepted: {', '.join(required)} as plain arrays, as numpy.savez writes them"
        raise ValueError(f"{_reason(str(path), error)}; {wanted}") from None


def check_torch(path: str | os.PathLike, blob: bytes | None = None) -> None:
    """Raises ValueError where a file is neither a zip of torch.save, which is never compressed, nor an older pickle.

    blob: its bytes, where they have been read already.
    """
    with open(path, "rb") if blob is None else io.BytesIO(blob) as file:
        start = file.read(16)
        if not start.startswith(_ZIP):
            if start.startswith(_PICKLE):
                return  # the older format: torch says what is wrong with it
            raise ValueError(f"{path}: not a checkpoint, it begins with {start!r}; accepted: what torch.save writes")
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
        except Exception as error:
            raise _reason(f"{path}: a damaged zip archive", error) from None
        size = file.seek(0, os.SEEK_END)
    if any(Path(m.filename).name == "constants.pkl" for m in members):
        remedy = "torch.save(torch.jit.load(PATH).state_dict(), PATH)"
        raise ValueError(f"{path}: a TorchScript archive; accepted: a state dict, as {remedy}")
    packed = [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]
    claimed = sum(m.file_size for m in members)
    if packed or claimed > size:
        got = f"{packed[0] if packed else 'its members'} would unpack to more than the file holds"
        raise ValueError(f"{path}: {got} ({claimed} bytes from {size}); accepted: what torch.save writes")


def load_torch(path: str | os.PathLike, blob: bytes | None = None) -> Any:
    """Returns what torch.save wrote to a file, on the CPU: tensors, numbers, strings, and containers of them.

    blob: the bytes of the file, where they have been read already.

    Raises OSError: it cannot be opened. ValueError: it is damaged, of another format, holds Python objects or claims
    more than it holds.
    """
    import torch  # reports are written without it

    if blob is None:
        check_regular(path)
        check_torch(path)  # before it is read: a large file of something else may not fit into memory
        blob = Path(path).read_bytes()
    check_torch(path, blob)
    if b"bytearray" in blob:  # torch would make one of any size
        raise ValueError(f"{path}: holds a bytearray; accepted: tensors, numbers and strings")
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            payload = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
    except Exception as error:
        name = re.search(r"(?:GLOBAL|[Ff]unction|[Cc]lass)\s+<?([\w.]+\.\w+)", str(error))
        what = f"it holds a Python object, {name[1]}" if name else "it is damaged, or no checkpoint"
        text = (
            f"{path}: refused by torch's weights-only loader: {what}. Python objects are never loaded: where you trust "
            "the file, load it with torch.load(PATH, weights_only=False) and save its state dict alone with torch.save"
        )
        raise (ValueError(text) if name else _reason(text, error)) from None
    check_tensors(str(path), payload, len(blob))
    return payload


def check_tensors(where: str, payload: Any, size: int | None = None) -> None:
    """Raises ValueError where a container, or one in it, would take more memory than the file it came from holds.

    Tensors may not have more elements than their storage, nor a storage beyond `size` bytes, and all containers
    together not more than MAX_ENTRIES entries, however often one of them is referred to. Sparse and quantised tensors
    pass: nothing may use them.
    """
    import torch

    spare, entries = MAX_UNCHECKED_BYTES, 0
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), payload)]
    while waiting:
        place, value = waiting.pop()
        entries += _weight(value)
        if isinstance(value, Mapping):
            items = list(value.items())
            entries += sum(_weight(key) for key, _ in items)
        elif isinstance(value, (list, tuple, set, frozenset)):
            items = list(enumerate(value))
        else:
            items = []
        if entries + len(items) > MAX_ENTRIES or len(place) > MAX_DEPTH:
            got = f"more than {MAX_ENTRIES} entries, or nested deeper than {MAX_DEPTH}"
            raise ValueError(f"{where}: {_name(place)}{got}; accepted: less")
        waiting += [((*place, key), item) for key, item in items]
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or value.is_quantized:
            continue
        needed, held = value.numel() * value.element_size(), value.untyped_storage().nbytes()
        spare -= max(0, needed - held)  # a mean that was expanded over an image is small and legitimate
        if spare < 0 or value.is_meta or (size is not None and held > size):
            got = f"claims {tuple(value.shape)}, {needed} bytes, and holds {held}"
            raise ValueError(f"{where}: {_name(place)}{got}; accepted: plain tensors")


def _numpy_globals() -> list[Any]:
    """What numpy's numbers and arrays are pickled with, which training code leaves beside a state dict."""
    found: list[Any] = [np.dtype, np.ndarray, *{type(np.dtype(code)) for code in _NUMBERS}]
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
        found += [(_numpy_scalar, f"{module}.scalar"), (_numpy_array, f"{module}._reconstruct")]
    return found


def _numpy_scalar(dtype: np.dtype, data: bytes) -> Any:
    if dtype.char not in _NUMBERS or len(data) != dtype.itemsize:
        raise ValueError(f"a numpy scalar of {dtype} from {len(data)} bytes")
    return np.frombuffer(data, dtype)[0].item()


def _numpy_array(cls: type, shape: Any, code: Any) -> np.ndarray:
    return np.empty(0, np.uint8)  # its state, which follows, brings shape and contents


def _weight(value: Any) -> int:
    """Entries that a value counts for: long texts and numbers count as many."""
    if isinstance(value, (str, bytes)):
        return 1 + len(value) // 64
    return 1 + value.bit_length() // 64 if isinstance(value, int) else 1


def _name(place: tuple[Any, ...]) -> str:
    """Where an entry is, as "model.state.conv1.weight "; a hostile key may be long, or no text at all."""
    short = (key[:80] if isinstance(key, str) else reprlib.repr(key)[:80] for key in place)
    return ".".join(short) + " " if place else ""


def _reason(what: str, error: Exception) -> ValueError:
    """`what` with the error's own words, on one line without control characters."""
    return ValueError(f"{what}: {one_line(error)[:300]}")


def _check_header(member: zipfile.ZipInfo, file: Any) -> None:
    try:
        version = np.lib.format.read_magic(file)
        read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[version[0]]
        shape, _, dtype = read(file)
        if not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"shape {shape}")
    except Exception as error:
        raise _reason(f"{member.filename}: not an array; accepted: what numpy.savez writes", error) from None
    claimed = math.prod(shape) * dtype.itemsize + file.tell()
    if not dtype.hasobject and claimed != member.file_size:
        got = f"claims {shape} of {dtype}, {claimed} bytes with its header, and holds {member.file_size}"
        raise ValueError(f"{member.filename}: {got}")
