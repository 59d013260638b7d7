"""A disk that fills up: one error that names the file, nothing half-written under a final name, nothing lost."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastrd import Recipe, deploy, evaluate, export, train
from fastrd.cli import main
from fastrd.core import checkpoint
from fastrd.data import pack
from fastrd.engine.log import TRACKERS, RunLog, Tracker
from fastrd.engine.trainer import Trainer
from fastrd.reproduce.job import Job

ROOT = Path(__file__).resolve().parent.parent

RECIPE = {
    "name": "small",
    "student": {"arch": "cnn", "options": {"width": 4}},
    "base": {"name": "pgd_at"},
    "data": {"name": "digits", "train_limit": 60, "holdout": 12},
    "attack": {"steps": 1, "epsilon": 0.1, "step_size": 0.1},
    "schedule": {"epochs": 2, "kind": "cosine"},
    "training": {"batch_size": 16},
    "validation": {"steps": 1},
}


@contextmanager
def files_of_at_most(size: int):
    """Any file that grows beyond `size` raises, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full") / "run"
    train(Recipe.from_dict(RECIPE), out=folder, device="cpu", progress=False)
    return folder


def test_a_run_goes_on_to_the_same_weights(run, tmp_path, capsys, monkeypatch):
    save = Trainer.save

    def full(self):
        with files_of_at_most(1000) if self.epoch > 1 else nullcontext():
            save(self)

    (tmp_path / "r.toml").write_text(Recipe.from_dict(RECIPE).to_toml())
    command = ["train", str(tmp_path / "r.toml"), "--out", str(tmp_path / "run"), "--device", "cpu", "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", full)
        assert main(command) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(tmp_path / "run" / "staged.pt") in said
    assert checkpoint.read(tmp_path / "run" / "last.pt")["position"] == {"epoch": 1, "batch": 0}
    assert not list((tmp_path / "run").glob(".*"))
    assert main([*command, "--resume"]) == 0
    ours, theirs = (checkpoint.read(folder / "last.pt")["model"]["state"] for folder in (tmp_path / "run", run))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("format", deploy.SUFFIXES)
def test_an_export_is_refused_and_leaves_nothing(format, run, tmp_path):
    if format == "onnx":
        pytest.importorskip("onnxscript")
    out = tmp_path / f"s{deploy.SUFFIXES[format]}"
    with files_of_at_most(8000), pytest.raises(OSError, match="File too large") as error:
        export(run, format=format, out=out)
    assert error.value.filename == str(out) and not list(tmp_path.iterdir())


def test_adversarial_images_are_refused_before_the_attack(tmp_path):
    """As a mapped file that has holes they would kill the process when the disk is full."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    options = {"attacks": "fgsm", "progress": False, "state_dir": tmp_path / "state"}
    options["save_adversarial"] = tmp_path / "images.npz"
    images = torch.rand(100, 1, 8, 8), torch.arange(100) % 3
    with files_of_at_most(20_000), pytest.raises(OSError, match="File too large") as error:
        evaluate(model, *images, **options)
    assert error.value.filename.endswith(".npy") and not (tmp_path / "state").exists()
    evaluate(model, *images, **options)
    assert len(np.load(tmp_path / "images.npz")["fgsm"]) == 100


def test_a_packed_file_is_named_and_not_its_description(tmp_path):
    x, y = np.zeros((400, 8, 8, 3), np.uint8), np.arange(400) % 4
    np.savez(tmp_path / "toy.npz", x_train=x, y_train=y, x_test=x[:8], y_test=y[:8])
    with files_of_at_most(30_000), pytest.raises(OSError, match="File too large") as error:
        pack.pack(tmp_path / "toy.npz", tmp_path / "toy.beton", progress=False)
    assert error.value.filename == str(tmp_path / "toy.beton")
    assert [path.name for path in tmp_path.iterdir()] == ["toy.npz"]


def test_a_log_that_cannot_be_ended_is_named_and_trackers_end(tmp_path, monkeypatch):
    ended = []
    tracker = Tracker(lambda values, step: None, lambda: ended.append(True))
    monkeypatch.setitem(TRACKERS, "mine", lambda run, recipe: tracker)
    log = RunLog(tmp_path, trackers=["mine"])
    for action in (lambda: log.write("step", 1, epoch=1, step=1, text="x" * 200), log.close):
        with files_of_at_most(100), pytest.raises(OSError, match="File too large") as error:
            action()
        assert error.value.filename == str(tmp_path / "log.jsonl")
    assert ended


def test_a_job_that_can_write_nothing_says_why_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    job = Job("train", str(tmp_path / "file" / "run"))
    with subprocess.Popen(
        [sys.executable, "-m", "fastrd.reproduce.job"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        process.stdin.write(job.dumps() + "\n")
        process.stdin.flush()  # and left open: its end would stop the job
        said = process.stderr.read()
        code = process.wait()
    assert code == 2 and said.count("\n") == 1 and "accepted: a folder" in said, said
