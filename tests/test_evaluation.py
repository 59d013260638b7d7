"""Accuracy under attack against closed forms, loops from the formula, and the published AutoAttack."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from unittest.mock import ANY

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrd.attacks import cross_entropy, pgd
from fastrd.core.documents import read_evaluation
from fastrd.core.files import atomic_write
from fastrd.core.fingerprint import fingerprint
from fastrd.core.seeding import derive_seed
from fastrd.evaluation import (
    Share,
    adversarial_examples,
    autoattack,
    check_attacks,
    cka,
    evaluate,
    gradient_alignment,
    linear_probe,
    measure,
    pointwise_distance,
    remainder_proportion,
    robustness_curve,
    write_evaluation,
)
from fastrd.evaluation.autoattack import flag_square
from fastrd.evaluation.measures import MEASURES, Measure

EPSILON, STEP = 0.1, 0.025
LINEAR = {"epsilon": 0.02, "step_size": 0.005}


class Linear(nn.Module):
    """Logits W x + b: its worst case in an l-infinity ball is known exactly."""

    def __init__(self, classes: int, size: int = 16) -> None:
        super().__init__()
        self.linear = nn.Linear(size, classes)
        with torch.no_grad():  # grey images sit between the classes
            self.linear.bias.copy_(-self.linear.weight.sum(1) / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.flatten(1))

    def radius(self, x: torch.Tensor, y: torch.Tensor, dual: int = 1) -> torch.Tensor:
        """Smallest epsilon that changes the verdict of grey images: min_k (z_y - z_k) / ||w_y - w_k||_dual."""
        z, w = self(x).detach(), self.linear.weight.detach()
        gap = z.gather(1, y[:, None]) - z
        reach = (w[y][:, None] - w[None]).norm(p=dual, dim=2)
        return (gap / reach).masked_fill(F.one_hot(y, z.shape[1]).bool(), float("inf")).amin(1)


def clear_cases(model: Linear, n: int, epsilon: float = 0.02, dual: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Images far from the borders of [0, 1], and none within 5% of being decided otherwise."""
    x = 0.3 + 0.4 * torch.rand(20 * n, 1, 4, 4)
    y = model(x).argmax(1)
    y[::5] = (y[::5] + 1) % model.linear.out_features
    keep = ((model.radius(x, y, dual) - epsilon).abs() > 0.05 * epsilon).nonzero()[:n, 0]
    return x[keep], y[keep]


class Net(nn.Module):
    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(96, classes, bias=False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


@pytest.fixture
def problem():
    """A small net and 40 images, a quarter of them classified wrong, of which EPSILON breaks some."""
    model = Net()
    for _ in range(30):
        model(torch.rand(64, 1, 6, 6))
    model.eval()
    x = torch.rand(200, 1, 6, 6)
    values, y = model(x).topk(2)
    clear = (values[:, 0] - values[:, 1]).argsort()[-40:].sort().values
    x, y = x[clear], y[clear, 0]
    y[::4] = (y[::4] + 1) % 5
    return model, x, y


def quiet(model, x, y, **options):
    return evaluate(model, x, y, **{"epsilon": EPSILON, "step_size": STEP, "progress": False, **options})


def ascend(model, x, y, start, epsilon, step, steps, loss, norm="linf"):
    """PGD from its formula."""
    x_adv = start
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        z = model(x_adv)
        if loss == "ce":
            value = F.cross_entropy(z, y, reduction="sum")
        else:
            others = z - 1e9 * F.one_hot(y, z.shape[1])
            value = (others.max(1).values - z[torch.arange(len(y)), y]).sum()
        (g,) = torch.autograd.grad(value, x_adv)
        if norm == "l2":
            delta = x_adv.detach() + step * g / g.flatten(1).norm(dim=1)[:, None, None, None] - x
            x_adv = (x + delta.renorm(2, 0, epsilon)).clamp(0, 1)
            continue
        x_adv = (x_adv + step * g.sign()).detach()
        x_adv = torch.min(torch.max(x_adv, x - epsilon), x + epsilon).clamp(0, 1)
    return x_adv


@pytest.mark.parametrize(
    ("attack", "loss", "steps", "restarts"),
    [("fgsm", "ce", 1, 1), ("pgd7", "ce", 7, 1), ("cw-quick", "margin", 30, 1), ("cw", "margin", 50, 10)],
)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attacks_equal_a_loop_from_the_formula(problem, attack, loss, steps, restarts, norm):
    model, x, y = problem
    radius, size = (EPSILON, STEP) if norm == "linf" else (3 * EPSILON, 3 * STEP)
    robust = model(x).argmax(1) == y
    for restart in range(restarts):
        given = robust.nonzero()[:, 0]
        xb, yb = x[given], y[given]
        if attack == "fgsm":
            start, step = xb, radius
        else:
            generator = torch.Generator().manual_seed(derive_seed(3, attack, restart, 0))
            if norm == "linf":
                noise = torch.empty_like(xb).uniform_(-radius, radius, generator=generator)
            else:
                noise = torch.empty_like(xb).normal_(generator=generator)
                noise *= radius / noise.flatten(1).norm(dim=1)[:, None, None, None]
            start, step = (xb + noise).clamp(0, 1), size
        x_adv = ascend(model, xb, yb, start, radius, step, steps, loss, norm)
        robust[given] = model(x_adv).argmax(1) == yb
    result = quiet(model, x, y, attacks=(attack,), seed=3, norm=norm, epsilon=radius, step_size=size)
    assert 0 < robust.sum() < 30
    assert result.verdicts[attack].tolist() == robust.tolist()
    assert result[attack]["accuracy"] == robust.double().mean().item()
    assert result[attack]["n"] == 40


@pytest.mark.parametrize(
    ("ball", "dual"), [(LINEAR, 1), ({"norm": "l2", "epsilon": 0.08, "step_size": None}, 2)], ids=["linf", "l2"]
)
def test_every_attack_finds_the_exact_worst_case_of_two_linear_classes(ball, dual):
    model, epsilon, norm = Linear(2), ball["epsilon"], ball.get("norm", "linf")
    x, y = clear_cases(model, 50, epsilon, dual)
    exact = (model.radius(x, y, dual) > epsilon).tolist()
    assert 5 < sum(exact) < 45
    result = quiet(model, x, y, attacks=("fgsm", "pgd20", "cw", "apgd-ce", "fab-t"), batch_size=20, **ball)
    for name in result:
        assert result.verdicts[name].tolist() == exact, name
    curve = robustness_curve(model, x, y, [0, epsilon], norm=norm, progress=False)
    assert curve == pytest.approx([(model(x).argmax(1) == y).float().mean().item(), sum(exact) / 50])
    shown = adversarial_examples(model, x, y, 9, norm=norm, epsilon=epsilon, step_size=epsilon / 4)
    reached = shown.delta.flatten(1).norm(p=float("inf") if dual == 1 else 2, dim=1)
    torch.testing.assert_close(reached, torch.full((9,), epsilon))


class Stop(Exception):
    pass


class Disk:
    """Stands before the writing of state: notes (stage, position), and dies before or after the nth write."""

    def __init__(self) -> None:
        self.written: list[tuple[int, int]] = []
        self.dies: tuple[str, int] | None = None

    def write(self, path, text):
        state = json.loads(text)
        if self.dies == ("before", len(self.written)):
            raise Stop
        atomic_write(path, text)
        self.written.append((state["stage"], state["position"]))
        if self.dies == ("after", len(self.written)):
            raise Stop


@pytest.fixture
def disk(monkeypatch):
    disk = Disk()
    monkeypatch.setattr("fastrd.evaluation.runner.atomic_write", disk.write)
    return disk


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("attack", "batch"), [("pgd7", 1), ("cw", 1), ("cw", 3), ("cw", 8), ("apgd-ce", 2)])
def test_a_stopped_evaluation_goes_on_to_the_same_verdicts(problem, tmp_path, disk, attack, batch, when):
    model, x, y = problem
    options = {"attacks": ("clean", attack), "batch_size": 12}
    expected = quiet(model, x, y, **options, state_dir=tmp_path / "whole")
    whole, disk.written = disk.written, []
    disk.dies = (when, batch)
    with pytest.raises(Stop):
        quiet(model, x, y, **options, state_dir=tmp_path / "parts")
    assert disk.written == whole[:batch]
    disk.dies = None
    resumed = quiet(model, x, y, **options, state_dir=tmp_path / "parts")
    assert disk.written == whole
    assert resumed.verdicts[attack].tolist() == expected.verdicts[attack].tolist()
    assert resumed[attack].get("stages") == expected[attack].get("stages")

    cached = quiet(model, x, y, **options, state_dir=tmp_path / "parts")
    assert disk.written == whole
    assert cached[attack] == resumed[attack]


