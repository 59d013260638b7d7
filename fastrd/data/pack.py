"""`fastrd pack`: a data set as one .beton file that FFCV reads, with a sidecar that says what is in it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..core.files import atomic_path, check_path, check_writable, locked, naming
from ..core.kinds import check_kinds
from ..core.values import check_integer
from .beton import FORMAT, SPLITS, PackedFile, file_hash, read_sidecar, sidecar_of, write
from .catalog import UNLABELLED, add_extra, load_dataset

CHUNK = 1024  # images that are compared at a time


@check_kinds
def pack(
    name: str | os.PathLike,
    out: str | os.PathLike,
    *,
    root: str | os.PathLike | None = None,
    download: bool = False,
    quality: int | None = None,
    unlabelled: bool = False,
    image_size: int | None = None,
    progress: bool = True,
) -> PackedFile:
    """Writes the data set `name` to `out`, a .beton file, and `out`.json beside it.

    The file is read back and compared with the data set before it gets its name: as raw pixels every image equals its
    original, as JPEGs every one can be decoded. It appears whole or not at all, and until then what it replaces
    can be read; a killed process leaves a hidden temporary file beside it.

    Unlabelled images get the label -1. `load_dataset` leaves them in the file; a recipe trains on them with
    `data.extra = "unlabelled"`, see `add_extra`.

    Args:
        name, root, download, image_size: of `load_dataset`.
        quality: of JPEGs, 1..100; None keeps the pixels as they are.
        unlabelled: with STL-10's 100,000 unlabelled images, which are read from `stl10_binary/unlabeled_X.bin`.
        progress: show progress bars on stderr.

    Raises:
        ValueError: images without three channels, a bad quality, unlabelled images of a data set that has none, a name
            that does not end in .beton; or the file that was written differs from the data set.
        OSError: no space left, or the folder cannot be written to; nothing is left behind.
        ImportError: JPEGs need FFCV.
    """
    out = check_path(out=out)
    if out.suffix != ".beton":
        raise ValueError(f"out: got {str(out)!r}; accepted: a file name that ends in .beton")
    check_integer(least=1, most=100, optional=True, quality=quality)
    check_writable(out, sidecar_of(out))
    dataset = load_dataset(name, root=root, download=download, image_size=image_size)
    if dataset.image_shape[0] != 3:
        raise ValueError(f"images: got {dataset.image_shape[0]} channels; accepted: 3, FFCV packs RGB images")
    images: dict[str, Any] = {"train": dataset.x_train, "test": dataset.x_test}
    labels = [dataset.y_train, dataset.y_test]
    if unlabelled:
        images["unlabelled"] = add_extra(dataset, UNLABELLED).x_extra
        labels.append(np.full(len(images["unlabelled"]), -1))
    splits = {split: len(images.get(split, ())) for split in SPLITS}
    encoding = "raw" if quality is None else "jpeg"
    _check_space(out, sum(splits.values()) * int(np.prod(dataset.x_train.shape[1:])) if encoding == "raw" else 0)

    try:
        before = read_sidecar(sidecar_of(out)) if out.exists() else None
    except (ValueError, OSError):
        before = None  # what is there cannot be read either
    # The sidecar goes first and describes both files, so that whichever is there at any instant is described.
    with locked(out.parent), atomic_path(out) as temporary, atomic_path(sidecar_of(out)) as described:
        with naming(out), open(temporary, "wb") as file:
            encoded, shape = _encoded(images, quality, progress), dataset.x_train.shape[1:]
            write(file, encoded, np.concatenate(labels), splits, encoding=encoding, image_shape=shape)
        contents: dict[str, Any] = {
            "format": FORMAT,
            "name": dataset.name,
            "class_names": dataset.class_names,
            "augmentation": dataset.augmentation.switches,
            "encoding": encoding,
            "quality": quality,
            "image_shape": dataset.x_train.shape[1:],
            "splits": splits,
            "bytes": temporary.stat().st_size,
            "sha256": file_hash(temporary),
        }
        if before is not None:
            contents["before"] = {key: value for key, value in before.items() if key != "before"}
        described.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
        _compare(PackedFile(temporary, sidecar=described), images, progress)
    return PackedFile(out)


@check_kinds
def check(path: str | os.PathLike, *, progress: bool = True) -> PackedFile:
    """Reads a packed file through: its sidecar, hash and structure, and of JPEGs every image.

    Raises:
        FileNotFoundError, ValueError: see `PackedFile`.
        ImportError: JPEGs need FFCV.
    """
    with _bar(Path(path).stat().st_size, "hash", "B", progress) as bar:
        file = PackedFile(path, progress=bar.update)
    if file.encoding == "jpeg":
        _compare(file, {}, progress)
    return file


def _encoded(images: dict[str, Any], quality: int | None, progress: bool) -> Iterator[bytes]:
    if quality is not None:
        from .jpeg import jpeg
    with _bar(sum(map(len, images.values())), "pack", "img", progress) as bar:
        for part in images.values():
            for start in range(0, len(part), CHUNK):
                chunk = np.asarray(part[start : start + CHUNK])
                for image in chunk:
                    yield image.tobytes() if quality is None else jpeg(image, quality)
                bar.update(len(chunk))


def _compare(file: PackedFile, images: dict[str, Any], progress: bool) -> None:
    with _bar(sum(file.splits.values()), "verify", "img", progress) as bar:
        for split in SPLITS:
            packed = file.images(split)
            originals = images.get(split)
            for start in range(0, len(packed), CHUNK):
                chunk = np.asarray(packed[start : start + CHUNK])
                if originals is not None and file.encoding == "raw":
                    differ = (chunk != np.asarray(originals[start : start + CHUNK])).any(axis=(1, 2, 3))
                    if differ.any():
                        raise ValueError(
                            f"{file.path}: {split} image {start + int(differ.argmax())} was not written as it is; "
                            "the disk may be full or failing"
                        )
                bar.update(len(chunk))


def _check_space(out: Path, wanted: int) -> None:
    free = shutil.disk_usage(next(folder for folder in out.parents if folder.exists())).free
    if wanted > free:
        raise OSError(f"{out}: it will take {wanted >> 20} MiB and {free >> 20} MiB are free; name another folder")


def _bar(total: int, what: str, unit: str, progress: bool) -> tqdm:
    show: dict[str, Any] = {"unit_scale": True, "dynamic_ncols": True, "leave": False}
    return tqdm(total=total, desc=what, unit=unit, disable=not progress, **show)
