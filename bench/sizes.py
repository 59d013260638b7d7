"""Where benchmarks run, how large their problems are, their clock, and what kernels are compared with."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TINY = "FASTRD_BENCH_TINY" in os.environ
"""Problems take no time, to try out what runs them."""


def seconds(run: Callable[[], object]) -> float:
    """Of one `run()`, until the device has finished."""
    began = time.perf_counter()
    run()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def variants(ours: Callable, eager: Callable) -> dict[str, Callable[[], Callable]]:
    """Name -> what makes the function: nothing is compiled before its benchmark runs."""
    return {"ours": lambda: ours, "eager": lambda: eager, "compiled eager": lambda: torch.compile(eager)}
