"""The run's log: log.jsonl, and the experiment trackers that were asked for."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from ..core.documents import read_log
from ..core.files import atomic_write, naming
from ..core.toml import flat
from ..core.values import check_option


class Tracker(NamedTuple):
    """An experiment tracker that has started its run."""

    write: Callable[[dict[str, float], int], object]  # (values by name, step)
    close: Callable[[], object]


def _tensorboard(run: Path, recipe: Mapping[str, Any]) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(str(run / "tensorboard"))

    def write(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            board.add_scalar(name, value, step)

    return Tracker(write, board.close)


def _wandb(run: Path, recipe: Mapping[str, Any]) -> Tracker:
    # The same folder is the same run, also when it goes on in another process.
    number = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
    place = {"project": "fastrd", "id": number, "resume": "allow", "dir": str(run)}
    started = importlib.import_module("wandb").init(name=recipe.get("name"), config=dict(recipe), **place)
    return Tracker(lambda values, step: started.log(values, step=step), started.finish)


def _mlflow(run: Path, recipe: Mapping[str, Any]) -> Tracker:
    mlflow = importlib.import_module("mlflow")
    kept = run / "mlflow-run.txt"
    known = kept.read_text(encoding="utf-8").strip() if kept.is_file() else None
    started = mlflow.start_run(run_id=known, run_name=None if known else recipe.get("name"))
    if known is None:
        atomic_write(kept, started.info.run_id + "\n")
        mlflow.log_params(flat(recipe))
    return Tracker(lambda values, step: mlflow.log_metrics(values, step=step), mlflow.end_run)


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "wandb": _wandb,
    "mlflow": _mlflow,
    "tensorboard": _tensorboard,
}


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError for an unknown tracker, ImportError for one that is not installed."""
    for name in names:
        check_option("log", name, TRACKERS)
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"log: {name} is not installed: pip install {name}")


_OWN = {
    *("kind", "global_step", "step", "epoch", "loss", "lr", "seconds", "stall_seconds", "images_per_s", "memory_mb"),
    *("val_clean", "val_pgd", "remainder"),
}


def check_names(names: Iterable[str]) -> None:
    """Raises ValueError where a loss or metric has a name of which a line of the log says something else."""
    for name in sorted(_OWN.intersection(names)):
        raise ValueError(f"log: got a loss or metric called {name}; accepted: another name")


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
        self._file, self._trackers = None, []
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
        with ExitStack() as closing:  # each is closed whatever another raises
            for tracker in self._trackers:
                closing.callback(tracker.close)
            if self._file is not None:
                closing.enter_context(naming(self.path))  # what a full disk did not take is written once more
                closing.callback(self._file.close)


def _position(line: dict[str, Any]) -> tuple[int, int]:
    """An epoch line belongs to the very end of its epoch, i.e. before batch 0 of the next."""
    return (line["epoch"] + 1, 0) if line["kind"] == "epoch" else (line["epoch"], line["step"])