def call_autoattack(model, x, y, *, epsilon, stages=None, batch_size, seed, norm="Linf"):
    """Verdicts of the package itself."""
    from pyautoattack import AutoAttack

    adversary = AutoAttack(model, eps=epsilon, norm=norm, version="standard", seed=seed)
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = model(x[:1]).shape[1] - 1
    adversary.attacks_to_run = stages or adversary.attacks_to_run
    _, predicted = adversary.run_standard_evaluation(x, y, batch_size=batch_size)
    return (predicted == y).tolist()


@pytest.mark.parametrize(("norm", "epsilon"), [("Linf", EPSILON), ("L2", 0.3)])
def test_a_stage_in_batches_equals_the_package_called_directly(problem, norm, epsilon):
    model, x, y = problem
    options = {"epsilon": epsilon, "batch_size": 12, "seed": 5}
    direct = call_autoattack(model, x, y, norm=norm, stages=["apgd-ce"], **options)
    assert 0 < sum(direct) < 30
    result = quiet(model, x, y, attacks="apgd-ce", norm=norm.lower(), **options)
    assert result.verdicts["apgd-ce"].tolist() == direct


@pytest.mark.slow
def test_autoattack_standard_resumed_equals_the_package_and_is_exact_on_a_linear_model(tmp_path, disk):
    model = Linear(4)
    x, y = clear_cases(model, 12)
    clean, exact = model(x).argmax(1) == y, model.radius(x, y) > 0.02
    assert 1 <= exact.sum() < clean.sum() < 12
    direct = call_autoattack(model, x, y, epsilon=0.02, batch_size=12, seed=5)

    disk.dies = ("after", 2)
    options = {"attacks": ("clean", "aa"), "seed": 5, "state_dir": tmp_path, "batch_size": 12, **LINEAR}
    with pytest.raises(Stop):
        quiet(model, x, y, **options)
    disk.dies = None
    result = quiet(model, x, y, **options)
    assert [stage for stage, _ in disk.written] == [0, 1, 2, 3]
    assert result.verdicts["clean"].tolist() == clean.tolist()
    assert result.verdicts["aa"].tolist() == direct == exact.tolist()
    stages = list(result["aa"]["stages"].items())
    assert [name for name, _ in stages] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    accuracies = [result["clean"]["accuracy"], *(accuracy for _, accuracy in stages)]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[-1] == result["aa"]["accuracy"] == exact.double().mean()


