"""One job of a reproduction in a process of its own: `python -m fastrd.reproduce.job`, its `Job` as JSON on stdin.

The process ends on SIGTERM and when the process that started it is gone (stdin closes). The next job of the same task
goes on from there.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..core.documents import is_finished
from ..core.files import atomic_path, atomic_write, locked
from ..core.plugins import given_plugins, load_plugins
from ..core.process_environment import plain_warnings, prepare_process
from .cost import metered

VERIFY_IMAGES = 1000  # test images a teacher is measured on before anything trains with it
STOPPED = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Job:
    """`task`: "train" a run and evaluate it but for AutoAttack; "autoattack" it; "measure" a teacher.

    Args:
        options: of the task, see the function of its name.
        common: data, download, device and progress, of whatever is called.
        threads: of torch; None leaves them as they are.
    """

    task: str
    folder: str
    options: dict[str, Any] = field(default_factory=dict)
    common: dict[str, Any] = field(default_factory=dict)
    threads: int | None = None
    plugins: tuple[str, ...] = field(default_factory=given_plugins)

    def dumps(self) -> str:
        return json.dumps(asdict(self), default=os.fspath)


def main() -> int:
    prepare_process()
    stops = []

    def stop(*_: object) -> None:
        stops.append(True)
        sys.exit(STOPPED)

    signal.signal(signal.SIGTERM, stop)
    job = Job(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder = Path(job.folder)
    error_file = folder / "error.txt"
    try:
        with plain_warnings(), locked(folder, wait=True):  # a job whose parent was killed may still be saving its state
            _run(job, folder)
            error_file.unlink(missing_ok=True)
    except Exception as error:
        from ..engine.errors import Interrupted, message_of

        if stops or isinstance(error, Interrupted):  # code that was interrupted may make another error of the exit
            return STOPPED
        text = message_of(error)
        with suppress(OSError):  # the disk may be what failed
            atomic_write(error_file, f"{text or repr(error)}\n")
        if text is None:
            raise
        print(f"fastrd: {folder}: {text}", file=sys.stderr)
        return 2
    return 0


def _end_with_parent() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


def _run(job: Job, folder: Path) -> None:
    import torch

    if job.threads:
        torch.set_num_threads(job.threads)
    load_plugins(job.plugins)
    tasks: dict[str, Callable[..., None]] = {"train": _train, "autoattack": _autoattack, "measure": _measure}
    tasks[job.task](folder, job.common, **job.options)


def _train(
    folder: Path,
    common: dict[str, Any],
    *,
    recipe: dict[str, Any],
    teachers: dict[str, Any],
    same_weights_as: str | None,
    evaluation: dict[str, Any] | None,
) -> None:
    from ..recipe import Recipe
    from ..workflow import evaluate_run, train

    loaded = Recipe.stored(recipe, str(folder))
    if not is_finished(folder):
        if same_weights_as and not (folder / "last.pt").is_file():
            _copy_weights(Path(same_weights_as), folder, loaded)
        with metered(folder, "train", common["device"]):
            train(loaded, out=folder, resume=True, **teachers, **common)
    if evaluation:
        with metered(folder, "evaluate", common["device"]):
            evaluate_run(folder, **evaluation, **common)


def _copy_weights(source: Path, folder: Path, recipe: Any) -> None:
    """Copies a run that trains to the same weights; its verdicts under attack are the same too."""
    atomic_write(folder / "recipe.toml", recipe.to_toml())
    if (source / ".evaluation").is_dir():
        shutil.copytree(source / ".evaluation", folder / ".evaluation", dirs_exist_ok=True)
    for name in ("log.jsonl", "best.pt", "last.pt"):
        with atomic_path(folder / name) as copy:
            shutil.copyfile(source / name, copy)


def _autoattack(
    folder: Path, common: dict[str, Any], *, teacher: str | None, limit: int | None, aa_limit: int | None
) -> None:
    from ..workflow import add_autoattack, evaluate_run

    with metered(folder, "autoattack", common["device"]):
        if aa_limit in (None, limit):
            evaluate_run(folder, attacks=("aa",), limit=limit, teacher=teacher, **common)
        else:
            add_autoattack(folder, limit=aa_limit, teacher=teacher, **common)


def _measure(_: Path, common: dict[str, Any], *, teacher: str, dataset: str, record: str, limit: int | None) -> None:
    from ..core.fingerprint import fingerprint
    from ..data import load_dataset
    from ..evaluation import evaluate
    from ..models import load_teacher, with_features
    from .plan import stamp

    device, limit = common["device"], limit or VERIFY_IMAGES
    images = load_dataset(dataset, root=common["data"], download=common["download"], test_limit=limit)
    x, y = images.x_test, images.y_test
    model = load_teacher(teacher, dataset=images.name, device=device, check=(x, y), **images.network_shape)
    results = evaluate(model, x, y, attacks=("clean", "pgd20"), progress=common["progress"], device=device)
    accuracies = {name: entry["accuracy"] for name, entry in results.items()}
    about = {"stamp": stamp(Path(teacher)), "fingerprint": fingerprint(with_features(model)), "n": results.n}
    atomic_write(record, json.dumps({**about, **accuracies}) + "\n")


if __name__ == "__main__":
    code = main()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # all is saved; a second signal is not to interrupt the exit
    sys.exit(code)
