"""Every base loss and add-on: value and every parameter gradient against the formula written out by hand."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrd import attacks, methods
from fastrd.core.seeding import derive_seed
from fastrd.engine.distributed import World
from fastrd.engine.step import EXAMPLES, Distiller, build_distiller
from fastrd.engine.weight_perturbation import perturbed
from fastrd.losses import ContrastiveDistillation, class_table
from fastrd.methods import ADDONS, BASES, Method, Setup, Step, views
from fastrd.methods.views import Output, View
from fastrd.recipe import Attack, Tricks

EPOCH, EPOCHS = 70, 200


def kl(p_logits, q_logits, t=1.0):
    """KL(softmax(p/t) || softmax(q/t)), (N,)."""
    p, q = (p_logits / t).softmax(1), (q_logits / t).softmax(1)
    return (p * (p / q).log()).sum(1)


def make(tiny, base, addons=None, inner=None, clean_teacher_width=6, attack=None, **options):
    """A Distiller around tiny networks; base = (name, options)."""
    networks = {"student": tiny(1), "teacher": tiny(2, width=8).eval().requires_grad_(False)}
    networks["clean_teacher"] = tiny(3, width=clean_teacher_width).eval().requires_grad_(False)
    method = Method(BASES[base[0]](**base[1]), {name: ADDONS[name](**kw) for name, kw in (addons or {}).items()}, inner)
    options = {"labels": torch.arange(12) % 4, "num_classes": 4, "seed": 5, **options}
    distiller = build_distiller(method, networks, attack or Attack(steps=3), **options)
    method.double()
    return distiller


def run(distiller, batch, epoch=EPOCH):
    """Losses at a fixed x' and the gradients of the student."""
    x, y, index = batch
    x_adv = (x + 0.03 * torch.sign(torch.sin(40 * x))).clamp(0, 1)
    losses, metrics = distiller.losses(x, y, index, x_adv, epoch=epoch, epochs=EPOCHS)
    total = sum(losses.values())
    parameters = dict(distiller.student.named_parameters())
    gradients = torch.autograd.grad(total, parameters.values(), allow_unused=True)
    return losses, dict(zip(parameters, gradients, strict=True)), x_adv, metrics


class Hand:
    """Outputs of fresh copies of the networks, the student in train mode, one pass per image in the defined order."""

    def __init__(self, distiller, batch, x_adv):
        x, self.y, _ = batch
        self.net = copy.deepcopy(distiller.student).train()
        images = {"adv": x_adv, "clean": x, "mirror": 2 * x - x_adv}
        self.s = {name: self.net(image) for name, image in images.items()}
        self.f = {name: self.net(image, features=True)[1] for name, image in images.items()}
        self.t = {name: distiller.networks["teacher"](image) for name, image in images.items()}
        self.c = distiller.networks["clean_teacher"](x, features=True)[1]


def trust(h):
    return h.t["adv"].softmax(1)[torch.arange(5), h.y] ** 0.1


def self_kl(h):
    return ((1 - trust(h)) * kl(h.s["clean"], h.s["adv"])).mean()


def mart(h):
    p = h.s["adv"].softmax(1)
    wrong = torch.stack([p[i, [c for c in range(4) if c != h.y[i]]].max() for i in range(5)])
    weight = 1.0000001 - h.s["clean"].softmax(1)[torch.arange(5), h.y]
    bce = F.cross_entropy(h.s["adv"], h.y) - torch.log(1.0001 - wrong + 1e-12).mean()
    return bce + 5 * (kl(h.s["clean"], h.s["adv"]) * weight).mean()


BY_HAND = {
    "natural": (("natural", {}), lambda h: F.cross_entropy(h.s["clean"], h.y)),
    "pgd_at": (("pgd_at", {}), lambda h: F.cross_entropy(h.s["adv"], h.y)),
    "trades": (
        ("trades", {}),
        lambda h: F.cross_entropy(h.s["clean"], h.y) + 6 * kl(h.s["clean"], h.s["adv"]).sum() / 5,
    ),
    "mart": (("mart", {}), mart),
    "ard": (("ard", {}), lambda h: kl(h.t["clean"], h.s["adv"]).sum() / 5),
    "ard original": (
        ("ard", {"temperature": 30.0, "alpha": 0.9, "reduction": "mean"}),
        lambda h: 0.9 * 900 * kl(h.t["clean"], h.s["adv"], 30).sum() / 20 + 0.1 * F.cross_entropy(h.s["clean"], h.y),
    ),
    "akd": (
        ("akd", {}),
        lambda h: 0.5 * F.cross_entropy(h.s["adv"], h.y) + 0.5 * kl(h.t["adv"], h.s["adv"]).sum() / 5,
    ),
    "iad": (("iad", {}), lambda h: kl(h.t["clean"], h.s["adv"]).sum() / 5 + self_kl(h)),
    "rslad": (
        ("rslad", {"scale": 10.0}),
        lambda h: (
            10 * (5 / 6 * kl(h.t["clean"], h.s["adv"]).sum() / 20 + 1 / 6 * kl(h.t["clean"], h.s["clean"]).sum() / 20)
        ),
    ),
    "adaad": (("adaad", {}), lambda h: kl(h.t["adv"], h.s["adv"]).sum() / 5),
    "adaad mixed": (
        ("adaad", {"lambda_": 0.7, "reduction": "mean"}),
        lambda h: 0.7 * kl(h.t["adv"], h.s["adv"]).sum() / 20 + 0.3 * kl(h.t["clean"], h.s["clean"]).sum() / 20,
    ),
    "adaiad": (("adaiad", {}), lambda h: 900 * kl(h.t["adv"], h.s["adv"], 30).sum() / 5 + self_kl(h)),
}


