"""Recipes: strict validation, inheritance, overrides, round trips, the shipped files."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import fields

import pytest

from fastrd.core.schema import options
from fastrd.core.toml import differences, flat, parse_assignment
from fastrd.methods import ADDONS, BASES
from fastrd.recipe import SCALARS, SECTIONS, Attack, Recipe, RecipeError, RecipeWarning, available, decides

MINIMAL = """
name = "mine"
[student]
arch = "cnn"
[base]
name = "ard"
"""


def write(tmp_path, text, name="mine.toml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_minimal_recipe_has_the_papers_defaults(tmp_path):
    recipe = Recipe.load(write(tmp_path, MINIMAL))
    assert recipe.attack.epsilon == 8 / 255 and recipe.attack.step_size == 2 / 255 and recipe.attack.steps == 10
    assert recipe.attack.attack_bn == "eval" and not recipe.training.extra_clean_bn_pass
    assert recipe.training.student_passes == "views" and recipe.training.drop_last
    assert (recipe.optimizer.lr, recipe.optimizer.momentum, recipe.optimizer.weight_decay) == (0.1, 0.9, 5e-4)
    assert recipe.schedule.epochs == 200 and recipe.schedule.milestones == (100, 150)
    assert recipe.base == {"name": "ard", "temperature": 1.0, "alpha": 1.0, "reduction": "batchmean"}
    assert recipe.addons == {}


@pytest.mark.parametrize("name", sorted(available()))
def test_every_shipped_recipe_loads_and_round_trips(name, tmp_path):
    recipe = Recipe.load(name)
    assert recipe.name == name and recipe.description
    again = Recipe.load(write(tmp_path, recipe.to_toml()))
    assert again == recipe
    method = recipe.build_method()
    assert method.views(1)


def test_paper_settings_of_the_shipped_recipes():
    ard = Recipe.load("igdm-ard-cifar100-resnet18")
    assert ard.addons["igdm"]["alpha"] == 100 and ard.paper.aa == 28.79
    rslad = Recipe.load("igdm-rslad-cifar100-resnet18")
    assert rslad.schedule.epochs == 300 and rslad.schedule.milestones == (215, 260, 285)
    assert rslad.base["scale"] == 10 and rslad.base["reduction"] == "mean"
    adaad = Recipe.load("igdm-adaad-cifar100-resnet18")
    assert adaad.addons["igdm"]["alpha"] == 70 and adaad.build_method().inner == "adaad"
    faithful = Recipe.load("igdm-ard-cifar100-resnet18-faithful")
    assert faithful.addons == ard.addons and faithful.training.extra_clean_bn_pass


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            "[igdm]\nalpah = 3",
            r"mine.toml: igdm.alpah: unknown key \(value 3\); accepted: alpha.*did you mean 'alpha'",
        ),
        ("[igdm]\nbeta = 1", r"mine.toml: igdm.alpha: missing"),
        ("[igdm]\nalpha = -1", r"mine.toml: igdm.alpha: got -1.0; accepted: a number >= 0"),
        ("[igdm]\nalpha = true", r"mine.toml: igdm.alpha: got True; accepted: a finite number"),
        ("[igmd]\nalpha = 3", r"mine.toml: igmd: unknown key.*did you mean 'igdm'"),
        (
            "[attack]\nattack_bn = 'trian'",
            r"attack.attack_bn: got 'trian'; accepted: one of.*did you mean 'train'",
        ),
        ("[attack]\nsteps = 2.5", r"attack.steps: got 2.5; accepted: an integer"),
        ("[attack]\nepsilon = '8/0'", r"attack.epsilon: got '8/0'"),
        (
            "[attack]\nepsilon = 0",
            r"attack.epsilon: got 0.0; accepted: a fraction of the pixel range, such as 8/255, in \(0, 1.0\]",
        ),
        ("[attack]\nstep_size = 0", r"attack.step_size: got 0.0; accepted"),
        ("[attack]\nstep_size = 1.1", r"attack.step_size: got 1.1; accepted"),
        ("[validation]\nsteps = 10000000", r"validation.steps: got 10000000; accepted: an integer >= 0 and <= 9999999"),
        ("[evaluation]\nattacks = ['pgd20 ']", r"evaluation.attacks: got 'pgd20 '; accepted: 'pgd20', without spaces"),
        ("[schedule]\ngamma = 1e200", r"schedule.gamma: got 1e\+200; accepted: a factor"),
        (
            "[attack]\nnorm = 'l2'",
            r"attack.epsilon: got 8/255, made for l-infinity; accepted: a radius for l2",
        ),
        ("[tricks]\nawp = 1", r"tricks.awp: got 1.0; accepted"),
        ("[tricks]\nawp = 0.01\n[training]\ncompile = true", r"tricks.awp: got 0.01 with training.compile = true"),
        ("[tricks]\nearly_stopping = 0", r"tricks.early_stopping: got 0; accepted: an integer >= 1"),
        ("[tricks]\nearly_stopping = 2\n[validation]\nsteps = 0", r"tricks.early_stopping: got 2; .*validation.steps"),
        ("[attack]\nnorm = 'l1'", r"attack.norm: got 'l1'; accepted"),
        (
            "[attack]\ninner = 'trade'",
            r"attack.inner: got 'trade'; accepted: none, ce, .*did you mean 'trades'",
        ),
        ("[attack]\nprecision = 'tf32'", r"attack.precision: got 'tf32'; accepted: one of 'fp32', 'bf16'"),
        ("[attack]\nepsilon = 8", r"attack.epsilon: got 8.0; accepted: a fraction of the pixel range"),
        ("[schedule]\nmilestones = [150, 100]", r"schedule.milestones: got \[150, 100\]"),
        ("[schedule]\nepochs = 0", r"schedule.epochs: got 0; accepted: an integer >= 1"),
        (
            "[training]\nprecision = 'fp16'",
            r"training.precision: got 'fp16'; accepted: one of 'fp32', 'tf32', 'bf16'",
        ),
        ("[training]\nema = 1.5", r"training.ema: got 1.5"),
        ("[optimizer]\nmomentum = 0\nnesterov = true", r"optimizer.nesterov: got true with momentum 0"),
    ],
)
def test_errors_name_file_key_value_and_what_is_accepted(extra, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        Recipe.load(write(tmp_path, MINIMAL + extra))


def test_bad_names_and_missing_parts(tmp_path):
    with pytest.raises(RecipeError, match="base.name: got 'trdes'; accepted: .*did you mean 'trades'"):
        Recipe.load(write(tmp_path, MINIMAL.replace('"ard"', '"trdes"')))
    with pytest.raises(RecipeError, match="student: arch: got 'cnnn'.*did you mean 'cnn'"):
        Recipe.load(write(tmp_path, MINIMAL.replace('"cnn"', '"cnnn"')))
    with pytest.raises(RecipeError, match="data: got 3; accepted: a table"):
        Recipe.load(write(tmp_path, "data = 3" + MINIMAL))
    with pytest.raises(RecipeError, match="base: missing"):
        Recipe.load(write(tmp_path, 'name = "x"\n[student]\narch = "cnn"\n'))
    with pytest.raises(RecipeError, match="not a TOML file"):
        Recipe.load(write(tmp_path, "name = = 3"))
    with pytest.raises(FileNotFoundError, match="no file or shipped recipe 'dmeo-ard'; did you mean 'demo-ard'"):
        Recipe.load("dmeo-ard")


def test_extends_replaces_single_keys_but_the_base_as_a_whole(tmp_path):
    write(tmp_path, MINIMAL.replace('name = "ard"', 'name = "ard"\ntemperature = 4') + "[attack]\nsteps = 3\n")
    child = write(tmp_path, 'extends = "mine"\nname = "child"\n[attack]\nepsilon = "4/255"\n', "child.toml")
    recipe = Recipe.load(child)
    assert recipe.attack.steps == 3 and recipe.attack.epsilon == 4 / 255 and recipe.base["temperature"] == 4
    other = write(tmp_path, 'extends = "mine"\nname = "other"\n[base]\nname = "rslad"\n', "other.toml")
    assert Recipe.load(other).base["name"] == "rslad"
    loop = write(tmp_path, 'extends = "loop"\nname = "loop"\n', "loop.toml")
    with pytest.raises(RecipeError, match="in a circle: loop.toml -> loop.toml"):
        Recipe.load(loop)


def test_overrides_are_validated_like_the_file(tmp_path):
    path = write(tmp_path, MINIMAL)
    recipe = Recipe.load(path, {"igdm.alpha": 20, "schedule.epochs": 3, "attack.epsilon": "4/255"})
    assert recipe.addons["igdm"]["alpha"] == 20 and recipe.schedule.epochs == 3
    assert recipe.override({"igdm.alpha": 0}).build_method().views(1) == Recipe.load(path).build_method().views(1)
    with pytest.raises(RecipeError, match="schedule.epoch: unknown key.*did you mean 'epochs'"):
        Recipe.load(path, {"schedule.epoch": 3})
    with pytest.raises(RecipeError, match="name is a value, not a table"):
        Recipe.load(path, {"name.x": 3})


def test_another_base_loss_starts_from_its_own_defaults():
    recipe = Recipe.from_dict({"name": "t", "student": {"arch": "cnn"}, "base": {"name": "ard", "temperature": 4}})
    other = Recipe.from_dict({"name": "t", "student": {"arch": "cnn"}, "base": {"name": "rslad"}})
    assert recipe.override({"base.name": "rslad"}) == other
    assert recipe.override({"base.name": "ard", "base.alpha": 0.5}).base["temperature"] == 4


def test_a_file_is_looked_for_where_the_run_found_it_only_under_its_own_path(tmp_path, monkeypatch):
    def naming(source):
        return Recipe.from_dict({"name": "t", "student": {"arch": "cnn"}, "base": {"name": "ard"}}).override(
            {"teacher.source": str(source)}
        )

    teacher, elsewhere = tmp_path / "a" / "teachers" / "t.pt", tmp_path / "b"
    teacher.parent.mkdir(parents=True)
    elsewhere.mkdir()
    teacher.touch()
    monkeypatch.chdir(elsewhere)
    for given in ("teachers/t.pt", "../teachers/t.pt", "./t.pt", teacher):
        assert naming(given).located(naming(teacher)).teacher.source == str(teacher), given
    for given in ("teachers/u.pt", "u.pt", "Wang2023Better_WRN-28-10", "other/t.pt", tmp_path / "t.pt"):
        assert naming(given).located(naming(teacher)).teacher.source == str(given), "another file, though it is missing"


@pytest.mark.parametrize("overrides", [[1], {5: 1}, "seed=1"])
def test_overrides_that_are_no_table_are_refused(overrides):
    with pytest.raises(RecipeError, match="overrides: got .*accepted: a table of dotted keys"):
        Recipe.load("demo-ard", overrides)
    with pytest.raises((RecipeError, TypeError), match="overrides: got .*accepted: a table"):
        Recipe.load("demo-ard").override(overrides)


def test_set_values_are_toml_or_plain_strings():
    assert parse_assignment("schedule.milestones=[1, 2]") == ("schedule.milestones", [1, 2])
    assert parse_assignment("attack.epsilon=8/255") == ("attack.epsilon", "8/255")
    assert parse_assignment("data.name = digits") == ("data.name", "digits")
    with pytest.raises(RecipeError, match="--set: got 'nonsense'"):
        parse_assignment("nonsense")
    with pytest.raises(RecipeError, match=r"--set: got 'seed=1\\nname=2'; accepted: one key=value"):
        parse_assignment("seed=1\nname=2")


def test_keyword_options_have_their_natural_key(tmp_path):
    recipe = Recipe.load(write(tmp_path, MINIMAL.replace('"ard"', '"pgd_at"') + "[vfd]\nlambda = 5\n"))
    assert recipe.build_method().terms["vfd"].lambda_ == 5
    assert Recipe.load(write(tmp_path, recipe.to_toml())) == recipe


NOT_FINITE = (math.nan, math.inf, -math.inf, 10**400, -(10**5000), "nan", "inf", "1/inf")
TABLE = {"name": "t", "student": {"arch": "cnn"}, "base": {"name": "pgd_at"}}


def numbers():
    """Yields every key of a section or method that takes a number, with the tables that it is set in."""
    owners = {("base", name): term for name, term in BASES.items()}
    owners |= {(name, None): owner for name, owner in {**SECTIONS, **ADDONS}.items()}
    for (section, name), owner in owners.items():
        for key, parameter in options(owner).items():
            if re.search(r"\b(int|float)\b", parameter.annotation):
                yield section, key.rstrip("_"), {} if name is None else {"name": name}


@pytest.mark.parametrize("value", NOT_FINITE, ids=map(str, range(len(NOT_FINITE))))
def test_no_number_of_a_recipe_is_anything_but_finite(value):
    found = list(numbers())
    assert len(found) > 50
    for section, key, others in found:
        needed = {**TABLE, "paper": {"source": "s"}, "igdm": {"alpha": 1}}.get(section, {})
        table = {**TABLE, section: {**needed, **others, key: value}}
        with pytest.raises(RecipeError, match=f"recipe: {section}.{key}"):
            Recipe.from_dict(table)
    with pytest.raises(RecipeError):
        Recipe.from_dict({**TABLE, "seed": value})
    with pytest.raises(RecipeError):
        Recipe.from_dict({**TABLE, "student": {"arch": "cnn", "options": {"width": value}}})


def test_sections_made_in_python_are_checked_alike():
    assert Attack(epsilon="8/255", step_size="0.01", steps=3).epsilon == 8 / 255
    for options_, message in (
        ({"epsilon": math.nan}, "epsilon: got nan"),
        ({"epsilon": 10**400}, "epsilon"),
        ({"steps": 2.0}, "steps: got 2.0; accepted: an integer"),
        ({"step_size": 2}, "step_size: got 2.0; accepted: a fraction of the pixel range"),
        ({"inner": "pgd"}, "inner: got 'pgd'"),
    ):
        with pytest.raises(ValueError, match=message):
            Attack(**options_)
    with pytest.raises(ValueError, match="alpha: got inf; accepted: a number >= 0"):
        ADDONS["igdm"](alpha=math.inf)
    with pytest.raises(TypeError, match="alpha: got '3'"):
        ADDONS["igdm"](alpha="3")


def test_quoted_numbers_and_plain_decimals_are_fractions():
    for text in ("0.03", " 0.03", "3e-2", "3/100"):
        assert Recipe.from_dict({**TABLE, "attack": {"epsilon": text}}).attack.epsilon == 0.03
    for text in ("", "/", "1/", "1/0", "a", "1/2/3"):
        with pytest.raises(RecipeError, match="attack.epsilon"):
            Recipe.from_dict({**TABLE, "attack": {"epsilon": text}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"student": {"arch": "resnet18", "options": {"width": 10**9}}},
            "student.options: got {'width': 1000000000}, of which no network can be built .*; accepted: smaller",
        ),
        (
            {"schedule": {"milestones": [-5]}},
            "schedule.milestones: got \\[-5\\]; accepted: increasing epoch numbers >= 1",
        ),
        ({"schedule": {"milestones": [0, 3]}}, "schedule.milestones"),
        ({"schedule": {"warmup_epochs": 5}}, "schedule.warmup_epochs: got 5.0 with kind = 'multistep'"),
        (
            {"schedule": {"kind": "cosine", "epochs": 3, "warmup_epochs": 3.5}},
            "schedule.warmup_epochs: got 3.5 for a run of 3 epochs",
        ),
        ({"evaluation": {"attacks": ["autoatack"]}}, "evaluation.attacks: got 'autoatack'"),
        ({"evaluation": {"attacks": []}}, "evaluation.attacks: none given"),
        ({"optimizer": {"momentum": 1}}, "optimizer.momentum: got 1.0"),
        ({"data": {"holdout": 50, "train_limit": 50}}, "data.holdout: got 50 of train_limit = 50"),
        ({"data": {"name": ""}}, "data.name: got ''"),
        ({"base": {"name": ["ard"]}}, "base.name: got \\['ard'\\]"),
        ({"base": {"name": {}}}, "base.name: got {}"),
        (
            {"student": {"arch": "cnn", "options": {"num_classes": 3}}},
            "student.options.num_classes: decided by",
        ),
        (
            {"student": {"arch": "cnn", "options": {"arch": "resnet8"}}},
            "student.options.arch: a key of its own; accepted: student.arch",
        ),
        (
            {"student": {"arch": "timm:resnet18", "repeat_grey": True, "options": {"repeat_grey": True}}},
            "student.options.repeat_grey: a key of its own; accepted: student.repeat_grey",
        ),
        ({"student": {"arch": ["cnn"]}}, "student.arch: got \\['cnn'\\]"),
        ({"student": {"arch": "cnn", "options": {"width": 10**18}}}, "student"),
        ({"description": "half a pair \ud83d"}, "description"),
        ({3: 4}, "got the key 3"),
    ],
)
def test_what_would_fail_later_or_do_nothing_is_refused(change, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict({**TABLE, **change})


def test_milestones_beyond_the_run_are_said():
    with pytest.warns(RecipeWarning, match="schedule.milestones: 100, 150 have no effect with schedule.epochs = 30"):
        Recipe.load("igdm-ard-cifar100-resnet18", {"schedule.epochs": 30})
    with pytest.warns(RecipeWarning, match="milestones: 3 have no effect"):
        Recipe.from_dict({**TABLE, "schedule": {"epochs": 3, "milestones": [1, 3]}})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gacd.negatives": 64}, "gacd.negatives: 64 has no effect with estimator = 'infonce'"),
        ({"gacd.momentum": 0.9}, "gacd.momentum: 0.9 has no effect with estimator = 'infonce' and no bank"),
        ({"gacd.momentum": 0.9, "gacd.candidates": "bank"}, None),
        ({"gacd.estimator": "crd", "gacd.negatives": 64}, None),
        ({"gacd.estimator": "crd", "gacd.candidates": "bank"}, "gacd.candidates: 'bank' has no effect with estimator"),
        ({"schedule.gamma": 0.5}, "schedule.gamma: 0.5 has no effect with schedule.kind = 'cosine'"),
        ({"data.extra_fraction": 0.3}, "data.extra_fraction: 0.3 has no effect without data.extra"),
        ({"tricks.awp_warmup": 3}, "tricks.awp_warmup: 3 has no effect without tricks.awp"),
        ({"data.holdout": 0}, "validation.every: 2 has no effect without data.holdout"),
        ({"tricks.awp": 0.01, "tricks.awp_warmup": 100}, "tricks.awp: has no effect in a run of"),
        ({"tricks.early_stopping": 100}, "tricks.early_stopping: has no effect in a run of"),
        ({"base.name": "iad"}, "base.start_epoch: has no effect in a run of .* epochs, before epoch 61"),
        ({"base.alpha": 0, "base.temperature": 5}, "base.temperature: 5.* has no effect with alpha = 0"),
    ],
)
def test_what_has_no_effect_is_said(changes, said):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Recipe.load("demo-gacd", changes)
    texts = [str(warning.message) for warning in caught if warning.category is RecipeWarning]
    assert len(texts) == bool(said) and all(re.search(said, text) for text in texts)


def test_an_attack_that_is_not_trained_on_is_said():
    with pytest.warns(RecipeWarning, match="attack.steps: 5 has no effect as no attack is trained on"):
        Recipe.from_dict({**TABLE, "base": {"name": "natural"}, "attack": {"steps": 5}})
    with pytest.warns(RecipeWarning, match="igdm: has no effect as no attack is trained on"):
        Recipe.from_dict({**TABLE, "base": {"name": "natural"}, "igdm": {"alpha": 5}})
    with pytest.warns(RecipeWarning, match="igdm.alpha: 5.* has no effect with beta = gamma = 0"):
        Recipe.from_dict({**TABLE, "igdm": {"alpha": 5, "beta": 0, "gamma": 0}})


def test_shipped_recipes_set_nothing_in_vain():
    """But where a paper's row does: SVHN's 50 epochs end before IAD's 61st, and faithful rows hold no images out."""
    said = {}
    for name in available():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Recipe.load(name)
        if caught:
            said[name] = "; ".join(str(each.message).removeprefix(f"{name}: ") for each in caught)
    short = "base.start_epoch: has no effect in a run of 50 epochs, before epoch 61"
    svhn = {name for name in available() if name.startswith("igdm-3-svhn/") and "iad" in name.split("/")[1]}
    remainder = "validation.remainder: True has no effect without data.holdout"
    faithful = {f"igdm-remainder/{row}/faithful" for row in ("ard", "ard+igdm")}
    assert said == dict.fromkeys(svhn, short) | dict.fromkeys(faithful, remainder)


