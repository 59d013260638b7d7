"""Carrying a plan out: jobs in processes of their own, stopped and continued at any point."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import published as facts
from ..core.arguments import check_device
from ..core.files import atomic_write, locked
from ..core.kinds import check_kinds
from ..core.values import as_number, check_integer
from ..engine.process import stop_signals
from . import page
from .job import STOPPED, Job
from .plan import FrozenTeacher, Plan, PlannedRun, make

_POLL = 0.1  # seconds
_GRACE = 120  # seconds a job has to save its state before it is killed
_REMIND = 5  # seconds: an exit that is raised inside a destructor is ignored, so SIGTERM is sent again


@dataclass(frozen=True)
class Outcome:
    pages: tuple[Path, ...]  # one for each table that has something to show
    finished: bool
    stopped_by: int | None  # signal number
    out_of_time: bool  # the budget was used up
    problems: tuple[str, ...]  # what failed or could not start, in words


@check_kinds
def reproduce(
    table: str | os.PathLike,
    *,
    out: str | os.PathLike = "runs",
    rows: Sequence[str] = (),
    seeds: int | None = None,
    budget: str | float | None = None,
    plan_only: bool = False,
    teachers: Mapping[str, str | os.PathLike] | None = None,
    any_teacher: bool = False,
    overrides: Mapping[str, Any] | None = None,
    jobs: int | None = None,
    data: str | os.PathLike | None = None,
    download: bool = False,
    device: str | None = None,
    progress: bool = True,
) -> Outcome:
    """Trains and evaluates the rows of a table and writes OUT/TABLE.html: the paper beside what came out.

    Whatever is complete in `out` is kept, what has begun goes on where it was: the files are the state.

    Args:
        table: a shipped table, a facts file or FILE:TABLE, see `facts`.
        out: runs go to OUT/TABLE/ROW/seed-N, teachers trained here to OUT/teachers.
        rows: shell patterns of row labels; default all but the `faithful` variants.
        seeds: how many; default the table's.
        budget: wall time of this call, e.g. "2h", "45m" or seconds; then jobs save their state and stop.
        plan_only: print the plan and do nothing.
        teachers: file or run folder of a teacher by its name in the facts.
        any_teacher: also train with teachers that do not have the published accuracy; their rows are not comparable.
        overrides: recipe keys changed in every row, dotted; the rows are then not comparable.
        jobs: runs at the same time; default 1 on a GPU, one for each core (of one thread each) on a CPU.

    Raises:
        FileNotFoundError, ValueError: see `plan.make`.
    """
    check_integer(least=1, optional=True, jobs=jobs)
    kind = check_device(device)
    deadline = math.inf if budget is None else time.monotonic() + seconds(budget)
    options: dict[str, Any] = {"seeds": seeds, "teachers": teachers, "any_teacher": any_teacher, "overrides": overrides}
    plans = [make(found, out, patterns=rows, **options) for found in facts.load(table)]
    for plan in plans:
        print(f"{plan.table.title or plan.table.name}\n\n" + "\n".join(plan.lines()), flush=True)
    runs = [(run, plan) for plan in plans for run in plan.runs]
    if plan_only:
        return Outcome((), all(run.done for run, _ in runs), None, False, ())
    jobs = jobs or ((os.cpu_count() or 1) if kind.type == "cpu" else 1)
    threads = 1 if kind.type == "cpu" and jobs > 1 else None
    common = {"data": data, "download": download, "device": str(kind), "progress": progress and jobs == 1}
    failures: dict[str, str] = {}
    with stop_signals() as received, ExitStack() as locks:
        for plan in plans:
            locks.enter_context(locked(plan.out / plan.table.name))
            page.check_out(plan)

        def stop() -> bool:
            return bool(received) or time.monotonic() > deadline

        try:
            for plan in plans:
                _Workers(plan, common, threads, jobs, stop, progress, failures).work()
        finally:
            pages = tuple(written for plan in plans if (written := page.write(plan)) is not None)
    for written in pages:
        print(f"report: {written}", flush=True)
    left = [(run, plan) for run, plan in runs if not run.done]
    failed = [f"{run.label}, seed {run.recipe.seed}: {text}" for run, _ in left if (text := run.failure())]
    blocked = [text for run, plan in left if not run.failure() and (text := plan.blocked(run))]
    problems = dict.fromkeys([*failed, *blocked])
    if left and not problems:
        problems = dict.fromkeys(f"{name}: {text}" for name, text in failures.items())
    late = time.monotonic() > deadline
    return Outcome(pages, not left, received[0] if received else None, late, tuple(problems))


def seconds(text: str | float) -> float:
    """Parses "2h" as 7200.0; also "90m", "30s", "1h30m", a plain number of seconds."""
    value = as_number(text)
    if value is None and isinstance(text, str):
        number = r"(?:(\d+(?:\.\d+)?){})?"
        match = re.fullmatch("".join(map(number.format, "hms")), text)
        parts = [float(part or 0) for part in match.groups()] if match else []
        value = sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
    if value is None or not 0 < value < math.inf:
        raise ValueError(f"budget: got {text!r}; accepted: e.g. 2h, 45m, 1h30m or seconds, above 0")
    return value


@dataclass
class _Task:
    name: str
    job: Job
    ready: Callable[[], bool]
    done: Callable[[], bool]


@dataclass
class _Workers:
    """Runs the jobs of a plan, a few at a time: teachers, then training seed by seed, AutoAttack at the very end.

    A row that trains with no teacher does not wait for one; only its evaluation does, which compares their gradients.
    """

    plan: Plan
    common: dict[str, Any]
    threads: int | None  # of each job
    jobs: int  # at the same time
    stop: Callable[[], bool]
    progress: bool
    failures: dict[str, str]  # of jobs, by their names

    def work(self) -> None:
        waiting = list(self._tasks())
        running: dict[subprocess.Popen, tuple[_Task, float]] = {}
        try:
            while (waiting or running) and not self.stop():
                for process in [p for p in running if p.poll() is not None]:
                    self._ended(process, *running.pop(process))
                for task in list(waiting):
                    if len(running) < self.jobs and task.ready():
                        waiting.remove(task)
                        if not task.done():
                            running[self._start(task)] = (task, time.monotonic())
                if not running and not any(task.ready() for task in waiting):
                    break  # what is left waits for something that failed or is missing
                time.sleep(_POLL)
        finally:
            _stop_all(list(running))
            for process, (task, began) in running.items():
                self._ended(process, task, began)

    def _start(self, task: _Task) -> subprocess.Popen:
        environment = dict(os.environ)
        if self.threads:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        process = subprocess.Popen(
            [sys.executable, "-m", "fastrd.reproduce.job"],
            stdin=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process, which stops its jobs once
        )
        # Left open: its closing, at the latest when this process is gone, ends the job.
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already, and its status will say how
            process.stdin.write(task.job.dumps() + "\n")
            process.stdin.flush()
        self._say(f"{task.name}: started")
        return process

    def _ended(self, process: subprocess.Popen, task: _Task, began: float) -> None:
        if process.stdin is not None:
            with suppress(BrokenPipeError):
                process.stdin.close()
        code = process.returncode
        if code < 0 and not self.stop():
            text = f"killed by {signal.Signals(-code).name}; SIGKILL often means that the memory ran out\n"
            atomic_write(Path(task.job.folder) / "error.txt", text)
        how = "done" if code == 0 else "stopped" if code == STOPPED or self.stop() else "failed"
        if how == "failed":
            self.failures[task.name] = f"failed with status {code}; its last lines say why"
        self._say(f"{task.name}: {how} after {time.monotonic() - began:.0f} s")

    def _say(self, text: str) -> None:
        if self.progress:
            print(text, flush=True)

    def _tasks(self) -> Iterator[_Task]:
        teachers, rows = self.plan.networks.values(), [run for run in self.plan.runs if run.row is not None]
        for teacher in teachers:
            if teacher.run is not None:
                yield from self._training(teacher.run)
        yield from (self._measurement(teacher) for teacher in teachers if teacher.path is not None)
        for run in rows:
            yield from self._training(run)
        yield from (self._attack(run) for run in rows if "aa" in run.attacks)

    def _job(self, task: str, folder: Path, **options: Any) -> Job:
        return Job(task, str(folder), options, self.common, self.threads)

    def _training(self, run: PlannedRun) -> Iterator[_Task]:
        """Yields what comes before AutoAttack: one task, or two where only the evaluation looks at a teacher."""
        earlier = next((other for other in self.plan.runs if other.folder == run.same_weights_as), None)
        aligned = run.alignment_teacher

        def ready() -> bool:
            known = all(network.measured is not None for network in run.networks.values())
            return known and not self.plan.blocked(run) and (earlier is None or earlier.trained)

        def task(name: str, evaluation: dict[str, Any] | None, *conditions: Callable[[], bool]) -> _Task:
            options = {
                "recipe": run.recipe.to_dict(),
                "teachers": {role: network.path for role, network in run.networks.items()},
                "same_weights_as": run.same_weights_as,
                "evaluation": evaluation,
            }
            return _Task(f"{run.name}: {name}", self._job("train", run.folder, **options), *conditions)

        def comparable() -> bool:
            return run.trained and (aligned is None or aligned.path is None or aligned.measured is not None)

        attacks = [attack for attack in run.attacks if attack != "aa"]
        measures = run.missing_measures()
        evaluation: dict[str, Any] | None = None
        if attacks or measures:
            evaluation = {"attacks": attacks or ["clean"], "measures": measures, "figures": True}
            evaluation |= run.evaluation_options()
        if aligned in (None, *run.networks.values()):
            yield task("training", evaluation, ready, lambda: not run.before_autoattack)
        else:
            yield task("training", None, ready, lambda: run.trained)
            yield task("evaluation", evaluation, comparable, lambda: not run.before_autoattack)

    def _attack(self, run: PlannedRun) -> _Task:
        aa_limit = run.row.facts.aa_limit if run.row else None
        job = self._job("autoattack", run.folder, aa_limit=aa_limit, **run.evaluation_options())
        return _Task(f"{run.name}: AutoAttack", job, lambda: not run.before_autoattack, lambda: run.done)

    def _measurement(self, network: FrozenTeacher) -> _Task:
        limits = [row.facts.limit for row in self.plan.rows if row.facts.limit is not None]
        job = self._job(
            "measure",
            network.record.parent / ".measuring" / network.name,
            teacher=network.path,
            dataset=network.run.recipe.data.name if network.run else network.facts.data,
            record=network.record,
            limit=min(limits, default=None),
        )

        def ready() -> bool:
            return network.path is not None and network.path.exists() and (network.run is None or network.run.trained)

        return _Task(f"teacher {network.name}: measuring", job, ready, lambda: network.measured is not None)


def _stop_all(processes: list[subprocess.Popen]) -> None:
    began = time.monotonic()
    reminded = float(-_REMIND)
    while left := [process for process in processes if process.poll() is None]:
        elapsed = time.monotonic() - began
        if elapsed - reminded >= _REMIND:
            reminded = elapsed
            for process in left:
                process.terminate() if elapsed < _GRACE else process.kill()
        time.sleep(_POLL)
