"""What every benchmark shares: one clock, memory beside time, and shares of what the machine could do.

pytest bench --benchmark-only --benchmark-json=bench/results/<machine>.json
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastrd.kernels.runtime.roofline import SUSTAINED, TF32_PRODUCTS

from fastrd.core.malloc import keep_freed_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

keep_freed_memory()  # as every fastrd command does; what is compared with gains as well


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)
    machine_info["cpu"].pop("flags", None)
    machine_info["device"] = (
        torch.cuda.get_device_name() if DEVICE == "cuda" else machine_info["cpu"]["brand_raw"]
    )
    machine_info["threads"] = torch.get_num_threads()
    machine_info["cpus"] = len(os.sched_getaffinity(0))
    for package in ("torch", "triton"):
        machine_info[package] = importlib.metadata.version(package)


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes that `run` takes at its peak beyond what was held before, with all that CUDA graphs hold for their replays."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before + _held_by_graphs()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _held_by_graphs() -> int:
    """A replay allocates nothing: its memory was put aside at the recording."""
    segments = torch.cuda.memory_snapshot()
    return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) != (0, 0))


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found.group(1))


@pytest.fixture
def measure(benchmark):
    """measure(run, problem=, variant=, bytes=, flops=, unit=): time and peak memory of `run()` and what follows from them.

    bytes and flops are what the problem needs, whatever the variant does (bytes None: not counted); unit: "bf16", "tf32" or "fp32" arithmetic.
    """

    def take(
        run: Callable[[], object],
        *,
        problem: str,
        variant: str,
        bytes: int | None,
        flops: int,
        unit: str = "fp32",
        rounds: int = 5,
    ) -> None:
        run()  # compiles, and makes allocators and thread pools
        peak = peak_memory(run)

        def timed() -> None:
            run()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(timed, rounds=rounds, warmup_rounds=1)
        seconds = benchmark.stats.stats.median
        info = {"problem": problem, "variant": variant, "peak_bytes": peak, "flops": flops}
        info["tflop_per_s"] = flops / seconds / 1e12
        if bytes is not None:
            info |= {"bytes": bytes, "gb_per_s": bytes / seconds / 1e9}
        gpu = next(
            (name for name in SUSTAINED if DEVICE == "cuda" and name in torch.cuda.get_device_name()), None
        )
        if gpu is not None:
            work = flops * (TF32_PRODUCTS if unit == "tf32" else 1)
            floor = max((bytes or 0) / SUSTAINED[gpu]["bytes"], work / SUSTAINED[gpu][unit])
            info |= {"floor_seconds": floor, "share_of_floor": floor / seconds}
        benchmark.extra_info.update(info)
        benchmark.group = problem

    return take
