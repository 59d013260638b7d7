"""What a run asks of its process: a clock, signal handlers, and what float32 means on a GPU."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def synchronized_time(device: torch.device) -> float:
    """Returns the time in seconds, once all that the device was given to do is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def float32_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Sets what float32 means on a GPU during the run: exact, unless the recipe allows tf32."""
    if device.type != "cuda":
        yield
        return
    cuda: Any = torch.backends.cuda.matmul  # its flags, and those of cudnn, are not declared in torch
    cudnn: Any = torch.backends.cudnn
    before = cuda.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.benchmark
    _set_float32(*3 * ["ieee" if precision == "fp32" else "tf32"])
    cudnn.benchmark = True  # shapes never change, so the fastest algorithm is worth looking for
    try:
        yield
    finally:
        *precisions, cudnn.benchmark = before
        _set_float32(*precisions)


def _set_float32(matmul: str, conv: str, rnn: str) -> None:
    """Set what float32 means in CUDA's products, convolutions and recurrent layers: "ieee", "tf32" or "none".

    torch has two generations of these flags and refuses to read the old ones, as parts of torch itself do, while the
    new ones say something else. So the old ones are set first, and then the new ones, which have more values.
    """
    torch.set_float32_matmul_precision("high" if matmul == "tf32" else "highest")
    cudnn: Any = torch.backends.cudnn
    cudnn.allow_tf32 = conv == "tf32"
    torch.backends.cuda.matmul.fp32_precision = matmul
    cudnn.conv.fp32_precision = conv
    cudnn.rnn.fp32_precision = rnn


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT, SIGTERM and SIGHUP instead of dying; a second SIGINT raises KeyboardInterrupt."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may install handlers
        return

    def note(signum: int, _frame: object) -> None:
        if signum == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(signum)

    stops = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup asks
        stops.append(signal.SIGHUP)
    previous = {s: signal.signal(s, note) for s in stops}
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
