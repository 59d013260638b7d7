"""Data sets as uint8 arrays, and loaders that turn them into reproducible training batches.

`make_loader` gives a `Loader`: `len(loader)`, `loader.epoch(epoch, start)` yielding `Batch`, `loader.num_samples` and
`loader.labels`, with one meaning whether the images are on the device, in worker processes or in a packed file.
"""

from ..core.seeding import derive_seed
from . import sources  # noqa: F401  registers the public data sets
from .augment import Augment
from .beton import PackedFile, PackedImages
from .catalog import DATASETS, Dataset, add_extra, dataset, find_dataset, load_dataset, split_holdout
from .loader import Batch, Loader
from .make import ResidentLoader, make_loader

__all__ = [
    "DATASETS",
    "Augment",
    "Batch",
    "Dataset",
    "Loader",
    "PackedFile",
    "PackedImages",
    "ResidentLoader",
    "add_extra",
    "dataset",
    "derive_seed",
    "find_dataset",
    "load_dataset",
    "make_loader",
    "split_holdout",
]
