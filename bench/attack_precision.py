"""How much weaker is an attack whose gradients come from bfloat16: docs/performance.md is made from this.

Real CIFAR-10, 10,000 training images. On fixed robust networks, in l-infinity and in l2: PGD from one start with
gradients in float32 and in bfloat16, verdicts by the network in float32. Then students that differ in
`attack.precision` alone, in pairs of one seed. Finished jobs are kept in the JSON file and skipped when the script is
started again. `--network` adds runs made elsewhere to the fixed networks.

    OMP_NUM_THREADS=1 python -m bench.attack_precision --data DATA --out bench/results/attack-precision.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from fastrd import Recipe, evaluate, train
from fastrd.attacks import PGD, PRECISIONS, cross_entropy, input_gradient, uniform_start
from fastrd.core.files import atomic_write
from fastrd.data import load_dataset
from fastrd.models import Folded, load_teacher

IMAGES, AUTOATTACK_IMAGES, BATCH = 2000, 200, 250
BALLS = {"linf": (8 / 255, 2 / 255), "l2": (128 / 255, 15 / 255)}  # radius, step
SEEDS = range(3)
RECIPE = {
    "name": "attack-precision",
    "data": {"name": "cifar10", "train_limit": 11000, "holdout": 1000},
    "optimizer": {"lr": 0.1, "nesterov": True},
    "validation": {"every": 1000, "steps": 0},
}
TEACHER = {
    **RECIPE,
    "student": {"arch": "resnet8"},
    "base": {"name": "pgd_at"},
    "attack": {"steps": 5, "step_size": "2.5/255"},
    "schedule": {"epochs": 6, "kind": "cosine", "warmup_epochs": 1},
    "seed": 100,
}
STUDENT = {
    **RECIPE,
    "student": {"arch": "cnn", "options": {"width": 16}},
    "base": {"name": "ard"},
    "attack": {"steps": 10},
    "schedule": {"epochs": 10, "kind": "cosine", "warmup_epochs": 1},
}


class Study:
    def __init__(self, data: str | None, runs: Path, networks: dict[str, str]) -> None:
        self.runs, self.data, self.networks = runs, load_dataset("cifar10", root=data, train_limit=11000), networks

    def trained(self, name: str, table: dict) -> torch.nn.Module:
        teacher = None if table is TEACHER else self.runs / "teacher"
        options = {"data": self.data, "teacher": teacher, "device": "cpu", "progress": False, "resume": True}
        train(Recipe.from_dict(table), out=self.runs / name, **options)
        return load_teacher(self.runs / name, **self.data.network_shape)

    def student(self, seed: int, precision: str) -> torch.nn.Module:
        attack = {**STUDENT["attack"], "precision": precision}
        return self.trained(f"student-{seed}-{precision}", {**STUDENT, "seed": seed, "attack": attack})

    def accuracies(self, network: Callable[[], torch.nn.Module], attacks: tuple[str, ...], limit: int | None) -> dict:
        x, y = self.data.x_test[:limit], self.data.y_test[:limit]
        found = evaluate(network(), x, y, attacks=attacks, progress=False)
        return {name: round(100 * entry["accuracy"], 2) for name, entry in found.items()}

    def compared(self, network: Callable[[], torch.nn.Module], norm: str) -> dict:
        """Shares, in percent: of signs of the first gradient that differ, of images broken, of verdicts that differ."""
        epsilon, step_size = BALLS[norm]
        x = torch.tensor(self.data.x_test[:IMAGES]).permute(0, 3, 1, 2).div(255)
        x = x.contiguous(memory_format=torch.channels_last)
        y, folded = torch.tensor(self.data.y_test[:IMAGES]), Folded(network(), x[:2])
        result = {"clean": _share(torch.cat([folded(part) for part in x.split(BATCH)]).argmax(1) == y)}
        for steps in (10, 20):
            broken, signs, ends = {}, {}, {}
            for name, seed in (("fp32", 0), ("bf16", 0), ("fp32, another start", 1)):
                generator, precision = torch.Generator().manual_seed(seed), name[:4]
                ball = {"epsilon": epsilon, "step_size": step_size, "norm": norm}
                attack = PGD(folded, **ball, steps=steps, precision=precision)
                parts: list[tuple[torch.Tensor, ...]] = []
                for clean, label in zip(x.split(BATCH), y.split(BATCH), strict=True):
                    start, objective = uniform_start(clean, epsilon, generator, norm=norm), cross_entropy(label)
                    end = attack(clean, start, objective)
                    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                        sign = input_gradient(folded, start, objective).sign()
                    parts.append((sign, end, folded(end).argmax(1) != label))
                signs[name], ends[name], broken[name] = map(torch.cat, zip(*parts, strict=True))
            plain, half, again = broken.values()
            result[f"pgd{steps}"] = {
                "broken": {name: _share(verdict) for name, verdict in broken.items()},
                "only fp32": _share(plain & ~half),
                "only bf16": _share(half & ~plain),
                "only one of two starts": _share(plain ^ again),
                "signs differ": _share(signs["fp32"] != signs["bf16"]),
                "pixels differ": _share((ends["fp32"] - ends["bf16"]).abs() > 1e-6),
            }
        return result

    def jobs(self) -> dict[str, Callable[[], dict]]:
        teacher = partial(self.trained, "teacher", TEACHER)
        fixed = {"resnet8": teacher, "cnn": partial(self.student, 0, "fp32")}
        for name, run in self.networks.items():
            fixed[name] = partial(load_teacher, run, **self.data.network_shape)
        jobs: dict[str, Callable[[], dict]] = {}
        for name, network in fixed.items():
            jobs[f"fixed/{name}"] = partial(self.compared, network, "linf")
            jobs[f"fixed/{name}, l2"] = partial(self.compared, network, "l2")
        students = [(seed, precision) for seed in SEEDS for precision in PRECISIONS]
        for seed, precision in students:
            network = partial(self.student, seed, precision)
            jobs[f"student/{seed}/{precision}"] = partial(self.accuracies, network, ("clean", "pgd20"), None)
        for seed, precision in students:
            network = partial(self.student, seed, precision)
            jobs[f"autoattack/{seed}/{precision}"] = partial(self.accuracies, network, ("aa",), AUTOATTACK_IMAGES)
        return jobs


def _share(verdicts: torch.Tensor) -> float:
    return round(100 * verdicts.float().mean().item(), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with the CIFAR files")
    parser.add_argument("--out", type=Path, default=Path("bench/results/attack-precision.json"))
    parser.add_argument("--runs", type=Path, default=Path("runs/attack-precision"), help="folder of the networks")
    parser.add_argument("--network", action="append", default=[], metavar="NAME=RUN", help="another robust network")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(options.out.read_text()) if options.out.exists() else {"torch": torch.__version__, "jobs": {}}
    networks = dict(each.split("=", 1) for each in options.network)
    for key, job in Study(options.data, options.runs, networks).jobs().items():
        if key not in results["jobs"]:
            started = time.process_time()
            results["jobs"][key] = {**job(), "cpu_seconds": round(time.process_time() - started, 1)}
            atomic_write(options.out, json.dumps(results, indent=1) + "\n")
            print(key, results["jobs"][key], flush=True)


if __name__ == "__main__":
    main()
