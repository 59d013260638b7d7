"""Everything that is to be known of a GPU, the most valuable first: `python3 -m bench.gpu_report`, again until it says
"done".

It needs no installation and no network, only torch, Triton, pytest, pytest-benchmark and pytest-xdist. The plan is a
list of stages, the essential ones in the first 12 minutes, half an hour in all. A call runs those that no earlier call
has begun, then those that failed, for as long as --minutes allow. After each stage bench/results/<gpu>.json and a page
in bench/raw/<gpu>/ say what is known so far. A stage that fails, or takes more than twice its time, costs its own
figures alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fastrd.core.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
DONE, NO_GPU, FAILED, UNFINISHED = 0, 1, 3, 4
GRACE = 5  # seconds a stopped stage has to end
ESSENTIAL_MINUTES = 12  # are enough for the stages up to ESSENTIAL, where a GPU is at hand for 15
ESSENTIAL = "step-ard-igdm-reference-tf32-512"


@dataclass(frozen=True)
class Stage:
    name: str
    seconds: float  # what it is expected to take; it is stopped at twice that
    arguments: tuple[str, ...]  # of pytest

    @property
    def measures(self) -> bool:
        return self.arguments[0].startswith("bench/")


@dataclass(frozen=True)
class Outcome:
    stage: str
    passed: bool
    seconds: float
    summary: str  # the last line of its log


def plan() -> list[Stage]:
    """The stages by value, up to ESSENTIAL within ESSENTIAL_MINUTES. Right before fast; the goals before the rest.

    Goals on an H200 in bf16 at batch 512: 8,000 images/s of ARD+IGDM, which takes 483 TFLOP/s, 47 to 64 % of what the
    tensor cores do; 1,600 of AdaAD, half of its ceiling of 3,214; 10 times the reference in IEEE float32, 4 times that
    in tf32.
    """

    def step(case: str, variant: str, seconds: float, batch: int = 512) -> Stage:
        name = re.sub("[^a-z0-9]+", "-", f"step {case} {variant} {batch}".lower())
        return Stage(name, seconds, (f"bench/test_step.py::test_step[{case}-{variant}-{batch}]",))

    def kernel(name: str, variant: str, seconds: float) -> Stage:
        words = "eager and not compiled" if variant == "eager" else variant
        return Stage(f"{name}-{variant.replace(' ', '-')}", seconds, (f"bench/test_{name}.py", "-k", words))

    kernels = ("info_nce", "nce_bank", "distillation", "pgd_step")
    chosen = ("-m", "triton and not slow", "-k", "not planted")
    numerics = ("tests/kernels", *chosen, "-n", "auto", "--maxprocesses", "12", "--dist", "worksteal")
    return [
        Stage("smoke", 110, ("tests/test_gpu_steps.py", "tests/kernels/test_cuda.py")),
        Stage("numerics", 220, numerics),
        *(kernel(name, "ours", 35) for name in kernels),
        step("ARD+IGDM", "ours, bf16", 130),
        step("ARD+IGDM", "reference", 60),
        step("ARD+IGDM", "reference, tf32", 45),
        step("ARD+IGDM", "ours, tf32", 110),
        step("ARD+IGDM", "ours", 110),
        step("AdaAD", "ours, bf16", 130),
        step("AdaAD", "reference", 70),
        step("AdaAD", "reference, tf32", 50),
        Stage("matrix-products", 15, ("bench/test_step.py::test_matrix_product",)),
        *(kernel(name, variant, 25) for variant in ("compiled", "eager") for name in kernels),
        Stage("loaders", 60, ("bench/test_loaders.py", "-k", "cifar10-resident-1 or cifar10-torch-1")),
        Stage("captured-steps", 70, ("tests/test_fast_step.py", "-k", "captured_step")),
        Stage("first-compiled-step", 130, ("bench/test_step.py::test_first_compiled_step[cached]",)),
    ]


def report(stages: Sequence[Stage], folder: Path, result: Path, minutes: float) -> int:
    """Run what is left of the stages for `minutes`. Returns DONE, FAILED where one has, or UNFINISHED."""
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    outcomes = _outcomes(folder)
    failed = [stage for stage in stages if stage.name in outcomes and not outcomes[stage.name].passed]
    todo = [stage for stage in stages if stage.name not in outcomes] + failed
    print(f"{len(stages) - len(todo)} of {len(stages)} stages passed before", flush=True)
    for place, stage in enumerate(todo):
        left = deadline - time.monotonic()
        if left < stage.seconds and place:
            continue  # a shorter one may fit
        outcome = _run(stage, folder, min(left, 2 * stage.seconds))
        atomic_write(folder / f"{stage.name}.outcome", json.dumps(asdict(outcome)))
        write(stages, folder, result)
    outcomes = _outcomes(folder)
    if any(not outcome.passed for outcome in outcomes.values()):
        print(f"failed: {', '.join(o.stage for o in outcomes.values() if not o.passed)}")
        return FAILED
    if len(outcomes) < len(stages):
        print(f"{len(stages) - len(outcomes)} stages are left: the same command goes on")
        return UNFINISHED
    print("done")
    return DONE


def _outcomes(folder: Path) -> dict[str, Outcome]:
    found = [Outcome(**json.loads(path.read_text())) for path in folder.glob("*.outcome")]
    return {outcome.stage: outcome for outcome in found}


def _run(stage: Stage, folder: Path, limit: float) -> Outcome:
    figures, log = folder / f"{stage.name}.json", folder / f"{stage.name}.log"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *stage.arguments]
    if stage.measures:
        command += ["--benchmark-only", f"--benchmark-json={figures}"]
    print(f"{stage.name}: {' '.join(command[2:])}", flush=True)
    # Started from a test, it must not take itself for a worker of the tests.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    began = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
            problem = f"exit status {status}: " if status else ""
        except subprocess.TimeoutExpired:
            problem = f"stopped after {limit:.0f} s: "
        finally:
            _end(process)  # with all that it started, also where this process is told to end
    lines = log.read_text(errors="replace").splitlines() or [""]
    if problem:
        print("\n".join(lines[-30:]))
    outcome = Outcome(stage.name, not problem, round(time.monotonic() - began, 1), problem + lines[-1].strip("= "))
    print(
        f"{stage.name}: {'passed' if outcome.passed else 'FAILED'} in {outcome.seconds} s; {outcome.summary}",
        flush=True,
    )
    return outcome


def _end(process: subprocess.Popen) -> None:
    """Ends a process and its children: they are a process group of their own."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(GRACE)
        except (ProcessLookupError, PermissionError):
            return
        except subprocess.TimeoutExpired:
            pass