def test_state_of_anything_else_is_not_used(problem, tmp_path, disk):
    model, x, y = problem
    base = {"attacks": ("pgd7",), "batch_size": 40, "state_dir": tmp_path}
    quiet(model, x, y, **base)
    assert len(disk.written) == 1
    other_x, other_y = x.clone(), y.clone()
    other_x[0, 0, 0, 0] = 0.5
    other_y[0] = (y[0] + 1) % 5
    variants = [
        (model, x, y, {"epsilon": 0.05}),
        (model, x, y, {"step_size": 0.05}),
        (model, x, y, {"norm": "l2"}),
        (model, x, y, {"seed": 1}),
        (model, x, y, {"batch_size": 39}),
        (model, x, y, {"attacks": ("pgd8",)}),
        (nn.Sequential(model, nn.Linear(5, 5)), x, y, {}),
        (model, other_x, y, {}),
        (model, x, other_y, {}),
    ]
    for i, (network, images, labels, options) in enumerate(variants):
        quiet(network, images, labels, **{**base, **options})
        assert len(disk.written) == i + 2, f"variant {i} took stale state"
    with torch.no_grad():
        model.body[0].bias += 1e-3
    quiet(model, x, y, **base)
    assert len(disk.written) == len(variants) + 2 == len(list(tmp_path.iterdir()))


def test_a_damaged_state_file_is_reported_and_not_used(problem, tmp_path):
    model, x, y = problem
    before = quiet(model, x, y, attacks="pgd7", state_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_text()
    fell = json.loads(whole)["fell"]
    changes = [
        *({"stage": value} for value in ("x", None, 1.5, -1, 99)),
        *({"position": value} for value in ("x", None, -1, 41)),
        *({key: value} for key in ("work", "seconds") for value in ("x", None, float("nan"), -1e9)),
        *({"notes": value} for value in ({"a": "b"}, {"a": -1}, [])),
        *({"fell": value} for value in ([-1], [-1] * 40, [7] * 40, [-3, *fell[1:]], [2**70] * 40, fell[::-1], "x")),
    ]
    for damaged in (whole[:50], "null", "[" * 100_000, *(json.dumps({**json.loads(whole), **c}) for c in changes)):
        path.write_text(damaged)
        with pytest.warns(UserWarning, match="accepted: .*; this attack starts anew|not JSON: .*starts anew"):
            after = quiet(model, x, y, attacks="pgd7", state_dir=tmp_path)
        assert after.verdicts["pgd7"].tolist() == before.verdicts["pgd7"].tolist(), damaged[:200]
        assert json.loads(path.read_text()) == {**json.loads(whole), "seconds": ANY}


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_the_process_are_left_as_they_were(problem, fails):
    model, x, y = problem
    model.train()
    model.body[1].eval()
    model.body[1].bias.requires_grad_(False)
    model.body[0].weight.grad = torch.full_like(model.body[0].weight, 7.0)
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    trace = sys.gettrace()

    def tracer(frame, event, argument):
        return None

    def stop_in_fab(now):
        if now.attack == "fab-t":
            raise Stop

    sys.settrace(tracer)
    try:
        attacks = ("clean", "pgd7", "apgd-ce", "fab-t")
        if fails:
            with pytest.raises(Stop):
                quiet(model, x[:6], y[:6], attacks=attacks, progress=stop_in_fab)
        else:
            quiet(model, x[:6], y[:6], attacks=attacks)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(trace)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model.body[0].weight.grad, torch.full_like(model.body[0].weight, 7.0))
    assert all(p.grad is None for p in list(model.parameters())[1:])
    assert torch.equal(torch.get_rng_state(), random)


def test_autocast_of_the_caller_does_not_reach_the_model(problem):
    model, x, y = problem
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quiet(model, x, y, attacks="pgd7")
    assert set(seen) == {torch.float32}


def test_images_that_are_wrong_clean_are_not_attacked(problem):
    model, x, _ = problem
    wrong = (model(x).argmax(1) + 1) % 5
    sizes = []
    model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    result = quiet(model, x, wrong, attacks=("clean", "pgd20", "aa"))
    assert [result[name]["accuracy"] for name in result] == [0, 0, 0]
    assert [size for size in sizes if size != 2] == [1, 40], "two images are what the network is folded by"


def test_every_restart_and_batch_starts_from_its_own_noise(problem):
    model, x, _ = problem
    x, y = x[:1].repeat(2, 1, 1, 1), model(x[:1]).argmax(1).repeat(2)
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    result = quiet(model, x, y, attacks="cw", epsilon=1e-3, batch_size=1)
    seen = [images for images in seen if len(images) == 1]  # not the two that the network is folded by
    assert result["cw"]["accuracy"] == 1
    starts = torch.cat(seen[3::51])  # after the count of classes and two clean batches
    assert starts.shape == (20, 1, 6, 6)
    assert len(starts.unique(dim=0)) == 20


def test_uint8_images_are_the_same_images_as_float(problem):
    model, _, y = problem
    raw = np.random.default_rng(0).integers(0, 256, (40, 6, 6, 1), dtype=np.uint8)
    x = torch.from_numpy(raw).permute(0, 3, 1, 2).float() / 255
    y = model(x).argmax(1)
    from_float, from_raw = (quiet(model, images, y.numpy(), attacks="pgd7", epsilon=0.05) for images in (x, raw))
    assert 0 < from_raw["pgd7"]["accuracy"] < 1
    assert from_raw.verdicts["pgd7"].tolist() == from_float.verdicts["pgd7"].tolist()


def test_results_come_cheapest_first_and_worst_is_their_conjunction(problem):
    model, x, y = problem
    result = quiet(model, x, y, attacks=["pgd20", "clean", " fgsm", "pgd3", "clean"])
    assert list(result) == ["clean", "fgsm", "pgd3", "pgd20"]
    assert result.worst == np.logical_and.reduce(list(result.verdicts.values())).mean() <= result["pgd20"]["accuracy"]
    json.dumps(result)
    assert check_attacks("aa, cw,clean,cw-quick,square") == ["clean", "cw-quick", "cw", "square", "aa"]


def test_non_finite_logits_count_as_wrong_and_are_reported(problem):
    model, x, _ = problem

    class Broken(nn.Module):
        def forward(self, x):
            z = model(x)
            return torch.where(x[:, :1, 0, 0] > 0.5, torch.full_like(z, float("nan")), z)

    result = quiet(Broken(), x, model(x).argmax(1), attacks="clean")
    bad = x[:, 0, 0, 0] > 0.5
    assert result.verdicts["clean"].tolist() == (~bad).tolist()
    assert result["clean"]["warnings"] == [f"non-finite logits; the image counts as wrong [{bad.sum()} times]"]