def assert_agrees(distiller, batch, formula):
    losses, gradients, x_adv, metrics = run(distiller, batch)
    hand = Hand(distiller, batch, x_adv)
    expected = formula(hand)
    torch.testing.assert_close(sum(losses.values()), expected, rtol=1e-9, atol=1e-12)
    parameters = dict(hand.net.named_parameters())
    by_hand = torch.autograd.grad(expected, parameters.values(), allow_unused=True)
    for name, g in zip(parameters, by_hand, strict=True):
        torch.testing.assert_close(gradients[name], g, rtol=1e-7, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    return losses, metrics


@pytest.mark.parametrize("case", BY_HAND)
def test_base_loss_and_gradients(case, tiny, batch):
    base, formula = BY_HAND[case]
    assert_agrees(make(tiny, base), batch, formula)


@pytest.mark.parametrize(
    ("options", "distance"),
    [
        ({}, lambda ds, dt: kl(dt, ds).sum() / 5),
        ({"divergence": "l1"}, lambda ds, dt: (dt - ds).abs().sum() / 5),
        ({"divergence": "l2"}, lambda ds, dt: ((dt - ds) ** 2).sum() / 5),
        ({"ramp_epochs": 100}, lambda ds, dt: 2 * kl(dt, ds).sum() / 5),
    ],
)
def test_igdm_is_added_to_the_base(options, distance, tiny, batch):
    def formula(h):
        ds, dt = h.s["adv"] - h.s["mirror"], h.t["adv"] - h.t["mirror"]
        return F.cross_entropy(h.s["adv"], h.y) + 20 * EPOCH / EPOCHS * distance(ds, dt)

    assert_agrees(make(tiny, ("pgd_at", {}), {"igdm": {"alpha": 20.0, **options}}), batch, formula)


@pytest.mark.parametrize(("addon", "reference"), [("smooth_clean", "clean"), ("smooth_mirror", "mirror")])
def test_regularisers_of_the_student_alone(addon, reference, tiny, batch):
    def formula(h):
        return F.cross_entropy(h.s["adv"], h.y) + 20 * EPOCH / EPOCHS * kl(h.s[reference], h.s["adv"]).mean()

    assert_agrees(make(tiny, ("pgd_at", {}), {addon: {"alpha": 20.0}}), batch, formula)


def test_mtard_weighs_a_robust_and_an_accurate_teacher(tiny, batch):
    distiller = make(tiny, ("pgd_at", {}), {"mtard": {"adv": 0.3, "clean": 2.0, "temperature": 2.0}})
    accurate = distiller.networks["clean_teacher"](batch[0])

    def formula(h):
        adv, clean = kl(h.t["adv"], h.s["adv"], 2.0).mean(), kl(accurate, h.s["clean"], 2.0).mean()
        return F.cross_entropy(h.s["adv"], h.y) + 4 * (0.3 * adv + 2.0 * clean)

    assert_agrees(distiller, batch, formula)
    assert not ADDONS["mtard"](adv=0.0, clean=0.0).active
    assert {view.network for view in ADDONS["mtard"](adv=0.0).views(1)} == {"student", "clean_teacher"}


def test_igdm_scalings_and_clamped_mirror_change_the_images(tiny, batch):
    x, _, _ = batch
    term = ADDONS["igdm"](alpha=1.0, beta=2.0, gamma=0.5)
    images = term.images(x, x + 0.1)
    torch.testing.assert_close(images["plus"], x + 0.2)
    torch.testing.assert_close(images["mirror"], x - 0.05)
    dark = torch.zeros_like(x)
    assert ADDONS["igdm"](alpha=1.0).images(dark, dark + 0.1)["mirror"].min() < 0
    assert ADDONS["igdm"](alpha=1.0, clamp_mirror=True).images(dark, dark + 0.1)["mirror"].min() == 0
    plain = run(make(tiny, ("pgd_at", {}), {"igdm": {"alpha": 9.0}}), batch)[0]["igdm"]
    scaled = run(make(tiny, ("pgd_at", {}), {"igdm": {"alpha": 9.0, "beta": 2.0}}), batch)[0]["igdm"]
    assert not torch.isclose(plain, scaled)


@pytest.mark.parametrize("distance", ["mse", "cosine", "smooth_l1"])
def test_vfd_aligns_both_views_with_the_clean_features_of_the_clean_teacher(distance, tiny, batch):
    measure = {
        "mse": lambda a, b: ((a - b) ** 2).mean(),
        "cosine": lambda a, b: (1 - F.cosine_similarity(a, b)).mean(),
        "smooth_l1": lambda a, b: F.smooth_l1_loss(a, b),
    }[distance]

    def formula(h):
        alignment = 3 * measure(h.f["adv"], h.c) + 0.5 * measure(h.f["clean"], h.c)
        return F.cross_entropy(h.s["adv"], h.y) + 10 * 0.5 * alignment

    options = {"lambda_": 10.0, "distance": distance, "weight_adv": 3.0, "weight_clean": 0.5}
    assert_agrees(make(tiny, ("pgd_at", {}), {"vfd": options}), batch, formula)


def test_vfd_projects_where_widths_differ(tiny, batch):
    distiller = make(tiny, ("pgd_at", {}), {"vfd": {}}, clean_teacher_width=10)
    projector = distiller.method.terms["vfd"].projector
    assert (projector.in_features, projector.out_features) == (24, 40)
    assert_agrees(
        distiller,
        batch,
        lambda h: (
            F.cross_entropy(h.s["adv"], h.y)
            + 5 * sum(((projector(h.f[v]) - h.c) ** 2).mean() for v in ("adv", "clean"))
        ),
    )


def test_feature_only_trains_the_classifier_and_leaves_the_backbone_to_the_addon(tiny, batch):
    losses, gradients, x_adv, _ = run(make(tiny, ("feature_only", {})), batch)
    hand = Hand(make(tiny, ("feature_only", {})), batch, x_adv)
    torch.testing.assert_close(losses["probe"], F.cross_entropy(hand.s["adv"], hand.y))
    assert {name for name, g in gradients.items() if g is not None} == {"head.weight", "head.bias"}
    both = run(make(tiny, ("feature_only", {}), {"gacd": {"negatives": 8, "dim": 8}}), batch)[1]
    assert all(g is not None for g in both.values())


@pytest.mark.parametrize("base", ["pgd_at", "trades", "mart", "rslad"])
def test_zero_weight_addons_leave_the_base_bit_for_bit(base, tiny, batch):
    plain = make(tiny, (base, {}))
    with_zeros = make(tiny, (base, {}), {"igdm": {"alpha": 0.0}, "vfd": {"lambda_": 0.0}, "gacd": {"weight": 0.0}})
    x, y, index = batch
    for distiller in (plain, with_zeros):
        distiller(x, y, index, epoch=1, epochs=2, generator=torch.Generator().manual_seed(1))
    for (name, a), b in zip(plain.student.named_parameters(), with_zeros.student.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(plain.student.named_buffers(), with_zeros.student.buffers(), strict=True):
        assert torch.equal(a, b), name
    assert not list(with_zeros.method.parameters())


def test_introspection_starts_at_its_epoch_and_can_detach(tiny, batch):
    for base, options, first in (
        ("iad", {"start_epoch": 3}, 3),
        ("iad", {}, 61),  # the authors' epoch 60, counted from 0
        ("adaiad", {}, 61),
    ):
        distiller = make(tiny, (base, options))
        assert set(run(distiller, batch, epoch=first - 1)[0]) == {"kl_adv"}
        assert set(run(distiller, batch, epoch=first)[0]) == {"kl_adv", "kl_self"}
    attached = run(make(tiny, ("iad", {})), batch)
    detached = run(make(tiny, ("iad", {"detach_self_target": True})), batch)
    assert torch.equal(attached[0]["kl_self"], detached[0]["kl_self"])
    assert not torch.allclose(attached[1]["head.weight"], detached[1]["head.weight"])


def record_images(network, seen):
    """Collects the batches a network or its folded copy sees, but not the few images it is folded by."""

    def note(module, args):
        if len(args[0]) > EXAMPLES:
            seen.append(args[0])

    network.register_forward_pre_hook(note)


@pytest.mark.parametrize("one_batch", [False, True])
def test_each_view_is_computed_once_in_the_defined_order(tiny, batch, one_batch, monkeypatch):
    monkeypatch.setattr(views, "_one_batch", lambda x: one_batch)
    distiller = make(tiny, ("trades", {}), {"igdm": {"alpha": 1.0}})
    x, y, index = batch
    calls = {"student": [], "teacher": []}
    for name, seen in calls.items():
        record_images(distiller.networks[name], seen)
    x_adv = (x + 0.02).clamp(0, 1)
    distiller.losses(x, y, index, x_adv, epoch=1, epochs=2)
    assert [c.shape[0] for c in calls["student"]] == [5, 5, 5]
    for seen, image in zip(calls["student"], (x_adv, x, 2 * x - x_adv), strict=True):
        torch.testing.assert_close(seen, image)
    assert [c.shape[0] for c in calls["teacher"]] == ([10] if one_batch else [5, 5])
    torch.testing.assert_close(torch.cat(calls["teacher"]), torch.cat([x_adv, 2 * x - x_adv]))


def test_the_rslad_attack_hands_its_teacher_view_to_the_loss(tiny, batch):
    distiller = make(tiny, ("rslad", {}))
    calls = []
    record_images(distiller.networks["teacher"], calls)
    x, y, index = batch
    distiller(x, y, index, epoch=1, epochs=2, generator=torch.Generator().manual_seed(1))
    assert len(calls) == 1


def test_extra_clean_pass_moves_bn_statistics_and_nothing_else(tiny, batch):
    plain = make(tiny, ("ard", {}), {"igdm": {"alpha": 5.0}})
    extra = make(tiny, ("ard", {}), {"igdm": {"alpha": 5.0}}, extra_clean_bn_pass=True)
    losses, extra_losses = run(plain, batch)[0], run(extra, batch)[0]
    assert all(torch.equal(losses[k], extra_losses[k]) for k in losses)
    assert not torch.equal(plain.student.body[1].running_mean, extra.student.body[1].running_mean)
    assert extra.student.body[1].num_batches_tracked - plain.student.body[1].num_batches_tracked == 1
    needed_anyway = make(tiny, ("trades", {}), extra_clean_bn_pass=True)
    run(needed_anyway, batch)
    assert needed_anyway.student.body[1].num_batches_tracked - 3 == 2


@pytest.mark.parametrize(
    ("base", "addons", "epoch", "passes"),
    [
        ("trades", {}, 1, "clean adv clean"),
        ("mart", {}, 1, "clean adv"),
        ("adaad", {}, 1, "clean adv"),
        ("iad", {}, 60, "adv adv clean"),
        ("iad", {}, 61, "adv adv clean clean"),
        ("adaiad", {}, 60, "clean adv clean"),
        ("adaiad", {}, 61, "clean adv clean clean"),
        ("adaad", {"igdm": {"alpha": 5.0}}, 1, "adv clean mirror adv"),
        ("rslad", {"igdm": {"alpha": 5.0}}, 1, "adv adv clean mirror"),
        ("ard", {}, 1, "adv clean"),
        ("rslad", {}, 1, "adv clean"),
        ("akd", {}, 1, "adv"),  # the authors' order is not known: ours
    ],
)
def test_the_authors_passes_give_their_running_statistics(tiny, batch, base, addons, epoch, passes):
    """Replayed by hand in the declared order; losses and gradients are those of the views."""
    x, *_ = batch
    theirs = make(tiny, (base, {}), addons, student_passes="authors")
    replayed = copy.deepcopy(theirs.student).train()
    losses, gradients, x_adv, _ = run(theirs, batch, epoch)
    images = {"clean": x, "adv": x_adv, "mirror": 2 * x - x_adv}
    for image in passes.split():
        replayed(images[image])
    ours, our_gradients, *_ = run(make(tiny, (base, {}), addons), batch, epoch)
    for (name, buffer), expected in zip(theirs.student.named_buffers(), replayed.buffers(), strict=True):
        assert torch.equal(buffer, expected), name
    assert all(torch.equal(losses[name], ours[name]) for name in ours)
    assert all(torch.equal(gradients[n], g) for n, g in our_gradients.items() if g is not None)


def test_a_faithful_step_of_iad_leaves_the_authors_running_statistics(tiny, batch):
    """Attack in train mode, each of whose steps is a pass, then the passes of the losses: replayed by hand."""
    x, y, index = batch
    theirs = make(tiny, ("iad", {}), student_passes="authors")
    theirs.config = Attack(steps=3, attack_bn="train")
    replayed = copy.deepcopy(theirs.student).train()
    start = attacks.uniform_start(x, theirs.config.epsilon, torch.Generator().manual_seed(4))
    theirs(x, y, index, epoch=1, epochs=2, start=start)
    x_adv = start
    for _ in range(3):
        x_adv = x_adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(replayed(x_adv), y, reduction="sum"), x_adv)
        x_adv = x_adv.detach() + 2 / 255 * gradient.sign()
        x_adv = x_adv.clamp(min=x - 8 / 255, max=x + 8 / 255).clamp(0, 1)
    for image in (x_adv, x_adv, x):
        replayed(image)
    for (name, buffer), expected in zip(theirs.student.named_buffers(), replayed.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, rtol=1e-12, atol=1e-12, msg=name)


def test_attack_bn_switch(tiny, batch):
    x, y, _ = batch
    frozen, live = make(tiny, ("pgd_at", {})), make(tiny, ("pgd_at", {}))
    live.config = Attack(steps=3, attack_bn="train")
    results = []
    for distiller in (frozen, live):
        distiller.student.train()
        before = distiller.student.body[1].running_mean.clone()
        x_adv = distiller.attack(x, y, generator=torch.Generator().manual_seed(0))
        results.append((x_adv, torch.equal(before, distiller.student.body[1].running_mean)))
        assert distiller.student.training
    assert results[0][1] and not results[1][1]
    assert not torch.equal(results[0][0], results[1][0])


def test_the_teacher_is_bit_identical_after_training_steps(tiny, batch):
    distiller = make(tiny, ("adaad", {}), {"igdm": {"alpha": 5.0}, "gacd": {"negatives": 8, "dim": 8}, "vfd": {}})
    teacher = distiller.networks["teacher"]
    teacher.requires_grad_(True)  # even a teacher somebody forgot to freeze
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    x, y, index = batch
    for number in range(3):
        distiller(x, y, index, epoch=1, epochs=2, batch=number, generator=torch.Generator().manual_seed(number))
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None for p in distiller.student.parameters())


