"""Recipes, tables of facts, and the JSON and TOML files of run folders and benchmarks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from fastrd import published, report
from fastrd.core.documents import is_finished, read_costs, read_evaluation, read_log
from fastrd.core.toml import to_toml
from fastrd.engine.log import RunLog
from fastrd.recipe import Recipe
from fastrd.report.card import write_card
from fastrd.reproduce import page, plan

from .runner import file_target, mutate_json, mutate_jsonl, mutate_toml

RECIPE = """
name = "fuzzed"
description = "A recipe with something in most tables."
seed = 1
student = { arch = "cnn", options = { width = 2 } }
base = { name = "ard", temperature = 2.0 }
data = { name = "digits", holdout = 10, train_limit = 60 }
attack = { epsilon = "8/255", steps = 1 }
schedule = { epochs = 3, kind = "cosine", warmup_epochs = 0.5 }
training = { batch_size = 16, ema = 0.9, clip_grad = 1.0 }
evaluation.attacks = ["clean", "pgd20"]
paper = { source = "Table 1", clean = 90.0, aa = 40.0, gd = 0.1 }
igdm = { alpha = 3, divergence = "l2" }
gacd = { weight = 0.5, negatives = 8, dim = 4 }
"""
FACTS = """
paper = "a made-up paper"
[methods.mine]
title = "Mine"
needs = ["teacher"]
base.name = "ard"
on.digits = { attack.steps = 2 }
faithful = { training.extra_clean_bn_pass = true }
[teachers]
far = { title = "Far", source = "Far2030_WRN-28-10", data = "cifar10", clean = 90, pgd20 = 60 }
[tables.t]
title = "A table"
source = "Table 1"
columns = ["clean", "pgd20", "aa"]
teacher = "far"
seeds = 1
limit = 40
measures = ["cka"]
recipe.student = { arch = "cnn", options = { width = 2 } }
recipe.data = { name = "digits" }
[tables.t.settings.here]
title = "as they are"
rows = { mine = { paper = [80.0, 40, 30], alias = "mine-here" }, "ard+igdm" = { igdm.alpha = 3 } }
[tables.t.settings.there]
rows = { ard = {}, strong = { method = "ard+igdm", igdm.alpha = 50 } }
"""
EVALUATION = {
    "schema": 1,
    "checkpoint": "last",
    "fingerprint": "0" * 64,
    "dataset": "digits",
    "data": "scikit-learn",
    "n": 40,
    "epsilon": 0.03,
    "device": "cpu (1 threads)",
    "results": {
        "clean": {"accuracy": 0.9, "n": 40, "seconds": 0.1, "device": "cpu"},
        "aa": {
            "accuracy": 0.4,
            "n": 40,
            "seconds": 9.0,
            "stages": {"apgd-ce": 0.5, "square": 0.4},
            "warnings": ["slow"],
        },
    },
    "alignment": {"gd": 0.1, "gc": 0.5, "n": 40},
    "remainder": 0.01,
    "cka": 0.9,
    "pointwise": {"uniform": 0.1, "adversarial": 0.2, "n": 40},
    "probe": {"digits": {"n": 40, "clean": 0.8, "pgd20": 0.3}},
    "versions": {"torch": "2.15", "fastrd": "1"},
}
LOG = [
    {"kind": "step", "epoch": 1, "step": 2, "loss": 2.0, "images_per_s": 900.0},
    {"kind": "epoch", "epoch": 1, "lr": 0.1, "seconds": 3.0, "loss": 2.0, "val_clean": 0.5, "val_pgd": 0.2},
    {"kind": "epoch", "epoch": 2, "lr": 0.05, "seconds": 3.0, "loss": 1.0, "mi_bound": 2.0, "remainder": 0.1},
]
BENCHMARK = {
    "machine_info": {"cpu": {"brand_raw": "a CPU"}, "gpu": "none", "python_version": "3.12"},
    "commit_info": {"id": "abc"},
    "benchmarks": [
        {
            "name": "test_thing[ours]",
            "stats": {"median": 0.1, "q1": 0.09, "q3": 0.12},
            "extra_info": {
                "problem": "small",
                "variant": "ours",
                "peak_bytes": 100,
                "gb_per_s": 3.0,
                "seconds_by_kind": {"attack": 0.05},
            },
        },
    ],
}


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def _make_run(folder: Path) -> Path:
    recipe = Recipe.load(_write(folder / "r.toml", RECIPE))
    (folder / "r.toml").unlink()
    run = folder / "run"
    run.mkdir()
    _write(run / "recipe.toml", recipe.to_toml())
    _write(run / "evaluation.json", json.dumps(EVALUATION))
    _write(run / "curve.json", json.dumps({"epsilons": [0, 0.01, 0.03], "accuracies": [0.9, None, 0.4], "n": 40}))
    _write(run / "log.jsonl", "".join(json.dumps(line) + "\n" for line in LOG))
    _write(run / "run.json", json.dumps({"finished": True, "identity": {"data": "abc", "teacher": "def"}}))
    cost = {"stage": "train", "seconds": 10.0, "joules": None, "device": "cpu"}
    _write(run / "cost.jsonl", 2 * (json.dumps(cost) + "\n"))
    return run


def _use_run(path: Path) -> None:
    run = path.parent
    report.table([run])
    try:
        write_card(run)
    finally:
        read_costs(run / "cost.jsonl")
        is_finished(run)
        read_evaluation(run / "evaluation.json")
        log = RunLog(run, after=(2, 0))
        log.close()
        read_log(run / "log.jsonl")


def _build(path: Path) -> None:
    report.build([path.parent], path.parent.parent / "page.html")


FILES = {
    "recipe.toml": mutate_toml,
    "evaluation.json": mutate_json,
    "curve.json": mutate_json,
    "run.json": mutate_json,
}
FILES |= {"log.jsonl": mutate_jsonl, "cost.jsonl": mutate_jsonl}
for file, mutation in FILES.items():
    file_target(f"run-{file}", lambda folder, file=file: _make_run(folder) / file, _use_run, mutation)
for file in ("evaluation.json", "curve.json", "log.jsonl", "recipe.toml"):
    file_target(f"page-{file}", lambda folder, file=file: _make_run(folder) / file, _build, FILES[file], slow=True)


def _use_recipe(path: Path) -> None:
    recipe = Recipe.load(path)
    assert Recipe.load(_write(path.with_name("again.toml"), recipe.to_toml())) == recipe
    recipe.identity()
    recipe.located()
    recipe.override({"schedule.epochs": 4})


def _use_facts(path: Path) -> None:
    for table in published.load(path):
        page.listing(table, table.rows, path.parent / "runs")
        for row in table.rows:
            to_toml(Recipe.from_dict(row.recipe, where=row.name).to_dict(), row.name)
        made = plan.make(table, path.parent / "runs", teachers={})
        made.lines()
        shutil.rmtree(path.parent / "runs", ignore_errors=True)


def _use_benchmarks(path: Path) -> None:
    report.benchmark_table([path])


file_target("recipe", lambda folder: _write(folder / "r.toml", RECIPE), _use_recipe, mutate_toml)
file_target("facts", lambda folder: _write(folder / "f.toml", FACTS), _use_facts, mutate_toml)
file_target(
    "benchmarks",
    lambda folder: _write(folder / "b.json", json.dumps(BENCHMARK)),
    _use_benchmarks,
    mutate_json,
)
