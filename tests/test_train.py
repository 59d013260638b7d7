"""The run: resume bit for bit, checkpoints that are whole or refused, logs, schedules, failure."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastrd import Recipe, evaluate, load_teacher, train
from fastrd.core import checkpoint
from fastrd.core.documents import is_finished
from fastrd.data import load_dataset, split_holdout
from fastrd.data.pack import pack
from fastrd.engine.errors import Interrupted, NonFiniteLoss
from fastrd.engine.schedule import learning_rate
from fastrd.engine.trainer import Trainer
from fastrd.evaluation import remainder_proportion
from fastrd.models import build_model
from fastrd.models.foreign import NETWORKS
from fastrd.recipe import Schedule
from fastrd.report.runs import load
from fastrd.workflow import add_autoattack, evaluate_run

EVERYTHING = {
    "name": "everything",
    "student": {"arch": "cnn", "options": {"width": 2}},
    "base": {"name": "rslad"},
    "igdm": {"alpha": 5.0},
    "gacd": {"negatives": 40, "dim": 8, "estimator": "crd"},
    "vfd": {"lambda": 1.0},
    "data": {"holdout": 20},
    "attack": {"steps": 2},
    "schedule": {"epochs": 2, "kind": "cosine", "warmup_epochs": 0.5},
    "training": {"batch_size": 32, "ema": 0.9, "clip_grad": 1.0},
    "validation": {"steps": 1},
}

SMALL = {
    "name": "small",
    "student": {"arch": "cnn", "options": {"width": 2}},
    "base": {"name": "pgd_at"},
    "data": {"holdout": 20},
    "attack": {"steps": 1},
    "schedule": {"epochs": 1, "milestones": []},
    "training": {"batch_size": 32},
    "validation": {"steps": 1},
}

TIMES = ("seconds", "stall_seconds", "images_per_s")


@pytest.fixture
def data(toy_arrays):
    return load_dataset(str(toy_arrays))


@pytest.fixture
def teachers():
    torch.manual_seed(11)
    return {
        "teacher": build_model("cnn", num_classes=4, image_size=8, width=3),
        "clean_teacher": build_model("cnn", num_classes=4, image_size=8, width=4),
    }


def final_state(run):
    """Everything a run ends with, flattened: weights, EMA, heads, banks, momentum."""
    payload = checkpoint.read(Path(run) / "last.pt")
    optimizer = payload["optimizer"]["state"]
    return {
        **payload["model"]["state"],
        **{f"ema {k}": v for k, v in payload.get("ema", {}).items()},
        **{f"method {k}": v for k, v in payload["method"].items()},
        **{f"momentum {i}": s["momentum_buffer"] for i, s in optimizer.items()},
    }


def assert_same_run(a, b):
    first, second = final_state(a), final_state(b)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def interrupt_after(monkeypatch, batches):
    """SIGTERM arrives during the given batch of the run."""
    original, count = Trainer._check_finite, [0]

    def counting(self, losses):
        count[0] += isinstance(next(iter(losses.values())), torch.Tensor)  # once per batch
        if count[0] == batches:
            count[0] += 1
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, losses)

    monkeypatch.setattr(Trainer, "_check_finite", counting)


@pytest.mark.parametrize("estimator", ["crd", "strict", "infonce"])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(estimator, data, teachers, tmp_path, monkeypatch):
    table = {**EVERYTHING, "gacd": {"negatives": 40, "dim": 8, "estimator": estimator, "candidates": "bank"}}
    recipe = Recipe.from_dict(table)
    train(recipe, out=tmp_path / "whole", data=data, **teachers, progress=False)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 6)
        with pytest.raises(Interrupted, match="SIGTERM; the state is saved"):
            train(recipe, out=tmp_path / "cut", data=data, **teachers, progress=False)
    stopped = checkpoint.read(tmp_path / "cut/last.pt")
    assert stopped["position"] == {"epoch": 2, "batch": 2}
    stopped["spent"] = [1000.0, 100.0]
    checkpoint.write(tmp_path / "cut/last.pt", {k: v for k, v in stopped.items() if k != "file"})
    torch.rand(100)  # whatever else the process does in between
    train(recipe, out=tmp_path / "cut", data=data, **teachers, resume=True, progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")

    def values(run):
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]

    assert values(tmp_path / "cut") == values(tmp_path / "whole")
    lines = [json.loads(line) for line in (tmp_path / "cut/log.jsonl").read_text().splitlines()]
    seconds = {line["epoch"]: (line["seconds"], line["stall_seconds"]) for line in lines if line["kind"] == "epoch"}
    assert seconds[1] < (1000, 100) < seconds[2], "an epoch has the time before it was stopped too"


def test_all_images_are_trained_on_in_the_authors_passes(data, tmp_path):
    table = {**SMALL, "base": {"name": "trades"}, "data": {"holdout": 0}, "training": {"batch_size": 50}}
    recipe = Recipe.from_dict(table)
    whole, rest = divmod(len(data.x_train), 50)
    assert rest
    for change, passes in (
        ({}, 2 * whole),
        ({"training.drop_last": False, "training.student_passes": "authors"}, 3 * (whole + 1)),
    ):
        out = tmp_path / str(passes)
        train(recipe.override(change), out=out, data=data, progress=False)
        counted = {v.item() for k, v in final_state(out).items() if k.endswith("num_batches_tracked")}
        assert counted == {passes}


def test_the_seed_decides_and_addons_do_not_move_the_base(data, teachers, tmp_path):
    for name, change in {"a": {}, "b": {}, "c": {"seed": 1}}.items():
        recipe = Recipe.from_dict(EVERYTHING).override({"schedule.epochs": 1, **change})
        train(recipe, out=tmp_path / name, data=data, **teachers, progress=False)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    a, c = final_state(tmp_path / "a"), final_state(tmp_path / "c")
    assert not torch.equal(a["linear.weight"], c["linear.weight"])
    base = {k: v for k, v in EVERYTHING.items() if k not in ("igdm", "gacd", "vfd")}
    zero = {**base, "igdm": {"alpha": 0}, "gacd": {"weight": 0}, "vfd": {"lambda": 0}}
    for name, table in {"base": base, "zero": zero}.items():
        train(Recipe.from_dict(table), out=tmp_path / name, data=data, **teachers, progress=False)
    assert_same_run(tmp_path / "base", tmp_path / "zero")


def test_it_learns_and_logs(data, teachers, tmp_path):
    recipe = Recipe.from_dict(EVERYTHING).override(
        {"base": {"name": "pgd_at"}, "schedule.epochs": 6, "igdm.alpha": 0, "gacd.weight": 0, "vfd.lambda": 0}
    )
    trained = train(recipe, out=tmp_path / "run", data=data, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [line["epoch"] for line in epochs] == [1, 2, 3, 4, 5, 6]
    assert epochs[-1]["loss"] < epochs[0]["loss"] * 0.8
    assert epochs[-1]["loss"] == pytest.approx(epochs[-1]["ce"])
    assert {"lr", *TIMES, "val_clean", "val_pgd"} <= epochs[0].keys()
    steps = [line for line in lines if line["kind"] == "step" and line["epoch"] == 1]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert np.mean([line["loss"] for line in steps]) == pytest.approx(epochs[0]["loss"])
    assert trained.best["val_pgd"] == max(line["val_pgd"] for line in epochs)
    best = checkpoint.read(tmp_path / "run/best.pt")
    assert best["epoch"] == trained.best["epoch"]
    assert Recipe.load(tmp_path / "run/recipe.toml") == recipe


def test_checkpoint_holds_the_evaluated_student(data, teachers, tmp_path):
    recipe = Recipe.from_dict(EVERYTHING).override({"schedule.epochs": 1})
    trained = train(recipe, out=tmp_path / "run", data=data, **teachers, progress=False)
    x = torch.rand(4, 3, 8, 8)
    loaded = load_teacher(tmp_path / "run/last.pt")
    torch.testing.assert_close(loaded(x), trained.student(x))
    assert not any(p.requires_grad for p in loaded.parameters())
    plain = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert not torch.equal(plain["ema"]["linear.weight"], plain["model"]["state"]["linear.weight"])


def test_bf16_autocast_trains_float32_weights(data, teachers, tmp_path):
    recipe = Recipe.from_dict(EVERYTHING).override({"schedule.epochs": 1, "training.precision": "bf16"})
    train(recipe, out=tmp_path / "bf16", data=data, **teachers, progress=False)
    train(
        recipe.override({"training.precision": "fp32"}),
        out=tmp_path / "fp32",
        data=data,
        **teachers,
        progress=False,
    )
    half, full = final_state(tmp_path / "bf16"), final_state(tmp_path / "fp32")
    assert all(v.dtype == torch.float32 for v in half.values() if v.is_floating_point())
    assert not torch.equal(half["linear.weight"], full["linear.weight"])
    torch.testing.assert_close(half["linear.weight"], full["linear.weight"], rtol=0.2, atol=0.1)


def test_held_out_images_are_not_trained_on(data, tmp_path, monkeypatch):
    seen = []
    original = Trainer.__init__

    def spy(self, *args, **options):
        original(self, *args, **options)
        seen.append((self.loader.num_samples, len(self.held_out[0])))

    monkeypatch.setattr(Trainer, "__init__", spy)
    recipe = Recipe.from_dict({**SMALL, "data": {"holdout": 30}})
    train(recipe, out=tmp_path / "run", data=data, progress=False)
    assert seen == [(130, 30)]


def test_refusals(data, teachers, tmp_path):
    recipe = Recipe.from_dict(EVERYTHING).override({"schedule.epochs": 1})
    with pytest.raises(ValueError, match="clean_teacher: this method needs one"):
        train(recipe, out=tmp_path / "run", data=data, teacher=teachers["teacher"], progress=False)
    assert not (tmp_path / "run").exists()
    train(recipe, out=tmp_path / "run", data=data, **teachers, progress=False)
    with pytest.raises(FileExistsError, match="already holds a run; pass --resume"):
        train(recipe, out=tmp_path / "run", data=data, **teachers, progress=False)
    with pytest.raises(ValueError, match=r"igdm.alpha: 5.0 -> 6.0"):
        train(recipe.override({"igdm.alpha": 6}), out=tmp_path / "run", data=data, **teachers, resume=True)
    with pytest.raises(ValueError, match="resume: teacher is not the one"):
        swapped = {
            "teacher": build_model("cnn", num_classes=4, width=3),
            "clean_teacher": teachers["clean_teacher"],
        }
        train(recipe, out=tmp_path / "run", data=data, **swapped, resume=True)
    with pytest.raises(ValueError, match="resume: data is not the one"):
        train(recipe, out=tmp_path / "run", data=data.limit(train=120), **teachers, resume=True)


def test_resume_on_nothing_starts_from_scratch(data, teachers, tmp_path):
    recipe = Recipe.from_dict(EVERYTHING).override({"schedule.epochs": 1})
    train(recipe, out=tmp_path / "run", data=data, **teachers, resume=True, progress=False)
    assert checkpoint.read(tmp_path / "run/last.pt")["position"]["epoch"] == 2


def test_non_finite_loss_names_the_term_and_keeps_the_last_good_state(data, teachers, tmp_path):
    recipe = Recipe.from_dict(EVERYTHING).override({"igdm.alpha": 1e300, "training.clip_grad": 1e9})
    with pytest.raises(NonFiniteLoss, match=r"loss term igdm is not finite in epoch 1, batch 1"):
        train(recipe, out=tmp_path / "run", data=data, **teachers, progress=False)
    good = checkpoint.load_last(tmp_path / "run")
    assert good["position"] == {"epoch": 1, "batch": 0}
    assert all(torch.isfinite(v).all() for v in good["model"]["state"].values() if v.is_floating_point())
    assert (tmp_path / "run/failed.pt").exists()


def test_weights_that_are_not_finite_are_never_saved_as_good(data, tmp_path, monkeypatch):
    """The loss of the last batch is finite and its gradient is not."""
    recipe = Recipe.from_dict(SMALL)
    update = Trainer._update

    def broken(self):
        if self.batch == len(self.loader) - 1:
            self.parameters[0].grad[0] = torch.nan
        update(self)

    monkeypatch.setattr(Trainer, "_update", broken)
    with pytest.raises(NonFiniteLoss, match=r"conv.*weight of the network is not finite in epoch 1"):
        train(recipe, out=tmp_path / "run", data=data, progress=False)
    assert checkpoint.load_last(tmp_path / "run")["position"] == {"epoch": 1, "batch": 0}
    assert not is_finished(tmp_path / "run") and not (tmp_path / "run/best.pt").exists()


def test_without_held_out_images_best_is_the_last_epoch(data, tmp_path):
    recipe = Recipe.from_dict({**SMALL, "data": {"holdout": 0}, "schedule": {"epochs": 2, "milestones": []}})
    train(recipe, out=tmp_path / "run", data=data, progress=False)
    assert checkpoint.read(tmp_path / "run/best.pt")["epoch"] == 2


def test_the_logged_remainder_is_of_the_norm_of_the_recipe(data, tmp_path):
    attack = {"norm": "l2", "epsilon": 0.5, "step_size": 0.2, "steps": 1}
    recipe = Recipe.from_dict({**SMALL, "attack": attack, "validation": {"remainder": True}})
    trained = train(recipe.override({"schedule.epochs": 1}), out=tmp_path / "run", data=data, progress=False)
    _, held_out = split_holdout(data, recipe.data.holdout, seed=0)
    images = np.asarray(data.x_train[held_out])
    assert trained.best["remainder"] == remainder_proportion(trained.student, images, epsilon=0.5, norm="l2")


SPEC = {"arch": "cnn", "num_classes": 2, "in_channels": 3, "image_size": 8}


def small_payload(value):
    return {
        "model": {"spec": SPEC, "state": {"w": torch.full((3,), float(value))}},
        "position": {"epoch": value},
    }


def test_checkpoint_survives_damage(tmp_path):
    for value in (1, 2):
        checkpoint.save_last(tmp_path, small_payload(value))
    assert checkpoint.load_last(tmp_path)["position"]["epoch"] == 2
    whole = (tmp_path / "last.pt").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged, complaint in ((whole[:-100], "torn"), (bytes(flipped), "altered or damaged"), (b"", "torn")):
        (tmp_path / "last.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match=complaint):
            checkpoint.read(tmp_path / "last.pt")
        with pytest.warns(UserWarning, match="going on from previous.pt"):
            assert checkpoint.load_last(tmp_path)["position"]["epoch"] == 1
    (tmp_path / "previous.pt").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="no checkpoint of this run can be used"):
        checkpoint.load_last(tmp_path)
    assert checkpoint.load_last(tmp_path / "empty") is None


def test_any_flipped_bit_falls_back_to_the_previous_checkpoint(tmp_path):
    for value in (1, 2):
        checkpoint.save_last(tmp_path, small_payload(value))
    whole = (tmp_path / "last.pt").read_bytes()
    directory = whole.index(b"PK\1\2")
    places = {
        *range(0, len(whole), 97),
        *range(directory, directory + 46),
        *range(len(whole) - 90, len(whole)),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for place in places:
            damaged = bytearray(whole)
            damaged[place] ^= 64
            (tmp_path / "last.pt").write_bytes(damaged)
            assert checkpoint.load_last(tmp_path)["position"]["epoch"] == 1


BROKEN = {
    "version": {"version": None},
    "position": {"position": [1]},
    "position ": {"position": {"epoch": -3, "batch": 0}},
    "position  ": {"position": {"epoch": 2, "batch": "x"}},
    "sums": {"sums": {"loss": torch.zeros(2)}},
    "best": {"best": {"val_pgd": "x"}},
    "recipe": {"recipe": 5},
    "recipe ": {"recipe": {7: 1}},
    "optimizer": {"optimizer": {}},
    "identity": {"identity": {"data": 3}},
    "rng": {"rng": {"cpu": torch.zeros(3), "cuda": []}},
    "best ": {"best": {"epoch": 1, "val_pgd": 99.0}},
    "best  ": {"best": {"val_pgd": 0.5}},
    "best   ": {"best": {"epoch": 1, "remainder": 10**400}},
    "spent": {"spent": [math.nan, 0.0]},
    "scores": {"scores": {"val_clean": -0.1}},
    "model": {"model": None},
    "model.spec": {"model": {"spec": torch.zeros(1).expand(3), "state": {}}},
    "model ": {"model": {"state": {}}},
    "model  ": {"model": {"spec": SPEC}},
    "model.spec ": {"model": {"spec": None, "state": {}}},
    "model.spec  ": {"model": {"spec": {k: v for k, v in SPEC.items() if k != "arch"}, "state": {}}},
    "model.spec   ": {"model": {"spec": {**SPEC, "image_size": 10**9}, "state": {}}},
    "model.spec    ": {"model": {"spec": {**SPEC, "num_classes": "2"}, "state": {}}},
    "model.class_names": {"model": {"spec": SPEC, "state": {}, "class_names": 5}},
    "model.class_names ": {"model": {"spec": SPEC, "state": {}, "class_names": [1, 1]}},
    "model.class_names  ": {"model": {"spec": SPEC, "state": {}, "class_names": torch.zeros(2)}},
    "model.state.w": {"model": {"spec": SPEC, "state": {"w": torch.tensor([math.nan])}}},
    "model.state.w ": {"model": {"spec": SPEC, "state": {"w": torch.zeros(2).to(torch.float8_e4m3fn)}}},
    "model.state.w  ": {"model": {"spec": SPEC, "state": {"w": torch.tensor([math.nan + 0j])}}},
    "ema": {"ema": torch.zeros(2)},
    "ema ": {"recipe": {"training": {"ema": 0.9}}},
}


@pytest.mark.parametrize("entry", BROKEN)
def test_a_checkpoint_with_a_right_digest_and_a_wrong_entry_names_it(tmp_path, entry):
    path = checkpoint.write(tmp_path / "last.pt", {**small_payload(1), **BROKEN[entry]})
    with pytest.raises(ValueError, match=rf"last\.pt: {re.escape(entry.strip())}: "):
        checkpoint.read(path)


@pytest.fixture
def stopped_run(data, teachers, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 6)
        train(Recipe.from_dict(EVERYTHING), out=tmp_path / "stopped", data=data, **teachers, progress=False)
    return tmp_path / "stopped"


def as_integers(tensors):
    tensors.update({name: tensor.long() for name, tensor in tensors.items()})


@pytest.mark.parametrize(
    ("entry", "change"),
    [
        ("model", lambda p: p["model"]["state"].update({"bn1.bias": torch.zeros(9)})),
        ("model", lambda p: p["model"]["state"].update({"conv1.weight": torch.zeros(2, 3, 3, 3) + 0j})),
        ("model", lambda p: p["model"]["state"].pop("bn1.num_batches_tracked")),
        ("ema", lambda p: as_integers(p["ema"])),
        ("ema_updates", lambda p: p.update(ema_updates=0)),
        ("method", lambda p: as_integers(p["method"])),
        ("optimizer", lambda p: p["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(1, 2))),
        ("optimizer", lambda p: as_integers(p["optimizer"]["state"][0])),
        ("optimizer", lambda p: p["optimizer"]["state"].clear()),
        ("optimizer", lambda p: p["optimizer"]["state"].update({99: p["optimizer"]["state"][0]})),
        ("position", lambda p: p.update(position={"epoch": 99, "batch": 0})),
        ("position", lambda p: p.update(position={"epoch": 1, "batch": 99})),
        ("best", lambda p: p.update(best={"epoch": 2, "val_pgd": 0.5})),
        ("sums", lambda p: p["sums"].update(epoch=1.0)),
        ("recipe", lambda p: p.pop("recipe")),
        ("model", lambda p: p.pop("model")),
        ("rng", lambda p: p["rng"].update(cpu=torch.zeros(3, dtype=torch.uint8))),
        ("identity", lambda p: p.pop("identity")),
        ("position", lambda p: p["position"].pop("batch")),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_run_names_the_entry(stopped_run, tmp_path, data, teachers, entry, change):
    run = shutil.copytree(stopped_run, tmp_path / "run")
    payload = checkpoint.read(run / "last.pt")
    change(payload)
    (run / "previous.pt").unlink()
    altered = checkpoint.write(run / "last.pt", payload).read_bytes()
    with pytest.raises(ValueError, match=rf"last\.pt: .*{entry}.*: (does not fit|missing)"):
        train(Recipe.from_dict(EVERYTHING), out=run, data=data, **teachers, resume=True, progress=False)
    assert (run / "last.pt").read_bytes() == altered
    assert {path.name for path in run.iterdir()} == {path.name for path in stopped_run.iterdir()} - {"previous.pt"}


def unsized():
    return build_model("unsized", num_classes=4, image_size=None)


@pytest.mark.parametrize(
    ("changes", "student"),
    [({}, lambda: Unused()), ({"optimizer.momentum": 0}, None), ({}, unsized)],
    ids=["layers that are never trained", "no momentum", "images of any size"],
)
def test_what_is_unusual_in_a_checkpoint_and_right_is_resumed(tmp_path, data, monkeypatch, changes, student):
    monkeypatch.setitem(NETWORKS, "unsized", lambda image_size, num_classes, in_channels: foreign(num_classes))
    options = {"out": tmp_path / "run", "data": data, "student": student and student(), "progress": False}
    recipe = Recipe.from_dict(SMALL).override(changes)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 2)
        train(recipe, **options)
    best = train(recipe, **options, resume=True).best
    assert train(recipe, **options, resume=True).best == best  # at the epoch after the last


def test_a_layer_that_is_trained_from_a_later_step_on_gets_its_momentum_then(tmp_path, data, monkeypatch):
    step = Trainer.step

    def late(self, batch):
        self.student.module.whole = self.batch > 1
        return step(self, batch)

    monkeypatch.setattr(Trainer, "step", late)
    student = Late()
    trained = train(Recipe.from_dict(SMALL), out=tmp_path / "run", data=data, student=student, progress=False).student
    assert not torch.equal(trained.module.more.weight, student.more.weight)


def without_one(tensor, place):
    return None if place == 3 else tensor


@pytest.mark.parametrize(
    ("change", "same"),
    [(lambda tensor, place: tensor.contiguous(), True), (without_one, False)],
    ids=["layout", "one less"],
)
def test_momenta_of_another_layout_or_none_of_a_layer_are_taken(stopped_run, tmp_path, data, teachers, change, same):
    recipe = Recipe.from_dict(EVERYTHING)
    runs = [shutil.copytree(stopped_run, tmp_path / name) for name in ("run", "other")]
    payload = checkpoint.read(runs[1] / "last.pt")
    state = payload["optimizer"]["state"]
    assert not all(entry["momentum_buffer"].is_contiguous() for entry in state.values())
    for place, entry in state.items():
        entry["momentum_buffer"] = change(entry["momentum_buffer"], place)
    checkpoint.write(runs[1] / "last.pt", payload)
    for run in runs:
        train(recipe, out=run, data=data, **teachers, resume=True, progress=False)
    if same:
        assert_same_run(*runs)


def test_crash_between_the_two_renames_loses_nothing(tmp_path, monkeypatch):
    checkpoint.save_last(tmp_path, small_payload(1))
    real, calls = os.replace, []

    def dying(source, target):
        calls.append(Path(target).name)
        if Path(target).name == "last.pt":
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_last(tmp_path, small_payload(2))
    assert calls == ["staged.pt", "previous.pt", "last.pt"]
    assert checkpoint.load_last(tmp_path)["position"]["epoch"] == 1


def test_foreign_and_hostile_files_are_refused(tmp_path):
    torch.save({"model": {}}, tmp_path / "plain.pt")
    with pytest.raises(ValueError, match="not a complete fastrd checkpoint"):
        checkpoint.read(tmp_path / "plain.pt")

    class Bomb:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/exploded",))

    checkpoint.write(tmp_path / "bomb.pt", {"model": Bomb()})
    with pytest.raises(ValueError, match="refused by torch's weights-only loader"):
        checkpoint.read(tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()


def test_learning_rate():
    steps = Schedule(epochs=200)
    rates = {epoch: learning_rate(steps, 0.1, epoch, 0, 10) for epoch in (1, 100, 101, 150, 151, 200)}
    assert rates == pytest.approx({1: 0.1, 100: 0.1, 101: 0.01, 150: 0.01, 151: 0.001, 200: 0.001})
    cosine = Schedule(epochs=10, kind="cosine", warmup_epochs=2)
    assert learning_rate(cosine, 1.0, 1, 0, 4) == pytest.approx(1 / 8)
    for warmup in (0.05, 0.3, 0.5, 1.37):
        part = Schedule(epochs=8, kind="cosine", warmup_epochs=warmup)
        assert max(learning_rate(part, 1.0, epoch, batch, 5) for epoch in (1, 2) for batch in range(5)) <= 1
    assert learning_rate(cosine, 1.0, 3, 0, 4) == pytest.approx(1.0)
    assert learning_rate(cosine, 1.0, 7, 0, 4) == pytest.approx(0.5)
    assert learning_rate(cosine, 1.0, 10, 3, 4) == pytest.approx(0.5 * (1 + math.cos(math.pi * 7.75 / 8)))


def command(folder, run, *more):
    """`fastrd train` of the recipe in a folder, into another one there."""
    files = [str(folder / "recipe.toml"), "--out", str(folder / run)]
    return [sys.executable, "-m", "fastrd.cli", "train", *files, "--device", "cpu", "--quiet", *more]


@pytest.mark.slow
def test_sigkill_then_resume_as_subprocesses(toy_arrays, tmp_path):
    """kill -9 in the middle of the run, twice; the weights are those of a run nobody touched."""
    recipe = Recipe.from_dict(
        {
            **{k: v for k, v in EVERYTHING.items() if k not in ("vfd", "igdm", "gacd")},
            "base": {"name": "trades"},
            "data": {"name": str(toy_arrays), "holdout": 20},
            "schedule": {"epochs": 30, "kind": "cosine"},
        }
    )
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(tmp_path, "whole"), check=True, env=environment, capture_output=True)
    log = tmp_path / "cut" / "log.jsonl"
    for kills in (1, 2):
        process = subprocess.Popen(command(tmp_path, "cut", "--resume"), env=environment, stdout=subprocess.DEVNULL)
        while process.poll() is None and not _epochs(log) >= 4 * kills:
            time.sleep(0.02)  # polling a file, not waiting for luck: the kill follows an epoch line
        assert process.poll() is None, "the run ended before it could be killed"
        process.kill()
        process.wait()
    assert _epochs(log) < 30
    subprocess.run(command(tmp_path, "cut", "--resume"), check=True, env=environment)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    positions = [(line["epoch"], line["kind"] == "epoch", line.get("step")) for line in map(json.loads, log.open())]
    assert positions == [(e, s is None, s) for e in range(1, 31) for s in (1, 2, 3, 4, None)]


def test_a_signal_stops_a_validation_and_the_run_goes_on_with_it(data, tmp_path, monkeypatch):
    recipe = Recipe.from_dict({**SMALL, "schedule": {"epochs": 2, "milestones": []}})
    train(recipe, out=tmp_path / "whole", data=data, progress=False)
    calls = []

    def signalled(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        result = evaluate(*arguments, **options)
        assert len(calls) != 2, "it ran to its end"
        return result

    with monkeypatch.context() as patch:
        patch.setattr("fastrd.engine.trainer.evaluate", signalled)
        with pytest.raises(Interrupted, match="SIGTERM; the state is saved"):
            train(recipe, out=tmp_path / "cut", data=data, progress=False)
    position = checkpoint.read(tmp_path / "cut/last.pt")["position"]
    assert position["epoch"] == 2 and position["batch"] > 0
    train(recipe, out=tmp_path / "cut", data=data, resume=True, progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")

    logs = [(tmp_path / run / "log.jsonl").read_text().splitlines() for run in ("whole", "cut")]
    whole, cut = ([{k: v for k, v in json.loads(x).items() if k not in TIMES} for x in log] for log in logs)
    assert cut == whole


def _epochs(log: Path) -> int:
    return len(re.findall(r'"kind": "epoch"', log.read_text())) if log.exists() else 0


def test_interrupt_from_the_command_line_exits_with_the_signal(toy_arrays, tmp_path):
    recipe = Recipe.from_dict({**SMALL, "schedule": {"epochs": 500}, "data": {"name": str(toy_arrays), "holdout": 0}})
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    process = subprocess.Popen(
        command(tmp_path, "run"),
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    log = tmp_path / "run" / "log.jsonl"
    while process.poll() is None and _epochs(log) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.search(r"stopped by SIGINT; the state is saved \(.*\); the same command with --resume goes on", errors)
    position = checkpoint.read(tmp_path / "run/last.pt")["position"]
    assert position["epoch"] >= 3 or position["batch"] > 0


@pytest.mark.slow
def test_a_real_cifar10_run(data_root, tmp_path):
    """A few hundred real images: the loss falls and the student beats chance under attack."""
    recipe = Recipe.load(
        "demo-teacher",
        {
            "data.train_limit": 640,
            "data.test_limit": 200,
            "data.holdout": 100,
            "schedule.epochs": 6,
            "attack.steps": 2,
        },
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trained = train(recipe, out=tmp_path / "run", data=data_root, progress=False)
    epochs = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in epochs if line["kind"] == "epoch"]
    assert losses[-1] < losses[0] - 0.1
    assert trained.best["val_clean"] > 0.2 and trained.best["val_pgd"] > 0.1


def test_tensorboard_gets_what_the_log_gets(tmp_path, monkeypatch):
    """Where tensorboard is installed; a stand-in for its writer, which is not part of the test environment."""
    from fastrd.engine import log

    written = []

    class SummaryWriter:
        def __init__(self, folder):
            written.append(folder)

        def add_scalar(self, *scalar):
            written.append(scalar)

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setattr(log.importlib.util, "find_spec", lambda name: object())
    run_log = log.RunLog(tmp_path)
    run_log.write("step", 7, epoch=1, step=7, loss=0.5, bound=math.nan)
    run_log.close()
    assert written[0] == str(tmp_path / "tensorboard") and written[-1] == "closed"
    assert written[1] == ("step/loss", 0.5, 7)
    line = json.loads((tmp_path / "log.jsonl").read_text())
    assert line == {"kind": "step", "epoch": 1, "step": 7, "loss": 0.5, "bound": None}


def foreign(classes=4, channels=3):
    return torch.nn.Sequential(
        torch.nn.Conv2d(channels, 4, 3),
        torch.nn.Dropout(0.5),
        torch.nn.AdaptiveAvgPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(16, classes),
    )


class Late(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.more, self.net, self.whole = torch.nn.Conv2d(3, 3, 1), foreign(), False

    def forward(self, x):
        return self.net(self.more(x) if self.whole else x)


class Unused(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.unused, self.net = torch.nn.Linear(2, 2), foreign()

    def forward(self, x):
        return self.net(x)


class Pair(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = foreign()

    def forward(self, x):
        return self.net(x), 0


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: foreign(100), "100 classes; the data have 4"),
        (lambda: foreign(3), "3 classes; the data have 4"),
        (lambda: foreign(channels=1), "to have 1 channels"),
        (lambda: foreign().double(), "torch.float64; accepted: float32"),
        (lambda: foreign().half(), "torch.float16; accepted: float32"),
        (Pair, "returned tuple"),
        (lambda: "nowhere.pt", "no such file"),
    ],
)
@pytest.mark.parametrize("role", ["teacher", "clean_teacher"])
def test_teachers_are_checked_before_there_is_a_folder(tmp_path, data, make, complaint, role):
    method = {"base": {"name": "ard"}} if role == "teacher" else {"vfd": {"lambda": 1.0}}
    with pytest.raises((ValueError, FileNotFoundError), match=f"^{role}: .*{complaint}"):
        train(
            Recipe.from_dict({**SMALL, **method}),
            out=tmp_path / "run",
            data=data,
            **{role: make()},
            progress=False,
        )
    assert not (tmp_path / "run").exists()


def test_the_callers_teacher_stays_as_it_was(tmp_path, data):
    teacher = foreign().train()
    before = {name: (value.clone(), value.stride()) for name, value in teacher.state_dict().items()}
    with pytest.warns(UserWarning, match="teacher: right on .* not decidedly better than guessing"):
        train(
            Recipe.from_dict({**SMALL, "base": {"name": "ard"}}),
            out=tmp_path / "run",
            data=data,
            teacher=teacher,
            progress=False,
        )
    assert all(module.training for module in teacher.modules())
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert not any(module._forward_pre_hooks for module in teacher.modules())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name][0]) and value.stride() == before[name][1]


def test_gradients_are_compared_with_the_teacher_that_was_trained_with(tmp_path):
    """Not with what lies in its place now; and a run's best and last have files of their own."""
    quiet = {"device": "cpu", "progress": False}
    plain = Recipe.from_dict({**SMALL, "data": {"name": "digits", "holdout": 20, "train_limit": 200}})
    teacher = train(plain, out=tmp_path / "teacher", **quiet).run
    run = train(plain.override({"base.name": "ard"}), out=tmp_path / "run", teacher=teacher, **quiet).run
    options = {"attacks": "clean", "limit": 60, **quiet}
    first = evaluate_run(run, figures=True, **options)
    assert "alignment" in first and first["of"] > first["n"] == 60
    curve = (run / "curve.json").read_bytes()
    evaluate_run(run, figures=True, checkpoint="best", **options)
    assert (run / "curve.json").read_bytes() == curve and (run / "panel-best.npz").exists()
    shutil.copy(run / "last.pt", tmp_path / "a{b}-evaluation.pt")
    few = {**options, "limit": 20, "teacher": teacher}
    assert evaluate_run(tmp_path / "a{b}-evaluation.pt", figures=True, **few)["n"] == 20
    assert (tmp_path / "a{b}-evaluation-curve.json").exists()
    assert evaluate_run(run, **{**options, "limit": 10**9})["n"] == first["of"], "more than there are: all"
    shutil.rmtree(teacher)
    train(plain.override({"seed": 5}), out=teacher, **quiet)
    (run / "evaluation.json").unlink()
    with pytest.warns(UserWarning, match="of this run holds other weights now; its gradients are not compared"):
        assert "alignment" not in evaluate_run(run, **options)
    (run / "evaluation.json").write_text(json.dumps({**first, "epsilon": 0.3}))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"evaluation.json is about other weights, another"):
        add_autoattack(run, limit=8, **quiet)