@pytest.mark.parametrize("inner", [name for name in attacks.INNER if name != "none"])
def test_every_inner_maximisation_works_with_any_base(inner, tiny, batch):
    x, y, _ = batch
    distiller = make(tiny, ("pgd_at", {}), inner=inner)
    x_adv = distiller.attack(x, y, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(x_adv, x) and (x_adv - x).abs().max() <= 8 / 255 + 1e-9

    distiller = make(tiny, ("pgd_at", {}), inner=inner, attack=Attack(norm="l2", epsilon=0.2, step_size=0.1))
    x_adv = distiller.attack(x, y, generator=torch.Generator().manual_seed(0))
    distances = (x_adv - x).flatten(1).norm(dim=1)
    assert distances.max() <= 0.2 + 1e-12 and distances.median() > 0.19


def test_a_step_refuses_images_outside_the_pixel_range_and_radii_that_reach_every_image(tiny, batch):
    x, y, index = batch
    for base in ("pgd_at", "natural"):
        with pytest.raises(ValueError, match="x: got values from"):
            make(tiny, (base, {}))(255 * x, y, index, epoch=1, epochs=1)
    attack = Attack(norm="l2", epsilon=128, step_size=15)
    with pytest.raises(ValueError, match=r"epsilon: got 128.0; accepted: an l2 norm, such as 0.5, in \[0, 10.39"):
        make(tiny, ("pgd_at", {}), attack=attack)(x, y, index, epoch=1, epochs=1)


def test_a_new_inner_maximisation_is_one_registered_object(tiny, batch, monkeypatch):
    """Ascends the distance of the student's logits to the clean teacher's at x."""

    def objective(clean):
        target = clean.logits["clean_teacher"]
        return attacks.Objective(lambda logits, x_adv: (logits - target).square().sum(1))

    mine = attacks.InnerMaximisation(objective, start="uniform", clean=("clean_teacher",))
    monkeypatch.setitem(attacks.INNER, "mine", mine)
    x, y, _ = batch
    distiller = make(tiny, ("pgd_at", {}), inner="mine")
    x_adv = distiller.attack(x, y, generator=torch.Generator().manual_seed(0))
    student, target = (distiller.networks[name].eval() for name in ("student", "clean_teacher"))
    start = attacks.uniform_start(x, 8 / 255, torch.Generator().manual_seed(0))
    distance = lambda z: (student(z) - target(x)).square().sum()
    assert distance(x_adv) > distance(start)
    del distiller.networks["clean_teacher"]
    with pytest.raises(ValueError, match="^clean_teacher: this method needs one"):
        Distiller(distiller.method, distiller.networks, Attack())
    with pytest.raises(ValueError, match=r"^inner: got 'trade'; accepted: none, ce.*trades"):
        Distiller(Method(BASES["pgd_at"](), inner="trade"), distiller.networks, Attack())


@pytest.mark.parametrize(("inner", "start"), [("ce", "uniform"), ("mart", "gaussian"), ("trades", "gaussian")])
def test_each_inner_maximisation_names_its_start(inner, start, tiny, batch):
    x, _, _ = batch
    distiller = make(tiny, ("mart", {}), inner=inner)
    seeded = lambda: torch.Generator().manual_seed(3)
    expected = {
        "uniform": attacks.uniform_start(x, 8 / 255, seeded()),
        "gaussian": attacks.gaussian_start(x, seeded()),
    }
    assert attacks.INNER[inner].start == start
    assert torch.equal(distiller.start(x, seeded()), expected[start])


def test_mart_attacks_from_the_start_of_its_authors():
    assert Method(BASES["mart"]()).inner == "mart"


@pytest.mark.parametrize("case", ["natural", "pgd_at", "trades", "mart", "ard original", "akd"])
def test_labels_are_smoothed_in_every_cross_entropy_of_a_base(case, tiny, batch):
    """Smoothed cross-entropy is that of 0.8 onehot + 0.2 / classes: hard and uniform targets, weighted."""
    (name, options), _ = BY_HAND[case]
    plain, smooth = (make(tiny, (name, options), tricks=Tricks(label_smoothing=s)) for s in (0.0, 0.2))
    assert plain.method.base.smoothed
    (before, _, x_adv, _), (after, *_) = run(plain, batch), run(smooth, batch)
    hand = Hand(plain, batch, x_adv)
    logits = hand.s["clean" if case in ("natural", "trades", "ard original") else "adv"]
    scale = {"ard original": 0.1, "akd": 0.5}.get(case, 1.0)
    uniform = -logits.log_softmax(1).mean(1).mean()
    expected = before["ce"] + scale * 0.2 * (uniform - F.cross_entropy(logits, hand.y))
    torch.testing.assert_close(after["ce"], expected)
    assert all(torch.equal(after[key], before[key]) for key in before if key != "ce")


def test_weights_are_perturbed_where_the_base_loss_rises_and_put_back(tiny, batch):
    """Gradients are those at w + gamma ||w|| g / ||g||; statistics move once, by the pass at these weights."""
    x, y, index = batch
    place = {"epoch": 3, "epochs": 4, "start": x}
    plain, awp = (
        make(tiny, ("trades", {}), {"gacd": {"negatives": 8, "dim": 8}}, tricks=t) for t in (None, Tricks(awp=0.05))
    )
    before = {name: value.clone() for name, value in awp.student.state_dict().items()}
    x_adv = plain.attack(x, y, start=x)
    at = copy.deepcopy(awp.student).train()
    clean, adv = at(x), at(x_adv)
    loss = F.cross_entropy(clean, y) + 6 * kl(clean, adv).sum() / 5
    weights = [p for p in at.parameters() if p.ndim > 1]
    for w, g in zip(weights, torch.autograd.grad(loss, weights), strict=True):
        w.data += 0.05 * w.norm() * g / g.norm()
    plain.student.load_state_dict({**dict(at.named_parameters()), **dict(awp.student.named_buffers())})
    expected, _ = plain.losses(x, y, index, x_adv, epoch=3, epochs=4)
    gradients = torch.autograd.grad(sum(expected.values()), list(plain.student.parameters()))
    losses, _ = awp(x, y, index, **place)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value.detach())
    for ours, hand in zip(awp.student.parameters(), gradients, strict=True):
        torch.testing.assert_close(ours.grad, hand)
    after = awp.student.state_dict()
    assert all(torch.equal(after[name], before[name]) for name, _ in awp.student.named_parameters())
    for name, value in plain.student.named_buffers():
        torch.testing.assert_close(after[name], value, msg=name)
    late = make(tiny, ("trades", {}), tricks=Tricks(awp=0.05, awp_warmup=3))
    off = make(tiny, ("trades", {}))
    assert late(x, y, index, **place)[0]["ce"] == off(x, y, index, **place)[0]["ce"]
    with pytest.raises(ValueError, match="awp: got 0.05 with compile"):
        make(tiny, ("trades", {}), tricks=Tricks(awp=0.05), compile=True)


