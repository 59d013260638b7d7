"""Meters what a run costs: time, and energy on a GPU. One line of RUN/cost.jsonl for each attempt at each stage."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ..core.documents import read_costs
from ..core.files import atomic_write

FILE = "cost.jsonl"
STAGES = {"train": "Training", "evaluate": "Evaluation", "autoattack": "AutoAttack"}


class Cost(NamedTuple):
    seconds: float
    joules: float | None  # None: not measured for all of it
    device: str  # "cpu" or "cuda"


@contextmanager
def metered(folder: Path, stage: str, device: str) -> Iterator[None]:
    """Appends what the block took, also when it is interrupted. A process that is killed outright leaves no line.

    Energy is the whole GPU's by NVML's counter, with what other processes use meanwhile; on a CPU it is not measured.
    """
    counter = _energy_counter(device)
    began, before = time.perf_counter(), counter()
    try:
        yield
    finally:
        after = counter()
        line = {
            "stage": stage,
            "seconds": round(time.perf_counter() - began, 3),
            "joules": None if before is None or after is None else round(after - before, 3),
            "device": device.partition(":")[0],
        }
        lines = [*read_costs(folder / FILE), line]  # without one that a killed process left torn
        atomic_write(folder / FILE, "".join(json.dumps(each) + "\n" for each in lines))


def total(folders: Iterable[Path], stage: str) -> Cost | None:
    """Returns the sum of a stage over runs; None where none has a line of it."""
    lines = [line for folder in folders for line in read_costs(folder / FILE) if line["stage"] == stage]
    if not lines:
        return None
    joules = [line["joules"] for line in lines]
    return Cost(
        sum(line["seconds"] for line in lines),
        None if None in joules else sum(j or 0.0 for j in joules),
        "+".join(sorted({line["device"] for line in lines})),
    )


def _energy_counter(device: str) -> Callable[[], float | None]:
    """Returns a function that reads the GPU's energy counter in joules, or returns None where there is none."""
    if not device.startswith("cuda"):
        return lambda: None
    try:
        import pynvml
    except ImportError:
        return lambda: None
    import torch

    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(torch.device(device)).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except (pynvml.NVMLError, RuntimeError, AttributeError):  # no driver, or a GPU without the counter
        return lambda: None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