def test_nesting_has_a_limit_and_no_traceback(tmp_path):
    nested: dict = {}
    for _ in range(100_000):
        nested = {"a": nested}
    for table in ({**TABLE, "student": nested}, {**TABLE, "base": [[nested]]}, nested):
        with pytest.raises(RecipeError, match="nested more than 16 deep"):
            Recipe.from_dict(table)
    while nested:  # Python frees a nest by recursion
        nested = nested.pop("a")
    for text in ("x" + ".a" * 2000 + " = 1", "x = " + "[" * 100_000, "x = " + "1" * 5000):
        with pytest.raises(RecipeError):
            Recipe.load(write(tmp_path, text + MINIMAL))


@pytest.mark.parametrize("name", ["robust \U0001f600", "a\x7fb", 'quote " \\ \n \t', "", "\x00"])
def test_any_text_survives_the_file(name, tmp_path):
    recipe = Recipe.from_dict({**TABLE, "name": name, "student": {"arch": "cnn", "options": {"width": 4}}})
    path = tmp_path / "again.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8", newline="")
    assert Recipe.load(path) == recipe


CLASSES = {
    "evaluation": {"data.test_limit", "evaluation.attacks"},
    "nothing": {
        "name",
        "description",
        "plugins",
        "data.loader",
        "teacher.source",
        "teacher.arch",
        "clean_teacher.source",
        "clean_teacher.arch",
        "validation.remainder",
        *(f"paper.{key}" for key in ("source", "clean", "fgsm", "pgd20", "cw", "aa", "gd", "gc")),
        *(f"paper.{key}" for key in ("pd_uniform", "pd_adv", "minutes", "memory")),
    },
    "weights": {
        *(f"{role}.{key}" for role in ("teacher", "clean_teacher") for key in ("normalize", "shortcut")),
        "seed",
        *(f"data.{key}" for key in ("name", "augment", "holdout", "train_limit")),
        *(f"data.{key}" for key in ("image_size", "extra", "extra_fraction")),
        *(f"student.{key}" for key in ("arch", "options", "weights", "repeat_grey")),
        *(f"attack.{key}" for key in ("inner", "norm", "epsilon", "step_size", "steps", "precision", "attack_bn")),
        *(f"optimizer.{key}" for key in ("lr", "momentum", "weight_decay", "nesterov", "head_lr")),
        *(f"schedule.{key}" for key in ("epochs", "kind", "milestones", "gamma", "warmup_epochs")),
        *(f"training.{key}" for key in ("batch_size", "precision", "compile", "sync_bn", "ema", "clip_grad")),
        *(f"training.{key}" for key in ("extra_clean_bn_pass", "channels_last", "drop_last", "student_passes")),
        *(f"tricks.{key}" for key in ("awp", "awp_warmup", "label_smoothing", "early_stopping")),
        *(f"validation.{key}" for key in ("every", "steps")),
    },
}


