"""One job of a reproduction in a process of its own: `python -m fastrd.reproduce.job`, its `Job` as JSON on stdin.

The process ends when it is told to (SIGTERM) and when the one that started it is gone (stdin closes); whatever it was
doing goes on from there next time.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..core.documents import is_finished
from ..core.files import atomic_path, atomic_write, locked
from ..core.plugins import given_plugins, load_plugins
from ..core.process_environment import prepare_process
from .cost import metered

VERIFY_IMAGES = 1000  # test images a teacher is measured on before anything trains with it
STOPPED = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Job:
    """`task`: "train" a run and evaluate it but for AutoAttack; "autoattack" it; "measure" a teacher."""

    task: str
    folder: str
    recipe: dict[str, Any] | None = None
    teacher: str | None = None
    clean_teacher: str | None = None
    alignment_teacher: str | None = None
    same_weights_as: str | None = None
    attacks: tuple[str, ...] = ()
    measures: tuple[str, ...] = ()
    limit: int | None = None
    aa_limit: int | None = None
    data_name: str = ""
    record: str = ""
    data: str | None = None
    download: bool = False
    device: str | None = None
    threads: int | None = None
    progress: bool = False
    plugins: tuple[str, ...] = field(default_factory=given_plugins)

    def dumps(self) -> str:
        return json.dumps(asdict(self))


def main() -> int:
    prepare_process()
    told = []

    def stop(*_: object) -> None:
        told.append(True)
        sys.exit(STOPPED)

    signal.signal(signal.SIGTERM, stop)
    job = Job(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder = Path(job.folder)
    error_file = folder / "error.txt"
    with locked(folder, wait=True):  # a job whose parent was killed may still be saving its state
        from ..engine.errors import Interrupted, message_of

        try:
            _run(job, folder)
        except Interrupted:
            return STOPPED
        except Exception as error:
            if told:  # code that was interrupted may have made another error of the exit
                return STOPPED
            text = message_of(error)
            atomic_write(error_file, f"{text or repr(error)}\n")
            if text is None:
                raise
            print(f"fastrd: {folder}: {text}", file=sys.stderr)
            return 2
        error_file.unlink(missing_ok=True)
    return 0


def _end_with_parent() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


def _run(job: Job, folder: Path) -> None:
    import torch

    if job.threads:
        torch.set_num_threads(job.threads)
    load_plugins(job.plugins)
    device = job.device or ("cuda" if torch.cuda.is_available() else "cpu")
    {"train": _train, "autoattack": _autoattack, "measure": _measure}[job.task](job, folder, device)


def _train(job: Job, folder: Path, device: str) -> None:
    from ..recipe import Recipe
    from ..workflow import evaluate_run, train

    recipe = Recipe.stored(job.recipe or {}, str(folder))
    if not is_finished(folder):
        if job.same_weights_as and not (folder / "last.pt").is_file():
            _copy_weights(Path(job.same_weights_as), folder, recipe)
        with metered(folder, "train", device):
            train(
                recipe,
                out=folder,
                teacher=job.teacher,
                clean_teacher=job.clean_teacher,
                data=job.data,
                download=job.download,
                device=device,
                progress=job.progress,
                resume=True,
            )
    attacks = tuple(attack for attack in job.attacks if attack != "aa")
    if attacks or job.measures:
        with metered(folder, "evaluate", device):
            evaluate_run(
                folder,
                attacks=attacks or ("clean",),
                limit=job.limit,
                teacher=job.alignment_teacher,
                measures=job.measures,
                figures=True,
                data=job.data,
                download=job.download,
                device=device,
                progress=job.progress,
            )


def _copy_weights(source: Path, folder: Path, recipe: Any) -> None:
    """A run that trains to the same weights is not trained twice; its verdicts under attack are the same too."""
    atomic_write(folder / "recipe.toml", recipe.to_toml())
    if (source / ".evaluation").is_dir():
        shutil.copytree(source / ".evaluation", folder / ".evaluation", dirs_exist_ok=True)
    for name in ("log.jsonl", "best.pt", "last.pt"):
        with atomic_path(folder / name) as copy:
            shutil.copyfile(source / name, copy)


def _autoattack(job: Job, folder: Path, device: str) -> None:
    from ..workflow import add_autoattack, evaluate_run

    options: dict[str, Any] = {"teacher": job.alignment_teacher, "data": job.data, "download": job.download}
    options |= {"device": device, "progress": job.progress}
    with metered(folder, "autoattack", device):
        if job.aa_limit in (None, job.limit):
            evaluate_run(folder, attacks=("aa",), limit=job.limit, **options)
        else:
            add_autoattack(folder, limit=job.aa_limit, **options)


def _measure(job: Job, folder: Path, device: str) -> None:
    from ..data import load_dataset
    from ..evaluation import evaluate
    from ..models import load_teacher
    from .plan import stamp

    images = load_dataset(job.data_name, root=job.data, download=job.download, test_limit=job.limit or VERIFY_IMAGES)
    labelled = images.x_test, images.y_test
    model = load_teacher(str(job.teacher), dataset=images.name, device=device, check=labelled, **images.network_shape)
    results = evaluate(
        model, images.x_test, images.y_test, attacks=("clean", "pgd20"), progress=job.progress, device=device
    )
    record = {
        "stamp": stamp(Path(str(job.teacher))),
        "n": results.n,
        **{name: entry["accuracy"] for name, entry in results.items()},
    }
    atomic_write(job.record, json.dumps(record) + "\n")


if __name__ == "__main__":
    code = main()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # all is saved; a second signal is not to interrupt the exit
    sys.exit(code)
