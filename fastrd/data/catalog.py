"""Data sets by name: where they are looked for, how they are read, what makes them valid."""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..core.archives import check_npz
from ..core.schema import nearest
from ..core.seeding import derive_seed
from .augment import Augment
from .beton import PackedFile, PackedImages
from .checks import check_images, check_labels


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification data set in memory, checked on construction.

    Args:
        name: short name, e.g. "cifar10".
        x_train, x_test: images, uint8 (N, H, W, C), numpy; x_train may stay in a packed file.
        y_train, y_test: labels in 0..len(class_names)-1, integers (N,); kept as int64.
        class_names: one for each class.
        source: where it came from, in a line; errors begin with it.
        augmentation: the training augmentation that keeps the classes what they are. Default: crop as usual for the
            size, no flip.

    Raises:
        ValueError: arrays that break these rules; names the array, what came and what is accepted.
    """

    name: str
    x_train: np.ndarray | PackedImages = field(repr=False)
    y_train: np.ndarray = field(repr=False)
    x_test: np.ndarray = field(repr=False)
    y_test: np.ndarray = field(repr=False)
    class_names: tuple[str, ...] = field(repr=False)
    source: str
    augmentation: Augment | None = None

    def __post_init__(self) -> None:
        def fix(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        fix("class_names", tuple(str(name) for name in self.class_names))
        try:
            for split in ("train", "test"):
                images = getattr(self, f"x_{split}")
                check_images(f"x_{split}", images)
                labels = check_labels(
                    f"y_{split}", getattr(self, f"y_{split}"), len(images), self.num_classes
                )
                fix(f"y_{split}", labels)
            if self.x_train.shape[1:] != self.x_test.shape[1:]:
                raise ValueError(
                    f"x_test: got images {self.x_test.shape[1:]}; accepted: those of x_train, {self.x_train.shape[1:]}"
                )
        except ValueError as error:
            raise ValueError(f"{self.source}: {error}") from None
        if self.augmentation is None:
            fix("augmentation", Augment.for_size(*self.x_train.shape[1:3], flip=False))

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W), as networks see an image."""
        height, width, channels = self.x_train.shape[1:]
        return channels, height, width

    @property
    def network_shape(self) -> dict[str, int]:
        """What `build_model` and `load_teacher` must know of the data."""
        channels, size, _ = self.image_shape
        return {"num_classes": self.num_classes, "in_channels": channels, "image_size": size}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all shapes, pixels and labels in their order, computed on first use.

        Equal fingerprints mean that a run can be resumed on this data.
        """
        digest = hashlib.sha256()
        for array in (self.x_train, self.y_train.astype("<i8"), self.x_test, self.y_test.astype("<i8")):
            digest.update(repr(array.shape).encode())
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()

    def describe(self) -> str:
        """One line for logs and tables."""
        size = "x".join(str(n) for n in self.image_shape)
        return (
            f"{self.name}: {len(self.x_train)} training and {len(self.x_test)} test images of {size}, "
            f"{self.num_classes} classes, from {self.source}"
        )

    def limit(self, train: int | None = None, test: int | None = None) -> Dataset:
        """At most `train` training and `test` test images; None keeps all.

        The subset is the same everywhere and needs no seed: classes keep their shares of the whole (rounded by
        largest remainder, ties to the lower class), and of each class the first images are taken, in their order.

        Raises:
            ValueError: a limit below 1.
        """
        for name, n in (("train_limit", train), ("test_limit", test)):
            if n is not None and n < 1:
                raise ValueError(f"{name}: got {n}; accepted: an integer >= 1, or None for all images")
        changes: dict[str, np.ndarray] = {}
        for split, n in (("train", train), ("test", test)):
            images, labels = getattr(self, f"x_{split}"), getattr(self, f"y_{split}")
            if n is not None and n < len(labels):
                chosen = _stratified(labels, n)
                changes |= {f"x_{split}": images[chosen], f"y_{split}": labels[chosen]}
        return replace(self, **changes) if changes else self


def load_dataset(
    name: str | os.PathLike,
    *,
    root: str | os.PathLike | None = None,
    download: bool = False,
    train_limit: int | None = None,
    test_limit: int | None = None,
) -> Dataset:
    """The data set called `name`.

    Names:
        "cifar10", "cifar100", "stl10": torchvision's folders `cifar-10-batches-py`, `cifar-100-python`, `stl10_binary`
            in the root (read and checked by torchvision), or `NAME.npz` there.
        "digits": the 1,797 real handwritten digits inside scikit-learn, 8x8, pixel values 0..16 scaled to 0..255
            (rounded). In each class, in scikit-learn's order, every fifth image is a test image: 1,442 training and
            355 test images. Never flipped: a mirrored digit is another sign.
        "arrays": your own, `arrays.npz` in the root, or the root itself when that is a file.
        anything ending in ".npz": that file.
        anything ending in ".beton": that file, made by `fastrd pack`. Its training images stay there until a loader wants
            them, its unlabelled images are left alone (see `fastrd.data.pack`).

    An .npz holds x_train, x_test uint8 (N, H, W, C) and y_train, y_test integers (N,), and may hold class names
    (`class_names` or `label_names`, strings) and `flip` (bool: mirroring an image keeps its class; default no).

    Args:
        root: folder to look in. None: the environment variable FASTRD_DATA, or else ./data and ./.data.
        download: fetch CIFAR-10/100 or STL-10 with torchvision into the (first) root when it is in none.
        train_limit, test_limit: see `Dataset.limit`.

    Raises:
        FileNotFoundError: no such data; says every place that was looked at, and the remedy.
        ValueError: unknown name, unreadable or invalid arrays, a bad limit, or no download for this name.
        ImportError: torchvision or scikit-learn is needed and missing.
    """
    return _find(name, root, download).limit(train_limit, test_limit)


def find_dataset(
    preferred: Iterable[str] = ("cifar10",), fallback: str = "digits", root: str | os.PathLike | None = None
) -> tuple[Dataset, str]:
    """The first of `preferred` that is there, else `fallback`, and a sentence saying which and why. Downloads nothing."""
    missing = []
    for name in preferred:
        try:
            dataset = load_dataset(name, root=root)
        except FileNotFoundError as error:
            missing.append(str(error))
        else:
            return dataset, f"using {name}, found in {dataset.source}"
    dataset = load_dataset(fallback, root=root)
    return dataset, " ".join([f"using {fallback} ({dataset.source}).", *missing])


def split_holdout(dataset: Dataset, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`n` TRAINING images set aside to choose the best checkpoint: (train_indices, holdout_indices) into x_train.

    Both int64, sorted, disjoint, together all of the training set. Classes keep their shares; which images of a class
    go is random, a function of `seed` (and the labels) alone. The test set is not touched.

    Raises:
        ValueError: `n` is negative or leaves no training image.
    """
    labels = dataset.y_train
    if not 0 <= n < len(labels):
        raise ValueError(f"n: got {n}; accepted: 0..{len(labels) - 1} of the {len(labels)} training images")
    # RandomState's streams are frozen by numpy: a run resumed under another version keeps its split.
    random = np.random.RandomState(derive_seed(seed, "holdout") % 2**32)
    holdout = _stratified(labels, n, random.permutation)
    return np.setdiff1d(np.arange(len(labels)), holdout, assume_unique=True), holdout


