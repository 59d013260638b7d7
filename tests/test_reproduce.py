"""Tables of facts, plans, verdicts, and a whole reproduction that is killed and goes on."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fastrd import published as facts
from fastrd.cli import main
from fastrd.core.documents import write_state
from fastrd.core.toml import differences, merge
from fastrd.recipe import Recipe, RecipeError, available, identity
from fastrd.report import runs
from fastrd.report.statistics import correlation
from fastrd.reproduce import cost, page, plan, run, verdict

ROOT = Path(__file__).resolve().parent.parent
FACTS = """
paper = "a made-up paper"

[teachers]
tiny-teacher = { title = "tiny PGD-AT", recipe = "teacher.toml", data = "digits" }

[teachers.far]
title = "Far"
source = "Far2030_WRN-28-10"
data = "cifar10"
substitute = "teachers/trades/cifar10-wrn-28-10"
clean = 90
pgd20 = 60

[tables.tiny]
title = "A tiny table"
source = "Table 1"
columns = ["clean", "pgd20", "aa"]
teacher = "tiny-teacher"
seeds = 2
limit = 40
aa_limit = 12
measures = ["cka"]

[tables.tiny.recipe]
student = { arch = "cnn", options = { width = 2 } }
data = { name = "digits", holdout = 20, train_limit = 200 }
attack = { steps = 2, epsilon = 0.15, step_size = 0.06 }
schedule = { epochs = 2, milestones = [1] }
training.batch_size = 32
validation.steps = 1
evaluation.attacks = ["clean", "pgd20", "aa"]

[tables.tiny.rows]
ard = { paper = [90.0, 80.0, 80.0] }
"ard+igdm" = { igdm.alpha = 1, paper = [10.0, 5.0], evaluation.attacks = ["clean", "pgd20"] }

[tables.published]
title = "Rows under a published teacher"
recipe.student.arch = "cnn"

[tables.published.settings.here]
title = "as they are"
teacher = "far"
columns = ["clean"]
seeds = 1
rows = { pgd_at = { paper = [80.0] }, ard = { paper = [80.0] }, "ard+igdm" = { igdm.alpha = 3 } }

