"""The demo from start to report, at a size for tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from fastrd import demo
from fastrd.cli import main
from fastrd.core.toml import read_toml
from fastrd.engine.errors import Interrupted

ROOT = Path(__file__).resolve().parent.parent
TRAINS_UNTIL_STOPPED = """
import os, signal
from pathlib import Path
from types import SimpleNamespace
import torch
from fastrd import demo
from fastrd.engine.errors import Interrupted
from fastrd.engine.process import stop_signals

def train(job, *_):
    with stop_signals() as stop:
        print(os.getpid(), flush=True)
        signal.pause()
        raise Interrupted(stop[0], Path("run"))

demo._do = train
os.cpu_count = lambda: 1
if __name__ == "__main__":
    jobs = [SimpleNamespace(recipe=SimpleNamespace(name="run", seed=seed)) for seed in range(3)]
    demo._do_all(jobs, False, {"device": torch.device("cpu")})
"""


@pytest.mark.slow
def test_no_process_goes_on_after_a_demo_that_was_killed(tmp_path):
    """It would train run after run, in folders that the next demo finds in use."""
    (tmp_path / "program.py").write_text(TRAINS_UNTIL_STOPPED)
    options = {"env": {**os.environ, "PYTHONPATH": str(ROOT)}, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, tmp_path / "program.py"], **options) as process:
        worker = int(process.stdout.readline())
        process.kill()
        try:
            assert process.communicate(timeout=300)[0] == "", "the pipe ends with the last process that holds it"
        finally:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)


@pytest.mark.slow
def test_demo_falls_back_to_the_digits_and_keeps_what_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("FASTRD_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "SEEDS", 2)
    small = {"data.train_limit": 300, "data.test_limit": 40, "evaluation.attacks": ["clean", "pgd5"]}
    monkeypatch.setattr(demo, "DIGITS", {**demo.DIGITS, **small})
    tiny = {"schedule.epochs": 2, "student.options.width": 4}
    monkeypatch.setattr(demo, "DIGITS_TEACHER", {**tiny, "student.options.width": 6})
    monkeypatch.setattr(demo, "DIGITS_STUDENT", tiny)
    page = demo.run(tmp_path / "demo", device="cpu", progress=False)
    said = capsys.readouterr().out
    assert "using digits" in said and "cifar10: not found" in said, "says which data and why"
    assert page.exists() and page == tmp_path / "demo" / "digits-cpu" / "report.html"
    folders = {name: page.parent / name / "seed-1" for name in demo.STUDENTS}
    for name, folder in folders.items():
        document = json.loads((folder / "evaluation.json").read_text())
        assert document["n"] == 40 and set(document["results"]) == {"clean", "pgd5"}
        if name != "demo-at":
            assert -1 <= document["alignment"]["gc"] <= 1, "each student is compared with its teacher"
            teacher = read_toml(folder / "recipe.toml")["teacher"]["source"]
            assert teacher.endswith("demo-teacher/last.pt"), "the checkpoint that is evaluated"
    for pair in ("demo-ard against demo-at", "demo-igdm against demo-ard", "demo-gacd against demo-igdm"):
        for text in (said, page.read_text()):
            assert f"{pair}, 2 seeds: " in text, "what is decided and what is not"
    weights = {folder: (folder / "last.pt").read_bytes() for folder in folders.values()}
    demo.run(tmp_path / "demo", device="cpu", progress=False)
    assert all((folder / "last.pt").read_bytes() == kept for folder, kept in weights.items())


def test_the_recipes_fit_data_and_machine():
    for dataset in ("cifar10", "digits"):
        for device in ("cpu", "cuda"):
            for name in ("demo-teacher", *demo.STUDENTS):
                recipe = demo._recipe(name, dataset, torch.device(device))
                assert recipe.data.name == dataset
    assert recipe.schedule.epochs == 120 and recipe.data.train_limit == 200, "digits are digits on a GPU too"


def test_a_stopped_demo_says_that_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    def stopped(out, **options):
        raise Interrupted(signal.SIGINT, out)

    monkeypatch.setattr(demo, "run", stopped)
    assert main(["demo", "--out", str(tmp_path)]) == 130
    said = capsys.readouterr().err
    monkeypatch.setattr(demo, "run", Mock(side_effect=BrokenProcessPool("A child process terminated abruptly")))
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "was killed, often because the memory ran out" in capsys.readouterr().err
    assert said.endswith(f"the state is saved ({tmp_path}); the same command goes on\n")
