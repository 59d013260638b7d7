"""Packed data sets: files of FFCV's format (.beton) as `fastrd pack` writes them, checked before anything trusts them.

Files of raw pixels are read here without FFCV; JPEGs need its decoder, so that every reader sees the same pixels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..core.files import read_json
from ..core.values import check_option, shown

SPLITS = ("train", "test", "unlabelled")
ENCODINGS = ("jpeg", "raw")  # in the order of FFCV's codes
FORMAT = 1

# Version 2 of FFCV's layout: a header, a description of each field, one record for each sample, the pages that hold
# the pixels, and a table of what was allocated in them.
_VERSION, _IMAGE_FIELD, _INTEGER_FIELD = 2, 2, 1
_HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
_FIELD = np.dtype([("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True)
_IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
_SAMPLE = np.dtype([("image", _IMAGE), ("label", "<i8"), ("index", "<i8"), ("split", "<i8")], align=True)
_ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])


class PackedFile:
    """A packed data set. Opening it reads and hashes the whole file once.

    Args:
        path: the .beton file.
        sidecar: what describes it; default `path` + ".json".
        progress: called with the number of bytes hashed since the last call.

    Attributes:
        name, class_names, augmentation: of the data set; the augmentation as the arguments of `Augment`.
        encoding: "raw" or "jpeg".
        image_shape: (height, width, 3).
        splits: the number of images of each of SPLITS.

    Raises:
        FileNotFoundError: no such file, or no sidecar.
        ValueError: the file is not what its sidecar says, or not what `fastrd pack` writes; says in what.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        sidecar: Path | None = None,
        progress: Callable[[int], object] = lambda size: None,
    ) -> None:
        self.path = Path(path)
        described = sidecar or sidecar_of(self.path)
        try:
            self._open(read_sidecar(described), progress)
        except ValueError as error:
            accepted = f"a file as `fastrd pack` left it, with its {described.name}"
            raise ValueError(f"{self.path}: {error}; accepted: {accepted}") from None

    def images(self, split: str) -> PackedImages:
        """Returns the images of one of SPLITS, in the order of the data set."""
        return PackedImages(self, self._records(split))

    def labels(self, split: str) -> np.ndarray:
        """Returns int64 (N,); -1 for unlabelled images."""
        return self._samples["label"][self._records(split)].astype(np.int64)

    def check_unchanged(self) -> None:
        """Raises ValueError if the file was replaced, cut or written to since it was opened.

        A file that is cut between this check and a read ends the process: the system answers reads beyond the end of a
        mapped file with SIGBUS. `fastrd pack` replaces files as a whole, which is safe at any time.
        """
        if _identity(self.path) != self._opened:
            raise ValueError(f"{self.path}: changed since it was opened; open it again, or resume the run")

    def read(self, records: np.ndarray) -> np.ndarray:
        """Returns records (B,) of the file as uint8 (B, H, W, 3), in fresh memory."""
        if self.encoding == "raw":
            size = int(np.prod(self.image_shape))
            pixels = self._pixels
            runs = np.lib.stride_tricks.as_strided(pixels, (len(pixels) - size + 1, size), (1, 1), writeable=False)
            return runs[self._places[records]].reshape(-1, *self.image_shape)
        from .jpeg import decode_jpeg

        out = np.empty((len(records), *self.image_shape), np.uint8)
        for image, record in zip(out, records, strict=True):
            start = self._places[record]
            decode_jpeg(self._pixels[start : start + self._sizes[record]], image)
        return out

    def _open(self, described: dict[str, Any], progress: Callable[[int], object]) -> None:
        self._opened = _identity(self.path)
        size = self.path.stat().st_size
        if described["bytes"] == size or described.get("before", {}).get("bytes") == size:
            found = file_hash(self.path, progress)
            if found != described["sha256"] and found == described.get("before", {}).get("sha256"):
                described = described["before"]  # packed anew, and killed before the new file was there
            if found != described["sha256"]:
                raise ValueError("the contents have another hash than those that were written")
        if size != described["bytes"]:
            raise ValueError(f"got {size} bytes, where {described['bytes']} were written")
        self.name: str = described["name"]
        self.class_names = tuple(described["class_names"])
        self.augmentation: dict[str, Any] = described["augmentation"]
        self.encoding: str = described["encoding"]
        self.image_shape = tuple(described["image_shape"])
        self.splits: dict[str, int] = described["splits"]

        # The hash tells accidents from what was written, not a hostile file: nothing below trusts a number in it.
        with open(self.path, "rb") as file:
            (header,) = _array(file, _HEADER, 1)
            fields = _array(file, _FIELD, 4)
            types = (_IMAGE_FIELD, *3 * [_INTEGER_FIELD])
            names = [field["name"].tobytes().rstrip(b"\0").decode("ascii", "replace") for field in fields]
            if (header["version"], header["num_fields"]) != (_VERSION, 4) or names != list(_SAMPLE.names or ()):
                raise ValueError(f"got version {header['version']} with the fields {names}")
            if tuple(fields["type_id"]) != types or header["num_samples"] != sum(self.splits.values()):
                raise ValueError(f"got fields of types {fields['type_id']}, {header['num_samples']} samples")
            page = int(header["page_size"])
            if page < 1 << 12 or page & (page - 1):
                raise ValueError(f"got pages of {page} bytes")
            count = int(header["num_samples"])
            self._samples = _array(file, _SAMPLE, count)
            table = int(header["alloc_table_ptr"])
            if not file.tell() <= table == size - count * _ALLOCATION.itemsize:
                raise ValueError(f"got a table at byte {table} of {size}")
            data = file.tell()
            file.seek(table)
            allocated = _array(file, _ALLOCATION, count)
        self._check_samples(allocated, data, table)

    def _check_samples(self, allocated: np.ndarray, data: int, table: int) -> None:
        image, count = self._samples["image"], len(self._samples)
        height, width, channels = self.image_shape
        split = np.repeat(np.arange(len(SPLITS)), [self.splits[name] for name in SPLITS])
        index = np.concatenate([np.arange(self.splits[name]) for name in SPLITS])
        label = self._samples["label"]
        classes = np.where(split == SPLITS.index("unlabelled"), 0, len(self.class_names))
        size = allocated["size"].astype(np.int64)
        place = allocated["ptr"].astype(np.int64)
        exact = height * width * channels
        for wrong, what in (
            (image["mode"] != ENCODINGS.index(self.encoding), f"an image that is not {self.encoding}"),
            ((image["height"] != height) | (image["width"] != width), f"an image that is not {height}x{width}"),
            ((self._samples["split"] != split) | (self._samples["index"] != index), "samples out of order"),
            ((label >= classes) | (label < np.where(classes == 0, -1, 0)), "labels out of range"),
            ((classes == 0) & (label != -1), "a label of an unlabelled image"),
            (allocated["sample_id"] != np.arange(count), "an image allocated twice or never"),
            (place != image["data_ptr"].astype(np.int64), "pixels somewhere else than allocated"),
            ((place < data) | (size < 1) | (place > table - size), "pixels outside of the file"),
            (np.diff(place, prepend=data - 1) <= 0, "pixels out of order"),
            ((size != exact) & (self.encoding == "raw"), f"an image that is not {exact} bytes"),
        ):
            if np.any(wrong):
                raise ValueError(f"got {what} (sample {int(np.argmax(wrong))})")
        self._places, self._sizes = place, size

    @cached_property
    def _pixels(self) -> np.ndarray:
        self.check_unchanged()
        return np.memmap(self.path, np.uint8, mode="r")

    def __getstate__(self) -> dict[str, Any]:
        """Without the mapped file, which would be copied to every worker process."""
        return {name: value for name, value in self.__dict__.items() if name != "_pixels"}

    def describe(self) -> str:
        """Returns one line for logs."""
        height, width, channels = self.image_shape
        counts = ", ".join(f"{n} {split}" for split, n in self.splits.items() if n)
        return f"{self.name}: {counts} images of {channels}x{height}x{width}, {self.encoding}, at {self.path}"

    def _records(self, split: str) -> np.ndarray:
        check_option("split", split, SPLITS)
        before = sum(self.splits[name] for name in SPLITS[: SPLITS.index(split)])
        return np.arange(before, before + self.splits[split])


