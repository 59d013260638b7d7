"""Everything that is to be known of a GPU, in commands of a few minutes each: `python -m bench.gpu_report`.

Each call takes up the stages that no earlier call has finished, until its time is over; the call that finishes the
last one writes bench/results/<gpu>.json and a page of it. A stage leaves a file in bench/raw/<gpu>/ when it has
succeeded, and none before; a failed stage is tried again by the next call.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.test_step import CASES

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ("pgd_step", "distillation", "info_nce", "nce_bank", "loaders")


@dataclass(frozen=True)
class Stage:
    name: str
    minutes: float  # what it is expected to take at most; it is stopped at three times that
    path: str  # of tests or benchmarks
    words: tuple[str, ...] = ()  # all of them in the names of those to run

    @property
    def writes_benchmarks(self) -> bool:
        return self.path.startswith("bench/")

    @property
    def arguments(self) -> list[str]:
        """Of pytest."""
        chosen = ["-k", " and ".join(self.words)] if self.words else []
        return [self.path, *chosen, *([] if self.writes_benchmarks else ["-m", "not slow"])]


def stages(*, dry: bool = False) -> list[Stage]:
    """Right before fast: speed is written down only of kernels and steps just found right."""
    tests = {
        "kernels": "tests/kernels",
        "step": "tests/test_fast_step.py",
        "loaders": "tests/test_loaders.py",
    }
    found = [Stage(f"tests-{name}", 3, path) for name, path in tests.items()]
    found += [Stage(name, 2, f"bench/test_{name}.py") for name in BENCHMARKS]
    for name in ("matrix_product", "attack", "first_compiled_step"):
        found.append(Stage(f"step-{name}", 2, f"bench/test_step.py::test_{name}"))
    for case in CASES:
        for batch in (8,) if dry else (128, 512):
            words = (f"[{case}-", f"-{batch}]")
            found.append(Stage(f"step-{case}-{batch}", 4, "bench/test_step.py::test_step", words))
    return found


def report(folder: Path, result: Path, minutes: float, *, dry: bool = False) -> bool:
    """Run what is left, for `minutes`; True when all of it is there and `result` is written.

    dry: tests are only collected, benchmarks run on tiny problems.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    chosen = stages(dry=dry)
    todo = [stage for stage in chosen if not (folder / f"{stage.name}.json").exists()]
    print(f"{len(chosen) - len(todo)} of {len(chosen)} stages done before", flush=True)
    for stage in todo:
        left = deadline - time.monotonic()
        if left < 60 * stage.minutes and stage is not todo[0]:
            print("time is up: the same command goes on", flush=True)
            return False
        if not _run(stage, folder, min(left, 180 * stage.minutes), dry):
            return False
    _write(chosen, folder, result)
    return True


def _run(stage: Stage, folder: Path, seconds: float, dry: bool) -> bool:
    part, log = folder / f".{stage.name}.part", folder / f"{stage.name}.log"
    command = [sys.executable, "-m", "pytest", "-q", *stage.arguments]
    if stage.writes_benchmarks:
        command += ["--benchmark-only", f"--benchmark-json={part}"]
    elif dry:
        command.append("--collect-only")
    print(f"{stage.name}: {' '.join(command[2:])}", flush=True)
    # Started from a test, it must not take itself for a worker of the tests.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    if dry:
        environment["FASTRD_BENCH_TINY"] = "1"
    began = time.monotonic()
    with log.open("w") as output:
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                check=False,
            )
            problem = f"exit status {done.returncode}" if done.returncode else None
        except subprocess.TimeoutExpired:
            problem = f"stopped after {seconds:.0f} s"
    taken = time.monotonic() - began
    lines = log.read_text(errors="replace").splitlines()
    if problem:
        part.unlink(missing_ok=True)
        print("\n".join(lines[-30:]))
        print(f"{stage.name}: {problem}; {log} has it all", flush=True)
        return False
    if not stage.writes_benchmarks:
        part.write_text(json.dumps({"summary": lines[-1], "seconds": round(taken, 1)}))
    part.replace(folder / f"{stage.name}.json")
    print(f"{stage.name}: done in {taken:.0f} s; {lines[-1].strip('= ')}", flush=True)
    return True


def _write(stages: list[Stage], folder: Path, result: Path) -> None:
    """One pytest-benchmark document of all stages, with the tests' last words beside it, and a page."""
    merged: dict = {"benchmarks": [], "tests": {}}
    for stage in stages:
        document = json.loads((folder / f"{stage.name}.json").read_text())
        if not stage.writes_benchmarks:
            merged["tests"][stage.name] = document
            continue
        for benchmark in document["benchmarks"]:
            benchmark["stats"].pop("data", None)
        merged["benchmarks"] += document.pop("benchmarks")
        merged |= document
    part = result.with_suffix(".part")
    part.write_text(json.dumps(merged, indent=1) + "\n")
    part.replace(result)
    page = folder / "report.html"
    subprocess.run(
        [sys.executable, "-m", "fastrd", "report", "--bench", str(result), "--out", str(page)],
        check=True,
        cwd=ROOT,
    )
    print(f"written: {result}, {page}")


def main(argv: list[str] | None = None) -> int:
    """0 when the report is complete, 3 when the same command must be called again, 1 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="stop before this (default: 8)")
    parser.add_argument("--again", action="store_true", help="forget the stages that are done")
    parser.add_argument(
        "--dry-run",
        metavar="DIR",
        type=Path,
        help="try it out on this machine, everything tiny and put into DIR",
    )
    arguments = parser.parse_args(argv)
    if arguments.dry_run:
        folder, result = arguments.dry_run / "raw", arguments.dry_run / "dry-run.json"
    elif not torch.cuda.is_available():
        print("no GPU that torch can use (`fastrd doctor` says why): nothing measured", file=sys.stderr)
        return 1
    else:
        gpu = re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
        folder, result = ROOT / "bench" / "raw" / gpu, ROOT / "bench" / "results" / f"{gpu}.json"
    if arguments.again:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if report(folder, result, arguments.minutes, dry=arguments.dry_run is not None) else 3


if __name__ == "__main__":
    sys.exit(main())
