"""Data sets by name: where they are looked for, how they are read, what makes them valid."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..core.archives import read_npz
from ..core.files import locked
from ..core.images import check_images, check_labels, grey_channel
from ..core.kinds import check_kinds
from ..core.seeding import derive_seed
from ..core.values import check_integer, nearest
from .augment import Augment
from .beton import PackedFile, PackedImages
from .folder import read_folder

CHUNK = 4096  # images that are read at a time


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
        x_extra, y_extra: further training images, as `add_extra` adds them: generated, or unlabelled (label -1).

    Raises ValueError: arrays that break these rules; names the array, what came and what is accepted.
    """

    name: str
    x_train: np.ndarray | PackedImages = field(repr=False)
    y_train: np.ndarray = field(repr=False)
    x_test: np.ndarray = field(repr=False)
    y_test: np.ndarray = field(repr=False)
    class_names: tuple[str, ...] = field(repr=False)
    source: str
    augmentation: Augment = None  # type: ignore[assignment]  # set in __post_init__
    x_extra: np.ndarray | PackedImages | None = field(default=None, repr=False)
    y_extra: np.ndarray | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        def fix(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        fix("class_names", tuple(str(name) for name in self.class_names))
        try:
            for split in ("train", "test") if self.x_extra is None else ("train", "test", "extra"):
                x, y = f"x_{split}", f"y_{split}"
                check_images(x, getattr(self, x))
                count = len(getattr(self, x))
                fix(y, check_labels(y, getattr(self, y), count, self.num_classes, unlabelled=split == "extra"))
            for name in ("x_test", "x_extra"):
                shape = getattr(getattr(self, name), "shape", (0, *self.x_train.shape[1:]))[1:]
                if shape != (wanted := self.x_train.shape[1:]):
                    raise ValueError(f"{name}: got images {shape}; accepted: those of x_train, {wanted}")
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
    def network_shape(self) -> dict[str, Any]:
        """What `build_model` and `load_teacher` must know of the data."""
        channels, size, _ = self.image_shape
        return {"num_classes": self.num_classes, "in_channels": channels, "image_size": size}

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 (hex) of all shapes, pixels and labels in their order, computed on first use.

        Equal fingerprints mean that a run can be resumed on this data.
        """
        digest = hashlib.sha256()
        arrays: list[Any] = [self.x_train, self.y_train.astype("<i8"), self.x_test, self.y_test.astype("<i8")]
        if self.x_extra is not None and self.y_extra is not None:
            arrays += [self.x_extra, self.y_extra.astype("<i8")]
        for array in arrays:
            digest.update(repr(array.shape).encode())
            for start in range(0, len(array), CHUNK):  # images may not fit into memory all at once
                digest.update(np.ascontiguousarray(array[start : start + CHUNK]).data)
        return digest.hexdigest()

    def training_images(self, kept: np.ndarray) -> tuple[np.ndarray | PackedImages, np.ndarray]:
        """Returns the `kept` training images and after them all extra ones, and their labels."""
        images, labels = self.x_train[kept], self.y_train[kept]
        if self.x_extra is None:
            return images, labels
        extra = self.x_extra
        if isinstance(images, PackedImages) and isinstance(extra, PackedImages) and images.file is extra.file:
            images = images.joined(extra)
        else:
            images = np.concatenate([np.asarray(images), np.asarray(extra)])
        return images, np.concatenate([labels, np.asarray(self.y_extra)])

    def describe(self) -> str:
        """Returns one line for logs and tables."""
        size = "x".join(str(n) for n in self.image_shape)
        counts = f"{len(self.x_train)} training and {len(self.x_test)} test images of {size}"
        return f"{self.name}: {counts}, {self.num_classes} classes, from {self.source}"

    def limit(self, train: int | None = None, test: int | None = None) -> Dataset:
        """Returns at most `train` training and `test` test images; None keeps all.

        The subset is the same everywhere and needs no seed: classes keep their shares of the whole (rounded by
        largest remainder, ties to the lower class), and of each class the first images are taken, in their order.

        Raises ValueError: a limit below 1.
        """
        check_integer(least=1, optional=True, train_limit=train, test_limit=test)
        changes: dict[str, Any] = {}
        for split, n in (("train", train), ("test", test)):
            images, labels = getattr(self, f"x_{split}"), getattr(self, f"y_{split}")
            if n is not None and n < len(labels):
                chosen = _stratified(labels, n)
                changes |= {f"x_{split}": images[chosen], f"y_{split}": labels[chosen]}
        return replace(self, **changes) if changes else self


@check_kinds
def load_dataset(
    name: str | os.PathLike,
    *,
    root: str | os.PathLike | None = None,
    download: bool = False,
    train_limit: int | None = None,
    test_limit: int | None = None,
    image_size: int | None = None,
) -> Dataset:
    """Returns the data set called `name`.

    Names:
        "cifar10", "cifar100", "stl10": torchvision's folders `cifar-10-batches-py`, `cifar-100-python`, `stl10_binary`
            in the root (read and checked by torchvision), or `NAME.npz` there.
        "svhn": `train_32x32.mat` and `test_32x32.mat` in the root or in `svhn` there, or `svhn.npz`. Never flipped.
        "tiny-imagenet": the folder `tiny-imagenet-200` or the file `tiny-imagenet-200.zip` in the root; its validation
            images are the test set, as the published test images have no labels.
        "digits": the 1,797 real handwritten digits inside scikit-learn, 8x8, pixel values 0..16 scaled to 0..255
            (rounded). In each class, in scikit-learn's order, every fifth image is a test image: 1,442 training and
            355 test images. Never flipped: a mirrored digit is another sign.
        "arrays": your own, `arrays.npz` in the root, or the root itself when that is a file.
        anything ending in ".npz": that file.
        anything ending in ".beton": that file, made by `fastrd pack`. Its training images stay there until a loader
            wants them, its unlabelled images are left alone (see `add_extra`).
        a folder: DIR/train/CLASS/IMAGE and DIR/test/CLASS/IMAGE (or DIR/val), JPEG or PNG of any size, see
            `fastrd.data.folder`. The training images stay there until a loader wants them.
        a name that a plugin registered with `fastrd.data.dataset`.

    An .npz holds x_train, x_test uint8 (N, H, W, C), or (N, H, W) where they are grey, and y_train, y_test integers
    (N,), and may hold class names (`class_names` or `label_names`, strings) and `flip` (bool: mirroring an image keeps
    its class; default no).

    Args:
        root: folder to look in. None: the environment variable FASTRD_DATA, or else ./data and ./.data.
        download: fetch CIFAR-10/100, STL-10 or SVHN with torchvision into the (first) root when it is in none.
        train_limit, test_limit: see `Dataset.limit`.
        image_size: side in pixels that a folder's images are brought to. None: they are all of one size.

    Raises:
        FileNotFoundError: no such data; says every place that was looked at, and the remedy.
        ValueError: unknown name, unreadable or invalid arrays, a bad limit, or no download for this name.
        ImportError: torchvision or scikit-learn is needed and missing.
    """
    return _find(name, root, download, image_size).limit(train_limit, test_limit)


def find_dataset(root: str | os.PathLike | None = None) -> tuple[Dataset, str]:
    """Returns CIFAR-10 where it is there, else the digits, and a sentence that says which and why."""
    try:
        dataset = load_dataset("cifar10", root=root)
    except FileNotFoundError as error:
        dataset = load_dataset("digits", root=root)
        return dataset, f"using digits ({dataset.source}). {error}"
    return dataset, f"using cifar10, found in {dataset.source}"


def split_holdout(dataset: Dataset, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sets `n` TRAINING images aside to choose the best checkpoint: (train_indices, holdout_indices) into x_train.

    Both int64, sorted, disjoint, together all of the training set. Classes keep their shares; which images of a class
    go is random, a function of `seed` (and the labels) alone. The test set is not touched.

    Raises ValueError: `n` is negative or leaves no training image.
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
    quotas, remainders = np.divmod(np.bincount(labels) * n, len(labels))
    quotas[np.argsort(-remainders, kind="stable")[: n - quotas.sum()]] += 1
    chosen = [arrange(np.flatnonzero(labels == label))[:quota] for label, quota in enumerate(quotas)]
    return np.sort(np.concatenate(chosen))


@dataclass(frozen=True)
class Source:
    """A data set that `load_dataset` knows by name.

    read: called with the root that holds one of `places`, or with the first root where there are none.
    places: paths below a root, any of which shows that the data set is there. None: it needs no file.
    download: fetches it into a root; None where nobody can.
    flip: mirroring an image keeps its class; for NAME.npz in a root, which holds the same data set as arrays.
    """

    read: Callable[[Path], Dataset]
    places: tuple[str, ...] = ()
    download: Callable[[Path], object] | None = None
    flip: bool = False


DATASETS: dict[str, Source] = {}
"""The registered data sets by name."""


def dataset(
    name: str, *, places: Sequence[str] = (), download: Callable[[Path], object] | None = None, flip: bool = False
) -> Callable[[Callable[[Path], Dataset]], Callable[[Path], Dataset]]:
    """Registers a function: `load_dataset(name)` is what the function returns; see `Source`.

    Raises ValueError: the name is taken, or looks like a path.
    """
    if name in DATASETS or name in ("arrays", "") or set(name) & set("/\\."):
        raise ValueError(f"dataset: got {name!r}; accepted: a name that is not taken, without / or .")

    def register(read: Callable[[Path], Dataset]) -> Callable[[Path], Dataset]:
        DATASETS[name] = Source(read, tuple(places), download, flip)
        return read

    return register


def check_name(key: str, name: str | os.PathLike) -> None:
    """Raises ValueError, about the argument `key`, unless `name` is a data set, a file's name, or a folder there."""
    name = os.fspath(name)
    known = (*DATASETS, "arrays")
    if name not in known and not name.lower().endswith((".npz", ".beton")) and not Path(name).expanduser().is_dir():
        raise ValueError(
            f"{key}: got {name!r}; accepted: {', '.join(known)}, the path of an .npz or .beton file, or a folder of "
            f"images{nearest(name.lower(), known)}"
        )


def _find(name: str | os.PathLike, root: str | os.PathLike | None, download: bool, size: int | None) -> Dataset:
    name = os.fspath(name)
    known = (*DATASETS, "arrays")
    source: Any = DATASETS.get(name)
    path = Path(name).expanduser()
    check_name("name", name)
    if size is not None and (name in known or not path.is_dir()):
        raise ValueError(f"image_size: got {size} for {name!r}; accepted: only for a folder of images")
    if download and (source is None or source.download is None):
        able = [known for known, each in DATASETS.items() if each.download is not None]
        raise ValueError(f"download: got True for {name!r}; accepted: only for {', '.join(able)}")
    if name not in known:
        if path.is_dir():
            return _read_folder(path, size)
        if not path.is_file():
            names = ", ".join(known)
            raise FileNotFoundError(f"{path}: no such file; accepted: the path of an .npz or .beton file, or {names}")
        return _read_npz(path, path.stem) if path.suffix.lower() == ".npz" else _read_packed(path)

    named = root or os.environ.get("FASTRD_DATA")
    roots = [Path(named).expanduser()] if named else [Path("data"), Path(".data")]
    if source is not None and not source.places:
        return source.read(roots[0])
    looked = []
    for place in roots:
        for below in source.places if source is not None else ():
            if (place / below).exists():
                if download:
                    _download(source, place)
                return source.read(place)
            looked.append(place / below)
        file = place if name == "arrays" and place.is_file() else place / f"{name}.npz"
        if file.is_file():
            return _read_npz(file, name)
        looked.append(file)
    if download:
        _download(source, roots[0])
        return source.read(roots[0])
    remedy = "put it there, or name its folder with root= (--data DIR) or the environment variable FASTRD_DATA"
    if source is not None and source.download is not None:
        remedy += "; download=True (--download) fetches it"
    places = ", ".join(map(str, looked))
    raise FileNotFoundError(f"{name}: not found. Looked for {places}. {_near(name, source, roots)}To fix: {remedy}.")


def _download(source: Any, root: Path) -> None:
    """Downloads while no other process does: the jobs of a reproduction start together, and would damage one file."""
    only_checks = root.is_dir() and not os.access(root, os.W_OK)
    with nullcontext() if only_checks else locked(root, wait=True):
        source.download(root)


def _near(name: str, source: Source | None, roots: Iterable[Path]) -> str:
    """A sentence on data that are there, but a folder too deep or still packed; or nothing."""
    for root in roots:
        if source is not None and root.resolve().name in (Path(place).parts[0] for place in source.places):
            return f"{root} is that folder itself: name the folder it lies in, {root.resolve().parent}. "
        for file in sorted(root.glob("*")) if root.is_dir() else ():
            packed = file.name.endswith((".tar.gz", ".tgz", ".tar", ".zip"))
            if packed and re.match(re.escape(name) + r"(?!\d)", re.sub(r"[^a-z0-9]", "", file.name.lower())):
                return f"{file} is there, but packed: unpack it in {root}. "
    return ""


def _read_npz(path: Path, name: str) -> Dataset:
    wanted = ("x_train", "y_train", "x_test", "y_test")
    arrays = read_npz(path, wanted, ("class_names", "label_names", "flip"))
    for key in ("x_train", "x_test"):
        arrays[key] = grey_channel(arrays[key])
    try:
        check_images("x_train", arrays["x_train"])
        names: Any = arrays.get("class_names", arrays.get("label_names"))
        if names is None:
            names = _numbered_classes(check_labels("y_train", arrays["y_train"], len(arrays["x_train"])))
        elif names.ndim != 1 or names.dtype.kind != "U":
            raise ValueError(f"class_names: got {names.dtype} of shape {names.shape}; accepted: an array of strings")
        flip = arrays.get("flip", np.asarray(False))
        if flip.shape != () or flip.dtype != bool:
            raise ValueError(f"flip: got {flip.dtype} of shape {flip.shape}; accepted: one bool")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    images: dict[str, Any] = {key: arrays[key] for key in wanted}
    flips = bool(flip) or (name in DATASETS and DATASETS[name].flip)
    augment = Augment.for_size(*arrays["x_train"].shape[1:3], flip=flips)
    return Dataset(name, class_names=tuple(names), source=str(path), augmentation=augment, **images)


def _read_packed(path: Path) -> Dataset:
    file = PackedFile(path)
    train, test = ((file.images(split), file.labels(split)) for split in ("train", "test"))
    augment = Augment(**file.augmentation)
    return Dataset(file.name, *train, np.asarray(test[0]), test[1], file.class_names, str(path), augment)


def _read_folder(path: Path, size: int | None) -> Dataset:
    classes, (train, test) = read_folder(path, size)
    augment = Augment.for_size(*train[0].shape[1:3])
    return Dataset(path.resolve().name, *train, np.asarray(test[0]), test[1], classes, str(path), augment)


UNLABELLED = "unlabelled"
EXTRA_KEYS = (("image", "label"), ("x_train", "y_train"))


@check_kinds
def add_extra(dataset: Dataset, source: str | os.PathLike) -> Dataset:
    """Returns `dataset` with the further training images of `source`: `x_extra` and `y_extra`.

    source: an .npz of uint8 images and integer labels, -1 where there is none, under the names `image` and `label` (as
        generated images are published with Gowal et al. 2021 and Wang et al. 2023), or `x_train` and `y_train`; or
        "unlabelled": the images without a label that come with the data set (STL-10 as published, or in a packed file).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, images of another shape, labels of other classes, or no unlabelled images.
    """
    if os.fspath(source) == UNLABELLED:
        images = _unlabelled(dataset)
        return replace(dataset, x_extra=images, y_extra=np.full(len(images), -1))
    path = Path(source).expanduser()
    if not path.is_file():
        accepted = f"the path of an .npz file, or {UNLABELLED!r} for the data set's own"
        raise FileNotFoundError(f"extra: no file {path}; accepted: {accepted}")
    found = read_npz(path, (), tuple(itertools.chain(*EXTRA_KEYS)))
    names = next((pair for pair in EXTRA_KEYS if set(pair) <= found.keys()), None)
    if names is None:
        got = ", ".join(found) or "none of them"
        raise ValueError(f"{path}: got {got}; accepted: image and label, or x_train and y_train")
    images, labels = (found[name] for name in names)
    try:
        return replace(dataset, x_extra=grey_channel(images), y_extra=labels)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _unlabelled(dataset: Dataset) -> np.ndarray | PackedImages:
    stored = getattr(dataset.x_train, "file", None)
    if isinstance(stored, PackedFile) and stored.splits[UNLABELLED]:
        return stored.images(UNLABELLED)
    file = Path(dataset.source) / "unlabeled_X.bin"
    if dataset.name != "stl10" or not file.is_file():
        raise ValueError(
            f"unlabelled: got True for {dataset.name} at {dataset.source}, which has none; accepted: only for stl10 as "
            "published, with unlabeled_X.bin, or a file packed from it with --unlabelled"
        )
    height, width, channels = dataset.x_train.shape[1:]
    # Channel planes, columns before rows; mapped, because they take 2.8 GB.
    return np.memmap(file, np.uint8, mode="r").reshape(-1, channels, width, height).transpose(0, 3, 2, 1)


def _numbered_classes(labels: np.ndarray) -> tuple[str, ...]:
    present = np.unique(labels)
    gaps = np.flatnonzero(present != np.arange(len(present)))
    if gaps.size:
        got = f"labels up to {present[-1]} but none of class {gaps[0]}"
        raise ValueError(f"y_train: got {got}; accepted: every class in 0..largest, or class_names in the file")
    return tuple(str(label) for label in present)