def test_a_missing_teacher_is_named(tiny):
    complete = make(tiny, ("ard", {}), {"vfd": {}})
    for name in ("teacher", "clean_teacher"):
        networks = {k: v for k, v in complete.networks.items() if k != name}
        with pytest.raises(ValueError, match=f"^{name}: this method needs one"):
            Distiller(complete.method, networks, Attack())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ADDONS["igdm"](alpha=-1.0), "alpha: got -1.0; accepted: a number >= 0"),
        (lambda: ADDONS["igdm"](alpha=1.0, ramp_epochs=0), "ramp_epochs: got 0"),
        (lambda: BASES["ard"](temperature=0.0), "temperature: got 0.0"),
        (lambda: BASES["adaiad"](temperature=0.0), "temperature: got 0.0"),
        (lambda: BASES["adaad"](lambda_=1.5), "lambda_: got 1.5"),
        (lambda: ADDONS["gacd"](momentum=2.0), "momentum: got 2.0"),
    ],
)
def test_bad_options_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def gacd(**options):
    """A prepared float64 GACD on twelve samples of four classes, features of width 6 (student) and 5 (teacher)."""
    labels = options.pop("labels", torch.arange(12) % 4)
    options = {"weight": 1.0, "negatives": 7, "estimator": "strict", **options}
    term = ADDONS["gacd"](**{"dim": 3, "temperature": 0.5, **options})
    dims = {"student": 6, "teacher": 5}
    term.prepare(Setup(4, dims, labels, torch.nn.Identity(), torch.device("cpu"), seed=3))
    return term.double()


