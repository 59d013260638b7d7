"""`fastrd demo`: a robust teacher, four methods over five seeds, evaluation and a report, on real images, in
minutes."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from . import report
from .core.arguments import check_device
from .data import find_dataset, load_dataset
from .engine.errors import Interrupted
from .evaluation import Progress
from .recipe import Recipe
from .report.document import check_out
from .workflow import add_autoattack, evaluate_run, train

STUDENTS = ("demo-at", "demo-ard", "demo-igdm", "demo-gacd")
SEEDS = 5

# 8x8 digits have 16 grey levels and cost next to nothing: a teacher that has seen all of them, small students that have
# 180 images each, where a teacher is worth most, and a radius at which networks are still near linear. All of it was
# chosen with 400 held-out training images and PGD-20 (`docs/results.md`), never with test images.
DIGITS: dict[str, Any] = {"attack.epsilon": 0.08, "attack.step_size": 0.032, "schedule.warmup_epochs": 1}
DIGITS_TEACHER: dict[str, Any] = {
    "data.train_limit": None,
    "data.holdout": 100,
    "schedule.epochs": 40,
    "student.options.width": 32,
}
DIGITS_STUDENT: dict[str, Any] = {
    "data.train_limit": 200,
    "data.holdout": 20,
    "schedule.epochs": 120,
    "student.options.width": 8,
    "validation.every": 30,
}
# A GPU does the same job at a size where robustness starts to look like the field's.
GPU: dict[str, Any] = {
    "data.train_limit": None,
    "data.holdout": 1000,
    "training.batch_size": 128,
    "attack.steps": 10,
    "attack.step_size": "2/255",
    "student.options.width": 64,
    "schedule.epochs": 30,
}
# Test images, None for all, and those of AutoAttack, whose cost for each robust image decides on a CPU.
EVALUATED: dict[str, int | None] = {"digits": None, "cifar10": 1000}
AUTOATTACKED = {"digits": 100, "cifar10": 50}


class _Job(NamedTuple):
    """A run to train, where it is not trained, and to evaluate."""

    recipe: Recipe
    folder: Path
    teacher: Path | None


def run(
    out: Path,
    *,
    data: str | os.PathLike | None = None,
    download: bool = False,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Path:
    """Trains, evaluates and reports; every part that is already there and complete is kept. Returns the report's
    path."""
    started = time.perf_counter()
    device = check_device(device)
    if download:
        load_dataset("cifar10", root=data, download=True)
    dataset, why = find_dataset(root=data)
    print(f"data: {why}", flush=True)
    folder = out / f"{dataset.name}-{device.type}"
    page = folder / "report.html"
    check_out(page)

    common: dict[str, Any] = {"data": data, "device": device}
    teacher = _Job(_recipe("demo-teacher", dataset.name, device), folder / "demo-teacher", None)
    print(f"\n{teacher.recipe.description} {teacher.recipe.schedule.epochs} epochs.", flush=True)
    train(teacher.recipe, out=teacher.folder, resume=True, progress=progress, **common)
    jobs = [teacher]
    for name in STUDENTS:
        recipe = _recipe(name, dataset.name, device)
        print(f"{recipe.description} {recipe.schedule.epochs} epochs, {SEEDS} seeds.", flush=True)
        # The checkpoint that is evaluated as the teacher is the one that is distilled from.
        given = None if recipe.base["name"] == "pgd_at" else teacher.folder / "last.pt"
        seeded = [recipe.override({"seed": seed}) for seed in range(SEEDS)]
        jobs += [_Job(each, folder / name / f"seed-{each.seed}", given) for each in seeded]
    count, attacked = EVALUATED[dataset.name] or "all", AUTOATTACKED[dataset.name]
    print(f"\nTraining, then evaluation on {count} test images, AutoAttack on {attacked} of them.", flush=True)
    _do_all(jobs, progress, common)

    runs = [job.folder for job in jobs]
    report.build(runs, page, title=f"fastrd demo: {dataset.name} on {device.type}", data=dataset)
    print(f"\n{report.table(runs)}\n\nreport: {page}\n{time.perf_counter() - started:.0f} s in all", flush=True)
    return page


def _recipe(name: str, dataset: str, device: torch.device) -> Recipe:
    """Returns the demo's recipe with what the data set and the machine change in it."""
    changes: dict[str, Any] = {"data.name": dataset}
    if dataset == "digits":
        changes |= DIGITS | (DIGITS_TEACHER if name == "demo-teacher" else DIGITS_STUDENT)
    elif device.type == "cuda":
        changes |= GPU
    return Recipe.load(name, changes)


def _do(job: _Job, listen: bool | Callable[[Progress], None], common: dict[str, Any]) -> None:
    """Trains and evaluates one run; of the students of one recipe the first makes the pictures of the report."""
    train(job.recipe, out=job.folder, resume=True, teacher=job.teacher, progress=False, **common)
    name, attacks = job.recipe.data.name, job.recipe.evaluation.attacks
    quick, figures = tuple(attack for attack in attacks if attack != "aa"), job.recipe.seed == 0
    evaluate_run(job.folder, attacks=quick, limit=EVALUATED[name], figures=figures, progress=listen, **common)
    if "aa" in attacks:
        add_autoattack(job.folder, limit=AUTOATTACKED[name], progress=listen, **common)


def _do_all(jobs: list[_Job], progress: bool, common: dict[str, Any]) -> None:
    """Runs the jobs, on a CPU in one process per core: steps of such small networks fill one core each."""
    if common["device"].type == "cuda":
        for job in jobs:
            _do(job, progress, common)
        return
    context = multiprocessing.get_context("spawn")  # forking after torch has started threads can hang
    processes = min(len(jobs), os.cpu_count() or 1)
    news: Any = context.Queue()
    with (
        ProcessPoolExecutor(processes, context, _begin, (news,)) as pool,
        tqdm(total=len(jobs), unit="run", disable=not progress, dynamic_ncols=True, bar_format=_BAR) as bar,
    ):
        running = [pool.submit(_in_process, job, common) for job in jobs]
        fractions: dict[str, float] = {}
        try:
            while not all(future.done() for future in running):
                try:
                    name, attack, fraction = news.get(timeout=0.5)
                except queue.Empty:
                    continue
                fractions[name] = fraction if attack == "aa" else fractions.get(name, 0.0)  # nearly all of the time
                bar.n = sum(fractions.values())
                bar.set_postfix_str(f"{name} {attack}")
        except BaseException:
            for child in multiprocessing.active_children():  # the pool would wait for its jobs, which take minutes
                child.terminate()
            raise
        for future in running:
            future.result()


_BAR = "{percentage:3.0f}%|{bar}| {n:.1f}/{total_fmt} runs [{elapsed}<{remaining}{postfix}]"


_news: Any = None  # the queue of this process of the pool, see `_begin`


def _begin(news: Any) -> None:
    """Makes this a process of the pool, which tells `news` how far it is."""
    global _news
    _news = news
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which outlives a process that is stopped
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent: Any = multiprocessing.parent_process()
    parent.join()  # returns however it ended
    os.kill(os.getpid(), signal.SIGTERM)


def _in_process(job: _Job, common: dict[str, Any]) -> None:
    name = f"{job.recipe.name}, seed {job.recipe.seed}"
    try:
        _do(job, lambda progress: _news.put((name, progress.attack, progress.fraction)), common)
    except Interrupted:
        os._exit(1)  # the state is saved; the pool would begin the next run here
