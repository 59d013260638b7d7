"""The run's log: log.jsonl, and the experiment trackers that were asked for."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.arguments import check_option
from ..core.documents import read_log
from ..core.files import atomic_write, naming
from ..core.toml import flat

Values = Mapping[str, float]


class _TensorBoard:
    def __init__(self, run: Path, recipe: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(run / "tensorboard"))

    def write(self, values: Values, step: int) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._board.close()


class _WandB:
    def __init__(self, run: Path, recipe: Mapping[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        # The same folder is the same run, also when it goes on in another process.
        number = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
        self._run = wandb.init(
            project="fastrd", name=recipe.get("name"), id=number, resume="allow", dir=str(run), config=dict(recipe)
        )

    def write(self, values: Values, step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, run: Path, recipe: Mapping[str, Any]) -> None:
        self._mlflow = importlib.import_module("mlflow")
        kept = run / "mlflow-run.txt"
        known = kept.read_text(encoding="utf-8").strip() if kept.is_file() else None
        started = self._mlflow.start_run(run_id=known, run_name=None if known else recipe.get("name"))
        if known is None:
            atomic_write(kept, started.info.run_id + "\n")
            self._mlflow.log_params(flat(recipe))

    def write(self, values: Values, step: int) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], Any]] = {
    "wandb": _WandB,
    "mlflow": _MLflow,
    "tensorboard": _TensorBoard,
}


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError for an unknown tracker, ImportError for one that is not installed."""
    for name in names:
        check_option("log", name, tuple(TRACKERS))
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"log: {name} is not installed: pip install {name}")


class RunLog:
    """Appends one JSON object per line to RUN/log.jsonl; `kind` is "step" or "epoch" (see `fastrd.report`)."""

    def __init__(
        self,
        run: Path | None,
        *,
        after: tuple[int, int] | None = None,
        trackers: Sequence[str] = (),
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        """`after` = (epoch, finished batches of it): a resumed run drops lines the checkpoint has not seen.

        The values of each line also go to `trackers`, with `recipe` as the configuration; to TensorBoard wherever it is
        installed. Without a run folder (the further processes of a distributed run) nothing is written.
        """
        self._file = None
        self._trackers: list[Any] = []
        if run is None:
            return
        self.path = run / "log.jsonl"
        kept = [] if after is None else [line for line in read_log(self.path)[0] if _position(line) <= after]
        atomic_write(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")
        installed = ["tensorboard"] if importlib.util.find_spec("tensorboard") is not None else []
        self._trackers = [TRACKERS[name](run, recipe or {}) for name in dict.fromkeys([*trackers, *installed])]

    def write(self, kind: str, global_step: int, **values: Any) -> None:
        """Writes a line; NaN and infinity are written as null: JSON has no word for them."""
        if self._file is None:
            return
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with naming(self.path):
            self._file.write(json.dumps({"kind": kind, **clean}) + "\n")
            self._file.flush()
        numbers = {
            f"{kind}/{name}": value
            for name, value in values.items()
            if isinstance(value, (int, float)) and name not in ("epoch", "step")
        }
        for tracker in self._trackers:
            tracker.write(numbers, global_step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            tracker.close()


def _position(line: dict[str, Any]) -> tuple[int, int]:
    """An epoch line belongs to the very end of its epoch, i.e. before batch 0 of the next."""
    return (line["epoch"] + 1, 0) if line["kind"] == "epoch" else (line["epoch"], line["step"])
