"""Features: their alignment with a teacher's, their worth on another task, and gradients matched directly."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from fastrd import Recipe, train
from fastrd.data import load_dataset
from fastrd.evaluation import cka, evaluate, linear_probe
from fastrd.methods import Setup, Step
from fastrd.methods.direct import Direct
from fastrd.models import build_model
from fastrd.workflow import evaluate_run


class Features(nn.Module):
    """x -> (logits, features) with features = A x; `A` by hand."""

    def __init__(self, matrix: torch.Tensor, classes: int = 3) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)
        self.head = nn.Linear(matrix.shape[0], classes)
        self.feature_dim, self.num_classes = matrix.shape[0], classes

    def forward(self, x, features=False):
        phi = x.flatten(1) @ self.matrix.T
        return (self.head(phi), phi) if features else self.head(phi)


def test_cka_equals_its_definition_on_centred_gram_matrices():
    torch.manual_seed(1)
    x = torch.rand(40, 3, 2, 2)
    a, b = Features(torch.randn(5, 12)), Features(torch.randn(7, 12))
    grams = []
    for model in (a, b):
        phi = model(x, features=True)[1].detach().double().numpy()
        centring = np.eye(40) - 1 / 40
        grams.append(centring @ (phi @ phi.T) @ centring)
    expected = (grams[0] * grams[1]).sum() / np.linalg.norm(grams[0]) / np.linalg.norm(grams[1])
    assert cka(a, b, x, batch_size=7) == pytest.approx(expected, rel=1e-5)
    assert cka(a, a, x) == pytest.approx(1, rel=1e-5)
    rotation, _ = torch.linalg.qr(torch.randn(5, 5))
    turned = Features(3 * rotation @ a.matrix.detach())
    assert cka(a, turned, x) == pytest.approx(1, rel=1e-4)
    assert cka(a, Features(torch.zeros(4, 12)), x) == 0


@pytest.mark.parametrize("measure", [lambda net, x, y: cka(net, net, x), partial(linear_probe, num_classes=3)])
def test_what_reads_features_leaves_no_hook_and_freezes_nothing(measure):
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3))
    measure(net, torch.rand(9, 3, 2, 2), torch.arange(9) % 3)
    assert net.training and all(parameter.requires_grad for parameter in net.parameters())
    assert not any(module._forward_pre_hooks for module in net.modules())


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_script_as_teacher_is_said_to_have_no_features(tmp_path):
    script = torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    recipe = {"name": "x", "student": {"arch": "cnn", "options": {"width": 4}}, "base": {"name": "ard"}}
    recipe |= {"data": {"name": "digits", "train_limit": 100, "holdout": 20}, "schedule": {"epochs": 1}}
    with pytest.raises(ValueError, match=r"^teacher: with_features: RecursiveScriptModule has no nn.Linear inside"):
        train(Recipe.from_dict(recipe), out=tmp_path / "run", teacher=script, device="cpu", progress=False)


def test_a_probe_is_the_softmax_regression_of_the_features():
    from sklearn.linear_model import LogisticRegression

    torch.manual_seed(2)
    model = Features(torch.randn(6, 12), classes=9)
    x, y = torch.rand(120, 3, 2, 2), torch.randint(0, 4, (120,))
    probe = linear_probe(model, x, y, num_classes=4, weight_decay=1e-2, batch_size=50)
    phi = model(x, features=True)[1].detach().double().numpy()
    standard = (phi - phi.mean(0)) / phi.std(0, ddof=1)
    # Its objective is sum of losses + ||W||^2 / (2 C).
    oracle = LogisticRegression(C=1 / (120 * 1e-2), tol=1e-8, max_iter=2000).fit(standard, y.numpy())
    ours = torch.softmax(probe(x), 1).numpy()
    np.testing.assert_allclose(ours, oracle.predict_proba(standard), atol=2e-3)
    assert not any(p.requires_grad for p in probe.parameters())
    results = evaluate(probe, x, y, attacks=("clean", "pgd5"), progress=False)
    assert results["clean"]["accuracy"] == pytest.approx((ours.argmax(1) == y.numpy()).mean())
    with pytest.raises(ValueError, match="y: got label 3; accepted: 0 to 2"):
        linear_probe(model, x, y, num_classes=3)


def test_a_probe_resizes_images_of_another_task():
    model = build_model("cnn", num_classes=4, image_size=8, width=2).eval()
    x, y = torch.rand(20, 3, 16, 16), torch.arange(20) % 3
    probe = linear_probe(model, x, y, num_classes=3, image_size=(8, 8))
    small = nn.functional.interpolate(x, size=(8, 8), mode="bilinear", antialias=True)
    expected = probe.head(model(small, features=True)[1])
    torch.testing.assert_close(probe(x), expected)


def test_direct_matching_is_the_distance_of_gradients_and_reaches_the_student():
    torch.manual_seed(3)
    student, teacher = (
        nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).double() for _ in range(2)
    )
    x, y = torch.rand(6, 3, 2, 2, dtype=torch.float64), torch.randint(0, 4, (6,))

    def by_hand(model):
        """W1^T (1 - h^2) * W2^T (p - onehot)."""
        w1, b1, w2, b2 = (p for p in model.parameters())
        h = torch.tanh(x.flatten(1) @ w1.T + b1)
        p = torch.softmax(h @ w2.T + b2, 1) - nn.functional.one_hot(y, 4)
        return ((p @ w2) * (1 - h**2)) @ w1

    def expected():
        return 5 * 2 / 10 * (by_hand(student) - by_hand(teacher)).norm(dim=1).mean()

    term = Direct(alpha=5)
    term.prepare(Setup(4, {}, y, student, torch.device("cpu"), 0, teacher.requires_grad_(False)))
    loss = term(Step(x, y, y, x, epoch=2, epochs=10, batch=0, outputs={}))["direct"]
    torch.testing.assert_close(loss.double(), expected(), rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(loss, student[1].weight)[0]
    wanted = torch.autograd.grad(expected(), student[1].weight)[0]
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)
    assert list(term.parameters()) == [] and not Direct(alpha=0).active


@pytest.fixture
def trained(toy_arrays, tmp_path):
    """A student distilled with every measure on, and its teacher."""
    table = {
        "name": "tiny",
        "student": {"arch": "cnn", "options": {"width": 2}},
        "base": {"name": "pgd_at"},
        "data": {"name": str(toy_arrays), "holdout": 20},
        "attack": {"steps": 1},
        "schedule": {"epochs": 1, "milestones": []},
        "validation": {"steps": 0, "remainder": True},
    }
    recipe = Recipe.from_dict(table)
    train(recipe, out=tmp_path / "teacher", progress=False)
    student = recipe.override({"base": {"name": "ard"}, "direct.alpha": 1.0, "seed": 1})
    train(student, out=tmp_path / "run", teacher=tmp_path / "teacher", progress=False)
    return tmp_path / "run"


def test_measures_of_a_run_are_sections_of_its_evaluation(trained, toy_arrays):
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    (epoch,) = (line for line in lines if line["kind"] == "epoch")
    assert 0 < epoch["remainder"] < 2 and epoch["direct"] > 0
    document = evaluate_run(
        trained,
        attacks=("clean",),
        measures=("remainder", "cka", f"probe:{toy_arrays}"),
        device="cpu",
        progress=False,
    )
    written = json.loads((trained / "evaluation.json").read_text())
    assert written == json.loads(json.dumps(document))
    assert 0 < written["remainder"] < 2 and 0 <= written["cka"] <= 1
    images = load_dataset(str(toy_arrays))
    assert written["probe"]["toy"]["n"] == len(images.x_test)
    assert 0 <= written["probe"]["toy"]["pgd20"] <= written["probe"]["toy"]["clean"] <= 1
    with pytest.raises(ValueError, match="measures: got 'ckaa'; accepted: remainder, cka, probe:DATA"):
        evaluate_run(trained, measures=("ckaa",))


def test_the_card_says_what_lies_there(trained):
    card = (trained / "card.md").read_text()
    assert card.startswith("# tiny\n") and "Not evaluated yet" in card
    assert "**Method:** ARD + DIRECT" in card and "**Teacher:** `teacher`" in card
    assert "epsilon 8/255, 1 steps of 2/255" in card and str(trained) not in card
    document = evaluate_run(trained, attacks=("clean",), device="cpu", progress=False)
    card = (trained / "card.md").read_text()
    assert f"{100 * document['results']['clean']['accuracy']:.1f}" in card and "Not evaluated" not in card