def test_each_key_decides_exactly_one_thing():
    keys = [*SCALARS, *(f"{name}.{field.name}" for name, cls in SECTIONS.items() for field in fields(cls))]
    assert sorted(keys) == sorted(key for named in CLASSES.values() for key in named), "a key belongs to no class"
    for decided, named in CLASSES.items():
        assert {decides(key) for key in named} == {decided}
    assert {decides(f"{name}.{key}") for name, term in ADDONS.items() for key in options(term)} == {"weights"}
    assert decides("base.name") == "weights"


def test_the_identity_holds_what_decides_the_weights_and_nothing_else():
    recipe = Recipe.from_dict({**TABLE, "igdm": {"alpha": 3}, "data": {"name": "folder/toy.npz"}})
    same = {
        "name": "other",
        "data.loader": "torch",
        "data.test_limit": 5,
        "data.name": "/elsewhere/toy.npz",
        "teacher.source": "t.pt",
        "evaluation.attacks": ["clean"],
        "validation.remainder": True,
    }
    for key, value in same.items():
        assert recipe.override({key: value}).identity() == recipe.identity(), key
    other = {
        "seed": 1,
        "igdm.alpha": 4,
        "training.ema": 0.9,
        "student.options.width": 8,
        "data.name": "digits",
    }
    for key, value in other.items():
        assert differences(recipe.override({key: value}).identity(), recipe.identity()).keys() == {key}
    assert set(recipe.identity()) <= set(flat(recipe.to_dict()))