@pytest.mark.parametrize("form", ["folder", "beton"])
def test_results_of_other_images_do_not_stand_beside_new_ones(tmp_path, data, monkeypatch, form):
    """Of a folder and a packed file the training images are not compared: see `_check_same_data`."""
    name = tmp_path / ("images" if form == "folder" else "images.beton")

    def write(x_test):
        arrays = {"x_train": data.x_train, "y_train": data.y_train, "x_test": x_test, "y_test": data.y_test}
        if form == "beton":
            np.savez(tmp_path / "images.npz", **arrays)
            pack(tmp_path / "images.npz", name, progress=False)
        for split in ("train", "test") if form == "folder" else ():
            for number, (image, label) in enumerate(zip(arrays[f"x_{split}"], arrays[f"y_{split}"], strict=True)):
                (name / split / str(label)).mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(name / split / str(label) / f"{number:03}.png")

    write(data.x_test)
    quiet = {"device": "cpu", "progress": False}
    run = train(
        Recipe.from_dict({**SMALL, "data": {"name": str(name), "holdout": 20}}), out=tmp_path / "run", **quiet
    ).run
    before = evaluate_run(run, attacks="clean,fgsm", figures=True, **quiet)
    assert load([run])[0].curve and load([run])[0].panel()
    changed = data.x_test.copy()
    changed[-1] = 255 - changed[-1]  # not one of those that AutoAttack is given
    write(changed)
    asked = []
    monkeypatch.setattr("fastrd.workflow.evaluate", lambda *a, **b: asked.append(b["attacks"]) or evaluate(*a, **b))
    with pytest.raises(ValueError, match=r"evaluation.json is about .* or about other images; evaluate it again"):
        add_autoattack(run, limit=4, **quiet)
    assert ("aa",) not in asked, "refused before the attack"
    now = evaluate_run(run, attacks="clean", **quiet)
    assert [*now["results"]] == ["clean"] and now["images"] != before["images"]
    assert load([run])[0].curve is None and load([run])[0].panel() is None
    add_autoattack(run, limit=4, **quiet)
    assert {*json.loads((run / "evaluation.json").read_text())["results"]} == {"clean", "aa"}


