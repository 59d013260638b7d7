"""GACD's estimators against their base losses, at a size that a CPU core finishes: docs/gacd.md is made from this.

Real images: the digits, CIFAR-10, CIFAR-100. Each job is one training run and its accuracies, clean and under PGD-20,
on held-out training images (by which estimator, temperature and weight are chosen) and on test images (which are
reported), and for CIFAR a linear probe of the features on the other CIFAR. Finished jobs are kept in the JSON file and
skipped when the script is started again.

    OMP_NUM_THREADS=1 python bench/gacd_study.py --data DATA --out bench/results/gacd-study.json
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from fastrd import Recipe, evaluate, train
from fastrd.core.files import atomic_write
from fastrd.data import load_dataset, split_holdout
from fastrd.evaluation import linear_probe
from fastrd.losses import contrastive
from fastrd.losses.heads import linear_head
from fastrd.models import load_teacher

SEEDS = 3
HEAD_RATE = "learning rate of the heads over that of the network"
VARIANTS = {
    "alone": None,
    "strict": {"estimator": "strict"},
    "crd": {"estimator": "crd"},
    "infonce t=0.07": {"estimator": "infonce", "temperature": 0.07},
    "infonce t=0.2": {"estimator": "infonce", "temperature": 0.2},
    "infonce t=0.2 bank": {"estimator": "infonce", "temperature": 0.2, "candidates": "bank"},
    "infonce t=0.07 w=0.2": {"estimator": "infonce", "temperature": 0.07, "weight": 0.2},
    # What makes "strict" explode: each takes one cause away. HEAD_RATE is no option of the package.
    "strict k=64": {"estimator": "strict", "negatives": 64},
    "strict t=0.5": {"estimator": "strict", "temperature": 0.5},
    "strict heads/10": {"estimator": "strict", HEAD_RATE: 0.1},
    "strict heads fixed": {"estimator": "strict", HEAD_RATE: 0.0},
}
CAUSES = ("strict k=64", "strict t=0.5", "strict heads/10", "strict heads fixed")
ORDER = (
    "alone",
    "infonce t=0.2",
    "strict",
    "infonce t=0.07",
    "crd",
    "infonce t=0.2 bank",
    "infonce t=0.07 w=0.2",
)
CNN = {"arch": "cnn", "options": {"width": 16}}
COMMON = {
    "student": CNN,
    "optimizer": {"lr": 0.1, "nesterov": True},
    "training": {"batch_size": 64},
    "validation": {"every": 1000, "steps": 0},
}
SETTINGS = {
    # 12 epochs with half an epoch of warm-up: where "strict" was seen to wreck training.
    "digits": {
        "data": {"name": "digits", "holdout": 300},
        "attack": {"epsilon": 0.15, "step_size": 0.06, "steps": 5},
        "schedule": {"epochs": 12, "kind": "cosine", "warmup_epochs": 0.5},
        "negatives": 1024,
    },
    "cifar10": {
        "data": {"name": "cifar10", "train_limit": 2500, "holdout": 500},
        "attack": {"steps": 5, "step_size": "2.5/255"},
        "schedule": {"epochs": 6, "kind": "cosine", "warmup_epochs": 1},
        "negatives": 2048,
    },
}
SETTINGS["cifar100"] = {**SETTINGS["cifar10"], "data": {**SETTINGS["cifar10"]["data"], "name": "cifar100"}}
TEACHERS = {  # PGD-AT too, wider or on more images
    "digits": {"student.options.width": 32, "schedule.epochs": 20},
    "cifar10": {"student.options.width": 24, "schedule.epochs": 4, "data.train_limit": 10500},
}
TEACHERS["cifar100"] = TEACHERS["cifar10"]
OTHER = {"cifar10": "cifar100", "cifar100": "cifar10"}


def jobs() -> list[tuple[str, int, str, str]]:
    """(setting, seed, base, variant), in an order in which what is finished early can be compared."""
    found = []
    for variants, settings in (
        (ORDER[:5], ["digits"]),
        (("alone", "infonce t=0.2", "infonce t=0.07"), ["cifar10", "cifar100"]),
        (CAUSES, ["digits"]),
        (ORDER[5:], ["digits"]),
        (("strict", "crd"), ["cifar10", "cifar100"]),
    ):
        for setting in settings:
            bases = ("pgd_at",) if variants == CAUSES else ("pgd_at", "ard")
            found += [(setting, s, b, v) for s in range(SEEDS) for v in variants for b in bases]
    return found


@contextmanager
def heads_at(rate: float) -> Iterator[None]:
    """Multiplies the gradients of all heads made inside the block."""

    def scaled(*args: object) -> torch.nn.Linear:
        head = linear_head(*args)
        for parameter in head.parameters():
            parameter.register_hook(lambda gradient: rate * gradient)
        return head

    with mock.patch.object(contrastive, "linear_head", scaled):
        yield


class Study:
    def __init__(self, data: str | None, folder: Path) -> None:
        self.root, self.folder = data, folder
        self.loaded: dict = {}

    def recipe(self, setting: str, base: str, gacd: dict | None, seed: int) -> Recipe:
        table = {"name": "study", **COMMON, **SETTINGS[setting], "base": {"name": base}, "seed": seed}
        negatives = table.pop("negatives")
        if gacd is not None:
            table["gacd"] = {"weight": 0.8, "negatives": negatives, **gacd}
        return Recipe.from_dict(table)

    def data(self, setting: str):
        """The data set of a setting; 1,000 test images of the CIFARs."""
        if setting not in self.loaded:
            limit = SETTINGS[setting]["data"].get("train_limit")
            test_limit = None if setting == "digits" else 1000
            self.loaded[setting] = load_dataset(
                SETTINGS[setting]["data"]["name"], root=self.root, train_limit=limit, test_limit=test_limit
            )
        return self.loaded[setting]

    @functools.cache  # noqa: B019
    def teacher(self, setting: str) -> Path:
        run = self.folder / f"{setting}-teacher"
        recipe = self.recipe(setting, "pgd_at", None, 100).override({"training.ema": 0.99, **TEACHERS[setting]})
        data = load_dataset(recipe.data.name, root=self.root, train_limit=recipe.data.train_limit, test_limit=100)
        train(recipe, out=run, data=data, resume=True, device="cpu", progress=False)
        return run

    def accuracies(self, network, x, y, setting: str) -> dict[str, float]:
        epsilon = self.recipe(setting, "pgd_at", None, 0).attack.epsilon
        options = {"epsilon": epsilon, "step_size": epsilon / 4, "progress": False}
        found = evaluate(network, x, y, attacks=("clean", "pgd20"), **options)
        return {name: round(100 * entry["accuracy"], 2) for name, entry in found.items()}

    def probe(self, network, setting: str) -> dict[str, float]:
        other = self.data(OTHER[setting])
        fitted = linear_probe(network, other.x_train, other.y_train, num_classes=other.num_classes)
        return self.accuracies(fitted, other.x_test[:500], other.y_test[:500], setting)

    def run(self, setting: str, seed: int, base: str, variant: str) -> dict:
        gacd = dict(VARIANTS[variant] or {})
        rate = gacd.pop(HEAD_RATE, 1.0)
        data, recipe = self.data(setting), self.recipe(setting, base, gacd or None, seed)
        with heads_at(rate), tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            trained = train(recipe, out=out, data=data, teacher=self.teacher(setting), device="cpu", progress=False)
            lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        held_out = split_holdout(data, recipe.data.holdout, seed=0)[1]
        student = trained.student
        result = {
            "held_out": self.accuracies(student, np.asarray(data.x_train[held_out]), data.y_train[held_out], setting),
            "test": self.accuracies(student, data.x_test, data.y_test, setting),
        }
        if setting in OTHER:
            result["probe"] = self.probe(student, setting)
        if gacd:
            result["log"] = [
                {key: round(line[key], 4) for key in ("gacd", "misranked", "mi_bound") if key in line}
                for line in lines
                if line["kind"] == "epoch"
            ]
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with the CIFAR files")
    parser.add_argument("--out", type=Path, default=Path("bench/results/gacd-study.json"))
    parser.add_argument("--runs", type=Path, default=Path("runs/gacd-study"), help="folder of the teachers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(options.data, options.runs)
    results = json.loads(options.out.read_text()) if options.out.exists() else {"teachers": {}, "jobs": {}}
    for job in jobs():
        setting, key = job[0], "/".join(map(str, job))
        if setting not in results["teachers"]:
            data = study.data(setting)
            network = load_teacher(study.teacher(setting), **data.network_shape)
            results["teachers"][setting] = study.accuracies(network, data.x_test, data.y_test, setting)
        if key in results["jobs"]:
            continue
        started = time.process_time()
        results["jobs"][key] = {**study.run(*job), "cpu_seconds": round(time.process_time() - started, 1)}
        atomic_write(options.out, json.dumps(results, indent=1) + "\n")
        print(key, results["jobs"][key]["test"], results["jobs"][key]["cpu_seconds"], flush=True)


if __name__ == "__main__":
    main()
