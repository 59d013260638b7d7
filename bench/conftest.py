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

from fastrd.core.process_environment import prepare_process

prepare_process()  # as every fastrd command does, before torch is imported; what is compared with gains as well

import torch
from fastrd.kernels.runtime.roofline import SUSTAINED

from bench.sizes import DEVICE, seconds
from fastrd.engine.process import float32_precision


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)
    machine_info["cpu"].pop("flags", None)
    machine_info["device"] = torch.cuda.get_device_name() if DEVICE == "cuda" else machine_info["cpu"]["brand_raw"]
    machine_info["threads"] = torch.get_num_threads()
    machine_info["cpus"] = len(os.sched_getaffinity(0))
    for package in ("torch", "triton"):
        machine_info[package] = importlib.metadata.version(package)


@pytest.fixture(autouse=True)
def fresh():
    """Each benchmark begins without the programs and graphs of others or their threads, and in float32 unless it says
    otherwise.

    Dynamo keeps 8 programs of a function, and from the second on makes them general.
    """
    torch.compiler.reset()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    threads = torch.get_num_threads()
    with float32_precision("fp32", torch.device(DEVICE)):
        yield
    torch.set_num_threads(threads)


def peak_memory(run: Callable[[], object], held_before: int = 0) -> int:
    """Bytes that `run` takes at its peak beyond what was held before, with what CUDA graphs hold for their replays.

    held_before: by graphs that are not of this run.
    """
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before + _held_by_graphs() - held_before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _held_by_graphs() -> int:
    """A replay allocates nothing: its memory was put aside at the recording."""
    if DEVICE == "cpu":
        return 0
    segments = torch.cuda.memory_snapshot()
    return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) != (0, 0))


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found.group(1))


def _replay_seconds(run: Callable[[], object], times: int = 200) -> float:
    """Of one `run` out of a CUDA graph: the device's part alone."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph, began, ended = torch.cuda.CUDAGraph(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    began.record()
    for _ in range(times):
        graph.replay()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1e3 / times


@pytest.fixture
def measure(benchmark):
    """measure(run, problem=, variant=, bytes=, flops=, unit=): time and peak memory of `run()` and what follows from
    them.

    bytes and flops are what the problem needs, whatever the variant does (bytes None: not counted); unit: of the
    arithmetic, one of `roofline.SUSTAINED`. replay: also the seconds of `run` in a CUDA graph, which the host's part of
    it is not in.
    """
    held = _held_by_graphs()

    def take(
        run: Callable[[], object],
        *,
        problem: str,
        variant: str,
        bytes: int | None,
        flops: int,
        unit: str = "fp32",
        rounds: int = 5,
        replay: bool = False,
    ) -> None:
        run()  # compiles, and makes allocators and thread pools
        peak = peak_memory(run, held)
        benchmark.pedantic(lambda: seconds(run), rounds=rounds, warmup_rounds=1)
        median = benchmark.stats.stats.median
        info = {"problem": problem, "variant": variant, "peak_bytes": peak, "flops": flops}
        info["tflop_per_s"] = flops / median / 1e12
        if bytes is not None:
            info |= {"bytes": bytes, "gb_per_s": bytes / median / 1e9}
        gpu = next((name for name in SUSTAINED if DEVICE == "cuda" and name in torch.cuda.get_device_name()), None)
        if gpu is not None:
            floor = max((bytes or 0) / SUSTAINED[gpu]["bytes"], flops / SUSTAINED[gpu][unit])
            info |= {"floor_seconds": floor, "share_of_floor": floor / median}
        if replay and DEVICE == "cuda":
            info["replay_seconds"] = _replay_seconds(run)
        benchmark.extra_info.update(info)
        benchmark.group = problem

    return take
