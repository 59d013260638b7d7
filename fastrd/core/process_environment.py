"""What a process asks of the system before it computes: memory that stays, threads that sleep while they wait; and how
its warnings look.

Without torch, so that every command can afford it, and because OpenMP reads its settings when torch loads it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
SPINS = "GOMP_SPINCOUNT"
FEW_SPINS = "5000"  # some 10 us: as long as it often takes to the next parallel loop, far less than a scheduler's turn
WAITING = (SPINS, "OMP_WAIT_POLICY")  # variables, each of which decides how OpenMP's threads wait
CONTENDED = 0.2
"""Share of its time that a thread waits for a core: about 0.01 alone, a third with one busy process beside two threads
on two cores."""


def prepare_process() -> None:
    """Makes the process keep freed memory and its threads sleep. To be called before torch is imported."""
    keep_freed_memory()
    sleep_while_waiting()


def keep_freed_memory() -> None:
    """Makes glibc keep the large blocks that are freed, for the whole process; elsewhere does nothing.

    A training step on a CPU frees and takes tensors of the same sizes over and over. By default much of it goes back
    to the system each time, and touching fresh pages again costs up to a fifth of an attack. torch, which reads its
    setting at its first tensor, asks for huge pages where the system leaves that to programs: batches of large images
    are made up to a fifth faster.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    libc = ctypes.CDLL(None)
    for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        libc.mallopt(parameter, 2**31 - 1)


def sleep_while_waiting() -> None:
    """Makes OpenMP's threads sleep soon after they find nothing to do, unless the user has set how they wait.

    By default they spin for milliseconds at each end of a parallel loop. Beside any other busy process they take the
    core from the thread that they wait for, and training is several times slower. Processes started later inherit it.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ[SPINS] = FEW_SPINS


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Shows each warning of the block as one line, without the place in the program."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"fastrd: warning: {' '.join(str(message).split())}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


class ContentionWatch:
    """Warns once in a process, by naming the variable, when its threads share their cores with other processes.

    Only where they spin while they wait, which is what is slow: on Linux with several threads and none of `WAITING`
    set.
    """

    PERIOD = 1.0  # seconds from one look to the next

    def __init__(self) -> None:
        self._warned = False
        self._next, self._before = 0.0, (0, 0)

    def look(self, threads: int) -> None:
        """Costs nothing to speak of, so that every step can call it. threads: those of torch."""
        now = time.monotonic()
        if self._warned or now < self._next or threads < 2 or any(name in os.environ for name in WAITING):
            return
        first, self._next = self._next == 0, now + self.PERIOD
        before, self._before = self._before, _ran_and_waited()
        ran, waited = (new - old for new, old in zip(self._before, before, strict=True))
        if first or ran <= 0 or waited <= CONTENDED * (ran + waited):
            return
        self._warned = True
        warnings.warn(
            f"other processes use the cores of this one, whose {threads} threads spin while they wait: several times "
            f"slower. Set {SPINS}={FEW_SPINS} before torch is imported, as every fastrd command does",
            RuntimeWarning,
            stacklevel=2,
        )


contention = ContentionWatch()


def _ran_and_waited() -> tuple[int, int]:
    """Nanoseconds that the main thread has run, and has waited for a core; zeros where the system does not say."""
    try:
        ran, waited, _ = Path("/proc/self/schedstat").read_text().split()
    except (OSError, ValueError):
        return 0, 0
    return int(ran), int(waited)