class PackedImages:
    """Images of a file that stay there: an array of uint8 (N, H, W, 3) as far as shape, dtype and len go.

    The file is a `PackedFile`, or anything else with its `image_shape`, `read` and `check_unchanged`. Indexed with a
    slice, integers (B,) or bools (N,) it gives another such part; `np.asarray` reads it.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, file: Any, records: np.ndarray) -> None:
        self.file = file
        self.records = records

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.records), *self.file.image_shape)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, rows: slice | np.ndarray) -> PackedImages:
        return PackedImages(self.file, np.atleast_1d(self.records[rows]))

    def joined(self, other: PackedImages) -> PackedImages:
        """Returns these images and then those of another part of the same file."""
        return PackedImages(self.file, np.concatenate([self.records, other.records]))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("copy: got False; accepted: None or True, packed images are read from a file")
        images = self.file.read(self.records)
        return images if dtype is None else images.astype(dtype, copy=False)


def write(
    file: BinaryIO,
    images: Iterable[bytes],
    labels: np.ndarray,
    splits: Mapping[str, int],
    *,
    encoding: str,
    image_shape: tuple[int, int, int],
) -> None:
    """Writes a .beton file into an empty seekable binary file.

    images: the encoded images of all SPLITS, one after the other; labels: int64, theirs. No image takes more than twice
    its pixels.
    """
    count = len(labels)
    height, width, channels = image_shape
    page = max(1 << 21, 1 << (2 * height * width * channels - 1).bit_length())
    fields = np.zeros(4, _FIELD)
    for field, name, kind in zip(fields, _SAMPLE.names or (), (_IMAGE_FIELD, *3 * [_INTEGER_FIELD]), strict=True):
        field["type_id"] = kind
        field["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
    samples = np.zeros(count, _SAMPLE)
    table = np.zeros(count, _ALLOCATION)
    samples["label"] = labels
    samples["split"] = np.repeat(np.arange(len(SPLITS)), [splits[name] for name in SPLITS])
    samples["index"] = np.concatenate([np.arange(splits[name]) for name in SPLITS])

    # FFCV may read whole pages: pixels begin with a page, and no image lies in two.
    place = file.write(bytes(-(-(_HEADER.itemsize + fields.nbytes + samples.nbytes) // page) * page))
    for number, image in enumerate(images):
        if place % page + len(image) > page:
            place += file.write(bytes(-place % page))
        table[number] = number, place, len(image)
        place += file.write(image)
    place += file.write(bytes(-place % page))
    samples["image"]["mode"] = ENCODINGS.index(encoding)
    samples["image"]["height"], samples["image"]["width"] = height, width
    samples["image"]["data_ptr"] = table["ptr"]
    file.write(table.tobytes())
    file.seek(0)
    header = np.array([(_VERSION, len(fields), page, count, place)], _HEADER)
    file.write(header.tobytes() + fields.tobytes() + samples.tobytes())


def sidecar_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def file_hash(path: Path, progress: Callable[[int], object] = lambda size: None) -> str:
    """Returns the SHA-256 (hex) of a file's contents."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def _identity(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _array(file: Any, dtype: np.dtype, count: int) -> np.ndarray:
    wanted = dtype.itemsize * count
    here, end = file.tell(), os.fstat(file.fileno()).st_size
    if wanted > end - here:
        raise ValueError(f"ends after {end} bytes, {wanted - (end - here)} too early")
    return np.frombuffer(file.read(wanted), dtype)