def test_evaluation_on_other_data_than_the_run_was_trained_on_is_refused(tmp_path, data):
    recipe = Recipe.from_dict({**SMALL, "data": {"name": "digits", "holdout": 20}})
    train(recipe, out=tmp_path / "run", data=data, progress=False)
    for checkpoint_name in ("last", "best"):
        with pytest.raises(ValueError, match="dataset: .* was trained on other data than digits"):
            evaluate_run(tmp_path / "run", attacks=("clean",), checkpoint=checkpoint_name, progress=False)
    other = evaluate_run(tmp_path / "run", attacks=("clean",), dataset=data.source, progress=False)
    assert other["results"]["clean"]["n"] == len(data.x_test)


def test_training_ends_where_robust_accuracy_has_not_risen(tmp_path, monkeypatch, data):
    tricks = {"early_stopping": 2, "awp": 0.01}
    recipe = Recipe.from_dict({**SMALL, "schedule": {"epochs": 9, "milestones": []}, "tricks": tricks})
    scores = {1: 0.2, 2: 0.4, 3: 0.3, 4: 0.4}  # the best once more is no better
    monkeypatch.setattr(Trainer, "_validate", lambda self, stop: {"val_clean": 0.9, "val_pgd": scores[self.epoch]})
    trained = train(recipe, out=tmp_path / "run", data=data, progress=False)
    assert trained.best["epoch"] == 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["kind"] == "epoch"] == [1, 2, 3, 4]
    assert is_finished(tmp_path / "run")
    train(recipe, out=tmp_path / "run", data=data, resume=True, progress=False)
    assert checkpoint.read(tmp_path / "run" / "last.pt")["position"] == {"epoch": 5, "batch": 0}, "and stays ended"