def test_autoattack_warnings_reach_the_results(problem):
    model, x, y = problem

    class Randomised(nn.Module):
        def forward(self, x):
            return model(x + 0.01 * torch.randn_like(x))

    class Rounding(nn.Module):
        def forward(self, x):
            return model(x.round())

    class Dynamic(nn.Module):
        def forward(self, x):
            with torch.enable_grad():
                a = x.detach().requires_grad_()
                torch.autograd.grad(a.sum(), a)
            return model(x)

    x, y = x[1:3], y[1:3]

    def said(network, attack):
        labels = network(x).argmax(1)
        return " ".join(quiet(network, x, labels, attacks=attack, epsilon=0.01)[attack].get("warnings", []))

    assert "randomized" in said(Randomised(), "apgd-ce")
    assert "zero gradient" in said(Rounding(), "apgd-t")
    assert "dynamic" in said(Dynamic(), "apgd-ce")
    assert said(model, "apgd-ce") == ""


class Sharp(nn.Module):
    """A softmax that is saturated in float32: cross-entropy has no gradient, the margin has."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x) * 1e6


class Rounded(Sharp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network((x * 255).round() / 255)


class Undefined(Sharp):
    """Finite logits whose derivative is NaN: the square root's is infinite at 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x) + (0 * x).sqrt().flatten(1).sum(dim=1, keepdim=True)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attacks_that_see_no_gradient_say_so(problem, norm):
    model, x, y = problem
    attacks = ("fgsm", "pgd7", "cw-quick", "apgd-ce")
    options = {"attacks": attacks, "norm": norm, "epsilon": 0.01, "step_size": 0.004}
    undefined = quiet(Undefined(model), x, y, **options)
    assert all("not finite" in undefined[name]["warnings"][0] for name in attacks)
    for network, blind in ((model, ()), (Rounded(model), attacks)):
        result = quiet(network, x, y, **options)
        for name in attacks:
            said = [
                text
                for text in result[name].get("warnings", [])
                if "gradient at the image is exactly zero or not finite" in text
            ]
            assert bool(said) == (name in blind), (network, name)
            if said:
                robust = result[name]["accuracy"] * 40
                assert said[0].endswith("times]") and 1 < robust <= int(said[0].split("[")[1].split()[0]) <= 30
    sharp = quiet(Sharp(model), x, y, **options)
    assert "warnings" in sharp["pgd7"] and "warnings" not in sharp["cw-quick"]
    curve = robustness_curve(Rounded(model), x, y, [0, 0.01, 0.02], norm=norm, progress=False)
    assert len(curve.warnings) == 1 and "[30 times]" in curve.warnings[0]
    assert robustness_curve(model, x, y, [0, 0.01], norm=norm, progress=False).warnings == []


def test_adversarial_images_are_saved_with_a_verdict_after_rounding(problem, tmp_path, disk):
    model, x, y = problem
    file = tmp_path / "adv.npz"
    attacks = ("clean", "pgd7", "cw-quick", "apgd-ce")
    options = {"attacks": attacks, "batch_size": 8, "seed": 2}
    plain = quiet(model, x, y, **options)
    result = quiet(model, x, y, **options, save_adversarial=file)
    saved = dict(np.load(file))
    assert saved["labels"].tolist() == y.tolist()
    for name in attacks:
        assert result.verdicts[name].tolist() == plain.verdicts[name].tolist(), "saving changes nothing"
        images = torch.from_numpy(saved[name])
        assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1
        assert (images - x).abs().max() <= (0 if name == "clean" else EPSILON + 1e-6)
        right = (model(images).argmax(1) == y).numpy()
        assert np.array_equal(right, result.verdicts[name]) and np.array_equal(right, saved[f"{name}_robust"])
        rounded = (model((images * 255).round() / 255).argmax(1) == y).numpy() & result.verdicts["clean"]
        assert np.array_equal(rounded, saved[f"{name}_robust_8bit"])
        assert result[name]["accuracy_8bit"] == rounded.mean()

    disk.dies = ("after", 2)
    with pytest.raises(Stop):
        quiet(model, x, y, **options, save_adversarial=tmp_path / "again.npz", state_dir=tmp_path / "state")
    assert not (tmp_path / "again.npz").exists()
    disk.dies = None
    quiet(model, x, y, **options, save_adversarial=tmp_path / "again.npz", state_dir=tmp_path / "state")
    again = dict(np.load(tmp_path / "again.npz"))
    assert all(np.array_equal(again[name], value) for name, value in saved.items())

    # An attack whose images are not there whole starts anew: clean images are not those that were tried.
    kept = sorted((tmp_path / "state").glob("*.npy"))
    kept[0].unlink()
    kept[1].write_bytes(kept[1].read_bytes()[:-4])
    np.save(kept[2], np.load(kept[2])[1:])
    quiet(model, x, y, **options, save_adversarial=tmp_path / "again.npz", state_dir=tmp_path / "state")
    again = dict(np.load(tmp_path / "again.npz"))
    assert [name for name, value in saved.items() if not np.array_equal(again[name], value)] == []
    kept[0].unlink()
    os.mkfifo(kept[0])
    quiet(model, x, y, **options, save_adversarial=tmp_path / "again.npz", state_dir=tmp_path / "state")
    assert kept[0].is_file(), "a pipe is replaced, not waited for"


