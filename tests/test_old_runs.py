"""Runs of earlier versions go on: the weights they end with are those that the version they were begun with reached."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from fastrd import Recipe, evaluate_run, train
from fastrd.core import checkpoint
from fastrd.recipe import RecipeWarning

# ARD + IGDM + GACD (CRD's form) with averaged weights, of 3 epochs; stopped in the second one, after its first batch.
# weights.npz: what the version of that time ended with, going on or uninterrupted, on one thread.
OLD = Path(__file__).parent / "old_run"
ROUNDING = 0.02  # relative: other CPUs round convolutions otherwise, and the attack takes signs of gradients


@pytest.fixture
def old_run(tmp_path) -> Path:
    for name in ("recipe.toml", "log.jsonl", "last.pt"):
        (tmp_path / "run").mkdir(exist_ok=True)
        shutil.copy(OLD / name, tmp_path / "run" / name)
    return tmp_path / "run"


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_run_of_an_earlier_version_ends_with_the_weights_it_would_have_had(old_run, one_thread):
    recipe = Recipe.load(old_run / "recipe.toml")
    train(recipe, out=old_run, teacher=OLD / "teacher.pt", resume=True, device="cpu", progress=False)
    ended = checkpoint.read(old_run / "last.pt")
    states = {"model": ended["model"]["state"], "ema": ended["ema"], "method": ended["method"]}
    found = {
        f"{part}.{name}".replace("gacd.contrast.", "gacd."): value
        for part, state in states.items()
        for name, value in state.items()
    }
    with np.load(OLD / "weights.npz") as expected:
        assert found.keys() == set(expected)
        for name, value in found.items():
            reference = torch.as_tensor(expected[name], dtype=torch.float64)
            error = (value.double() - reference).norm() / reference.norm().clamp(min=1e-3)
            assert error <= ROUNDING, f"{name}: relative error {error:.3g}"


def test_it_is_evaluated_with_a_word_on_its_missing_teacher(old_run):
    options = {"attacks": "clean", "limit": 20, "device": "cpu", "progress": False}
    with pytest.warns(UserWarning, match="the teacher teacher.pt of this run is not there; .*GD, GC"):
        document = evaluate_run(old_run, **options)
    assert "alignment" not in document
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "alignment" in evaluate_run(old_run, teacher=OLD / "teacher.pt", **options)


def test_a_recipe_of_an_earlier_version_is_read_without_a_word_on_its_milestones(tmp_path):
    text = (OLD / "recipe.toml").read_text().replace('kind = "cosine"', 'kind = "multistep"')
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.warns(RecipeWarning):
        Recipe.load(tmp_path / "recipe.toml")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Recipe.stored(tmp_path / "recipe.toml")