def test_two_terms_cannot_give_one_name(tiny, batch):
    """Neither images nor losses: the later would replace the earlier. IGDM's mirror stays as it is asked for."""
    x, y, index = batch
    both = {"igdm": {"alpha": 1.0, "gamma": 0.5}, "smooth_mirror": {"alpha": 1.0}}
    images = make(tiny, ("ard", {}), both).method.images(x, x + 0.02)
    torch.testing.assert_close((images["mirror"], images["reflection"]), (x - 0.01, x - 0.02))
    distiller = make(tiny, ("pgd_at", {}), {"igdm": {"alpha": 1.0}})
    distiller.method.addon("igdm").forward = lambda step: {"ce": step.student("adv").logits.sum()}
    with pytest.raises(ValueError, match=r"igdm: the loss 'ce' is another term's too"):
        distiller(x, y, index, epoch=1, epochs=2, start=x.clone())
    distiller.method.addon("igdm").images = lambda x, x_adv: {"clean": x}
    with pytest.raises(ValueError, match=r"igdm: the image 'clean' is another term's too"):
        distiller(x, y, index, epoch=1, epochs=2, start=x.clone())


def test_weights_without_a_gradient_are_not_perturbed_however_large(tiny):
    network = tiny(1)
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(1e4)
    before = [weight.detach().clone() for weight in network.parameters()]
    with perturbed(network, lambda: sum(0 * w.sum() for w in network.parameters()), 0.5, World()):
        assert all(torch.equal(a, b) for a, b in zip(network.parameters(), before, strict=True))


def test_images_without_a_label_get_the_teachers_prediction(tiny, batch):
    x, y, index = batch
    labels = torch.arange(12) % 4
    labels[index[[1, 3]]] = -1
    distiller = make(tiny, ("pgd_at", {}), labels=labels)
    predicted = distiller.networks["teacher"](x).argmax(1)
    hidden, filled = y.clone(), y.clone()
    hidden[[1, 3]], filled[[1, 3]] = -1, predicted[[1, 3]]
    found = distiller(x, hidden, index, epoch=1, epochs=2, start=x.clone())[0]["ce"]
    again = make(tiny, ("pgd_at", {}))
    assert torch.equal(found, again(x, filled, index, epoch=1, epochs=2, start=x.clone())[0]["ce"])
    with pytest.raises(ValueError, match="teacher: some training images have no label"):
        build_distiller(Method(BASES["pgd_at"]()), {"student": tiny(1)}, Attack(steps=1), labels=labels, num_classes=4)


def gacd_table(term, step):
    return term.contrast.table(step.index, derive_seed(term.seed, "negatives", step.epoch, step.batch))


def gacd_step(batch, seed=0):
    x, y, _ = batch
    index = torch.tensor([4, 1, 6, 3, 9])  # labels 0 1 2 3 1, as y
    generator = torch.Generator().manual_seed(seed)

    def output(width):
        logits = 3 * torch.randn(5, 4, generator=generator, dtype=torch.float64)
        return Output(logits, torch.randn(5, width, generator=generator, dtype=torch.float64).requires_grad_())

    outputs = {View("student", "adv"): output(6), View("teacher", "adv"): output(5)}
    return Step(x, y, index, x, 1, 2, 0, outputs)


def embeddings(term, step):
    s = F.normalize(term.contrast.student_head(step.student("adv").features))
    t = F.normalize(term.contrast.teacher_head(step.teacher("adv").features))
    return s, t, step.teacher("adv").logits.softmax(1)[torch.arange(5), step.y]