[tables.published.settings.there]
teacher = "tiny-teacher"
recipe.student.options.width = 4
rows = { pgd_at = {}, "ard+igdm" = { igdm.alpha = 5 }, strong = { method = "ard+igdm", igdm.alpha = 50 } }
"""
TEACHER = """
name = "tiny-teacher"
student = { arch = "cnn", options = { width = 3 } }
base.name = "pgd_at"
data = { name = "digits", holdout = 20, train_limit = 200 }
attack = { steps = 2, epsilon = 0.15, step_size = 0.06 }
schedule = { epochs = 2, milestones = [1] }
training.batch_size = 32
validation.steps = 1
"""


@pytest.fixture
def facts_file(tmp_path) -> Path:
    (tmp_path / "teacher.toml").write_text(TEACHER)
    path = tmp_path / "facts.toml"
    path.write_text(FACTS)
    return path


@pytest.fixture
def table(facts_file):
    """One table of the file by name."""
    return lambda name: facts.load(f"{facts_file}:{name}")[0]


class TestShippedFacts:
    def test_the_rows_of_the_papers_tables_are_all_there(self):
        tables = facts.tables()
        plain = {name: [r for r in t.rows if not r.name.endswith("/faithful")] for name, t in tables.items()}
        # Table 2: 15 methods under two teachers; 3: 15 on each data set; 5: 11 under three; 6: 4 under three; 10 to 13:
        # 15 under two; 14: 7 with and without; 15, 16: two rows and the values of alpha; 17, 18: a base and 15 of
        # alpha.
        expected = {
            "1": 8, "2": 30, "3": 15, "3-svhn": 15, "5": 33, "6": 12, "7": 6, "8": 4, "10": 30, "11": 30, "12": 30,
            "13": 30, "14": 14, "15": 15, "16": 16, "17": 16, "18": 16,
        }  # fmt: skip
        found = {n[5:]: len(r) for n, r in plain.items() if n.startswith("igdm-") and n != "igdm-remainder"}
        assert found == expected
        for name in expected:
            columns = set(tables[f"igdm-{name}"].rows[0].facts.columns) - {"gd", "gc"}
            assert all(columns <= row.paper.keys() for row in plain[f"igdm-{name}"]), name

    def test_a_table_of_printed_numbers_is_shown_and_not_trained(self, capsys):
        assert len(facts.printed()["igdm-9"].rows) == 11
        assert main(["recipes", "--table", "igdm-9"]) == 0
        assert "adaad+igdm              51.52" in capsys.readouterr().out
        with pytest.raises(RecipeError, match="igdm-9 holds printed numbers alone"):
            facts.load("igdm-9")

    @pytest.mark.parametrize(
        ("name", "alpha", "numbers"),
        [
            ("igdm-2/pgd_at+igdm/ltd", 100, {"clean": 60.49, "pgd20": 33.72, "cw": 29.61, "aa": 28.02}),
            (
                "igdm-3/rslad+igdm",
                0.9,
                {"clean": 83.67, "fgsm": 62.41, "pgd20": 57.34, "cw": 54.0, "aa": 53.1},
            ),
            (
                "igdm-11/akd+igdm/ltd",
                15,
                {"clean": 83.98, "pgd20": 54.4, "aa": 49.99, "gd": 0.04, "gc": 0.691},
            ),
            ("igdm-12/rslad+igdm/mobilenet_v2", 10, {"aa": 28.82, "gd": 0.118}),
            ("igdm-13/trades+igdm/mobilenet_v2", 0.2, {"aa": 47.4, "gc": 0.492}),
            ("igdm-17/alpha-220", 220, {"clean": 60.68, "aa": 29.16}),
            ("igdm-3-svhn/rslad+igdm", 3, {"clean": 90.71, "fgsm": 64.71, "aa": 50.69}),
            ("igdm-3-svhn/adaad+igdm", 9, {"clean": 93.48, "fgsm": 68.34, "aa": 53.89}),
            ("igdm-14/iad+igdm", 20, {"clean": 50.02, "pgd20": 25.57, "aa": 20.69, "gd": 0.066, "gc": 0.704}),
            ("igdm-5/akd+igdm/ikl", 40, {"pd_uniform": 0.1521, "pd_adv": 0.1698}),
            ("igdm-6/igdm-student-attack/bdm", 70, {"aa": 29.34, "minutes": 3.36, "memory": 2611}),
            ("igdm-7/adaad+igdm/cifar100", 15, {"clean": 63.44, "aa": 28.87}),
        ],
    )
    def test_numbers_and_alpha_of_rows_read_off_the_paper(self, name, alpha, numbers):
        row = facts.rows()[name]
        assert {key: row.paper[key] for key in numbers} == numbers
        assert Recipe.load(name).addons["igdm"]["alpha"] == alpha

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("igdm-3-svhn/rslad", {"schedule.epochs": 50, "schedule.milestones": [40, 45], "data.name": "svhn"}),
            (
                "igdm-14/rslad",
                {"schedule.epochs": 100, "schedule.milestones": [50, 80], "student.arch": "preact_resnet18"},
            ),
            ("igdm-6/adaad-student-attack/ltd", {"attack.inner": "ce", "base.name": "adaad"}),
            ("igdm-8/lambda-0.25", {"base.name": "adaad", "base.lambda": 0.25}),
            ("igdm-15/alpha-10000", {"base.name": "ard", "direct.alpha": 10000}),
            ("igdm-16/clean-alpha-5", {"base.name": "ard", "smooth_clean.alpha": 5}),
            ("igdm-16/mirror-alpha-30", {"base.name": "ard", "smooth_mirror.alpha": 30}),
        ],
    )  # fmt: skip
    def test_settings_of_rows_read_off_the_paper(self, name, expected):
        table = Recipe.load(name).to_dict()
        for key, value in expected.items():
            section, _, option = key.partition(".")
            assert table[section][option] == value, key

    def test_aliases_are_the_rows_under_their_old_names(self):
        for alias in ("igdm-ard-cifar100-resnet18", "gacd-cifar10-resnet18", "vfd-cifar10-resnet18"):
            row = facts.rows()[alias]
            assert alias in available() and Recipe.load(alias).name == alias
            assert differences(Recipe.load(alias).to_dict(), Recipe.load(row.name).to_dict()).keys() == {"name"}

    def test_faithful_variants_change_what_the_authors_code_does_and_nothing_else(self):
        passes = {"training.student_passes": ("views", "authors")}
        all_images = {"data.holdout": (1000, 0), "training.drop_last": (True, False)}
        decay = {"optimizer.weight_decay": (5e-4, 2e-4)}
        radius = {"attack.epsilon": (8 / 255, 0.031), "attack.step_size": (2 / 255, 0.007)}
        for name, expected in {
            "igdm-2/ard+igdm/bdm": {
                **passes,
                **all_images,
                **decay,
                "training.extra_clean_bn_pass": (False, True),
            },
            "igdm-3/rslad+igdm": {
                **passes,
                **all_images,
                **decay,
                "training.extra_clean_bn_pass": (False, True),
                "schedule.milestones": ([215, 260, 285], [210, 258, 285]),
                "igdm.ramp_epochs": (None, 200),
            },
            "igdm-3/adaad": {**passes, **all_images, "base.reduction": ("batchmean", "mean")},
            "igdm-2/adaad/bdm": {**passes, **all_images},  # reduced alike on CIFAR-100
            "igdm-3/rslad": {**passes, **all_images, **decay},
            "igdm-3/trades": {**passes, **all_images, **decay, **radius},
            "igdm-2/ard/bdm": {
                **passes,
                **all_images,
                **decay,
                "base.temperature": (1.0, 30.0),
                "base.reduction": ("batchmean", "mean"),
                "attack.attack_bn": ("eval", "train"),
                "training.batch_size": (128, 256),
            },
            "vfd-cifar10/mart": {
                **passes,
                **all_images,
                **radius,
                "optimizer.lr": (0.1, 0.01),
                "optimizer.weight_decay": (5e-4, 3.5e-3),
                "schedule.epochs": (200, 120),
                "schedule.milestones": ([100, 150], [74, 89, 99]),
            },
        }.items():
            pair = [Recipe.load(each).to_dict() for each in (name, f"{name}/faithful")]
            names = {key: tuple(table[key] for table in pair) for key in ("name", "description")}
            assert differences(*pair) == {**names, **expected}
        assert "vfd-cifar10/trades+vfd/faithful" not in available(), "no code of its authors is known"

    def test_every_row_and_teacher_of_the_tables_is_a_valid_recipe(self):
        for table in facts.tables().values():
            for row in table.rows:
                Recipe.from_dict(row.recipe, where=row.name)
            for teacher in table.teachers.values():
                for recipe in filter(None, (teacher.recipe, teacher.substitute)):
                    assert Recipe.load(recipe).base["name"] in ("natural", "pgd_at", "trades")

    def test_only_rows_that_train_with_a_published_teacher_name_it(self):
        assert Recipe.load("igdm-2/ard/bdm").teacher.source == "Wang2023Better_WRN-28-10"
        assert Recipe.load("igdm-2/pgd_at/bdm").teacher.source is None
        assert facts.rows()["igdm-2/pgd_at/bdm"].facts.teacher == "cifar100-bdm", "its gradients are compared with it"


class TestOwnFacts:
    def test_settings_add_to_the_table(self, table):
        found = {row.label: row for row in table("published").rows if "faithful" not in row.name}
        assert list(found) == [
            "pgd_at/here",
            "ard/here",
            "ard+igdm/here",
            "pgd_at/there",
            "ard+igdm/there",
            "strong/there",
        ]
        assert found["ard+igdm/there"].recipe["student"] == {"arch": "cnn", "options": {"width": 4}}
        assert found["strong/there"].recipe["igdm"] == {"alpha": 50}
        assert found["pgd_at/here"].paper == {"clean": 80.0}
        assert found["pgd_at/here"].recipe["paper"]["source"].startswith("a made-up paper, Rows under")
        assert found["ard/here"].recipe["teacher"] == {"source": "Far2030_WRN-28-10"}

    @pytest.mark.parametrize(
        ("before", "after", "message"),
        [
            ("seeds = 2", "seedz = 2", r"facts.toml: tables.tiny.seedz: unknown key.*did you mean 'seeds'"),
            ("ard = {", "arrd = {", r"rows.arrd: method: got 'arrd'.*did you mean 'ard'"),
            ("ard = {", '"../ard" = {', r"got the name '../ard'; accepted: letters"),
            ("ard = {", '"a..b" = { method = "ard",', r"got the name 'a..b'"),
            ("[tables.tiny]", '[tables."/tmp/x"]\n[tables.tiny]', r"got the name '/tmp/x'"),
            (
                'teacher = "tiny-teacher"\nseeds',
                'teacher = "tiny"\nseeds',
                r"teacher: got 'tiny'.*'tiny-teacher'",
            ),
            ('teacher = "tiny-teacher"\nseeds', "seeds", r"ard needs a teacher, and the table names none"),
            ("paper = [90.0, ", "paper = [1, 90.0, ", r"rows.ard.paper: got 4 numbers"),
            ('recipe = "teacher.toml", ', "", r"teachers.tiny-teacher.source: got None and recipe None"),
            ("[teachers]", "[teecher]\n[teachers]", r"teecher: unknown key; .*did you mean 'teachers'"),
        ],
    )
    def test_errors_name_the_place(self, facts_file, before, after, message):
        assert before in FACTS
        facts_file.write_text(FACTS.replace(before, after, 1))
        with pytest.raises(RecipeError, match=message):
            facts.load(facts_file)

    @pytest.mark.parametrize("data", ["cifar10", "cifar100"])
    def test_the_small_scale_tables_compare_every_claim(self, data, tmp_path):
        (table,) = facts.load(ROOT / "bench" / "small_scale" / f"{data}.toml")
        made = plan.make(table, tmp_path)
        labels = {r.label for r in made.runs}
        assert {"ard+igdm", "rslad+igdm", "adaad+igdm", "ard+gacd", "pgd_at+vfd"} <= labels
        assert all(label.rpartition("+")[0] in labels for label in labels if "+" in label)
        assert not any(made.blocked(r) for r in made.runs), "its teachers are trained with it"
        assert {r.recipe.data.name for r in made.runs} == {data} and made.seeds == 3

    @pytest.mark.parametrize("place", [0, 1])
    def test_the_tables_of_all_of_cifar10_bring_their_teachers(self, tmp_path, place):
        table = facts.load(ROOT / "bench" / "evidence" / "cifar10.toml")[place]
        made = plan.make(table, tmp_path)
        assert not any(made.blocked(r) for r in made.runs)
        rows = [r.recipe for r in made.runs if r.row]
        assert {(r.data.name, r.data.train_limit, r.schedule.epochs, r.attack.steps) for r in rows} == {
            ("cifar10", None, 20, 10)
        }
        assert made.seeds == 3 and {(row.facts.aa_limit, row.facts.limit) for row in table.rows} == {(1000, None)}

    def test_a_cosine_schedule_inherits_no_drops_of_the_learning_rate(self):
        (table,) = facts.load(ROOT / "bench" / "small_scale" / "cifar10.toml")
        (rslad,) = (row for row in table.rows if row.label == "rslad")
        assert rslad.recipe["schedule"]["kind"] == "cosine" and "milestones" not in rslad.recipe["schedule"]
        older = merge(rslad.recipe, {"schedule": {"milestones": [215, 260, 285]}})
        assert identity(older) == identity(rslad.recipe), "which decide nothing"
        assert facts.rows()["igdm-2/rslad/bdm"].recipe["schedule"]["milestones"] == [215, 260, 285]

    def test_unknown_tables(self, facts_file):
        with pytest.raises(FileNotFoundError, match="no shipped table or facts file 'igmd-2'.*'igdm-2'"):
            facts.load("igmd-2")
        with pytest.raises(FileNotFoundError, match="has no table 'x'; accepted: tiny, published"):
            facts.load(f"{facts_file}:x")


def test_a_plan_names_a_data_set_that_there_is_not_before_a_teacher_is_trained(table, tmp_path):
    with pytest.raises(ValueError, match=r"data.name: got 'digit'; accepted: .*did you mean 'digits'\?"):
        plan.make(table("tiny"), tmp_path, overrides={"data.name": "digit"})


@pytest.mark.parametrize(
    ("key", "accepted"),
    [("seed", "--seeds N"), ("name", "another --out"), ("teacher.source", "--teacher NAME=CKPT")],
)
def test_what_a_plan_decides_cannot_be_set(key, accepted, table, tmp_path):
    with pytest.raises(ValueError, match=f"--set {key}: got '?5'?; accepted: {accepted}"):
        plan.make(table("tiny"), tmp_path, seeds=2, overrides={key: 5 if key == "seed" else "5"})


class TestPlan:
    def test_the_time_left_is_never_guessed_from_a_teacher_of_another_size(self, table, tmp_path):
        def log(run, *seconds):
            run.folder.mkdir(parents=True)
            lines = [json.dumps({"kind": "epoch", "epoch": i, "seconds": each}) for i, each in enumerate(seconds, 1)]
            (run.folder / "log.jsonl").write_text("\n".join(lines) + "\n")

        made = plan.make(table("tiny"), tmp_path / "out")
        teacher, ard = made.runs[:2]  # two epochs each
        log(teacher, 3600)
        assert made.lines()[-1] == "0 of 5 runs done"
        log(ard, 900, 900)
        # An epoch of the teacher, ard's other seed, two seeds of ard+igdm.
        assert made.lines()[-1] == "0 of 5 runs done; about 2.5 hours of training left"

    def test_seed_by_seed_teachers_first(self, table, tmp_path):
        made = plan.make(table("tiny"), tmp_path / "out")
        assert [(r.label, r.recipe.seed) for r in made.runs] == [
            ("teacher tiny-teacher", 0),
            ("ard", 0),
            ("ard+igdm", 0),
            ("ard", 1),
            ("ard+igdm", 1),
        ]
        assert made.runs[1].folder == tmp_path / "out/tiny/ard/seed-0"
        assert not any(made.blocked(r) for r in made.runs)
        text = "\n".join(made.lines())
        assert "not started" in text and "0 of 5 runs done" in text

    def test_rows_are_chosen_by_patterns(self, table, tmp_path):
        def labels(*patterns):
            made = plan.make(table("published"), tmp_path, patterns=patterns, seeds=1)
            return [r.label for r in made.runs if r.row]

        assert labels("*igdm/*") == ["ard+igdm/here", "ard+igdm/there"]
        assert labels("*igdm/here/faithful", "pgd*") == ["pgd_at/here", "ard+igdm/here/faithful", "pgd_at/there"]
        with pytest.raises(ValueError, match="rows: nothing in published matches 'igmd'; accepted: .*pgd_at/here"):
            labels("igmd")
        with pytest.raises(ValueError, match="seeds: got 0"):
            plan.make(table("tiny"), tmp_path, seeds=0)

    def test_a_missing_teacher_is_named_with_the_remedy(self, table, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        made = plan.make(table("published"), tmp_path / "out", patterns=["*/here"], seeds=1)
        reasons = {r.label: made.blocked(r) for r in made.runs}
        assert reasons["pgd_at/here"] == "", "it trains without a teacher"
        for part in (
            "teacher far (Far, cifar10) is missing",
            "--teacher far=FILE",
            "load_model('Far2030_WRN-28-10', dataset='cifar10', threat_model='Linf')",
            "fastrd train teachers/trades/cifar10-wrn-28-10",
        ):
            assert part in reasons["ard/here"]
        there = tmp_path / "models/cifar10/Linf/Far2030_WRN-28-10.pt"
        there.parent.mkdir(parents=True)
        there.write_bytes(b"weights")
        again = plan.make(table("published"), tmp_path / "out", patterns=["*/here"], seeds=1)
        assert not any(again.blocked(r) for r in again.runs)

    def test_a_teacher_that_is_not_the_published_one_is_refused(self, table, tmp_path):
        checkpoint = tmp_path / "far.pt"
        checkpoint.write_bytes(b"weights")

        def made(**accuracies):
            record = {"stamp": plan.stamp(checkpoint), "n": 1000, **accuracies}
            (tmp_path / "out/teachers").mkdir(parents=True, exist_ok=True)
            (tmp_path / "out/teachers/far.json").write_text(json.dumps(record))
            return lambda **options: plan.make(
                table("published"),
                tmp_path / "out",
                patterns=["ard/here"],
                teachers={"far": checkpoint},
                **options,
            )

        # 1 + 3 * 100 * sqrt(0.9 * 0.1 / 1000) = 3.85 points around 90; 5.6 around 60.
        good = made(clean=0.865, pgd20=0.56)()
        assert good.blocked(good.runs[0]) == ""
        other = made(clean=0.80, pgd20=0.60)
        assert "clean 80.00, published 90.00" in other().blocked(other().runs[0])
        accepted = other(any_teacher=True)
        assert accepted.blocked(accepted.runs[0]) == ""
        checkpoint.write_bytes(b"other weights")
        unmeasured = plan.make(
            table("published"), tmp_path / "out", patterns=["ard/here"], teachers={"far": checkpoint}
        )
        assert unmeasured.networks["far"].measured is None, "it was replaced since"
        with pytest.raises(ValueError, match="--teacher: got 'near'; accepted: far"):
            plan.make(table("published"), tmp_path, patterns=["ard/here"], teachers={"near": checkpoint})

    def test_only_teachers_that_are_needed_are_trained_or_asked_for(self, tmp_path):
        (table,) = facts.load("vfd-cifar10")
        labels = {
            pattern: [r.label for r in plan.make(table, tmp_path, patterns=[pattern], seeds=1).runs]
            for pattern in ("pgd_at", "pgd_at+vfd")
        }
        assert labels == {"pgd_at": ["pgd_at"], "pgd_at+vfd": ["teacher cifar10-natural", "pgd_at+vfd"]}

    def test_rows_that_train_alike_are_trained_once(self, tmp_path):
        (table,) = facts.load("igdm-2")
        made = plan.make(table, tmp_path, patterns=["pgd_at/*", "ard/*"], seeds=2)
        twins = {(r.label, r.recipe.seed): r.same_weights_as for r in made.runs}
        assert twins["pgd_at/ltd", 1] == tmp_path / "igdm-2/pgd_at/bdm/seed-1"
        assert twins["pgd_at/bdm", 1] is None
        assert twins["ard/ltd", 0] is None, "it learns from another teacher"

    def test_a_folder_of_another_recipe_is_refused(self, table, tmp_path):
        made = plan.make(table("tiny"), tmp_path)
        folder = made.runs[1].folder
        folder.mkdir(parents=True)
        (folder / "recipe.toml").write_text(made.runs[1].recipe.to_toml())
        plan.make(table("tiny"), tmp_path)
        with pytest.raises(ValueError, match=r"made with another recipe \(schedule.epochs: 2 -> 3\)"):
            plan.make(table("tiny"), tmp_path, overrides={"schedule.epochs": 3})


@pytest.mark.parametrize(
    ("text", "expected"), [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("45s", 45), ("10", 10), (2.5, 2.5)]
)
def test_budgets(text, expected):
    assert run.seconds(text) == expected


@pytest.mark.parametrize("text", ["", "2d", "h", "0", "-3m"])
def test_bad_budgets(text):
    with pytest.raises(ValueError, match="budget: got"):
        run.seconds(text)


def result(
    paper: dict, values: dict[str, list[float]], *, seeds: int = 3, n: int = 10_000, **facts_
) -> verdict.RowResult:
    settings = facts._Setting(**facts_)
    recipe = {"paper": {"source": "here", **paper}} if paper else {}
    row = facts.PublishedRow("t/ard", ("ard",), "", settings, recipe, ())
    return verdict.RowResult(
        row,
        runs=("a run",),
        seeds=seeds,
        values={metric: dict(enumerate(found)) for metric, found in values.items()},
        n=dict.fromkeys(values, n),
    )


PAPER = {"clean": 60.0, "pgd20": 33.0, "aa": 28.0, "gd": 0.1}


class TestVerdict:
    """Every tolerance below was worked out by hand from the rule."""

    def test_reproduced_within_two_standard_errors(self):
        # Deviations 0.5, 0 and 0.2: s = 0.5, 0.3, 0.3; 2 s sqrt(1/3 + 1) = 1.155, 0.693, 0.693.
        close = {"clean": [60.0, 60.5, 61.0], "pgd20": [33.6] * 3, "aa": [27.3, 27.5, 27.7]}
        found = result(PAPER, close)
        assert found.tolerance("clean") == pytest.approx(1.1547, abs=1e-4)
        assert found.tolerance("pgd20") == pytest.approx(0.6928, abs=1e-4)
        assert found.verdict == (verdict.REPRODUCED, "")

    def test_one_metric_off_is_enough(self):
        off = {"clean": [60.0] * 3, "pgd20": [33.0] * 3, "aa": [27.2, 27.2, 27.2]}
        assert result(PAPER, off).verdict == (verdict.MISSED, "aa -0.80, allowed 0.69")
        above = {**off, "aa": [29.0] * 3}
        assert result(PAPER, above).verdict[0] == verdict.MISSED, "too good is not the same either"

    def test_few_seeds_are_given_the_deviation_of_the_field(self):
        one = {"clean": [61.6], "pgd20": [33.0], "aa": [28.0]}
        found = result(PAPER, one, seeds=1)
        assert found.tolerance("clean") == pytest.approx(2 * 0.6 * 2**0.5)  # 1.70
        assert found.verdict[0] == verdict.REPRODUCED
        assert result(PAPER, {**one, "clean": [61.8]}, seeds=1).verdict[0] == verdict.MISSED

    def test_a_part_of_the_test_set_adds_its_own_error_and_may_prove_nothing(self):
        # Half-width of Wilson's interval of 28 % of 200: 6.16 points; / 1.96 = 3.14.
        few = {"clean": [60.0] * 3, "pgd20": [33.0] * 3, "aa": [30.0] * 3}
        found = result(PAPER, few, n=200, aa_limit=200)
        assert found.tolerance("clean") == pytest.approx(0.6928, abs=1e-4)
        assert found.tolerance("aa") == pytest.approx(2 * (0.12 + 3.2**2) ** 0.5, rel=0.02)
        assert found.verdict[0] == verdict.UNDECIDED and "aa within 6." in found.verdict[1]
        far = result(PAPER, {**few, "aa": [20.0] * 3}, n=200, aa_limit=200)
        assert far.verdict[0] == verdict.MISSED, "what lies far outside is decided all the same"
        silent = result(PAPER, few, n=0, aa_limit=200)
        assert silent.tolerance("aa") == found.tolerance("aa"), "no number in the file: as many as the row asks for"

    def test_what_is_not_there_is_not_judged(self):
        whole = {"clean": [60.0] * 3, "pgd20": [33.0] * 3, "aa": [28.0] * 3}
        assert result(PAPER, {**whole, "aa": []} | {}, seeds=3).values["aa"] == {}
        part = {k: v for k, v in whole.items() if k != "aa"}
        assert result(PAPER, part).verdict == (verdict.UNFINISHED, "no aa")
        assert result(PAPER, {**whole, "aa": [28.0]}).verdict == (verdict.UNFINISHED, "1 of 3 seeds")
        assert replace(result(PAPER, {}), runs=()).verdict == (verdict.NOT_RUN, "")
        assert result({}, whole).verdict == (verdict.NO_TARGET, "")
        assert result({"pd_uniform": 0.2, "minutes": 3.0}, whole).verdict == (verdict.NOT_JUDGED, "")
        other = replace(result(PAPER, whole), incomparable="another teacher: clean 50.00")
        assert other.verdict == (verdict.INCOMPARABLE, "another teacher: clean 50.00")

    def test_distances_and_costs_are_read_off_a_run(self, tmp_path):
        epochs = ({"seconds": 90.0, "memory_mb": 900.0}, {"seconds": 30.0, "memory_mb": 950.0})
        evaluation = {"results": {}, "pointwise": {"uniform": 0.2, "adversarial": 0.3}}
        run = runs.Run(tmp_path, {}, {}, epochs, None, False, evaluation, None, {})
        measured = [run.measure(m) for m in ("pd_uniform", "pd_adv", "minutes", "memory", "gd")]
        assert measured == [0.2, 0.3, 1.0, 950.0, None]
        empty = replace(run, epochs=(), facts={})
        assert {empty.measure(m) for m in ("pd_uniform", "pd_adv", "minutes", "memory", "gc")} == {None}

    def test_gains_are_taken_seed_by_seed(self):
        base = result({"aa": 25.0}, {"aa": [20.0, 22.0, 24.0], "clean": [50.0, 50.0, 50.0]})
        other = result({"aa": 28.0}, {"aa": [21.0, 23.5, 25.5], "clean": [49.0, 51.0, 50.0]})
        pair = verdict.Comparison(base, other)
        gain, wide = pair.gain("aa")
        # Gains 1, 1.5, 1.5: mean 1.3333, deviation 0.2887 -> 0.3; t(0.975, 2) = 4.3027; 4.3027 * 0.3 / sqrt 3.
        assert gain == pytest.approx(4 / 3) and wide == pytest.approx(0.7452, abs=1e-4)
        assert pair.word("aa") == "higher" and pair.printed("aa") == pytest.approx(3.0)
        # Gains -1, 1, 0: deviation 1; 4.3027 / sqrt 3 = 2.484.
        assert pair.gain("clean") == (pytest.approx(0.0), pytest.approx(2.4841, abs=1e-4))
        assert pair.word("clean") == "undecided" and pair.printed("clean") is None
        single = verdict.Comparison(result({}, {"aa": [1.0]}), result({}, {"aa": [9.0]}))
        assert single.gain("aa") == (8.0, None) and single.word("aa") == "undecided"

    def test_correlation(self):
        points = [(0.1, 20.0), (0.2, 23.0), (0.4, 24.0), (0.3, 26.0)]
        x, y = zip(*points, strict=True)
        assert correlation(points) == pytest.approx(statistics.correlation(x, y))
        assert correlation([(1.0, 2.0), (2.0, 4.0), (3.0, 6.0)]) == pytest.approx(1)
        assert correlation(points[:2]) is None
        assert correlation([(1.0, 2.0)] * 3) is None


def test_a_row_without_a_teacher_trains_beside_the_one_that_its_gradients_are_compared_with(table, tmp_path):
    planned = plan.make(table("published"), tmp_path, patterns=["*/there"], seeds=1)
    workers = run._Workers(planned, {}, threads=1, jobs=2, stop=lambda: False, progress=False, failures={})

    def ready():
        return [task.name for task in workers._tasks() if task.ready() and not task.done()]

    teacher, pgd_at = "teacher tiny-teacher, seed 0", "pgd_at/there, seed 0"
    assert ready() == [f"{teacher}: training", f"{pgd_at}: training"]
    rows = [task.name for task in workers._tasks() if task.name.startswith("pgd_at/there")]
    assert rows == [f"{pgd_at}: training", f"{pgd_at}: evaluation", f"{pgd_at}: AutoAttack"]

    write_state(tmp_path / "published" / "pgd_at" / "there" / "seed-0", finished=True, identity={})
    assert ready() == [f"{teacher}: training"], "its evaluation waits for the teacher"


def test_a_job_that_ends_before_it_is_told_what_to_do_has_failed(table, tmp_path, monkeypatch):
    class Ended(subprocess.Popen):
        def __init__(self, command, **options):
            super().__init__([sys.executable, "-c", "raise SystemExit(3)"], **options)
            self.wait()

    monkeypatch.setattr(subprocess, "Popen", Ended)
    planned = plan.make(table("published"), tmp_path, patterns=["*/there"], seeds=1)
    common = {"data": None, "download": False, "device": "cpu", "progress": False}
    workers = run._Workers(planned, common, threads=1, jobs=2, stop=lambda: False, progress=False, failures={})
    workers.work()
    assert len(workers.failures) == 2
    assert all(text.startswith("failed with status 3") for text in workers.failures.values())


def test_costs_add_up_and_survive_a_torn_line(tmp_path):
    lines = [
        {"stage": "train", "seconds": 10.0, "joules": 100.0, "device": "cuda"},
        {"stage": "train", "seconds": 5.0, "joules": 50.0, "device": "cuda"},
        {"stage": "evaluate", "seconds": 2.0, "joules": None, "device": "cuda"},
    ]
    (tmp_path / cost.FILE).write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "tr')
    assert cost.total([tmp_path], "train") == (15.0, 150.0, "cuda")
    assert cost.total([tmp_path, tmp_path], "evaluate") == (4.0, None, "cuda")
    assert cost.total([tmp_path / "nothing"], "train") is None
    with pytest.raises(KeyError), cost.metered(tmp_path / "new", "train", "cpu"):
        raise KeyError
    assert cost.total([tmp_path / "new"], "train").joules is None, "a stopped attempt counts too"


def test_energy_is_the_difference_of_the_counter(tmp_path, monkeypatch):
    readings = iter([1000.0, 1250.5])
    monkeypatch.setattr(cost, "_energy_counter", lambda device: lambda: next(readings))
    with cost.metered(tmp_path, "autoattack", "cuda:0"):
        pass
    spent = cost.total([tmp_path], "autoattack")
    assert spent.joules == 250.5 and spent.device == "cuda"


def test_a_listing_shows_the_paper_where_nothing_was_run(tmp_path):
    (table,) = facts.load("igdm-2")
    text = page.listing(table, table.rows, tmp_path)
    line = next(line for line in text.splitlines() if line.startswith("ard+igdm/bdm "))
    assert " ".join(line.split()) == ("ard+igdm/bdm 0/3 61.62 35.75 30.99 28.79 0.101 0.571 – – – – – – not run")


def pretend(run, accuracies: dict[str, float], gd: float, gc: float) -> None:
    """Leave what a finished run leaves, with the numbers given."""
    run.folder.mkdir(parents=True)
    (run.folder / "recipe.toml").write_text(run.recipe.to_toml())
    write_state(run.folder, finished=True, identity={})
    epoch = {"kind": "epoch", "epoch": 2, "loss": 1.0, "seconds": 30.0, "mi_bound": 2.5, "misranked": 0.125}
    (run.folder / "log.jsonl").write_text(json.dumps(epoch) + "\n")
    document = {
        "schema": 1,
        "dataset": "digits",
        "n": 2000,
        "epsilon": run.recipe.attack.epsilon,
        "results": {k: {"accuracy": v, "n": 2000} for k, v in accuracies.items()},
        "alignment": {"gd": gd, "gc": gc},
        "cka": 0.75,
        "probe": {"cifar100": {"n": 10, "clean": 0.5, "pgd20": 0.25}, "svhn": {"n": 10, "clean": None}},
    }
    (run.folder / "evaluation.json").write_text(json.dumps(document))


def test_the_page_says_what_lies_on_disk(facts_file, tmp_path):
    facts_file.write_text(FACTS.replace("limit = 40\naa_limit = 12\n", ""))
    (table,) = facts.load(f"{facts_file}:tiny")
    made = plan.make(table, tmp_path, seeds=3)
    for each in made.runs[1:]:
        seed, better = each.recipe.seed, each.label == "ard+igdm"
        shift = 0.10 * better + 0.005 * seed
        numbers = {"clean": 0.90 - 0.801 * better, "pgd20": 0.80 - 0.75 * better, "aa": 0.70 + shift}
        pretend(each, numbers, gd=0.2 - shift, gc=0.5 + 0.01 * seed)
    written = page.write(made)
    assert written == tmp_path / "tiny.html"
    document = json.loads((tmp_path / "tiny.json").read_text())
    verdicts = {row["row"]: (row["verdict"], row["why"]) for row in document["rows"]}
    assert verdicts["tiny/ard"] == ("not reproduced", "aa -9.50, allowed 1.15"), "the paper prints 80"
    assert verdicts["tiny/ard+igdm"] == ("reproduced", ""), "9.9 and 5 beside 10 and 5"
    (comparison,) = document["comparisons"]
    assert comparison["aa"]["gain"] == pytest.approx(10) and comparison["aa"]["word"] == "higher"
    assert comparison["clean"]["gain"] == pytest.approx(-80.1) and comparison["clean"]["word"] == "lower"
    # AutoAttack and GD lie on one falling line; GC does not know which row it is.
    text = (tmp_path / "tiny.md").read_text()
    assert "AutoAttack accuracy against GD: Pearson's r = -1.00 over 6 runs." in text
    assert "| ard | 3/3 | 90.00 | 80.00 | 80.00 | 90.00 ± 0.00 (+0.00) |" in text
    assert "| ard+igdm | ard | -80.10, lower (±0.75) | -80.00 |" in text
    assert "| ard | 0.750 ± 0.000 | 50.0 ± 0.0 | 25.0 ± 0.0 | 2.500 ± 0.000 |" in text
    assert "CKA: linear" in text and "Remainder" not in text, "what was measured is explained"
    html = written.read_text()
    assert "not reproduced" in html and html.count("<svg") > 4
    for name in ("alignment", "trade-off", "training"):
        assert (tmp_path / f"tiny-{name}.png").stat().st_size > 1000 and f"(tiny-{name}.png)" in text
    listing = page.listing(table, made.rows, tmp_path)
    assert "not reproduced (aa -9.50, allowed 1.15)" in listing and verdict.RULE in listing


def test_rows_of_a_changed_recipe_or_another_teacher_are_not_comparable(table, tmp_path):
    table = table("published")
    changed = {"schedule.epochs": 3, "schedule.milestones": []}
    for each in plan.make(table, tmp_path, patterns=["pgd_at/here"], seeds=1, overrides=changed).runs:
        pretend(each, {"clean": 0.8}, 0.1, 0.5)
    (found,) = verdict.collect(table, [table.rows[0]], tmp_path)
    assert found.verdict[0] == verdict.INCOMPARABLE and "schedule.epochs 200 -> 3" in found.verdict[1]
    for each in plan.make(table, tmp_path, patterns=["ard/here"], seeds=1).runs:
        pretend(each, {"clean": 0.8}, 0.1, 0.5)
    row = next(row for row in table.rows if row.label == "ard/here")
    assert verdict.collect(table, [row], tmp_path)[0].verdict[0] == verdict.REPRODUCED
    (tmp_path / "teachers").mkdir()
    (tmp_path / "teachers/far.json").write_text(json.dumps({"n": 1000, "clean": 0.5, "pgd20": 0.6}))
    (found,) = verdict.collect(table, [row], tmp_path)
    assert found.verdict == (verdict.INCOMPARABLE, "another teacher: clean 50.00, published 90.00")
    record = {"n": 1000, "clean": 0.9, "pgd20": 0.6, "fingerprint": "that of good.pt"}
    (tmp_path / "teachers/far.json").write_text(json.dumps(record))
    for trained, word in (("that of good.pt", verdict.REPRODUCED), ("that of weak.pt", verdict.INCOMPARABLE)):
        write_state(found.runs[0].path, finished=True, identity={"data": "d", "teacher": trained})
        assert verdict.collect(table, [row], tmp_path)[0].verdict[0] == word


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"epsilon": 1 / 255}, "epsilon 0.00392156862745098 instead of 0.03137254901960784"),
        ({"n": 50, "of": 10_000}, "n 50 instead of 10000"),
        ({"norm": "l2"}, "norm l2 instead of linf"),
    ],
)
def test_a_row_that_was_evaluated_otherwise_is_neither_done_nor_comparable(table, tmp_path, change, why):
    table = table("published")
    (run,) = plan.make(table, tmp_path, patterns=["ard/here"], seeds=1).runs
    pretend(run, dict.fromkeys(run.attacks, 0.8), 0.1, 0.5)
    assert run.done
    file = run.folder / "evaluation.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert not run.done and set(run.missing_attacks()) == set(run.attacks)
    assert run.evaluation_options()["limit"] == plan.ALL, "whatever the recipe in the folder says"
    (found,) = verdict.collect(table, [run.row], tmp_path)
    assert found.verdict == (verdict.INCOMPARABLE, f"evaluated otherwise: {why}")


def test_autoattack_on_fewer_images_than_the_row_asks_for_is_still_to_do(table, tmp_path):
    (run,) = plan.make(table("published"), tmp_path, patterns=["ard/here"], seeds=1).runs
    pretend(run, dict.fromkeys(run.attacks, 0.8), 0.1, 0.5)
    file = run.folder / "evaluation.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "of": document["n"]}))
    assert run.done
    document["results"]["aa"]["n"] = document["n"] - 1
    file.write_text(json.dumps({**document, "of": document["n"]}))
    assert run.missing_attacks() == ["aa"]


def test_what_an_evaluation_drops_is_measured_again(table, tmp_path):
    """It drops what an older file has of a teacher that it does not name."""
    run = plan.make(table("tiny"), tmp_path, patterns=["ard"], seeds=1).runs[-1]
    pretend(run, {name: 0.8 for name in run.attacks if name != "aa"}, 0.1, 0.5)
    file = run.folder / "evaluation.json"
    document = {**json.loads(file.read_text()), "n": 40}
    file.write_text(json.dumps(document))
    assert run.missing_attacks() == ["aa"] and run.missing_measures() == ["cka"] and run.before_autoattack
    file.write_text(json.dumps({**document, "teachers": {"cka": "its fingerprint"}}))
    assert run.missing_attacks() == ["aa"] and run.missing_measures() == [] and not run.before_autoattack
    document["results"]["aa"] = {"accuracy": 0.5, "n": 12}
    file.write_text(json.dumps(document))
    assert run.done, "nothing is to be evaluated"


def test_what_decides_nothing_makes_no_other_run(table, tmp_path):
    """One identity: for runs that go on, for runs that are there, and for the verdict, of every seed."""
    table = table("published")
    row = next(row for row in table.rows if row.label == "ard/here")

    def make(**overrides):
        return plan.make(table, tmp_path, patterns=["ard/here"], seeds=2, overrides=overrides).runs

    for each in make(**{"data.loader": "torch"}):
        pretend(each, {"clean": 0.8}, 0.1, 0.5)
    assert verdict.collect(table, [row], tmp_path, seeds=2)[0].verdict[0] == verdict.REPRODUCED
    assert all(run.done or run.trained for run in make(**{"data.loader": "resident", "data.test_limit": 100}))
    with pytest.raises(ValueError, match="made with another recipe .*attack.steps"):
        make(**{"attack.steps": 7})
    second = make()[1]
    (second.folder / "recipe.toml").write_text(second.recipe.override({"attack.steps": 7}).to_toml())
    (found,) = verdict.collect(table, [row], tmp_path, seeds=2)
    assert found.verdict == (verdict.INCOMPARABLE, "the recipe was changed: attack.steps 10 -> 7")


def fastrd(*arguments, **options):
    command = [sys.executable, "-m", "fastrd.cli", *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def wait_for(condition, process, seconds=900):  # a guard against hanging, not a measurement
    """Until `condition` holds, while the process runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_table_is_reproduced_through_a_kill_a_stop_and_a_continuation(facts_file, tmp_path):
    out = tmp_path / "out"
    command = ["reproduce", f"{facts_file}:tiny", "--out", out, "--device", "cpu", "--jobs", "2"]

    planned = fastrd(*command, "--plan")
    text, _ = planned.communicate()
    assert planned.returncode == 0 and "0 of 5 runs done" in text and not out.exists(), text

    short = fastrd(*command, "--budget", "1s")
    text, _ = short.communicate(timeout=900)
    assert short.returncode == 0 and "not finished: the same command goes on" in text, text

    first = fastrd(*command)
    log = out / "teachers/tiny-teacher/log.jsonl"
    wait_for(lambda: log.is_file() and '"kind": "epoch"' in log.read_text(), first)
    first.kill()  # its job notices by itself
    first.communicate()

    second = fastrd(*command)
    wait_for(lambda: (out / "tiny/ard/seed-0/evaluation.json").is_file(), second)
    second.send_signal(signal.SIGTERM)
    text, _ = second.communicate(timeout=900)
    assert second.returncode == 128 + signal.SIGTERM, text
    assert (out / "tiny.html").is_file(), "what there is so far is shown"
    early = json.loads((out / "tiny.json").read_text())
    assert {row["verdict"] for row in early["rows"]} <= {"unfinished", "not run"}

    third = fastrd(*command)
    text, _ = third.communicate(timeout=900)
    assert third.returncode == 0, text
    weights = {path: path.read_bytes() for path in out.rglob("last.pt")}
    assert len(weights) == 5

    document = json.loads((out / "tiny.json").read_text())
    rows = {row["row"]: row for row in document["rows"]}
    assert list(rows) == ["tiny/ard", "tiny/ard+igdm"]
    for label in ("ard", "ard+igdm"):
        row = rows[f"tiny/{label}"]
        evaluations = [json.loads((out / f"tiny/{label}/seed-{s}/evaluation.json").read_text()) for s in (0, 1)]
        for attack in evaluations[0]["results"]:
            accuracies = [100 * e["results"][attack]["accuracy"] for e in evaluations]
            assert row["mean"][attack] == pytest.approx(statistics.fmean(accuracies))
            assert row["deviation"][attack] == pytest.approx(statistics.stdev(accuracies))
        assert row["n"] == {"clean": 40, "pgd20": 40} | ({"aa": 12} if label == "ard" else {})
        assert [0 <= each["CKA"] <= 1 for each in row["measures"]] == [True, True]
        assert row["cost"]["train"]["seconds"] > 0 and row["cost"]["train"]["joules"] is None
        log = (out / f"tiny/{label}/seed-0/log.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in log if '"kind": "epoch"' in line] == [1, 2]
    assert rows["tiny/ard"]["verdict"] == "not reproduced", "nobody has 90 % after two epochs"
    assert rows["tiny/ard"]["paper"] == {"clean": 90.0, "pgd20": 80.0, "aa": 80.0}
    (comparison,) = document["comparisons"]
    assert (comparison["base"], comparison["with"]) == ("ard", "ard+igdm")
    html, markdown = (out / "tiny.html").read_text(), (out / "tiny.md").read_text()
    assert "not reproduced" in html and html.count("<svg") > 5
    for heading in ("Verdicts", "Teachers", "Training", "Robustness against epsilon", "Cost", "Conditions"):
        assert f"<h2>{heading}</h2>" in html and f"## {heading}" in markdown
    assert (out / "tiny/ard/seed-0/card.md").read_text().startswith("# tiny/ard")

    fourth = fastrd(*command, "--budget", "1h")
    text, _ = fourth.communicate(timeout=900)
    assert fourth.returncode == 0 and "5 of 5 runs done" in text and "started" not in text
    assert weights == {path: path.read_bytes() for path in out.rglob("last.pt")}
