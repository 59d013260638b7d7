"""How time and memory grow with a problem: `python -m bench.growth [--only NAME ...]`, then `--draw`.

Each series doubles or quadruples one size. The exponent is the slope of log(time) over log(size), by least squares over
the upper half of the sizes.
Times are medians of three runs, of one where a run takes over ten seconds. Writes bench/results/cpu-growth.json
(gpu-growth.json with CUDA) and, with --draw, docs/growth.png.
"""
# ruff: noqa: I001

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench.conftest import peak_memory  # first: it prepares the process, for which torch must not be there yet

import torch
import torch.nn.functional as F

from bench.sizes import CUDA, DEVICE, TINY, seconds
from fastrd import attacks, build_model
from fastrd.data import Augment, make_loader
from fastrd.losses.functional import distillation_kl, info_nce, nce_bank
from fastrd.models import Folded

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench" / "results" / f"{'gpu' if CUDA else 'cpu'}-growth.json"
Run = Callable[[], object]


def attack(batch: int = 128, width: int = 32, steps: int = 10) -> Run:
    model = build_model("cnn", num_classes=10, width=width).to(DEVICE, memory_format=torch.channels_last).eval()
    x = torch.rand(batch, 3, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last)
    objective = attacks.cross_entropy(torch.arange(batch, device=DEVICE) % 10)
    pgd = attacks.PGD(Folded(model, x[:2]), epsilon=8 / 255, step_size=2 / 255, steps=steps)
    return lambda: pgd(x, x, objective)


def distillation(classes: int) -> Run:
    student, teacher = (torch.randn(128, classes, device=DEVICE) for _ in range(2))
    student.requires_grad_()
    return lambda: distillation_kl(student, teacher, temperature=4.0).backward()


def bank(rows: int) -> Run:
    anchor = F.normalize(torch.randn(64, 128, device=DEVICE), dim=1).requires_grad_()
    rows_of_bank = F.normalize(torch.randn(rows, 128, device=DEVICE), dim=1)
    positives, labels = torch.randint(0, rows, (64,), device=DEVICE), torch.arange(rows, device=DEVICE) % 10
    options = {"negatives": 4096, "normalizer": float(rows), "labels": labels}
    return lambda: nce_bank(anchor, rows_of_bank, positives, **options).backward()


def contrast(rows: int) -> Run:
    a, c = (torch.randn(rows, 128, device=DEVICE, requires_grad=True) for _ in range(2))
    return lambda: info_nce(a, c).backward()


def epoch(images: int) -> Run:
    pixels = torch.zeros(images, 32, 32, 3, dtype=torch.uint8)
    labels = torch.arange(images) % 10
    loader = make_loader("resident", pixels, labels, batch_size=128, device=DEVICE, augment=Augment())
    return lambda: [None for _ in loader.epoch(0)]


def processes(count: int) -> Run:
    """One attack of 128 images in each, of one thread each; the pool is made before the time is taken."""
    pool = get_context("spawn").Pool(count, initializer=_prepare)
    pool.map(_attack, range(count), chunksize=1)
    return lambda: pool.map(_attack, range(count), chunksize=1)


def _prepare() -> None:
    global _run
    torch.set_num_threads(1)
    _run = attack()


def _attack(_: int) -> None:
    _run()


SERIES: dict[str, tuple[str, tuple[int, ...], Callable[[int], Run]]] = {
    "batch": ("PGD-10, CNN of width 32: images of a batch", (32, 64, 128, 256, 512, 1024), lambda n: attack(batch=n)),
    "width": ("PGD-10, 128 images: channels of the CNN", (8, 16, 32, 64, 128), lambda n: attack(width=n)),
    "steps": ("CNN of width 32, 128 images: steps of PGD", (1, 2, 5, 10, 20, 40), lambda n: attack(steps=n)),
    "classes": ("distillation_kl, 128 rows: classes", (10, 32, 100, 316, 1000), distillation),
    "bank": (
        "nce_bank, 64 anchors, k = 4,096, labels sorted each time: rows of the bank",
        (10_000, 31_623, 100_000, 316_228, 1_000_000),
        bank,
    ),
    "info_nce": ("info_nce, D = 128: N = M", (1024, 4096, 16_384, 100_000), contrast),
    "images": ("resident loader, 32x32: images of an epoch", (10_000, 31_623, 100_000, 316_228, 1_000_000), epoch),
    "processes": ("PGD-10, 128 images each: processes of one thread", (1, 2, 3, 4), processes),
}


def take(make: Callable[[int], Run], size: int) -> dict[str, float]:
    torch.manual_seed(0)
    run = make(size)
    first = seconds(run)
    median = statistics.median(seconds(run) for _ in range(1 if first > 10 else 3))
    return {"size": size, "seconds": median, "peak_bytes": peak_memory(run)}


def exponent(points: list[dict[str, float]]) -> float:
    upper = points[(len(points) - 1) // 2 :]
    logs = [(math.log(p["size"]), math.log(p["seconds"])) for p in upper]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def draw(document: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    series = document["series"]
    figure, axes = plt.subplots(2, math.ceil(len(series) / 2), figsize=(13, 6), layout="constrained")
    for place, (name, found) in zip(axes.flat, series.items(), strict=False):
        sizes = [point["size"] for point in found["points"]]
        place.loglog(sizes, [point["seconds"] for point in found["points"]], "o-")
        place.set(title=f"{name}: exponent {found['exponent']:.2f}", ylabel="seconds")
        place.xaxis.set_minor_formatter("")  # of a short axis the labels would overlap
        place.set_xlabel(found["title"].split(": ")[1])
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SERIES, default=list(SERIES))
    parser.add_argument("--draw", action="store_true", help="draw what the file holds, measure nothing")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    document = json.loads(options.out.read_text()) if options.out.exists() else {"series": {}}
    if options.draw:
        return draw(document, ROOT / "docs" / "growth.png")
    for name in options.only:
        title, sizes, make = SERIES[name]
        points = []
        for size in sizes[:2] if TINY else sizes:
            points.append(take(make, size))
            print(name, points[-1], file=sys.stderr, flush=True)
        document["series"][name] = {"title": title, "points": points, "exponent": round(exponent(points), 2)}
        document |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": DEVICE}
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
