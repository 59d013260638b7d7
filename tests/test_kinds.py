"""Arguments of another kind than documented are refused by name, before anything happens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import fastrd
from fastrd import attacks, losses
from fastrd.core.kinds import check_kinds
from fastrd.data import load_dataset, pack
from fastrd.report import build_benchmarks
from fastrd.reproduce import reproduce


@check_kinds
def example(
    items: Sequence[str], *, flag: bool = False, table: Mapping[str, int] | None = None, size: int = 1, kind: str = ""
) -> tuple:
    """Returns what it was given."""
    return items, flag, table, size, kind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"items": "ab"}, "items: got 'ab'; accepted: a list of strings"),
        ({"items": ["a", 1]}, "items: got ['a', 1]; accepted: a list of strings"),
        ({"items": [], "flag": "no"}, "flag: got 'no'; accepted: true or false"),
        ({"items": [], "flag": 1}, "flag: got 1; accepted: true or false"),
        ({"items": [], "table": [("a", 1)]}, "table: got [('a', 1)]; accepted: a table"),
    ],
)
def test_an_argument_of_another_kind_is_named(arguments, message):
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        example(**arguments)


def test_numbers_and_names_are_left_to_those_who_know_what_is_accepted():
    given = (["a"], np.bool_(True), None, "8/255", 3)
    assert example(given[0], flag=given[1], table=None, size=given[3], kind=given[4]) == given
    assert example(("a",), table={"b": 1})[2] == {"b": 1}


def test_an_unknown_argument_has_pythons_own_message():
    with pytest.raises(TypeError, match=r"example\(\) got an unexpected keyword argument 'itmes'"):
        example([], itmes=[])
    with pytest.raises(TypeError, match=r"example\(\) missing 1 required positional argument: 'items'"):
        example()


RECIPE = fastrd.Recipe.load("demo-teacher")
NETWORK = fastrd.build_model("cnn", num_classes=3, width=2, image_size=8)
IMAGES = torch.full((2, 3, 8, 8), 0.5)
ATTACK = {"epsilon": 0.1, "step_size": 0.1, "steps": 1}


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("log", lambda out: fastrd.train(RECIPE, out=out, log="wandb")),
        ("resume", lambda out: fastrd.train(RECIPE, out=out, resume="yes")),
        ("recipe", lambda out: fastrd.train("demo-teacher", out=out)),
        ("measures", lambda out: fastrd.evaluate_run(out, measures="remainder")),
        ("figures", lambda out: fastrd.evaluate_run(out, figures="no")),
        ("teacher", lambda out: fastrd.evaluate_run(out, teacher=[1])),
        ("fold", lambda out: fastrd.export(out, fold="no")),
        ("runs", lambda out: fastrd.report(str(out), out / "page.html")),
        ("title", lambda out: fastrd.report([out], out / "page.html", title=3)),
        ("files", lambda out: build_benchmarks("file.json", out / "page.html")),
        ("rows", lambda out: reproduce("igdm-2", out=out, rows="ard")),
        ("teachers", lambda out: reproduce("igdm-2", out=out, teachers="file")),
        ("overrides", lambda out: RECIPE.override("seed=1")),
        ("table", lambda out: fastrd.Recipe.from_dict([1])),
        ("name", lambda out: load_dataset(3)),
        ("download", lambda out: load_dataset("digits", download="no")),
        ("quality", lambda out: pack.pack("digits", out / "digits.beton", quality="9")),
        ("prefix", lambda out: fastrd.load_teacher(out, prefix=3)),
        ("generator", lambda out: attacks.pgd(NETWORK, IMAGES, lambda z, x: z[:, 0], generator=3, **ATTACK)),
        ("compile", lambda out: attacks.PGD(NETWORK, compile="no", **ATTACK)),
    ],
)
def test_public_functions_name_it_and_leave_nothing(name, call, tmp_path):
    with pytest.raises(TypeError, match=f"^{name}: got .+; accepted: "):
        call(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_images_of_another_dtype_than_the_network_are_named(dtype):
    with pytest.raises(ValueError, match=f"^x: got {dtype}; accepted: torch.float32"):
        attacks.pgd(NETWORK, IMAGES.to(dtype), lambda logits, x: logits[:, 0], **ATTACK)


def test_shapes_alone_pass_through_info_nce():
    rows = torch.empty(4, 8, device="meta")
    assert losses.info_nce(rows, rows).shape == ()


@pytest.mark.parametrize(("reduction", "name"), [("none", "info_nce"), ("mean", "info_nce_sum")])
def test_a_transform_of_torch_func_is_refused_by_the_name_of_the_loss(reduction, name):
    rows = torch.randn(1100, 8)  # more scores than a tile holds
    with pytest.raises(RuntimeError, match=rf"^{name}: got called under a transform of torch\.func"):
        torch.func.grad(lambda anchor: losses.info_nce(anchor, rows, reduction=reduction).sum())(rows)


def bank_loss(anchor):
    options = {"negatives": 3, "normalizer": 4.0, "labels": torch.arange(6, device="cpu") % 2}
    return losses.nce_bank(anchor, torch.ones(6, 8, device="cpu"), torch.arange(4, device="cpu"), **options)


def contrast(anchor):
    return losses.info_nce(anchor, torch.ones(4, 8))


@pytest.mark.parametrize("loss", [contrast, bank_loss])
def test_no_transform_of_torch_func_silently_drops_a_derivative(loss):
    x = torch.randn(4, 8)
    for derivative in (lambda: torch.func.jvp(loss, (x,), (x,)), lambda: dual(loss, x)):
        with pytest.raises(RuntimeError, match=r"got called under a transform of torch\.func"):
            derivative()
    x.requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    many = torch.stack([x.detach(), x.detach()]).requires_grad_()
    (found,) = torch.autograd.grad(torch.func.vmap(loss, randomness="same")(many).sum(), many)
    torch.testing.assert_close(found, torch.stack([expected, expected]))


def dual(loss, x):
    with forward_ad.dual_level():
        return loss(forward_ad.make_dual(x, x))


def test_the_default_device_and_dtype_of_torch_change_no_loss():
    """A draw read from memory of a tensor on meta, and heads were drawn in the default dtype."""
    x, labels = torch.randn(4, 8), torch.arange(6) % 2

    def gacd(estimator):
        module = losses.ContrastiveDistillation(8, 8, labels, dim=4, negatives=3, estimator=estimator)
        return module(x, x, torch.arange(4, device="cpu"), draw=3)

    values = bank_loss(x), *map(gacd, ("infonce", "strict", "crd"))
    with torch.device("meta"):
        assert torch.equal(torch.stack(values), torch.stack([bank_loss(x), *map(gacd, ("infonce", "strict", "crd"))]))
    torch.set_default_dtype(torch.float64)
    try:
        finer = torch.stack([bank_loss(x).double(), *map(gacd, ("infonce", "strict", "crd"))])
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(torch.stack(values).double(), finer, rtol=1e-4, atol=1e-4)


def test_features_of_a_teacher_in_inference_mode_are_constants():
    module, x = losses.ContrastiveDistillation(8, 8, torch.arange(6) % 2, dim=4), torch.randn(4, 8)
    with torch.inference_mode():
        taught = x.clone()
    found = [module(x, features, torch.arange(4)) for features in (x, taught)]
    assert torch.equal(*found) and found[1].requires_grad


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (fastrd.load_plugins, {"sources": "x.py"}, "sources: got 'x.py'; accepted: a list of"),
        (fastrd.load_plugins, {"sources": [3]}, "sources: got [3]; accepted: a list of"),
        (reproduce, {"table": "t", "teachers": {"a": b"b"}}, "teachers: got {'a': b'b'}; accepted: a table"),
        (
            fastrd.evaluate,
            {"model": torch.nn.Flatten(), "x": torch.zeros(1, 1, 1, 2), "y": [0], "attacks": "clean", "state_dir": 3},
            "state_dir: got 3; accepted: a path",
        ),
    ],
)
def test_what_lists_and_tables_hold(function, arguments, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        function(**arguments)


@pytest.mark.parametrize("reweight", ["base", (term for term in ["base"])])
def test_terms_to_reweight_are_a_list(reweight):
    """A generator would be empty after its terms were checked, and the weights silently left out."""
    logits = torch.zeros(2, 3)
    given = {"labels": torch.tensor([0, 1]), "alpha": 1.0, "reweight": reweight}
    with pytest.raises(TypeError, match="reweight: got .+; accepted: a list of names"):
        losses.fused_objective(*[logits] * 4, **given)
