"""Recipes: strict validation, inheritance, overrides, round trips, the shipped files."""

from __future__ import annotations

import pytest

from fastrd.core.toml import differences, parse_assignment
from fastrd.recipe import Recipe, RecipeError, available

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
    assert (
        recipe.attack.epsilon == 8 / 255 and recipe.attack.step_size == 2 / 255 and recipe.attack.steps == 10
    )
    assert recipe.attack.attack_bn == "eval" and not recipe.training.extra_clean_bn_pass
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
    changed = differences(ard.to_dict(), faithful.to_dict(), ignore=("name", "description"))
    assert changed == {"training.extra_clean_bn_pass": (False, True)}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            "[igdm]\nalpah = 3",
            r"mine.toml: igdm.alpah: unknown key \(value 3\); accepted: alpha.*did you mean 'alpha'",
        ),
        ("[igdm]\nbeta = 1", r"mine.toml: igdm.alpha: missing"),
        ("[igdm]\nalpha = -1", r"mine.toml: igdm.alpha: got -1.0; accepted: a number >= 0"),
        ("[igdm]\nalpha = true", r"mine.toml: igdm.alpha: got True; accepted: a number"),
        ("[igmd]\nalpha = 3", r"mine.toml: igmd: unknown key.*did you mean 'igdm'"),
        (
            "[attack]\nattack_bn = 'trian'",
            r"attack.attack_bn: got 'trian'; accepted: one of.*did you mean 'train'",
        ),
        ("[attack]\nsteps = 2.5", r"attack.steps: got 2.5; accepted: an integer"),
        ("[attack]\nepsilon = '8/0'", r"attack.epsilon: got '8/0'"),
        (
            "[attack]\nepsilon = 0",
            r"attack.epsilon: got 0.0; accepted: a fraction of the pixel range in \(0, 1\]",
        ),
        ("[attack]\nstep_size = 0", r"attack.step_size: got 0.0; accepted"),
        ("[attack]\nstep_size = 1.1", r"attack.step_size: got 1.1; accepted"),
        ("[attack]\nepsilon = nan", r"attack.epsilon: got nan; accepted"),
        (
            "[attack]\nnorm = 'l2'",
            r"attack.epsilon: got 8/255, made for l-infinity; accepted: a radius for l2",
        ),
        ("[attack]\nnorm = 'l1'", r"attack.norm: got 'l1'; accepted"),
        (
            "[attack]\ninner = 'trade'",
            r"attack.inner: got 'trade'; accepted: none, ce, .*did you mean 'trades'",
        ),
        ("[attack]\nepsilon = 8", r"attack.epsilon: got 8.0; accepted: a fraction of the pixel range"),
        ("[schedule]\nmilestones = [150, 100]", r"schedule.milestones: got \[150, 100\]"),
        ("[schedule]\nepochs = 0", r"schedule.epochs: got 0; accepted: a number >= 1"),
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
    with pytest.raises(
        FileNotFoundError, match="no file or shipped recipe 'dmeo-ard'; did you mean 'demo-ard'"
    ):
        Recipe.load("dmeo-ard")


def test_extends_replaces_single_keys_but_the_base_as_a_whole(tmp_path):
    write(
        tmp_path, MINIMAL.replace('name = "ard"', 'name = "ard"\ntemperature = 4') + "[attack]\nsteps = 3\n"
    )
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
    assert recipe.override({"igdm.alpha": 0}).build_method().views(1) == Recipe.load(
        path
    ).build_method().views(1)
    with pytest.raises(RecipeError, match="schedule.epoch: unknown key.*did you mean 'epochs'"):
        Recipe.load(path, {"schedule.epoch": 3})
    with pytest.raises(RecipeError, match="name is a value, not a table"):
        Recipe.load(path, {"name.x": 3})


def test_set_values_are_toml_or_plain_strings():
    assert parse_assignment("schedule.milestones=[1, 2]") == ("schedule.milestones", [1, 2])
    assert parse_assignment("attack.epsilon=8/255") == ("attack.epsilon", "8/255")
    assert parse_assignment("data.name = digits") == ("data.name", "digits")
    with pytest.raises(RecipeError, match="--set: got 'nonsense'"):
        parse_assignment("nonsense")


def test_keyword_options_have_their_natural_key(tmp_path):
    recipe = Recipe.load(write(tmp_path, MINIMAL.replace('"ard"', '"pgd_at"') + "[vfd]\nlambda = 5\n"))
    assert recipe.build_method().terms["vfd"].lambda_ == 5
    assert Recipe.load(write(tmp_path, recipe.to_toml())) == recipe