def test_patience_is_counted_where_it_is_validated(tmp_path, monkeypatch, data):
    table = {**SMALL, "schedule": {"epochs": 9, "milestones": []}, "tricks": {"early_stopping": 2}}
    recipe = Recipe.from_dict({**table, "validation": {"every": 3}})
    scores = {3: 0.4, 6: 0.3}
    monkeypatch.setattr(Trainer, "_validate", lambda self, stop: {"val_clean": 0.9, "val_pgd": scores[self.epoch]})
    train(recipe, out=tmp_path / "run", data=data, progress=False)
    assert checkpoint.read(tmp_path / "run" / "last.pt")["position"] == {"epoch": 7, "batch": 0}


@pytest.fixture
def trackers(monkeypatch):
    """Stand-ins for the clients of wandb and mlflow, which are not part of the test environment."""
    said = []
    run = types.SimpleNamespace(
        log=lambda values, step: said.append(("wandb", values, step)), finish=lambda: said.append(("wandb", "end"))
    )

    def init(**options):
        said.append(("wandb", options))
        return run

    def start(run_id, run_name):
        said.append(("mlflow", run_id, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r-1"))

    mlflow = types.SimpleNamespace(
        start_run=start,
        log_params=lambda values: said.append(("mlflow", values)),
        log_metrics=lambda values, step: said.append(("mlflow", values, step)),
        end_run=lambda: said.append(("mlflow", "end")),
    )
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, __spec__=object()))
    mlflow.__spec__ = object()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    return said


