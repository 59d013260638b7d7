"""How a run ends early. A module of its own: the command line catches these without loading torch."""

from __future__ import annotations

import signal
from concurrent.futures import BrokenExecutor
from pathlib import Path


class Interrupted(Exception):
    """The run was asked to stop (`signum`), saved its state and can be resumed."""

    def __init__(self, signum: int, run: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; the state is saved ({run})")
        self.signum = signum


class NonFiniteLoss(RuntimeError):
    """A loss term became NaN or infinite."""


# As Python, CUDA and the CPU allocator of torch say it; the last is said of what no memory could hold.
_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "Storage size calculation overflowed")


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that the memory, of the machine or of a GPU, ran out."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def message_of(error: Exception) -> str | None:
    """Returns the message of an error that a user can do something about, and None for a mistake in the program."""
    text = str(error)
    if isinstance(error, (ValueError, OSError, ImportError, NonFiniteLoss)):
        return text
    if isinstance(error, TypeError) and "; accepted: " in text:  # a check of an argument
        return text
    if isinstance(error, Warning):
        return f"{text} (an error because of python -W error, or PYTHONWARNINGS)"
    if isinstance(error, RuntimeError) and text.startswith(("Symlink loop", "Could not determine home")):  # of pathlib
        return f"{text}; accepted: a path"
    if isinstance(error, BrokenExecutor):
        return "a process that worked on it was killed, often because the memory ran out; the same command goes on"
    if is_out_of_memory(error):
        return f"out of memory: {text or 'Python has no more'}; a smaller batch size, image or network needs less"
    return None