def test_a_table_of_another_number_of_negatives_is_refused(batch):
    step = gacd_step(batch)
    for estimator in ("crd", "strict"):
        contrast = gacd(estimator=estimator).contrast
        features = step.student("adv").features, step.teacher("adv").features
        with pytest.raises(ValueError, match=r"draw: got a table of shape .*; accepted: .*, k = 7"):
            contrast(*features, step.index, draw=torch.zeros(5, 5, dtype=torch.long))


@pytest.mark.parametrize("k", [7, 2])
def test_gacd_strict_by_hand(k, batch):
    """Loops over anchors and negatives: batch first, then the bank until each anchor has k of them."""
    term, step = gacd(negatives=k), gacd_step(batch)
    bank, table = term.contrast.bank_student.clone(), gacd_table(term, step)
    loss = term(step)["gacd"]
    s, t, w = embeddings(term, step)
    scores, negatives = [], []
    for i in range(5):
        rows = [s[j] for j in range(5) if step.y[j] != step.y[i]][:k]
        rows += [bank[r] for r in table[i, : k - len(rows)]]
        assert len(rows) == k
        negatives.append([torch.exp(t[i] @ row / 0.5) for row in rows])
        scores += [torch.exp(t[i] @ s[i] / 0.5), *negatives[-1]]
    z = torch.stack(scores).mean().detach() * 12
    torch.testing.assert_close(term.contrast.normalizers[0], z)
    expected = 0.0
    for i in range(5):

        def h(e):
            return (e / z) / (e / z + k / 12)

        terms = [h(torch.exp(t[i] @ s[i] / 0.5)).log(), *((1 - h(e)).log() for e in negatives[i])]
        expected = expected - w[i] * sum(terms) / 5
    torch.testing.assert_close(loss, expected)
    features = [step.student("adv").features, step.teacher("adv").features, *term.parameters()]
    for ours, hand in zip(torch.autograd.grad(loss, features), torch.autograd.grad(expected, features), strict=True):
        torch.testing.assert_close(ours, hand)
    assert not torch.equal(term.contrast.bank_student, bank), "the bank is updated after scoring"
    updated = F.normalize(0.5 * bank[step.index] + 0.5 * s.detach())
    torch.testing.assert_close(term.contrast.bank_student[step.index], updated)
    untouched = [i for i in range(12) if i not in step.index.tolist()]
    assert torch.equal(term.contrast.bank_student[untouched], bank[untouched])


@pytest.mark.parametrize("unlabelled", [[], [2, 4]])
@pytest.mark.parametrize("candidates", ["batch", "bank"])
def test_gacd_infonce_by_hand(candidates, unlabelled, batch):
    """An image without a label has weight max P_T(x~), and of the rows only its own is left out."""
    labels, step = torch.arange(12) % 4, gacd_step(batch)
    labels[step.index[unlabelled]] = -1
    step.y[unlabelled] = step.teacher("adv").logits.argmax(1)[unlabelled]  # as the engine predicts them
    term = gacd(estimator="infonce", candidates=candidates, labels=labels)
    bank = term.contrast.bank_student.clone() if candidates == "bank" else None
    loss = term(step)["gacd"]
    s, t, w = embeddings(term, step)
    for i in unlabelled:
        w[i] = step.teacher("adv").logits[i].softmax(0).max()
    index, expected = step.index.tolist(), 0.0

    def other(a, b):
        return a != b and (labels[a] < 0 or labels[b] < 0 or labels[a] != labels[b])

    for i in range(5):
        rows = [s[i]] + [s[j] for j in range(5) if other(index[i], index[j])]
        if bank is not None:
            rows += [bank[r] for r in range(12) if other(index[i], r)]
        scores = torch.stack([t[i] @ row / 0.5 for row in rows])
        expected = expected - w[i] * scores.log_softmax(0)[0] / 5
    torch.testing.assert_close(loss, expected)


def test_gacd_crd_weights_every_per_sample_term(batch):
    """With weights the two-sided loss is the weighted mean of what single samples lose without."""
    weighted, step = gacd(estimator="crd"), gacd_step(batch)
    loss = weighted(step)["gacd"]
    s, t, w = embeddings(weighted, step)
    fresh = gacd(estimator="crd")
    table, z = gacd_table(fresh, step), weighted.contrast.normalizers
    expected = 0.0
    banks = fresh.contrast.bank_teacher, fresh.contrast.bank_student
    for half, (anchor, bank) in enumerate(zip((s, t), banks, strict=True)):
        for i in range(5):
            p = torch.exp(anchor[i] @ bank[step.index[i]] / 0.5) / z[half]
            q = torch.stack([torch.exp(anchor[i] @ bank[r] / 0.5) / z[half] for r in table[i]])
            floor = 7 / 12
            terms = (p / (p + floor + 1e-7)).log() + (floor / (q + floor + 1e-7)).log().sum()
            expected = expected - w[i] * terms / 5
    torch.testing.assert_close(loss, expected)


def test_gacd_switches_change_what_they_say(batch):
    step = gacd_step(batch)
    plain = gacd()(step)["gacd"]
    for options in ({"reweight": False}, {"temperature": 1.0}, {"negatives": 9}, {"estimator": "infonce"}):
        assert not torch.isclose(gacd(**options)(step)["gacd"], plain), options
    torch.testing.assert_close(gacd(weight=0.8)(step)["gacd"], 0.8 * plain)
    keep, forget = gacd(momentum=1.0), gacd(momentum=0.0)
    for term in (keep, forget):
        term(step)
    s, _, _ = embeddings(forget, step)
    torch.testing.assert_close(forget.contrast.bank_student[step.index], s.detach())
    initial = gacd().contrast.bank_student[step.index]
    torch.testing.assert_close(keep.contrast.bank_student[step.index], F.normalize(initial))
    assert ADDONS["gacd"](input="clean").views(1) == frozenset({View("student", "clean"), View("teacher", "clean")})


@pytest.mark.parametrize("estimator", ["strict", "crd"])
def test_gacd_on_a_single_class_scores_the_positives_alone(estimator, batch):
    term = ADDONS["gacd"](weight=1.0, estimator=estimator, dim=3, temperature=0.5, negatives=7)
    step = gacd_step(batch)
    labels = torch.zeros(12, dtype=torch.int64)
    term.prepare(Setup(4, {"student": 6, "teacher": 5}, labels, torch.nn.Identity(), torch.device("cpu"), 3))
    step.y = torch.zeros(5, dtype=torch.int64)
    loss = term.double()(step)["gacd"]
    s, t, w = embeddings(term, step)
    assert torch.isfinite(loss) and loss > 0
    if estimator == "strict":
        e = torch.exp((t * s).sum(1) / 0.5)
        h = (e / (e.mean() * 12)) / (e / (e.mean() * 12) + 7 / 12)
        torch.testing.assert_close(loss, -(w * h.log()).mean())


