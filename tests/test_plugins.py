"""Plugins: networks, methods, inner maximisations, data sets and measures without editing the package."""

from __future__ import annotations

import json
import re

import pytest
import torch

from fastrd import Recipe, attacks, train
from fastrd.cli import main
from fastrd.core import plugins
from fastrd.data.catalog import DATASETS
from fastrd.evaluation.measures import MEASURES
from fastrd.methods import ADDONS
from fastrd.models.foreign import NETWORKS
from fastrd.recipe import RecipeError
from fastrd.reproduce import job

PLUGIN = """
import torch
from fastrd.attacks import INNER, InnerMaximisation, margin
from fastrd.data import dataset, load_dataset
from fastrd.evaluation import measure
from fastrd.methods import Term, addon
from fastrd.methods.views import student
from fastrd.models import network


@network("linear")
def linear(*, num_classes, in_channels, image_size, scale=1.0):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(in_channels * image_size**2, num_classes))
    net[1].weight.data.mul_(scale)
    return net


@addon("small_logits")
class SmallLogits(Term):
    def __init__(self, *, weight: float = 0.1) -> None:
        super().__init__()
        self.weight = weight

    def views(self, epoch):
        return student("adv")

    def forward(self, step):
        return {"small_logits": self.weight * step.student("adv").logits.square().mean()}


@dataset("few-digits")
def few_digits(root):
    return load_dataset("digits").limit(40, 20)


INNER["margin"] = InnerMaximisation(lambda batch: margin(batch.y), start="uniform")


@measure("weight_norm")
def weight_norm(subject):
    return sum(p.square().sum().item() for p in subject.model.parameters())
"""
RECIPE = """
name = "mine"
student = { arch = "linear", options = { scale = 0.5 } }
base.name = "pgd_at"
small_logits.weight = 0.5
data = { name = "few-digits", holdout = 8 }
attack = { inner = "margin", steps = 1 }
schedule = { epochs = 1, milestones = [] }
training.batch_size = 16
validation.steps = 0
evaluation.attacks = ["clean"]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch, registry):
    """A plugin and a recipe that needs it."""
    (tmp_path / "mine.py").write_text(PLUGIN)
    (tmp_path / "mine.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def forget(folder):
    """As in a new process."""
    known = {"linear": NETWORKS, "small_logits": ADDONS, "margin": attacks.INNER, "few-digits": DATASETS}
    known |= {"weight_norm": MEASURES, "mine.py": plugins._loaded}
    for name, registry in known.items():
        registry.pop(name, None)
    plugins._given.clear()


COMMON = ["--quiet", "--device", "cpu"]


def test_one_of_everything_from_the_command_line(folder, capsys):
    arguments = ["train", "mine.toml", "--out", "run", *COMMON]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "small_logits" in error and error.count("\n") == 1 and not (folder / "run").exists()
    assert main([*arguments, "--plugin", "mine.py"]) == 0
    assert Recipe.load("run/recipe.toml").plugins == ("mine.py",)
    line = json.loads((folder / "run/log.jsonl").read_text().splitlines()[-1])
    assert line["small_logits"] > 0
    assert main(["eval", "run", "--measure", "weight_norm", "--plugin", "mine.py", *COMMON]) == 0
    assert json.loads((folder / "run/evaluation.json").read_text())["weight_norm"] > 0


def test_a_run_refuses_to_go_on_without_its_plugins(folder, capsys):
    assert main(["train", "mine.toml", "--out", "run", "--plugin", "mine.py", *COMMON]) == 0
    forget(folder)
    for arguments in (
        ["train", "run/recipe.toml", "--out", "run", "--resume"],
        ["eval", "run"],
        ["eval", "run/last.pt"],
    ):
        assert main([*arguments, *COMMON]) == 2
        error = capsys.readouterr().err
        assert "plugins: needs mine.py" in error and "--plugin" in error and error.count("\n") == 1
    assert main(["train", "run/recipe.toml", "--out", "run", "--resume", "--plugin", "mine.py", *COMMON]) == 0


def test_one_of_everything_from_python(folder):
    plugins.load_plugins([folder / "mine.py"])
    trained = train(Recipe.load("mine.toml"), out="run", progress=False, device="cpu")
    assert type(trained.student.module).__name__ == "Sequential"
    forget(folder)
    with pytest.raises(RecipeError, match="needs mine.py"):
        Recipe.load("run/recipe.toml")
    train(Recipe.from_dict({"name": "x", "student": {"arch": "cnn", "options": {"width": 2}},
                            "base": {"name": "pgd_at"}, "data": {"name": "digits", "train_limit": 40, "holdout": 8},
                            "schedule": {"epochs": 1, "milestones": []}, "training": {"batch_size": 16},
                            "attack": {"steps": 1}, "validation": {"steps": 0}}),
          out="other", plugins=["mine.py"], progress=False, device="cpu")  # fmt: skip
    assert Recipe.load("other/recipe.toml").plugins == ("mine.py",)


def test_a_recipe_alone_executes_nothing(folder, capsys):
    text = RECIPE.replace('name = "mine"', 'name = "mine"\nplugins = ["mine.py"]')
    (folder / "mine.py").write_text("open('executed', 'w')\n")
    (folder / "mine.toml").write_text(text)
    assert main(["train", "mine.toml", "--out", "run", *COMMON]) == 2
    assert "plugins: needs mine.py" in capsys.readouterr().err
    assert not (folder / "executed").exists()


def test_plugins_reach_the_processes_of_a_reproduction(folder, monkeypatch):
    plugins.load_plugins(["mine.py"])
    sent = job.Job("measure", str(folder)).dumps()
    forget(folder)
    found = []
    monkeypatch.setattr(job, "_measure", lambda *_: found.extend(NETWORKS))
    job._run(job.Job(**json.loads(sent)), folder)
    assert "linear" in found


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("nowhere.py", None, "plugin: no file nowhere.py; accepted: a Python file, or the name of a module"),
        ("no-module", None, "plugin: got 'no-module'; accepted: a file that ends in .py"),
        ("no_such_module_here", None, "plugin: module no_such_module_here: No module named"),
        ("bad.py", "1 / 0", "plugin: .*bad.py: ZeroDivisionError: division by zero"),
        ("bad.py", "def", "plugin: .*bad.py: SyntaxError"),
        ("bad.py", "import sys; sys.exit(0)", "plugin: .*bad.py: SystemExit: 0"),
        ("bad.py", "from fastrd.models import network\nnetwork('cnn')(dict)", "network: got 'cnn'; accepted: a name"),
        ("bad.py", "from fastrd.evaluation import measure\nmeasure('cka')(print)", "measure: got 'cka'; accepted"),
        ("bad.py", "from fastrd.evaluation import measure\nmeasure('model')(print)", "measure: got 'model'; accepted"),
        ("bad.py", "from fastrd.methods import addon\naddon('igdm')(dict)", "got 'igdm'; accepted: a name that is not"),
    ],
)  # fmt: skip
def test_plugins_that_cannot_be_used_are_named(name, contents, message, folder, capsys):
    if contents is not None:
        (folder / name).write_text(contents)
    assert main(["train", "mine.toml", "--out", "run", "--plugin", name, *COMMON]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1, error
    assert not (folder / "run").exists()


def test_installed_plugins_load_by_themselves(folder, monkeypatch):
    class Point:
        name, value = "installed", "somewhere:register"

        def load(self):
            NETWORKS["installed-network"] = torch.nn.Identity

    monkeypatch.setattr(plugins.metadata, "entry_points", lambda group: [Point()] * (group == "fastrd.plugins"))
    assert plugins.load_plugins() == ("installed",) and "installed-network" in NETWORKS


@pytest.mark.parametrize("name", ["loss", "epoch", "val_clean", "kind"])
def test_a_loss_that_is_called_as_another_entry_of_the_log_is_named(name, folder, capsys):
    (folder / "mine.py").write_text(PLUGIN.replace('return {"small_logits"', f'return {{"{name}"'))
    assert main(["train", "mine.toml", "--out", "run", "--plugin", "mine.py", *COMMON]) == 2
    error = capsys.readouterr().err
    assert f"log: got a loss or metric called {name}; accepted: another name" in error and error.count("\n") == 1