def read_sidecar(path: Path) -> dict[str, Any]:
    """Returns the sidecar, every entry of the type and in the range that the rest relies on."""
    if (found := read_json(path)) is None:
        raise FileNotFoundError(f"{path}: no such file; it is written beside a .beton file by `fastrd pack`")
    _check_sidecar(path.name, found)
    if "before" in found:
        _check_sidecar(f"{path.name}: before", found["before"])
    return found


def _check_sidecar(name: str, found: Any) -> None:
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{name} is not of format {FORMAT}")

    def number(value: Any, least: int, most: int = 2**40) -> bool:
        return type(value) is int and least <= value <= most

    rules: dict[str, Callable[[Any], bool]] = {
        "name": lambda v: isinstance(v, str),
        "class_names": lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v),
        "augmentation": lambda v: (
            isinstance(v, dict)
            and v.keys() == {"padding", "flip"}
            and number(v["padding"], 0)
            and isinstance(v["flip"], bool)
        ),
        "encoding": lambda v: v in ENCODINGS,
        "image_shape": lambda v: (
            isinstance(v, list) and len(v) == 3 and all(number(n, 1, 2**16 - 1) for n in v) and v[2] == 3
        ),
        "splits": lambda v: (
            isinstance(v, dict) and v.keys() == set(SPLITS) and all(number(n, 0, 2**32) for n in v.values())
        ),
        "bytes": lambda v: number(v, 1, 2**60),
        "sha256": lambda v: isinstance(v, str),
    }
    for key, rule in rules.items():
        if not rule(found.get(key)):
            raise ValueError(f"{name}: {key}: got {shown(found.get(key))}")
