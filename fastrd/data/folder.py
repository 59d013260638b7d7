"""Images in folders or in a zip file, decoded when they are wanted: data sets of any size and resolution."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from ..core.files import check_regular
from ..core.values import check_integer
from .beton import PackedImages

SUFFIXES = (".jpg", ".jpeg", ".png")
TEST_FOLDERS = ("test", "val")
MAX_BYTES = 64 << 20  # of one image file
MAX_PIXELS = 1 << 26  # of one image


class Files:
    """The files below a folder, or in a zip archive, by their names relative to it ("train/cat/1.jpg").

    levels: of a folder, how deep it is looked into: 2 for "train/cat". Only train, test and val are looked into,
        whatever lies beside them or behind links.
    """

    def __init__(self, path: Path, levels: int) -> None:
        self.path = path
        if path.is_dir():
            self._sizes: dict[str, int] = {}
            for folder, below, names in os.walk(path, onerror=_refuse, followlinks=True):
                inside = Path(folder).relative_to(path)
                if folder == str(path):
                    below[:] = sorted({"train", *TEST_FOLDERS}.intersection(below))
                elif len(inside.parts) == levels:
                    below.clear()
                else:
                    for name in names:  # a link that leads nowhere may stand for a class
                        try:
                            os.stat(Path(folder, name))
                        except OSError as error:
                            _refuse(error)
                self._sizes |= dict.fromkeys(((inside / name).as_posix() for name in names), 0)
        else:
            check_regular(path)
            try:
                with zipfile.ZipFile(path) as archive:
                    self._sizes = {m.filename: m.file_size for m in archive.infolist() if not m.is_dir()}
            except Exception as error:
                raise ValueError(f"{path}: {error}; accepted: a zip file") from None
        self.names = sorted(self._sizes)
        self._archive: tuple[int, zipfile.ZipFile] | None = None

    def read(self, name: str) -> bytes:
        """Returns the contents of a file; ValueError where there is no such file, or it is unreasonably large."""
        if name not in self._sizes:
            raise ValueError(f"{self.path}: no file {name} in it")
        if self.path.is_dir():
            check_regular(self.path / name)
        size = (self.path / name).stat().st_size if self.path.is_dir() else self._sizes[name]
        if size > MAX_BYTES:
            raise ValueError(f"{self.path}: {name}: {size} bytes; accepted: at most {MAX_BYTES}")
        if self.path.is_dir():
            return (self.path / name).read_bytes()
        if self._archive is None or self._archive[0] != os.getpid():  # a forked process has its own position
            self._archive = os.getpid(), zipfile.ZipFile(self.path)
        try:
            return self._archive[1].read(name)
        except Exception as error:
            raise ValueError(f"{self.path}: {name}: {error}") from None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_archive": None}


def _refuse(error: OSError) -> NoReturn:
    raise ValueError(f"{error.filename}: {error.strerror}; accepted: what can be read") from None


class ImageFiles:
    """Labelled image files of one size, read as a packed file is: `PackedImages(files, records)`.

    Args:
        files: where they lie.
        names: of the image files.
        size: (height, width) that each image is brought to: scaled until it covers that size, and its middle cut out.
            None: all have the size of the first, and one that has not is refused.

    Attributes:
        image_shape: (height, width, 3); grey images are repeated, transparency is dropped.

    Raises:
        ValueError: no image, or one that cannot be decoded; names the file.
        ImportError: Pillow is missing.
    """

    def __init__(self, files: Files, names: Sequence[str], size: tuple[int, int] | None) -> None:
        if not names:
            raise ValueError(f"{files.path}: no images; accepted: files that end in {', '.join(SUFFIXES)}")
        self.files, self.names, self._size = files, list(names), size
        height, width = size or self._decode(self.names[0]).shape[:2]
        self.image_shape = (height, width, 3)

    def images(self) -> PackedImages:
        return PackedImages(self, np.arange(len(self.names)))

    def read(self, records: np.ndarray) -> np.ndarray:
        """Returns images (B,) as uint8 (B, H, W, 3)."""
        out = np.empty((len(records), *self.image_shape), np.uint8)
        for image, record in zip(out, records, strict=True):
            decoded = self._decode(self.names[record])
            if decoded.shape != image.shape:
                raise ValueError(
                    f"{self.files.path}: {self.names[record]} is {decoded.shape[0]}x{decoded.shape[1]}, the first "
                    f"image {image.shape[0]}x{image.shape[1]}; accepted: images of one size, or data.image_size = N "
                    "in the recipe (`fastrd pack` has --size N)"
                )
            image[:] = decoded
        return out

    def check_unchanged(self) -> None:
        """Files are read anew each time; one that is gone or damaged is named then."""

    def _decode(self, name: str) -> np.ndarray:
        path = self.files.path
        try:
            from PIL import Image, ImageOps
        except ImportError as error:
            raise ImportError(f"{path}: reading images needs Pillow ({error}); pip install pillow") from error
        try:
            with Image.open(io.BytesIO(self.files.read(name)), formats=("JPEG", "PNG")) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width}x{image.height} pixels; accepted: at most {MAX_PIXELS}")
                if image.mode.startswith(("I", "F")):  # to 8 bits Pillow would cut them off, not scale them
                    raise ValueError(f"mode {image.mode}, of more than 8 bits; accepted: 8 bits a channel")
                image = image.convert("RGB")
                if self._size is not None and image.size != self._size[::-1]:
                    image = ImageOps.fit(image, self._size[::-1], Image.Resampling.BILINEAR)
                return np.asarray(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # of Pillow and of `read`
            raise ValueError(f"{path}: {name}: not a usable image ({error})") from None


def read_folder(path: Path, size: int | None) -> tuple[tuple[str, ...], list[tuple[PackedImages, np.ndarray]]]:
    """Returns the class names, in their order, of DIR/train/CLASS/IMAGE and DIR/test/CLASS/IMAGE (or DIR/val/...), and
    the images and labels of training and test set.

    size: side in pixels, see `ImageFiles`; None: all images are of one size.

    Raises ValueError: another layout, or an unreadable first image; says what is missing.
    """
    check_integer(least=1, optional=True, image_size=size)
    files = Files(path, 2)
    shape = None if size is None else (size, size)
    images = [name for name in files.names if name.lower().endswith(SUFFIXES) and name.count("/") == 2]
    split = next((s for s in TEST_FOLDERS if any(name.startswith(f"{s}/") for name in images)), "test")
    train, test = ([name for name in images if name.startswith(f"{s}/")] for s in ("train", split))
    if not train or not test:
        raise ValueError(
            f"{path}: got {len(train)} training and {len(test)} test images; accepted: a folder with "
            "train/CLASS/IMAGE and test/CLASS/IMAGE (or val/CLASS/IMAGE), JPEG or PNG"
        )
    classes = tuple(sorted({name.split("/")[1] for name in train}))
    if unknown := sorted({name.split("/")[1] for name in test} - set(classes)):
        raise ValueError(f"{path}: class {unknown[0]!r} has test images and no training images")
    number = {name: label for label, name in enumerate(classes)}
    labels = [np.array([number[name.split("/")[1]] for name in names]) for names in (train, test)]
    parts = [ImageFiles(files, names, shape).images() for names in (train, test)]
    return classes, list(zip(parts, labels, strict=True))