def test_processes_that_share_an_evaluation_reach_the_verdicts_of_one(problem, tmp_path):
    """Two threads stand for two processes; tests/test_distributed.py has real ones."""
    model, x, y = problem
    barrier, given, told = threading.Barrier(2, timeout=60), [None, None], ([], [])

    class Thread(Share):
        def exchange(self, mine):
            barrier.wait()
            given[self.rank] = mine
            barrier.wait()
            return list(given)

    def run(rank):
        options = {"attacks": ("clean", "pgd7", "cw"), "batch_size": 7, "state_dir": tmp_path / "state"}
        network = copy.deepcopy(model)  # processes do not share one
        options |= {"share": Thread(rank, 2), "progress": told[rank].append}
        return quiet(network, x, y, **options, save_adversarial=tmp_path / f"{rank}.npz")

    alone = quiet(model, x, y, attacks=("clean", "pgd7", "cw"), batch_size=7, save_adversarial=tmp_path / "alone.npz")
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, range(2)))
    for result in results:
        for name in alone:
            assert result.verdicts[name].tolist() == alone.verdicts[name].tolist(), name
            for key in ("accuracy", "stages", "accuracy_8bit"):
                assert result[name].get(key) == alone[name].get(key)
    ours, expected = (np.load(tmp_path / f"{name}.npz") for name in ("0", "alone"))
    assert all(np.array_equal(ours[name], value) for name, value in expected.items())
    assert not (tmp_path / "1.npz").exists(), "the first process writes"
    assert told[0] and not told[1], "the first process tells how far it is"


def test_square_beating_the_white_box_stages_is_flagged():
    notes: Counter[str] = Counter()
    flag_square({"clean": 0.9, "apgd-ce": 0.5, "apgd-t": 0.5, "fab-t": 0.5, "square": 0.499}, notes)
    assert not notes
    flag_square({"clean": 0.9, "apgd-ce": 0.5, "apgd-t": 0.5, "fab-t": 0.5, "square": 0.4}, notes)
    assert "Square Attack has decreased" in next(iter(notes))


def test_progress_rises_to_one_and_ends_at_the_result(problem, capsys):
    model, x, y = problem
    told = []
    result = quiet(model, x, y, attacks="cw", batch_size=8, progress=told.append)
    told = [now for now in told if now.attack == "cw"]
    fractions = [now.fraction for now in told]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    assert told[-1].robust == result.verdicts["cw"].sum()
    assert all(now.seconds_left >= 0 and now.done <= now.of <= now.n == 40 for now in told)
    quiet(model, x, y, attacks="pgd7", progress=True)
    assert capsys.readouterr() == ("", "")


def test_the_curve_of_a_linear_model_is_its_distribution_of_radii():
    model = Linear(2)
    x = 0.4 + 0.2 * torch.rand(60, 1, 4, 4)
    y = model(x).argmax(1)
    y[::6] = 1 - y[::6]
    epsilons = [0.04, 0.0, 0.01, 0.02, 0.01]
    exact = [(model.radius(x, y) > epsilon).float().mean().item() for epsilon in epsilons]
    assert len(set(exact)) >= 3
    assert robustness_curve(model, x, y, epsilons, progress=False) == pytest.approx(exact, abs=1e-6)


def test_examples_for_a_picture(problem):
    model, x, y = problem
    model.train()
    shown = adversarial_examples(model, x, y, 6, epsilon=EPSILON, step_size=STEP)
    assert model.training
    model.eval()
    assert torch.equal(shown.clean, x[:6])
    assert torch.equal(shown.delta, shown.adversarial - x[:6])
    assert 0 < shown.delta.abs().max() <= EPSILON + 1e-6
    assert shown.adversarial.min() >= 0 and shown.adversarial.max() <= 1
    assert torch.equal(shown.labels, y[:6])
    assert torch.equal(shown.clean_predictions, model(x[:6]).argmax(1))
    assert torch.equal(shown.adversarial_predictions, model(shown.adversarial).argmax(1))
    assert not torch.equal(shown.clean_predictions, shown.adversarial_predictions)
    assert len(adversarial_examples(model, x, y, 99).clean) == 40


def test_evaluations_of_the_same_weights_are_merged_and_others_replaced(problem, tmp_path):
    model, x, y = problem
    path = tmp_path / "run" / "evaluation.json"

    def write(result, **sections):
        write_evaluation(path, result, model=model, checkpoint="last", dataset="toy", **sections)
        return json.loads(path.read_text())

    first = write(quiet(model, x, y, attacks=("clean", "pgd3")), alignment={"gd": 0.1, "gc": 0.5, "n": 40})
    assert first["schema"] == 1 and first["checkpoint"] == "last" and first["dataset"] == "toy"
    assert first["n"] == 40 and first["epsilon"] == EPSILON
    assert first["versions"]["torch"] == torch.__version__
    assert {"fastrd", "pyautoattack"} <= first["versions"].keys()

    second = write(quiet(model, x, y, attacks=("fgsm", "pgd3"), seed=9))
    assert set(second["results"]) == {"clean", "pgd3", "fgsm"}
    assert second["results"]["clean"] == first["results"]["clean"]
    assert second["alignment"] == first["alignment"]

    for data in ("a", "b"):
        probes = write(quiet(model, x, y, attacks="clean"), probe={data: {"n": 9, "clean": 0.5}})["probe"]
    assert set(probes) == {"a", "b"}, "one probe does not replace another"
    assert json.dumps(probes["a"]) == '{"n": 9, "clean": 0.5}', "read and written again: a count stays an integer"
    others = write(quiet(model, x.flip(0), y.flip(0), attacks="fgsm"))
    assert set(others["results"]) == {"fgsm"}, "as many images of the same name, and others"

    fewer = write(quiet(model, x[:20], y[:20], attacks="fgsm"))
    assert set(fewer["results"]) == {"fgsm"} and fewer["n"] == 20 and "alignment" not in fewer
    wider = write(quiet(model, x[:20], y[:20], attacks="clean", epsilon=0.2))
    assert set(wider["results"]) == {"clean"}
    with torch.no_grad():
        model.body[0].bias += 1
    trained = write(quiet(model, x[:20], y[:20], attacks="fgsm", epsilon=0.2))
    assert set(trained["results"]) == {"fgsm"} and trained["norm"] == "linf"
    older = {key: value for key, value in trained.items() if key != "norm"}
    path.write_text(json.dumps(older))
    assert set(write(quiet(model, x[:20], y[:20], attacks="clean", epsilon=0.2))["results"]) == {
        "clean",
        "fgsm",
    }
    in_l2 = write(quiet(model, x[:20], y[:20], attacks="clean", norm="l2", epsilon=0.2))
    assert set(in_l2["results"]) == {"clean"} and in_l2["norm"] == "l2"


