"""`fastrd demo`: a robust teacher, three students, their evaluation and a report, on real images, in minutes."""

from __future__ import annotations

import multiprocessing
import os
import queue
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import report
from .core.arguments import check_device
from .data import find_dataset, load_dataset
from .evaluation import Progress
from .recipe import Recipe
from .workflow import evaluate_run, train

STUDENTS = ("demo-ard", "demo-igdm", "demo-gacd")
EVALUATED = 50  # test images; AutoAttack's cost per robust image decides it on a CPU

# 8x8 digits have 16 grey levels and cost next to nothing: a radius that matters there, all the images, more epochs.
DIGITS: dict[str, Any] = {
    "data.train_limit": None,
    "data.holdout": 100,
    "attack.epsilon": 0.15,
    "attack.step_size": 0.06,
}
DIGITS_EPOCHS = 12
# A GPU does the same job at a size where robustness starts to look like the field's.
GPU: dict[str, Any] = {
    "data.train_limit": None,
    "data.holdout": 1000,
    "training.batch_size": 128,
    "attack.steps": 10,
}
GPU |= {"attack.step_size": "2/255", "student.options.width": 64}
GPU_EPOCHS = 30


def run(
    out: Path,
    *,
    data: str | os.PathLike | None = None,
    download: bool = False,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Path:
    """Trains, evaluates and reports; every part that is already there and complete is kept. Returns the report's path."""
    started = time.perf_counter()
    device = check_device(device)
    if download:
        load_dataset("cifar10", root=data, download=True)
    dataset, why = find_dataset(root=data)
    print(f"data: {why}", flush=True)
    overrides = _overrides(dataset.name, device)
    folder = out / f"{dataset.name}-{device.type}"
    common: dict[str, Any] = {"data": data, "device": device, "progress": progress}

    def trained(name: str, **teachers: Any) -> Path:
        recipe = Recipe.load(name, overrides)
        print(f"\n{recipe.description} {recipe.schedule.epochs} epochs.", flush=True)
        train(recipe, out=folder / name, resume=True, **teachers, **common)
        return folder / name

    teacher = trained("demo-teacher")
    runs = [teacher, *(trained(name, teacher=teacher / "best.pt") for name in STUDENTS)]
    print(f"\nEvaluation on {EVALUATED} test images, AutoAttack last.", flush=True)
    _evaluate_all(runs, **common)

    title = f"fastrd demo: {dataset.name} on {device.type}"
    page = report.build(runs, folder / "report.html", title=title, data=dataset)
    print(f"\n{report.table(runs)}\n\nreport: {page}\n{time.perf_counter() - started:.0f} s in all", flush=True)
    return page


def _overrides(dataset: str, device: torch.device) -> Mapping[str, Any]:
    """What the data set and the machine change in the demo's recipes."""
    changes: dict[str, Any] = {"data.name": dataset}
    if dataset == "digits":
        changes |= DIGITS | {"schedule.epochs": DIGITS_EPOCHS}
    elif device.type == "cuda":
        changes |= GPU | {"schedule.epochs": GPU_EPOCHS}
    return changes


def _evaluate_all(runs: list[Path], *, device: torch.device, progress: bool, **common: Any) -> None:
    """On a CPU one process per core: AutoAttack on so few images is thousands of small steps that fill one core
    each."""
    options = {"limit": EVALUATED, "batch_size": EVALUATED, "figures": True, "device": device, **common}
    if device.type == "cuda":
        for path in runs:
            evaluate_run(path, progress=progress, **options)
        return
    context = multiprocessing.get_context("spawn")  # forking after torch has started threads can hang
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(min(len(runs), os.cpu_count() or 1), context, partial(torch.set_num_threads, 1)) as pool,
        tqdm(total=len(runs), unit="run", disable=not progress, dynamic_ncols=True, bar_format=_BAR) as bar,
    ):
        news = manager.Queue()
        jobs = [pool.submit(_evaluate_one, path, news, options) for path in runs]
        fractions = dict.fromkeys((path.name for path in runs), 0.0)
        try:
            while not all(job.done() for job in jobs):
                try:
                    name, attack, fraction = news.get(timeout=0.5)
                except queue.Empty:
                    continue
                if attack == "aa":  # nearly all of the time
                    fractions[name] = fraction
                bar.n = sum(fractions.values())
                bar.set_postfix_str(f"{name} {attack}")
        except BaseException:
            for child in multiprocessing.active_children():  # the pool would wait for its jobs, which take minutes
                child.terminate()
            raise
        for job in jobs:
            job.result()


_BAR = "{percentage:3.0f}%|{bar}| {n:.1f}/{total_fmt} runs [{elapsed}<{remaining}{postfix}]"


def _evaluate_one(path: Path, news: queue.Queue, options: dict[str, Any]) -> None:
    def listen(progress: Progress) -> None:
        news.put((path.name, progress.attack, progress.fraction))

    evaluate_run(path, progress=listen, **options)
