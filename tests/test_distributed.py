"""Several processes, one run: two of them on the CPU against a single one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch

from fastrd import Recipe
from fastrd.data import derive_seed, load_dataset
from fastrd.engine.distributed import World
from fastrd.engine.trainer import Trainer
from fastrd.models import build_model

RECIPE = """
name = "shared"
[student]
arch = "cnn"
options = {{ width = 4 }}
[base]
name = "ard"
[data]
name = "digits"
train_limit = 220
holdout = 20
[attack]
steps = 2
[optimizer]
lr = 0.01
[training]
batch_size = 40
sync_bn = {sync_bn}
clip_grad = 5.0
[schedule]
epochs = 2
[igdm]
alpha = 1.0
[gacd]
estimator = "strict"
negatives = 60
"""


def command(folder, *arguments, processes=1, sync_bn="true"):
    """`fastrd train`, or `fastrd eval` of the teacher, in one or more processes, as arguments of a subprocess."""
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(sync_bn=sync_bn))
    teacher = folder / "teacher.pt"
    if not teacher.exists():
        torch.manual_seed(3)
        torch.save(network().state_dict(), teacher)
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    what = ["train", recipe, "--teacher", teacher]
    if arguments[0] == "eval":
        what, arguments = ["eval", teacher, "--dataset", "digits"], arguments[1:]
    return {
        "args": [*launcher, "fastrd", *what, "--quiet", "--device", "cpu", *map(str, arguments)],
        "env": {**os.environ, "OMP_NUM_THREADS": "1"},
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }


def run(*arguments, **options):
    return subprocess.run(**command(*arguments, **options), timeout=300, check=False)


def network():
    return build_model("cnn", num_classes=10, in_channels=1, image_size=8, width=4)


def losses(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"]


def weights(out):
    return torch.load(out / "last.pt", weights_only=True)["model"]["state"]


def test_two_processes_are_one_run_with_synchronised_batch_norm(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for out, processes in ((one, 1), (two, 2)):
        done = run(tmp_path, "--out", out, processes=processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("done after") == 1, "one process speaks"
    assert len(losses(one)) == 10
    assert losses(two) == pytest.approx(losses(one), rel=2e-3)
    torch.manual_seed(derive_seed(0, "init"))
    start = network().state_dict()
    for name, value in weights(two).items():
        expected = weights(one)[name].float()
        moved = (expected - start[name].float()).norm()
        assert (value.float() - expected).norm() <= 0.05 * moved + 1e-6, name


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path):
    """Each process normalises by its own samples here; the saved statistics are their mean."""
    options = {"processes": 2, "sync_bn": "false"}
    longer = ("--set", "schedule.epochs=30")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(tmp_path, "--out", whole, *longer, **options).returncode == 0
    process = subprocess.Popen(**command(tmp_path, "--out", cut, *longer, **options))
    while process.poll() is None and not ((cut / "log.jsonl").exists() and len(losses(cut)) > 8):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0 and len(losses(cut)) < len(losses(whole))
    again = run(tmp_path, "--out", cut, "--resume", *longer, **options)
    assert again.returncode == 0, again.stderr
    assert losses(cut) == losses(whole)
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(cut).items())
    taken = run(tmp_path, "--out", cut, *longer, **options)
    assert taken.returncode != 0 and "already holds a run" in taken.stderr


DIES = """
import os, signal
from fastrd.engine.trainer import Trainer
update = Trainer._update
def dies(self):
    if self.world.rank == 1 and self.epoch == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    update(self)
Trainer._update = dies
"""


def test_a_killed_process_ends_the_others_in_one_line_and_a_single_one_goes_on(tmp_path):
    plugin, out = tmp_path / "dies.py", tmp_path / "run"
    plugin.write_text(DIES)
    arguments = ("--out", out, "--plugin", plugin)
    killed = run(tmp_path, *arguments, processes=2)
    assert killed.returncode != 0 and "[rank0]: Traceback" not in killed.stderr
    # The launcher stops the others too, and may be first.
    assert re.search("fastrd: another process of this run ended|stopped by SIGTERM", killed.stderr), killed.stderr
    assert not (out / ".lock").exists() and not list(out.glob(".*.tmp"))
    again = run(tmp_path, *arguments, "--resume")
    assert again.returncode == 0 and len(losses(out)) == 10, again.stderr


def test_a_batch_that_cannot_be_shared_evenly_is_refused(tmp_path):
    done = run(tmp_path, "--out", tmp_path / "run", "--set", "training.batch_size=41", processes=2)
    assert done.returncode != 0 and "batch_size: got 41" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("drop_last", "images"), [(False, 65), (False, 68), (True, 65)])
def test_a_last_batch_that_cannot_be_shared_evenly_is_refused(drop_last, images, tmp_path):
    data = load_dataset("digits", train_limit=images)
    recipe = Recipe.from_dict(
        {
            "name": "last-batch",
            "student": {"arch": "cnn", "options": {"width": 2}},
            "base": {"name": "pgd_at"},
            "data": {"holdout": 0},
            "training": {"batch_size": 32, "drop_last": drop_last},
        }
    )
    trainer = partial(Trainer, recipe, tmp_path, data, {}, torch.device("cpu"), World(0, 2), profile=False)
    if drop_last or images == 68:
        assert len(trainer().loader) == 2 + (not drop_last)
    else:
        with pytest.raises(ValueError, match="training.drop_last: got false, and 2 processes cannot share"):
            trainer()


def test_alone_nothing_is_averaged():
    world = World()
    tensors = [torch.randn(3), torch.randn(2, dtype=torch.float64)]
    before = [t.clone() for t in tensors]
    world.average(tensors)
    assert all(map(torch.equal, tensors, before)) and world.any(True, torch.device("cpu"))
    assert not world.any(False, torch.device("cpu")) and world.is_main


def test_two_processes_share_an_evaluation_and_reach_the_verdicts_of_one(tmp_path):
    documents = []
    options = ("--attacks", "clean,pgd5,apgd-ce", "--limit", "50", "--batch-size", "10", "--epsilon", "0.1")
    torch.manual_seed(3)
    state = network().state_dict()
    torch.nn.init.zeros_(state["linear.bias"])  # else all images are of one class
    torch.save(state, tmp_path / "teacher.pt")
    for processes in (1, 2):
        out = tmp_path / str(processes)
        images = out / "adv.npz"
        done = run(tmp_path, "eval", *options, "--out", out, "--save-adversarial", images, processes=processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("PGD-5") == 1, "one process speaks"
        document = json.loads((out / "teacher-evaluation.json").read_text())
        measured = {n: (e["accuracy"], e["accuracy_8bit"]) for n, e in document["results"].items()}
        documents.append((measured, {name: value.tolist() for name, value in np.load(images).items()}))
    assert 0 < documents[0][0]["pgd5"][0] < documents[0][0]["clean"][0]
    assert documents[1] == documents[0]