def test_what_compares_with_one_teacher_does_not_stand_beside_another(problem, tmp_path, monkeypatch):
    model, x, y = problem
    a, b = Net(), Net()
    path, result = tmp_path / "evaluation.json", quiet(model, x, y, attacks="clean")
    monkeypatch.setitem(MEASURES, "mine", Measure(lambda subject, name: {}, "DATA", needs_teacher=True))
    of_a = {"alignment": {"gd": 0.1}, "cka": 0.2, "pointwise": {"n": 1}, "mine": {"d": 1}}

    def write(teacher=None, **sections):
        document = write_evaluation(
            path, result, model=model, checkpoint="last", dataset="toy", teacher=teacher, **sections
        )
        found = set(document) & {*of_a, "remainder"}
        assert read_evaluation(path) == json.loads(json.dumps(document))
        return found, document.get("teachers")

    assert write(remainder=0.5) == ({"remainder"}, None)
    assert write(a, **of_a) == ({*of_a, "remainder"}, dict.fromkeys(of_a, fingerprint(a)))
    assert write() == ({*of_a, "remainder"}, dict.fromkeys(of_a, fingerprint(a))), "no teacher: they name their own"
    assert write(a, mine={"e": 2}) == ({*of_a, "remainder"}, dict.fromkeys(of_a, fingerprint(a)))
    assert read_evaluation(path)["mine"] == {"d": 1, "e": 2}
    monkeypatch.delitem(MEASURES, "mine")  # a plugin that is not loaded now
    now = write(b, alignment={"gd": 0.3}, cka=0.4)
    assert now == ({"alignment", "cka", "remainder"}, dict.fromkeys(("alignment", "cka"), fingerprint(b)))

    older = {key: value for key, value in read_evaluation(path).items() if key != "teachers"}
    path.write_text(json.dumps(older))
    assert write() == ({"alignment", "cka", "remainder"}, None)
    assert write(b, alignment={"gd": 0.3}) == ({"alignment", "remainder"}, {"alignment": fingerprint(b)})


@pytest.mark.parametrize("content", ["{", "[1]", '{"schema": 2}'])
def test_a_file_that_is_not_an_evaluation_is_not_overwritten(problem, tmp_path, content):
    model, x, y = problem
    path = tmp_path / "evaluation.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="evaluation.json.*move the file away"):
        write_evaluation(path, quiet(model, x, y, attacks="clean"), model=model, checkpoint="last", dataset="toy")
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attacks": ("clean", "pdg20")}, "did you mean 'pgd20'"),
        ({"attacks": "cw_quick"}, "did you mean 'cw-quick'"),
        ({"attacks": "pgd0"}, "any pgdN with N >= 1"),
        ({"attacks": ()}, "attacks: none given"),
        ({"epsilon": 8}, "epsilon: got 8; accepted: a fraction"),
        ({"step_size": 0}, "step_size: got 0"),
        ({"epsilon": float("nan")}, "epsilon: got nan"),
        ({"norm": "l1"}, "norm: got 'l1'; accepted: linf, l2"),
        ({"norm": "l2", "epsilon": 128}, r"epsilon: got 128; accepted: an l2 norm, such as 0.5, in \(0, 6"),
        ({"save_adversarial": "images.png"}, "save_adversarial: got 'images.png'; accepted: a file name.npz"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"batch_size": 2.5}, "batch_size: got 2.5"),
    ],
)
def test_bad_options_are_named(problem, options, message):
    model, x, y = problem
    with pytest.raises((ValueError, TypeError), match=message):
        quiet(model, x, y, **options)


