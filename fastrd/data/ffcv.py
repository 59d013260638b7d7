"""FFCV: batches of a packed file, read and decoded by its compiled pipeline in a thread.

FFCV gets no further than pixels. Order, crops and everything else that must be reproducible are `Loader`'s, because
FFCV draws its augmentations from generators nobody can seed. Importing this module imports FFCV.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from queue import Empty, Full
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .beton import PackedImages
from .jpeg import threads_kept  # first: it says what is wrong where FFCV is missing
from .loader import Loader

with threads_kept():
    import numba
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader as _FFCV
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.memory_managers import OSCacheManager

PATIENCE = 120.0
"""Seconds without a batch after which an epoch is given up; compiling the pipeline takes less than half a minute."""


class FFCVLoader(Loader):
    """See `Loader`; `images` is a part of a packed file, `workers` threads decode.

    Made and used in one process. One thread reads ahead while an epoch runs; it ends with the epoch's iterator, at
    whatever batch that is left.

    Raises:
        ValueError: the file changed since it was opened, now or at any batch.
        RuntimeError: FFCV failed, or the loader is used in a process forked from that which made it.
        TimeoutError: no batch came for PATIENCE seconds.
    """

    def __init__(self, images: PackedImages, labels: np.ndarray | Tensor, *, workers: int = 1, **options: Any) -> None:
        super().__init__(images, labels, **options)
        images.file.check_unchanged()
        self._file, self._records = images.file, images.records.astype(np.uint64)
        self._process = os.getpid()
        workers = min(workers, _NUMBA.NUMBA_NUM_THREADS)
        if workers > 1 and not _can_share_threads():
            workers = 1
        with threads_kept():
            self._ffcv = _FFCV(
                str(images.file.path),
                batch_size=self.batch_size // self._world_size,
                num_workers=workers,
                seed=0,  # of an order that is not used; without one it reads numpy's global generator
                drop_last=False,
                pipelines={"image": [SimpleRGBImageDecoder()], **dict.fromkeys(("label", "index", "split"))},
            )
        _share_decoder(self._ffcv)

    def _source(self, parts: Sequence[Tensor], on_device: Sequence[Tensor]) -> Generator:
        if os.getpid() != self._process:
            raise RuntimeError("loader: it was made in another process; make it in the process that uses it")
        order = self._records[torch.cat(list(parts)).numpy()]
        epoch = _Epoch(self._ffcv, order, self._file.check_unchanged)
        try:
            for part in parts:
                # A rank's share of the last batch may be empty; FFCV has no such batches.
                pixels = next(epoch) if len(part) else np.empty((0, *self._file.image_shape), np.uint8)
                # FFCV writes the next batches over this one, which what `Loader` makes of it must outlive.
                yield self._to_device(torch.from_numpy(pixels)), None
        finally:
            epoch.close()
            epoch.join(timeout=30.0)


# FFCV compiles its pipeline anew for every loader, which takes a second and 4 MB that numba never gives back. Neither
# function depends on the loader: the first one compiled serves them all.
_compiled: dict[str, Any] = {}


def _reader(self: OSCacheManager, compile: Any = OSCacheManager.compile_reader) -> Any:
    if "read" not in _compiled:
        _compiled["read"] = compile(self)
    return _compiled["read"]


OSCacheManager.compile_reader = _reader


def _share_decoder(loader: _FFCV) -> None:
    ((stage, _), *_), _ = loader.code
    (name,) = (name for name in stage.__globals__ if name.startswith("code_"))
    kind = "decode in parallel" if loader.num_workers > 1 else "decode"
    stage.__globals__[name] = _compiled.setdefault(kind, stage.__globals__[name])


class _Epoch(EpochIterator):
    """FFCV's thread that fills batches, with three changes: an error in it reaches the caller, which would
    otherwise wait forever; torch's threads are left alone; the file is looked at before every batch."""

    def __init__(self, loader: _FFCV, order: np.ndarray, check: Any) -> None:
        self._check = check
        super().__init__(loader, order)

    def run(self) -> None:
        slots = self.loader.batches_ahead + 2
        try:
            numba.set_num_threads(self.loader.num_workers)
            for number, records in enumerate(self.iter_ixes):
                self._check()
                slot = number % slots
                (pixels,) = self.run_pipeline(number, records, slot, None)
                if not self._offer(pixels):
                    return
        except BaseException as error:
            self._offer(error)

    def _offer(self, item: object) -> bool:
        while not self.terminate_event.is_set():
            try:
                self.output_queue.put(item, timeout=0.1)
                return True
            except Full:
                pass
        return False

    def __next__(self) -> np.ndarray:
        try:
            item = self.output_queue.get(timeout=PATIENCE)
        except Empty:
            raise TimeoutError(f"ffcv: no batch in {PATIENCE:.0f} seconds; given up") from None
        if isinstance(item, np.ndarray):
            return item
        if isinstance(item, ValueError):
            raise item
        raise RuntimeError(f"ffcv: {type(item).__name__}: {item}") from item


_NUMBA: Any = numba.config  # its settings are not declared


def _can_share_threads() -> bool:
    """Whether numba has a layer under which two pipelines may run at once; under its own the process aborts."""
    if _NUMBA.THREADING_LAYER == "workqueue":
        return False
    for layer in ("omppool", "tbbpool"):
        try:
            __import__(f"numba.np.ufunc.{layer}")
        except ImportError:
            continue
        return True
    return False
