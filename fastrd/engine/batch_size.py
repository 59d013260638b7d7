"""Which batch sizes fit, and how fast each is: `fastrd batch-sizes`."""

from __future__ import annotations

import os
import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ..core.arguments import check_device
from ..data import Dataset
from ..recipe import Recipe
from .distributed import ALONE
from .errors import is_out_of_memory
from .process import float32_precision, synchronized_time
from .trainer import Trainer, load_inputs

WARM_UP, TIMED = 2, 3  # steps


class Row(NamedTuple):
    batch_size: int
    images_per_s: float | None  # None: out of memory
    peak_bytes: int  # of the device's memory; on the CPU, of the process


def try_batch_sizes(
    recipe: Recipe,
    *,
    data: Dataset | str | os.PathLike | None = None,
    teacher: nn.Module | str | os.PathLike | None = None,
    clean_teacher: nn.Module | str | os.PathLike | None = None,
    download: bool = False,
    device: str | torch.device | None = None,
) -> Iterator[Row]:
    """Times a few training steps at the recipe's batch size, twice it, and so on, until memory or data run out.

    Nothing is kept. The learning rate that suits a batch size is the caller's choice, so the recipe is not changed.
    """
    device = check_device(device)
    recipe, data, frozen = load_inputs(recipe, data, teacher, clean_teacher, download, device)
    size = recipe.training.batch_size
    while True:
        torch.compiler.reset()  # forgets the programs and graphs of the size before, which hold memory
        larger = recipe.override({"training.batch_size": size})
        with tempfile.TemporaryDirectory() as folder, float32_precision(recipe.training.precision, device):
            try:
                trainer = Trainer(larger, Path(folder), data, frozen, device, ALONE, profile=False)
                if trainer.loader.images_in(0, 1) < size > recipe.training.batch_size:
                    return  # a batch is the whole data set
                row = _try(trainer)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                row = Row(size, None, _peak(device))
            except ValueError:
                if size == recipe.training.batch_size:
                    raise
                return  # more than the data set holds
        yield row
        if row.images_per_s is None:
            return
        size *= 2


def _try(trainer: Trainer) -> Row:
    device, size = trainer.device, trainer.recipe.training.batch_size
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    batch, images = next(trainer.loader.epoch(1)), trainer.loader.images_in(0, 1)
    for number in range(WARM_UP + TIMED):
        if number == WARM_UP:
            began = synchronized_time(device)
        trainer.step(batch)
    return Row(size, TIMED * images / (synchronized_time(device) - began), _peak(device))


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