def test_bad_images_labels_and_models_are_named(problem):
    model, x, y = problem
    for images, labels, message in [
        (2 * x, y, "x: got values from .*Normalisation belongs inside the model"),
        (x[0], y, "x: got shape"),
        (x[:0], y[:0], "x: got shape"),
        (torch.full_like(x, float("nan")), y, "x: got values from nan"),
        (x, y[:-1], r"y: got shape \(39,\); accepted: \(40,\), one label for each image"),
        (x, y.float(), "y: got dtype float32"),
        (x, None, "y: got NoneType"),
        (x.repeat(1, 3, 1, 1), y, "^model: fails on"),
        (x, y - 1, r"y: got labels -1\.\.3; accepted: numbers >= 0"),
        (x, y.numpy().astype("uint64") + 2**63, r"y: got labels .*; accepted: numbers >= 0, as int64"),
        (x, torch.full_like(y, 5), "y: got label 5; accepted: 0 to 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            quiet(model, images, labels, attacks="clean")
    assert "clean" in quiet(model, x.flip(0).numpy()[::-1], y.numpy()[::-1], attacks="clean")  # of negative stride
    with pytest.raises(TypeError, match="model: got function"):
        quiet(lambda x: x, x, y, attacks="clean")
    with pytest.raises(ValueError, match=r"model: .* is torch.float16; accepted: float32"):
        quiet(Net().half(), x, y, attacks="clean")
    with pytest.raises(ValueError, match="model: returned tuple"):
        quiet(Pair(), x, y, attacks="clean")


class Pair(nn.Module):
    def forward(self, x):
        return x, x


def test_autoattack_needs_four_classes_and_says_so_before_any_work(problem):
    _, x, _ = problem
    told: list = []
    with pytest.raises(ValueError, match="at least 4 classes and the model has 3"):
        quiet(Net(3), x, torch.zeros(40, dtype=torch.long), attacks=("clean", "aa"), progress=told.append)
    assert told == []


def test_square_in_l2_needs_five_pixels_a_side_and_says_so():
    model, x = Linear(4), torch.rand(2, 1, 4, 4)
    with pytest.raises(ValueError, match="Square in l2 needs images of at least 5 pixels a side, got 4"):
        quiet(model, x, torch.zeros(2, dtype=torch.long), attacks="aa", norm="l2")
    assert quiet(model, x, model(x).argmax(1), attacks="fgsm", norm="l2").verdicts["fgsm"].shape == (2,)


@pytest.mark.slow
def test_square_in_l2_is_refused_exactly_where_the_package_fails():
    def first_step_fails(shape):
        square = import_module("pyautoattack.square").SquareAttack(lambda x: x.flatten(1)[:, :4], norm="L2", eps=0.1)
        square.init_hyperparam(x := torch.rand(1, 1, *shape))
        square.n_queries = 0
        try:
            square.attack_single_run(x, torch.zeros(1, dtype=torch.long))
        except RuntimeError:
            return True
        return False

    def refused(shape):
        try:
            autoattack.check(("square",), 10, "l2", *shape)
        except ValueError:
            return True
        return False

    shapes = list(itertools.product(range(5, 41), repeat=2))
    assert [shape for shape in shapes if refused(shape) != first_step_fails(shape)] == []
    assert {h for h, w in shapes if h == w and refused((h, w))} == {12, 14, 18, 19, 24}


def test_autoattack_without_the_package_says_how_to_get_it(problem, monkeypatch):
    model, x, y = problem
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ImportError, match="pip install pyautoattack"):
        quiet(model, x, y, attacks=("clean", "aa"))
    assert quiet(model, x, y, attacks="clean")["clean"]["accuracy"] == 0.75


LAYOUTS = {
    "uint8, channels first": (torch.zeros(6, 3, 8, 8, dtype=torch.uint8), "looks channels first"),
    "float, channels last": (torch.zeros(6, 8, 8, 3), "looks channels last"),
    "0..255": (torch.full((6, 3, 8, 8), 128.0), "got values from 128"),
    "integers": (torch.zeros(6, 3, 8, 8, dtype=torch.int64), "got dtype torch.int64"),
    "text": ("images", "got no array"),
}
TAKERS = {
    "evaluate": lambda net, x, y: evaluate(net, x, y, attacks="clean", progress=False),
    "curve": lambda net, x, y: robustness_curve(net, x, y, [0.1], progress=False),
    "examples": lambda net, x, y: adversarial_examples(net, x, y, 2),
    "alignment": lambda net, x, y: gradient_alignment(net, net, x, y),
    "cka": lambda net, x, y: cka(net, net, x),
    "remainder": lambda net, x, y: remainder_proportion(net, x),
    "pointwise": lambda net, x, y: pointwise_distance(net, net, x, y),
    "probe": lambda net, x, y: linear_probe(net, x, y, num_classes=4),
}


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_of_another_layout_are_refused_everywhere(taker, layout):
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    x, complaint = LAYOUTS[layout]
    with pytest.raises(ValueError, match=f"^x: {complaint}|^x: .*{complaint}"):
        TAKERS[taker](net, x, torch.arange(6) % 4)


def of_classes(classes):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, classes))


SIX_IMAGES, SIX_LABELS = torch.rand(6, 3, 8, 8), torch.arange(6) % 4
MODEL, BOTH = {"model": of_classes(4)}, {"student": of_classes(4), "teacher": of_classes(4)}
DATA = {"x": SIX_IMAGES, "y": SIX_LABELS}
SHORT = {"steps": 1, "epsilon": 0.1, "step_size": 0.1}
GOOD = {
    evaluate: {**MODEL, **DATA, "attacks": "clean", "progress": False},
    robustness_curve: {**MODEL, **DATA, "epsilons": [0.1, 0.0], "steps": 1, "progress": False},
    adversarial_examples: {**MODEL, **DATA, "n": 2, **SHORT},
    gradient_alignment: {**BOTH, **DATA},
    remainder_proportion: {**MODEL, "x": SIX_IMAGES},
    pointwise_distance: {**BOTH, **DATA, **SHORT, "inner": "none"},
    cka: {**BOTH, "x": SIX_IMAGES},
    linear_probe: {**MODEL, **DATA, "num_classes": 4, "iterations": 1},
    write_evaluation: {**MODEL, "path": "x.json", "results": None, "checkpoint": "last", "dataset": "toy"},
    measure: {"name": "a new one"},
}
SPARSE, META = SIX_IMAGES.to_sparse(), SIX_IMAGES.to("meta")
NETWORKS = (None, lambda x: x)
UNFIT = [
    *((evaluate, {"x": x}) for x in (None, SPARSE, META, SIX_IMAGES.to(torch.float8_e4m3fn))),
    (evaluate, {"x": torch.zeros(6, 8, 8, 3, dtype=torch.uint8, device="meta")}),
    (evaluate, {"x": torch.zeros(6, 8, 8, 3, dtype=torch.uint8).to_sparse()}),
    *((evaluate, {"progress": progress}) for progress in (None, "no", torch.ones(2))),
    *((evaluate, {"compile": compile}) for compile in ("no", torch.ones(2))),
    *((evaluate, {"share": share}) for share in (None, (0, 1), "x", Share(1, 1), Share(-1, 1), Share(0, 2))),
    *((evaluate, {"share": share}) for share in (Share(0, 0), Share(None, 1), Share("a", "b"))),
    *((evaluate, {"seed": seed}) for seed in (None, 0.5)),
    *((robustness_curve, {"epsilons": e}) for e in (None, [], 0.1, "0.1", ["0.1"], [-1], [math.nan], [None], [True])),
    *((robustness_curve, {"epsilons": e}) for e in (torch.tensor(0.1), [[0.1]], torch.ones(2, 1), [torch.ones(1)])),
    *((robustness_curve, {"steps": steps}) for steps in (None, 0, 2.5, "a")),
    (robustness_curve, {"progress": "no"}),
    *((adversarial_examples, {name: None}) for name in ("x", "y", "n", "epsilon", "step_size", "steps", "seed")),
    *((adversarial_examples, {"x": x}) for x in (1, SPARSE, META, torch.tensor(1.0))),
    (adversarial_examples, {"y": torch.tensor(1)}),
    *((function, {name: m}) for function in (gradient_alignment, cka) for name in BOTH for m in NETWORKS),
    *((gradient_alignment, {name: Pair()}) for name in BOTH),
    *((pointwise_distance, {name: Pair()}) for name in BOTH),
    *((function, {"y": SIX_LABELS + 1}) for function in (gradient_alignment, pointwise_distance)),
    (pointwise_distance, {"teacher": of_classes(5)}),
    *((pointwise_distance, {name: None}) for name in ("epsilon", "step_size", "steps", "seed")),
    *((remainder_proportion, {"epsilon": epsilon}) for epsilon in (None, "a", -1, math.nan, 2, torch.ones(2))),
    *((remainder_proportion, {"norm": norm}) for norm in (None, "l3", np.ones(2))),
    (remainder_proportion, {"model": Pair()}),
    *((linear_probe, {"num_classes": n}) for n in (None, 0, 4.5, "a", 2**70, torch.ones(2))),
    *((linear_probe, {"iterations": n}) for n in (None, 0, math.inf, "a")),
    *((linear_probe, {"weight_decay": w}) for w in (None, -1, math.nan, "a", 1j)),
    *((linear_probe, {"image_size": s}) for s in (8, "ab", (8,), (0, 0), ("a", "b"), (8.5, 8), (None, 8))),
    (linear_probe, {"x": SIX_IMAGES[:1], "y": SIX_LABELS[:1]}),
    (linear_probe, {"model": None}),
    *((write_evaluation, {name: None}) for name in ("path", "results", "model", "dataset")),
    (write_evaluation, {"checkpoint": 1.5}),
    *((measure, {"name": name}) for name in (None, 1.5, torch.ones(2))),
]


