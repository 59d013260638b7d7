"""What a run asks of its process: a clock, signal handlers, and what float32 means on a GPU."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def clock(device: torch.device) -> float:
    """Seconds, when all that the device was given to do is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """What float32 means on a GPU during the run: exact, unless the recipe allows tf32."""
    if device.type != "cuda":
        yield
        return
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [switch.fp32_precision for switch in switches], torch.backends.cudnn.benchmark
    for switch in switches:
        switch.fp32_precision = "ieee" if precision == "fp32" else "tf32"
    torch.backends.cudnn.benchmark = (
        True  # shapes never change, so the fastest algorithm is worth looking for
    )
    try:
        yield
    finally:
        for switch, value in zip(switches, before[0], strict=True):
            switch.fp32_precision = value
        torch.backends.cudnn.benchmark = before[1]


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying; a second SIGINT raises KeyboardInterrupt."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may install handlers
        return

    def note(signum: int, _frame: object) -> None:
        if signum == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(signum)

    previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
