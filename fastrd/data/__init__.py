"""Data sets as uint8 arrays, and loaders that turn them into reproducible training batches.

A loader is anything with `len(loader)`, `loader.epoch(epoch, start)` yielding `Batch`, `loader.num_samples` and
`loader.labels`, with the meanings documented in `ResidentLoader`.
"""

from .augment import Augment
from .catalog import Dataset, find_dataset, load_dataset, split_holdout
from .resident import Batch, ResidentLoader
from .seeding import derive_seed

__all__ = [
    "Augment",
    "Batch",
    "Dataset",
    "ResidentLoader",
    "derive_seed",
    "find_dataset",
    "load_dataset",
    "split_holdout",
]