@pytest.mark.parametrize("case", range(len(UNFIT)))
def test_every_evaluation_names_what_it_cannot_take(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function, change = UNFIT[case]
    (name, *_) = change
    arguments = {**GOOD[function], **change}
    if function is write_evaluation and name != "results":
        arguments["results"] = evaluate(**GOOD[evaluate])
    shown = "measure" if function is measure else name
    with pytest.raises((ValueError, TypeError), match=rf"^{shown}(\.\w+)?: (got|returned) .*accepted: "):
        function(**arguments)
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_radii_of_every_kind_of_number_and_in_every_order():
    plain = robustness_curve(**GOOD[robustness_curve])
    for radii in (np.array([0.1, 0.0]), torch.tensor([0.1, 0.0]), iter([np.float64(0.1), 0]), (torch.tensor(0.1), 0.0)):
        assert robustness_curve(**{**GOOD[robustness_curve], "epsilons": radii}) == plain


def test_an_image_size_that_the_network_does_not_read_is_named():
    with pytest.raises(ValueError, match=r"^model: fails on an image \(3, 16, 16\)"):
        linear_probe(**GOOD[linear_probe], image_size=(16, 16))


class Cut(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x.detach())


class InPlace(Cut):
    def forward(self, x):
        return self.net(x.sub_(0.5))


@pytest.mark.parametrize(
    ("wrapper", "complaint"),
    [(Cut, "no gradient reaches x"), (InPlace, "changes its input in place")],
)
def test_networks_that_cannot_be_attacked_are_named(wrapper, complaint):
    net = wrapper(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))
    x, y = torch.rand(6, 3, 8, 8), torch.arange(6) % 4
    with pytest.raises(ValueError, match=f"^model: {complaint}"):
        evaluate(net, x, net(x.clone()).argmax(1), attacks="pgd2", progress=False)
    if wrapper is Cut:
        with pytest.raises(ValueError, match=f"^model: {complaint}"):
            evaluate(net, x, net(x).argmax(1), attacks="apgd-ce", progress=False)
    with pytest.raises(ValueError, match=f"^model: {complaint}"):
        pgd(net, x, cross_entropy(y), epsilon=0.1, step_size=0.1, steps=1)


class SetByTheCaller:
    """Each gives what the caller of `evaluate` may have set in torch."""

    @staticmethod
    @contextmanager
    def float64():
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)

    inference, autocast = torch.inference_mode, partial(torch.autocast, "cpu")
    other_device = partial(torch.device, "meta")


@pytest.mark.parametrize("name", ["inference", "autocast", "other_device", "float64"])
def test_what_the_caller_has_set_in_torch_changes_no_evaluation(name):
    pytest.importorskip("pyautoattack")
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), torch.rand(6, 3, 8, 8)
    y = net(x).argmax(1)
    outside = evaluate(net, x, y, attacks="pgd2,apgd-ce", epsilon=0.01, progress=False)
    with getattr(SetByTheCaller, name)():
        inside = evaluate(net, x.clone(), y, attacks="pgd2,apgd-ce", epsilon=0.01, progress=False)
        assert evaluate(net, x.numpy(), y.tolist(), attacks="clean", progress=False).worst == 1
    assert all(np.array_equal(inside.verdicts[attack], verdict) for attack, verdict in outside.verdicts.items())


def test_a_network_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    x, y = torch.rand(6, 3, 8, 8), torch.zeros(6, dtype=torch.long)
    with pytest.raises(ValueError, match=r"^model: 1.weight was made inside torch.inference_mode\(\).*; accepted: "):
        evaluate(net, x, y, attacks="pgd2", progress=False)
    with pytest.raises(ValueError, match=r"^model: a weight was made inside torch.inference_mode\(\).*; accepted: "):
        pgd(net, x, cross_entropy(y), epsilon=0.1, step_size=0.1, steps=1)
    evaluate(copy.deepcopy(net), x, y, attacks="pgd2", progress=False)
