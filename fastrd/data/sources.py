"""The public data sets: how each is laid out where it is published, and how it is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .augment import Augment
from .catalog import Dataset, dataset
from .folder import Files, ImageFiles


def _torchvision(name: str, cls: str, folder: str, *splits: dict[str, Any]) -> None:
    """Registers a data set that torchvision downloads, checks and reads."""

    def opened(root: Path, download: bool = True) -> list[Any]:
        return _open(name, root / folder, cls, root, splits, download)

    @dataset(name, places=[folder], download=opened, flip=True)
    def read(root: Path) -> Dataset:
        parts = opened(root, download=False)
        if name == "stl10":
            arrays = [array for part in parts for array in (part.data.transpose(0, 2, 3, 1), part.labels)]
        else:
            arrays = [array for part in parts for array in (part.data, part.targets)]
        x_train, y_train, x_test, y_test = map(np.ascontiguousarray, arrays)
        augment = Augment.for_size(*x_train.shape[1:3])
        return Dataset(name, x_train, y_train, x_test, y_test, parts[0].classes, str(root / folder), augment)


def _open(name: str, place: Path, cls: str, root: Path, splits: Sequence[dict[str, Any]], download: bool) -> list[Any]:
    try:
        import torchvision.datasets
    # A torchvision built for another torch fails with RuntimeError: its operators do not exist.
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"{name}: reading {place} needs torchvision ({error}); install the torchvision of your torch, "
            f"or provide {root / name}.npz"
        ) from error
    reader = getattr(torchvision.datasets, cls)
    try:
        return [reader(root, download=download, **split) for split in splits]
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"{name}: {place} cannot be used: {error}. To fix: remove what is there and download again "
            "with download=True (--download), or name another folder with root= (--data DIR)."
        ) from error


_torchvision("cifar10", "CIFAR10", "cifar-10-batches-py", {"train": True}, {"train": False})
_torchvision("cifar100", "CIFAR100", "cifar-100-python", {"train": True}, {"train": False})
_torchvision("stl10", "STL10", "stl10_binary", {"split": "train"}, {"split": "test"})

_SVHN = ("train_32x32.mat", "test_32x32.mat")


def _download_svhn(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    _open("svhn", root / _SVHN[0], "SVHN", root, [{"split": "train"}, {"split": "test"}], download=True)


@dataset("svhn", places=[_SVHN[0], f"svhn/{_SVHN[0]}"], download=_download_svhn)
def _svhn(root: Path) -> Dataset:
    """Netzer et al. 2011, "format 2". torchvision's reader refuses any file but those of the first release."""
    folder = root if (root / _SVHN[0]).exists() else root / "svhn"
    (x_train, y_train), (x_test, y_test) = (_read_mat(folder / name) for name in _SVHN)
    classes = tuple("0123456789")
    augmentation = Augment.for_size(32, 32, flip=False)  # a mirrored digit is another sign
    return Dataset("svhn", x_train, y_train, x_test, y_test, classes, str(folder), augmentation)


def _read_mat(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"svhn: {path} is missing; accepted: {' and '.join(_SVHN)} beside each other")
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError(f"svhn: reading {path} needs SciPy ({error}); pip install scipy") from error
    try:
        found = loadmat(path, variable_names=("X", "y"))
    except Exception as error:  # a damaged file may raise anything at all
        raise ValueError(f"{path}: not a readable .mat file ({error})") from error
    images, labels = found.get("X"), found.get("y")
    if images is None or images.ndim != 4 or images.shape[:3] != (32, 32, 3) or images.dtype != np.uint8:
        kind = "none" if images is None else f"{images.dtype} {images.shape}"
        raise ValueError(f"{path}: X: got {kind}; accepted: uint8 (32, 32, 3, N)")
    if labels is None or labels.size != images.shape[3] or labels.dtype.kind not in "iu":
        kind = "none" if labels is None else f"{labels.dtype} {labels.shape}"
        raise ValueError(f"{path}: y: got {kind}; accepted: {images.shape[3]} integers 1..10, 10 is the digit 0")
    labels = labels.ravel().astype(np.int64)
    if labels.min() < 1 or labels.max() > 10:
        raise ValueError(f"{path}: y: got {labels.min()}..{labels.max()}; accepted: 1..10, 10 is the digit 0")
    return np.ascontiguousarray(images.transpose(3, 0, 1, 2)), labels % 10


_TINY = ("tiny-imagenet-200", "tiny-imagenet-200.zip")


@dataset("tiny-imagenet", places=_TINY, flip=True)
def _tiny_imagenet(root: Path) -> Dataset:
    """Le and Yang 2015: 200 classes, 64x64. The test images have no labels: the validation images are used."""
    folder = next(root / name for name in _TINY if (root / name).exists())
    files = Files(folder, 3)
    prefix = "" if folder.is_dir() else "tiny-imagenet-200/"

    def lines(name: str) -> list[list[str]]:
        return [line.split("\t") for line in files.read(prefix + name).decode().splitlines() if line.strip()]

    classes = [line[0].strip() for line in lines("wnids.txt")]
    number = {name: label for label, name in enumerate(sorted(classes))}
    words = {line[0]: line[1].split(",")[0] for line in lines("words.txt") if len(line) > 1}
    train = [name for name in files.names if name.startswith(f"{prefix}train/") and name.endswith(".JPEG")]
    y_train = [number.get(name.removeprefix(prefix).split("/")[1], -1) for name in train]
    annotated = {line[0]: line[1] for line in lines("val/val_annotations.txt") if len(line) > 1}
    test = [f"{prefix}val/images/{name}" for name in annotated]
    y_test = [number.get(name, -1) for name in annotated.values()]
    if -1 in y_train + y_test:
        raise ValueError(f"{folder}: an image of a class that is not in wnids.txt")
    x_train, x_test = (np.asarray(ImageFiles(files, names, None).images()) for names in (train, test))
    labels = {"y_train": np.array(y_train), "y_test": np.array(y_test)}
    names, augment = tuple(words.get(name, name) for name in number), Augment.for_size(*x_train.shape[1:3])
    return Dataset(
        "tiny-imagenet", x_train, x_test=x_test, **labels, class_names=names, source=str(folder), augmentation=augment
    )


@dataset("digits")
def _digits(root: Path) -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(f"digits: they come with scikit-learn ({error}); pip install scikit-learn") from error
    raw = load_digits()
    images = np.rint(raw.images * (255 / 16)).astype(np.uint8)[..., None]
    test = np.zeros(len(images), dtype=bool)
    for digit in range(10):
        test[np.flatnonzero(raw.target == digit)[4::5]] = True
    arrays = (images[~test], raw.target[~test], images[test], raw.target[test])
    classes, source = tuple("0123456789"), "scikit-learn's handwritten digits"
    return Dataset("digits", *arrays, classes, source, Augment.for_size(8, 8, flip=False))