def _stratified(
    labels: np.ndarray, n: int, arrange: Callable[[np.ndarray], np.ndarray] = lambda members: members
) -> np.ndarray:
    """Sorted positions of `n` labels with the class shares of all; of each class the first in its arrangement."""
    counts = np.bincount(labels)
    quotas, remainders = np.divmod(counts * n, len(labels))
    quotas[np.argsort(-remainders, kind="stable")[: n - quotas.sum()]] += 1
    chosen = [arrange(np.flatnonzero(labels == label))[:quota] for label, quota in enumerate(quotas)]
    return np.sort(np.concatenate(chosen))


@dataclass(frozen=True)
class _Torchvision:
    cls: str
    folder: str
    train: Mapping[str, Any]
    test: Mapping[str, Any]


_PUBLIC = {
    "cifar10": _Torchvision("CIFAR10", "cifar-10-batches-py", {"train": True}, {"train": False}),
    "cifar100": _Torchvision("CIFAR100", "cifar-100-python", {"train": True}, {"train": False}),
    "stl10": _Torchvision("STL10", "stl10_binary", {"split": "train"}, {"split": "test"}),
}


def _find(name: str | os.PathLike, root: str | os.PathLike | None, download: bool) -> Dataset:
    name = os.fspath(name)
    public = _PUBLIC.get(name)
    known = (*_PUBLIC, "digits", "arrays")
    if name not in known and not name.endswith((".npz", ".beton")):
        raise ValueError(
            f"name: got {name!r}; accepted: {', '.join(known)}, or the path of an .npz or .beton file"
            f"{nearest(name, known)}"
        )
    if download and public is None:
        raise ValueError(f"download: got True for {name!r}; accepted: only for {', '.join(_PUBLIC)}")
    if name == "digits":
        return _digits()
    if name not in known:
        file = Path(name).expanduser()
        if not file.is_file():
            raise FileNotFoundError(
                f"{file}: no such file; accepted: the path of an .npz or .beton file, or {', '.join(known)}"
            )
        return _read_npz(file, file.stem) if file.suffix == ".npz" else _read_packed(file)

    roots = _roots(root)
    looked = []
    for place in roots:
        if public is not None:
            if (place / public.folder).is_dir():
                return _read_torchvision(name, place, download)
            looked.append(place / public.folder)
        file = place if name == "arrays" and place.is_file() else place / f"{name}.npz"
        if file.is_file():
            return _read_npz(file, name)
        looked.append(file)
    if download:
        return _read_torchvision(name, roots[0], download)
    remedy = (
        "put it there, or name its folder with root= (--data DIR) or the environment variable FASTRD_DATA"
    )
    if public is not None:
        remedy += "; download=True (--download) fetches it"
    raise FileNotFoundError(
        f"{name}: not found. Looked for {', '.join(map(str, looked))}. To mend: {remedy}."
    )


