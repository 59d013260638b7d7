"""How a run ends early. A module of its own: the command line catches these without loading torch."""

from __future__ import annotations

import signal
from pathlib import Path


class Interrupted(Exception):
    """The run was asked to stop (`signum`), saved its state and can be resumed."""

    def __init__(self, signum: int, run: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name}; the state is saved: go on with --resume ({run})"
        )
        self.signum = signum


class NonFiniteLoss(RuntimeError):
    """A loss term became NaN or infinite."""