@pytest.mark.parametrize("candidates", ["batch", "bank"])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0, -1.0])
def test_gacd_default_has_a_bounded_gradient(candidates, spread):
    """Whatever the embeddings: collinear, as at the start of training, spread out,
    or students opposite their teachers."""
    generator, temperature = torch.Generator().manual_seed(0), 0.07
    labels = torch.arange(64) % 4
    loss = ContrastiveDistillation(4, 4, labels, candidates=candidates, dim=4, temperature=temperature).double()
    for head in (loss.student_head, loss.teacher_head):
        head.weight.data.copy_(torch.eye(4))
        head.bias.data.zero_()

    def rows(sign):
        noise = torch.randn(32, 4, generator=generator, dtype=torch.float64)
        return F.normalize(sign * torch.ones(32, 4).double() + abs(spread) * noise).requires_grad_()

    s, t = rows(-1 if spread < 0 else 1), rows(1)
    weight = torch.rand(32, generator=generator, dtype=torch.float64)
    value = loss(s, t, torch.arange(32), weight=weight)
    for gradient in torch.autograd.grad(value, (s, t)):
        assert gradient.norm(dim=1).sum() <= 2 * weight.mean() / temperature + 1e-9


def test_contrastive_distillation_in_a_trainer_of_ones_own():
    """Pairs are told apart after a few steps, by each estimator; the state dict goes on from where it was taken."""
    torch.manual_seed(0)
    labels = torch.arange(40) % 4
    teacher = torch.randn(40, 6)
    student = teacher @ torch.randn(6, 5)
    for estimator in ("infonce", "crd", "strict"):
        options = {"estimator": estimator, "negatives": 12, "dim": 8, "temperature": 0.3}
        loss = ContrastiveDistillation(5, 6, labels, **options)
        optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
        misranked = []
        for step in range(40):
            index = torch.randperm(40, generator=torch.Generator().manual_seed(step))[:20]
            optimizer.zero_grad()
            loss(student[index], teacher[index], index, draw=step).backward()
            optimizer.step()
            misranked.append(loss.metrics["misranked"].item())
            assert ("mi_bound" in loss.metrics) == (estimator != "infonce")
        assert misranked[-1] < misranked[0], estimator
        again = ContrastiveDistillation(5, 6, labels, seed=1, **options)
        again.load_state_dict(loss.state_dict())
        values = [each(student[:9], teacher[:9], torch.arange(9), draw=7) for each in (loss, again)]
        assert torch.equal(*values), estimator


class Given(nn.Identity):
    """A head of features that are embeddings already."""

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.in_features = in_features


@pytest.mark.parametrize("estimator", ["infonce", "crd", "strict"])
def test_contrastive_distillation_scores_in_float32(estimator):
    """Also under autocast and with weights in half precision, where Z would be infinite."""
    torch.manual_seed(0)
    labels, index = torch.arange(40) % 5, torch.arange(8)
    features = [torch.randn(8, 6) for _ in range(2)]

    def loss() -> ContrastiveDistillation:
        return ContrastiveDistillation(6, 6, labels, estimator=estimator, dim=6, negatives=8)

    values, scales = [], []
    for dtype in (None, torch.bfloat16, torch.float16):
        each = loss()
        each.student_head, each.teacher_head = Given(6), Given(6)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            values.append(each(*features, index, draw=1))
        scales.append(each.normalizers)
    assert values[0] == values[1] == values[2]
    assert torch.equal(scales[0], scales[1]) and torch.equal(scales[0], scales[2])
    for dtype in (torch.bfloat16, torch.float16):
        half = loss().to(dtype)
        half(*(x.to(dtype) for x in features), index, draw=1)
        kept = half.normalizers.clone()
        value = half.float().to(dtype)(*(x.to(dtype) for x in features), index, draw=2)
        assert value.isfinite() and value.dtype == torch.float32
        assert half.normalizers.dtype == torch.float32 and torch.equal(half.normalizers, kept)
        assert estimator == "infonce" or kept[0] > torch.finfo(torch.float16).max


@pytest.mark.parametrize("estimator", ["infonce", "crd", "strict"])
def test_contrastive_distillation_is_pickled_whole(estimator):
    features, index = [torch.randn(8, 6) for _ in range(2)], torch.arange(8)
    loss = ContrastiveDistillation(6, 6, torch.arange(40) % 5, estimator=estimator, dim=6, negatives=8)
    loss(*features, index, draw=1)
    again = pickle.loads(pickle.dumps(loss))
    assert torch.equal(loss(*features, index, draw=2), again(*features, index, draw=2))
    fresh = pickle.loads(pickle.dumps(ContrastiveDistillation(6, 6, loss.labels, estimator=estimator, dim=6)))
    fresh.load_state_dict(loss.state_dict())
    assert fresh._normalized == loss._normalized == (estimator != "infonce")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draw": None}, "draw: got None with estimator 'crd'; accepted: a seed"),
        ({"student": torch.rand(2, 4)}, r"student: got shape \(2, 4\); accepted: \(2, 5\)"),
        ({"teacher": torch.rand(3, 6)}, r"teacher: got shape \(3, 6\); accepted: \(2, 6\)"),
        ({"index": torch.tensor([0, 8])}, r"index: got 0..8; accepted: 0..7"),
        ({"index": torch.rand(2)}, "index: got torch.float32; accepted: int64"),
        ({"weight": torch.rand(3)}, r"weight: got shape \(3,\); accepted: \(2,\)"),
        ({"index": None}, "index: got NoneType; accepted: an integer tensor"),
        ({"gather": None}, "gather: got None; accepted: a function"),
        ({"student": torch.tensor(1.0)}, r"student: got shape \(\); accepted: two dimensions"),
        ({"student": torch.rand(0, 5), "index": torch.arange(0)}, r"student: got shape \(0, 5\); accepted: two"),
        ({"teacher": None}, "teacher: got NoneType; accepted: a floating point tensor"),
        *(
            ({"draw": draw}, f"draw: got {got}; accepted: ")
            for draw, got in (
                (torch.ones(2, 3), "torch.float32"),
                (torch.ones(2, 3, dtype=torch.int32), "torch.int32"),
                (torch.ones(3, 3, dtype=torch.int64), r"a table of shape \(3, 3\)"),
                (torch.ones(2, 4, dtype=torch.int64), r"a table of shape \(2, 4\)"),
                (torch.tensor([[0, 1, 8], [0, 1, 2]]), r"0\.\.8"),
                (torch.tensor([[0, 1, -2], [0, 1, 2]]), r"-2\.\.2"),
                ("seed", "'seed'"),
                (1.5, "1.5"),
                (torch.ones(3), r"torch.float32 \(3,\)"),
            )
        ),
    ],
)
@pytest.mark.parametrize("estimator", ["crd", "strict"])
def test_contrastive_distillation_names_what_does_not_fit(change, message, estimator):
    loss = ContrastiveDistillation(5, 6, torch.arange(8) % 2, estimator=estimator, negatives=3)
    message = message.replace("'crd'", repr(estimator))
    inputs = {"student": torch.rand(2, 5), "teacher": torch.rand(2, 6), "index": torch.arange(2)}
    options = {"draw": 1, **inputs, **change}
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        loss(**options)
    assert torch.equal(loss.normalizers, torch.zeros(2)), "nothing has changed"


