"""How the process keeps its memory. Without torch, so that every command can afford it."""

from __future__ import annotations

import ctypes
import os
import platform
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory() -> None:
    """Have glibc keep the large blocks that are freed, for the whole process; elsewhere do nothing.

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
