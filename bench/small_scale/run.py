"""A comparison small enough for a CPU, on real CIFAR-10: five students, three seeds, AutoAttack included.

    python bench/small_scale/run.py --work runs/small --out bench/results/small-scale-cifar10.json

Trains the two teachers (teacher.toml, clean-teacher.toml) and every (arm, seed) of ARMS on student.toml, evaluates the
last epoch's weights and writes one JSON. What is already there is kept, so it can be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ARMS = {
    "ARD": {"base.name": "ard"},
    "ARD+IGDM": {"base.name": "ard", "igdm.alpha": 10},
    "ARD+IGDM+GACD": {"base.name": "ard", "igdm.alpha": 10, "gacd.weight": 0.8, "gacd.negatives": 4096},
    "PGD-AT": {"base.name": "pgd_at"},
    "PGD-AT+VFD": {"base.name": "pgd_at", "vfd.lambda": 10},
}
SEEDS = (0, 1, 2)
CLEAN_IMAGES, AA_IMAGES = 2000, 200
METRICS = ("clean", "pgd20", "aa", "gd", "gc", "train_seconds")


def train_and_evaluate(arm: str, seed: int, work: str, data: str | None) -> dict:
    """One student, alone in its process."""
    import torch

    from fastrd import Recipe, train
    from fastrd.data import load_dataset
    from fastrd.evaluation import evaluate, gradient_alignment
    from fastrd.models import load_teacher

    torch.set_num_threads(1)
    run = Path(work) / f"{arm.lower().replace('+', '-')}-seed{seed}"
    done = run / "small-scale.json"
    if done.exists():
        return json.loads(done.read_text())
    recipe = Recipe.load(HERE / "student.toml", {"name": arm, "seed": seed, **ARMS[arm]})
    teachers = {"teacher": f"{work}/teacher/best.pt"} if arm.startswith("ARD") else {}
    if "vfd.lambda" in ARMS[arm]:
        teachers["clean_teacher"] = f"{work}/clean-teacher/best.pt"
    train(recipe, out=run, data=data, device="cpu", resume=True, progress=False, **teachers)

    student, robust = load_teacher(run / "last.pt"), load_teacher(f"{work}/teacher/best.pt")
    many = load_dataset("cifar10", root=data, test_limit=CLEAN_IMAGES)
    few = many.limit(test=AA_IMAGES)
    result = evaluate(student, many.x_test, many.y_test, attacks=("clean", "pgd20"), progress=False)
    attack = evaluate(
        student,
        few.x_test,
        few.y_test,
        attacks=("aa",),
        batch_size=AA_IMAGES,
        state_dir=run / ".evaluation",
        progress=False,
    )
    alignment = gradient_alignment(student, robust, many.x_test, many.y_test)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    record = {
        "arm": arm,
        "seed": seed,
        "clean": result["clean"]["accuracy"],
        "pgd20": result["pgd20"]["accuracy"],
        "aa": attack["aa"]["accuracy"],
        "gd": alignment["gd"],
        "gc": alignment["gc"],
        "train_seconds": sum(line["seconds"] for line in lines if line["kind"] == "epoch"),
        "aa_seconds": attack["aa"]["seconds"],
    }
    done.write_text(json.dumps(record))
    print(json.dumps(record), flush=True)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", default="runs/small", help="folder of the runs")
    parser.add_argument("--out", default=str(HERE.parent / "results" / "small-scale-cifar10.json"))
    parser.add_argument("--data", help="folder of CIFAR-10")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="students trained at the same time")
    arguments = parser.parse_args()
    for teacher in ("teacher", "clean-teacher"):
        command = [sys.executable, "-m", "fastrd.cli", "train", str(HERE / f"{teacher}.toml")]
        command += ["--out", f"{arguments.work}/{teacher}", "--resume", "--device", "cpu"]
        subprocess.run(command + (["--data", arguments.data] if arguments.data else []), check=True)
    with ProcessPoolExecutor(arguments.jobs) as pool:
        jobs = [
            pool.submit(train_and_evaluate, arm, seed, arguments.work, arguments.data)
            for seed in SEEDS
            for arm in ARMS
        ]
        records = [job.result() for job in jobs]
    write(Path(arguments.out), records, arguments)


def write(out: Path, records: list[dict], arguments: argparse.Namespace) -> None:
    import torch

    from fastrd import Recipe, load_teacher
    from fastrd.data import load_dataset
    from fastrd.evaluation import evaluate
    from fastrd.files import atomic_write

    test = load_dataset("cifar10", root=arguments.data, test_limit=CLEAN_IMAGES)
    teachers = {}
    for name in ("teacher", "clean-teacher"):
        model = load_teacher(f"{arguments.work}/{name}/best.pt")
        scores = evaluate(model, test.x_test, test.y_test, attacks=("clean", "pgd20"), progress=False)
        teachers[name] = {key: entry["accuracy"] for key, entry in scores.items()}
    summary = {}
    for arm in ARMS:
        rows = [record for record in records if record["arm"] == arm]
        summary[arm] = {
            metric: {
                "mean": statistics.mean(row[metric] for row in rows),
                "std": statistics.stdev(row[metric] for row in rows),
            }
            for metric in METRICS
        }
    document = {
        "what": "ARD, ARD+IGDM, ARD+IGDM+GACD, PGD-AT, PGD-AT+VFD on 5,000 real CIFAR-10 images, small CNN, last epoch",
        "conditions": {
            "device": f"CPU, {os.cpu_count()} cores, one thread per run, {arguments.jobs} runs at a time, shared machine",
            "cpu": _cpu(),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "test_images": {"clean, pgd20, gd, gc": CLEAN_IMAGES, "aa": AA_IMAGES},
            "epsilon": 8 / 255,
            "student": Recipe.load(HERE / "student.toml").to_dict(),
            "arms": ARMS,
        },
        "teachers": teachers,
        "summary": summary,
        "runs": records,
    }
    atomic_write(out, json.dumps(document, indent=1) + "\n")
    print(f"written: {out}")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


if __name__ == "__main__":
    main()