def _roots(root: str | os.PathLike | None) -> list[Path]:
    named = root or os.environ.get("FASTRD_DATA")
    return [Path(named).expanduser()] if named else [Path("data"), Path(".data")]


def _read_torchvision(name: str, root: Path, download: bool) -> Dataset:
    public = _PUBLIC[name]
    folder = root / public.folder
    try:
        import torchvision.datasets
    # A torchvision built for another torch fails with RuntimeError: its operators do not exist.
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"{name}: reading {folder} needs torchvision ({error}); install the torchvision of your torch, "
            f"or provide {root / name}.npz"
        ) from error
    reader = getattr(torchvision.datasets, public.cls)
    try:
        train, test = (reader(root, download=download, **split) for split in (public.train, public.test))
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"{name}: {folder} cannot be used: {error}. To mend: remove what is there and download again "
            "with download=True (--download), or name another folder with root= (--data DIR)."
        ) from error
    if name == "stl10":
        arrays = (
            train.data.transpose(0, 2, 3, 1),
            train.labels,
            test.data.transpose(0, 2, 3, 1),
            test.labels,
        )
    else:
        arrays = (train.data, train.targets, test.data, test.targets)
    x_train, y_train, x_test, y_test = (np.ascontiguousarray(array) for array in arrays)
    augmentation = Augment.for_size(*x_train.shape[1:3])
    return Dataset(name, x_train, y_train, x_test, y_test, train.classes, str(folder), augmentation)


def _read_npz(path: Path, name: str) -> Dataset:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not an .npz file; accepted: what numpy.savez writes")
    wanted = ("x_train", "y_train", "x_test", "y_test")
    try:
        check_npz(path)
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in wanted if key not in file]
            if missing:
                raise ValueError(f"{', '.join(missing)}: missing; it holds {', '.join(file) or 'nothing'}")
            arrays = {
                key: file[key] for key in (*wanted, "class_names", "label_names", "flip") if key in file
            }
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: {error}; accepted: {', '.join(wanted)} as plain arrays") from error
    try:
        check_images("x_train", arrays["x_train"])
        names = arrays.get("class_names", arrays.get("label_names"))
        if names is None:
            names = _numbered_classes(check_labels("y_train", arrays["y_train"], len(arrays["x_train"])))
        elif names.ndim != 1 or names.dtype.kind != "U":
            raise ValueError(
                f"class_names: got {names.dtype} of shape {names.shape}; accepted: an array of strings"
            )
        flip = arrays.get("flip", np.asarray(False))
        if flip.shape != () or flip.dtype != bool:
            raise ValueError(f"flip: got {flip.dtype} of shape {flip.shape}; accepted: one bool")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    augmentation = Augment.for_size(*arrays["x_train"].shape[1:3], flip=name in _PUBLIC or bool(flip))
    return Dataset(name, *(arrays[key] for key in wanted), tuple(names), str(path), augmentation)


def _read_packed(path: Path) -> Dataset:
    file = PackedFile(path)
    return Dataset(
        file.name,
        file.images("train"),
        file.labels("train"),
        np.asarray(file.images("test")),
        file.labels("test"),
        file.class_names,
        str(path),
        Augment(**file.augmentation),
    )


def _numbered_classes(labels: np.ndarray) -> tuple[str, ...]:
    present = np.unique(labels)
    gaps = np.flatnonzero(present != np.arange(len(present)))
    if gaps.size:
        raise ValueError(
            f"y_train: got labels up to {present[-1]} but none of class {gaps[0]}; "
            "accepted: every class in 0..largest, or class_names in the file"
        )
    return tuple(str(label) for label in present)


def _digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            f"digits: they come with scikit-learn ({error}); pip install scikit-learn"
        ) from error
    raw = load_digits()
    images = np.rint(raw.images * (255 / 16)).astype(np.uint8)[..., None]
    test = np.zeros(len(images), dtype=bool)
    for digit in range(10):
        test[np.flatnonzero(raw.target == digit)[4::5]] = True
    return Dataset(
        "digits",
        images[~test],
        raw.target[~test],
        images[test],
        raw.target[test],
        tuple(str(digit) for digit in range(10)),
        "scikit-learn's handwritten digits",
        Augment.for_size(8, 8, flip=False),
    )
