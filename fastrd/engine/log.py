"""The run's log: log.jsonl, and TensorBoard where it is installed."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

from ..core.documents import read_log
from ..core.files import atomic_write


class RunLog:
    """Appends one JSON object per line to RUN/log.jsonl; `kind` is "step" or "epoch" (see `fastrd.report`)."""

    def __init__(self, run: Path | None, *, after: tuple[int, int] | None = None) -> None:
        """`after` = (epoch, finished batches of it): a resumed run drops lines the checkpoint has not seen.

        Without a run folder (the further processes of a distributed run) nothing is written.
        """
        self._file = self._board = None
        if run is None:
            return
        self.path = run / "log.jsonl"
        kept = [] if after is None else [line for line in read_log(self.path)[0] if _position(line) <= after]
        atomic_write(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"))

    def write(self, kind: str, global_step: int, **values: Any) -> None:
        """NaN and infinity are written as null: JSON has no word for them."""
        if self._file is None:
            return
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._file.write(json.dumps({"kind": kind, **clean}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and name not in ("epoch", "step"):
                    self._board.add_scalar(f"{kind}/{name}", value, global_step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _position(line: dict[str, Any]) -> tuple[int, int]:
    """An epoch line belongs to the very end of its epoch, i.e. before batch 0 of the next."""
    return (line["epoch"] + 1, 0) if line["kind"] == "epoch" else (line["epoch"], line["step"])