def write(stages: Sequence[Stage], folder: Path, result: Path) -> None:
    """One pytest-benchmark document of all figures there are, with every stage's outcome beside them, and a page."""
    outcomes = _outcomes(folder)
    merged: dict = {"benchmarks": [], "stages": [asdict(o) for s in stages if (o := outcomes.get(s.name))]}
    for stage in stages:
        try:
            document = json.loads((folder / f"{stage.name}.json").read_text())
        except (FileNotFoundError, ValueError):  # none, or stopped while it was written
            continue
        for benchmark in document["benchmarks"]:
            benchmark["stats"].pop("data", None)
        merged["benchmarks"] += document.pop("benchmarks")
        merged |= document
    atomic_write(result, json.dumps(merged, indent=1) + "\n")
    _page(stages, outcomes, merged["benchmarks"], folder / "report.html", result)
    print(f"written: {result}", flush=True)


def _page(stages: Sequence[Stage], outcomes: dict[str, Outcome], measured: list, page: Path, result: Path) -> None:
    from fastrd.report import benchmarks, document
    from fastrd.report.tables import Cell, Column, Table

    rows = []
    for stage in stages:
        outcome = outcomes.get(stage.name)
        told = ("not run yet", "", "") if outcome is None else (
            "passed" if outcome.passed else "failed", f"{outcome.seconds:.0f}", outcome.summary
        )  # fmt: skip
        rows.append([Cell(stage.name), *map(Cell, told)])
    titles = [Column("Stage"), Column("Outcome"), Column("Seconds", numeric=True), Column("Last line")]
    sections = benchmarks.sections(benchmarks.load([result])) if measured else []
    document.write(page, "GPU report", [document.Section("Stages", tables=[Table(titles, rows)]), *sections])


def main(argv: list[str] | None = None) -> int:
    """0: all stages passed; 1: no GPU; 3: something failed; 4: stages are left."""
    parser = argparse.ArgumentParser(prog="python3 -m bench.gpu_report", description=__doc__.partition(":")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no stage that would end later (default: 9)")
    parser.add_argument("--again", action="store_true", help="forget what earlier calls have found")
    parser.add_argument("--list", action="store_true", help="print the plan with its seconds, and run nothing")
    arguments = parser.parse_args(argv)
    stages = plan()
    if arguments.list:
        passed = 0.0
        for stage in stages:
            passed += stage.seconds
            print(f"{stage.seconds:5.0f} {passed:6.0f}  {stage.name}: {' '.join(stage.arguments)}")
            if stage.name == ESSENTIAL:
                print(f"{passed:12.0f}  for what is essential")
        print(f"{passed:12.0f}  in all")
        return DONE
    if not torch.cuda.is_available():
        print("no GPU that torch can use (`fastrd doctor` says why): nothing measured", file=sys.stderr)
        return NO_GPU
    gpu = re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
    folder, result = ROOT / "bench" / "raw" / gpu, ROOT / "bench" / "results" / f"{gpu}.json"
    if arguments.again:
        shutil.rmtree(folder, ignore_errors=True)
    # A limit around this command must not leave the running stage behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(FAILED))
    return report(stages, folder, result, arguments.minutes)


if __name__ == "__main__":
    sys.exit(main())