def test_trackers_get_what_the_log_gets_and_go_on_with_a_resumed_run(tmp_path, trackers):
    from fastrd.engine import log

    log.check_trackers(["wandb", "mlflow"])
    recipe = {"name": "mine", "attack": {"steps": 3}}
    for _ in range(2):
        run_log = log.RunLog(tmp_path, trackers=["wandb", "mlflow"], recipe=recipe)
        run_log.write("step", 7, epoch=1, step=7, loss=0.5)
        run_log.close()
    wandb = [said for said in trackers if said[0] == "wandb"]
    assert wandb[1] == ("wandb", {"step/loss": 0.5}, 7) and wandb[2] == ("wandb", "end")
    assert wandb[0] == wandb[3] and wandb[0][1]["config"] == recipe and wandb[0][1]["resume"] == "allow"
    mlflow = [said for said in trackers if said[0] == "mlflow"]
    assert mlflow[0] == ("mlflow", None, "mine") and mlflow[1] == ("mlflow", {"name": "mine", "attack.steps": 3})
    assert mlflow[2:5] == [("mlflow", {"step/loss": 0.5}, 7), ("mlflow", "end"), ("mlflow", "r-1", None)]


def test_a_tracker_that_is_not_there_is_named_before_anything_runs(tmp_path, data, monkeypatch):
    from fastrd.engine import log

    monkeypatch.setattr(log.importlib.util, "find_spec", lambda name: None)
    recipe = Recipe.from_dict(EVERYTHING)
    with pytest.raises(ImportError, match="log: wandb is not installed: pip install wandb"):
        train(recipe, out=tmp_path / "run", data=data, log=["wandb"], progress=False)
    with pytest.raises(ValueError, match="log: got 'visdom'; accepted"):
        train(recipe, out=tmp_path / "run", data=data, log=["visdom"], progress=False)
    assert not (tmp_path / "run").exists()