@pytest.mark.parametrize("gather", [lambda rows: None, lambda rows: rows[0], lambda rows: rows.long()])
def test_what_gather_returns_is_checked(gather):
    loss = ContrastiveDistillation(5, 6, torch.arange(8) % 2)
    with pytest.raises((ValueError, TypeError), match="^gather: got .*accepted: "):
        loss(torch.rand(2, 5), torch.rand(2, 6), torch.arange(2), gather=gather)


def test_a_drawn_table_names_what_it_is_asked_with():
    loss = ContrastiveDistillation(5, 6, torch.arange(8) % 2, estimator="crd", negatives=3)
    for index in (None, [0], torch.tensor(1), torch.tensor([1], dtype=torch.int32), torch.tensor([8])):
        with pytest.raises((ValueError, TypeError, IndexError), match="^index: got .*accepted: "):
            loss.table(index, 1)
    with pytest.raises(TypeError, match="^draw: got None"):
        loss.table(torch.arange(2), None)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: Method(None), "base"),
        (lambda: Method(BASES["ard"](), {"igdm": 1}), "igdm"),
        (lambda: Method(BASES["ard"](), [1]), "addons"),
        (lambda: Method(BASES["ard"](), inner=torch.ones(2)), "inner"),
        (lambda: BASES["trades"](beta=None), "beta"),
        (lambda: BASES["ard"](alpha=None), "alpha"),
        (lambda: ADDONS["igdm"](alpha=None), "alpha"),
        (lambda: methods.base([]), "method"),
    ],
)
def test_methods_name_what_they_cannot_be_made_of(call, name):
    with pytest.raises(TypeError, match=f"^{name}: got .*accepted: "):
        call()


@pytest.mark.parametrize("name", ["student_dim", "teacher_dim", "labels"])
def test_contrastive_distillation_is_made_of_whole_widths_and_a_vector_of_labels(name):
    arguments = {"student_dim": 5, "teacher_dim": 6, "labels": torch.arange(8) % 2}
    widths = (0, "a", None, 6.0, -1, True)
    labels = (None, [0, 1], np.arange(8), torch.rand(8), torch.ones(0, dtype=torch.int64), torch.tensor(1))
    for bad in (*labels, class_table(arguments["labels"])) if name == "labels" else widths:
        with pytest.raises((ValueError, TypeError), match=f"^{name}: got .*accepted: "):
            ContrastiveDistillation(**{**arguments, name: bad})


@pytest.mark.parametrize("estimator", ["infonce", "crd", "strict"])
@pytest.mark.parametrize("dtypes", [[torch.float16] * 2, [torch.float64] * 2, [torch.bfloat16, torch.float32]])
def test_contrastive_distillation_computes_features_of_any_precision_in_that_of_its_heads(dtypes, estimator):
    features, index = [torch.randn(4, 6).to(dtype) for dtype in dtypes], torch.arange(4)
    table = torch.tensor([[-1, 3, 5]]).expand(4, 3)
    for draw in (1, table):
        values = []
        for given in (features, [x.float() for x in features]):
            loss = ContrastiveDistillation(6, 6, torch.arange(8) % 2, estimator=estimator, negatives=3)
            values.append(loss(*given, index, draw=draw))
        assert values[0] == values[1] and values[0].dtype == torch.float32


@pytest.mark.parametrize("estimator", ["strict", "crd"])
def test_checkpoints_from_before_the_loss_was_a_module_load(estimator, batch):
    """Heads and banks had the names that they have in the module, without its prefix."""
    term = gacd(estimator=estimator)
    term(gacd_step(batch))
    old = {f"terms.gacd.{k.removeprefix('contrast.')}": v for k, v in term.state_dict().items()}
    method = Method(BASES["pgd_at"](), {"gacd": gacd(estimator=estimator)})
    method.load_state_dict(old)
    restored = method.terms["gacd"]
    assert torch.equal(restored(gacd_step(batch, 1))["gacd"], term(gacd_step(batch, 1))["gacd"])


def test_gacd_normalizer_is_frozen_after_the_first_batch_and_survives_a_checkpoint(batch):
    term = gacd()
    term(gacd_step(batch))
    first = term.contrast.normalizers.clone()
    saved = copy.deepcopy(term.state_dict())
    term(gacd_step(batch, seed=1))
    assert torch.equal(term.contrast.normalizers, first)
    restored = gacd()
    restored.load_state_dict(saved)
    restored(gacd_step(batch, seed=2))
    assert torch.equal(restored.contrast.normalizers, first)


def test_gacd_bound_is_a_lower_bound_of_the_mutual_information(batch):
    """E log h + log k <= I <= H(index) = log M for embeddings that determine each other."""
    term, step = gacd(reweight=False), gacd_step(batch)
    term(step)
    s, t, _ = embeddings(term, step)
    e = torch.exp((s * t).sum(1) / 0.5) / term.contrast.normalizers[0]
    expected = (e / (e + 7 / 12)).log().mean() + torch.tensor(7.0).log()
    torch.testing.assert_close(step.metrics["mi_bound"], expected.detach())


@pytest.mark.parametrize("network", [views.student, views.teacher, views.clean_teacher])
def test_a_view_of_an_image_that_no_step_has_is_refused(network):
    with pytest.raises(ValueError, match="image: got 'nat'; accepted: adv, plus, clean, mirror, reflection"):
        network("adv", "nat")
