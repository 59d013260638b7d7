"""Speed of an attack alone, beside a busy process and beside another attack, for ways in which threads wait.

python -m bench.busy_machine [--seconds 10] [--out bench/results/cpu-busy-machine.json]

Each figure is the median of three processes. Other processes must be quiet: the load average before is written down.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WAYS: dict[str, dict[str, str]] = {
    "default": {},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=5000": {"GOMP_SPINCOUNT": "5000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}
BESIDE = ("alone", "busy loop", "the same")
REPETITIONS = 3

ATTACK = """
import sys, time, torch
from fastrd import attacks, build_model
from fastrd.models import Folded
torch.manual_seed(0)
x, y = torch.rand(128, 3, 32, 32).contiguous(memory_format=torch.channels_last), torch.arange(128) % 10
model = build_model("cnn", num_classes=10, width=24).to(memory_format=torch.channels_last).eval()
attack = attacks.PGD(Folded(model, x[:2]), epsilon=8 / 255, step_size=2 / 255, steps=5)
attack(x, x, attacks.cross_entropy(y))
print("ready", flush=True)
sys.stdin.readline()
images, began = 0, time.perf_counter()
while time.perf_counter() - began < float(sys.argv[1]):
    attack(x, x, attacks.cross_entropy(y))
    images += len(x)
print(images / (time.perf_counter() - began), flush=True)
"""


def measure(way: dict[str, str], beside: str, seconds: float) -> float:
    """Images/s of the attack with as many threads as cores."""
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", ATTACK, str(seconds)]
    count = 2 if beside == "the same" else 1
    attacks = [subprocess.Popen(command, cwd=ROOT, env=clean | way, **pipes) for _ in range(count)]
    busy = None
    try:
        for attack in attacks:
            attack.stdout.readline()
        if beside == "busy loop":
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for attack in attacks:
            attack.stdin.write("\n")
            attack.stdin.flush()
        return statistics.fmean(float(attack.communicate()[0]) for attack in attacks)
    finally:
        for process in [*attacks, *([busy] if busy else [])]:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "cpu-busy-machine.json")
    options = parser.parse_args()
    before = os.getloadavg()[0]
    speeds = {
        name: {
            beside: round(statistics.median(measure(way, beside, options.seconds) for _ in range(REPETITIONS)), 1)
            for beside in BESIDE
        }
        for name, way in WAYS.items()
    }
    document = {
        "what": "images/s of PGD-5 on the CNN of width 24, batch 128, 32x32; beside `the same`: of each of the two",
        "cpus": os.cpu_count(),
        "cpu": platform.processor() or platform.machine(),
        "load_average_before": round(before, 2),
        "quiet": before < 0.5,
        "images_per_s": speeds,
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
