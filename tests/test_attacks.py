"""The PGD loop and every inner objective against the formula, written out."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastrd import attacks

SETTINGS = {"epsilon": 8 / 255, "step_size": 2 / 255, "steps": 5}


def by_the_formula(loss_of, x, start, epsilon, step_size, steps):
    """The ten-line loop every paper prints."""
    x_adv = start.clone()
    for _ in range(steps):
        x_adv.requires_grad_()
        (g,) = torch.autograd.grad(loss_of(x_adv), x_adv)
        x_adv = x_adv.detach() + step_size * g.sign()
        x_adv = torch.min(torch.max(x_adv, x - epsilon), x + epsilon).clamp(0, 1)
    return x_adv


def kl(p_logits, q_logits):
    p = p_logits.softmax(1)
    return (p * (p.log() - q_logits.softmax(1).log())).sum()


@pytest.mark.parametrize("name", ["cross_entropy", "margin", "trades", "adaad", "igdm"])
def test_pgd_equals_the_loop_from_the_formula(name, tiny, batch):
    x, y, _ = batch
    student, teacher = tiny(1).eval(), tiny(2).eval()
    clean = student(x).detach()

    def cw(z):
        others = torch.stack([row[torch.arange(4) != c].max() for row, c in zip(z, y, strict=True)])
        return (others - z[torch.arange(5), y]).sum()

    cases = {
        "cross_entropy": (
            attacks.cross_entropy(y),
            lambda a: F.cross_entropy(student(a), y, reduction="sum"),
        ),
        "margin": (attacks.margin(y), lambda a: cw(student(a))),
        "trades": (attacks.kl_from(clean), lambda a: kl(clean, student(a))),
        "adaad": (attacks.adaad(teacher), lambda a: kl(teacher(a), student(a))),
        "igdm": (
            attacks.gradient_mismatch(student, teacher, x),
            lambda a: kl(teacher(a) - teacher(2 * x - a), student(a) - student(2 * x - a)),
        ),
    }
    objective, loss_of = cases[name]
    start = attacks.gaussian_start(x, torch.Generator().manual_seed(3))
    ours = attacks.pgd(student, x, objective, **SETTINGS, start=start)
    assert torch.equal(ours, by_the_formula(loss_of, x, start, **SETTINGS))
    assert (ours - x).abs().max() <= 8 / 255 + 1e-12 and ours.min() >= 0 and ours.max() <= 1
    assert loss_of(ours) > loss_of(start)


def test_adaad_gradient_flows_through_the_teacher(tiny, batch):
    x, _, _ = batch
    student, teacher = tiny(1).eval(), tiny(2).eval()
    x_adv = (x + 0.01).requires_grad_()
    both = torch.autograd.grad(attacks.adaad(teacher)(student(x_adv), x_adv).sum(), x_adv)[0]
    one = torch.autograd.grad(attacks.kl_from(teacher(x_adv))(student(x_adv), x_adv).sum(), x_adv)[0]
    assert not torch.allclose(both, one)


def test_objectives_are_per_sample(tiny, batch):
    x, y, _ = batch
    student = tiny(1).eval()
    for objective in (attacks.cross_entropy(y), attacks.margin(y), attacks.adaad(tiny(2).eval())):
        assert objective(student(x), x).shape == (5,)


def test_random_start_is_uniform_seeded_and_clamped(batch):
    x, _, _ = batch
    x = torch.zeros_like(x).index_fill_(0, torch.tensor([0]), 0.5)
    first = attacks.uniform_start(x, 0.1, torch.Generator().manual_seed(1))
    assert torch.equal(first, attacks.uniform_start(x, 0.1, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, attacks.uniform_start(x, 0.1, torch.Generator().manual_seed(2)))
    assert first.min() == 0, "noise below black is clamped"
    inside = first[0] - 0.5
    assert inside.abs().max() <= 0.1 and inside.abs().max() > 0.09 and abs(inside.mean()) < 0.02
    same = attacks.pgd(len, x, len, epsilon=0.1, step_size=0, steps=0, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, same)


def test_start_is_taken_as_it_is(tiny, batch):
    x, y, _ = batch
    start = torch.full_like(x, 2.0)
    assert torch.equal(
        attacks.pgd(tiny(1), x, attacks.cross_entropy(y), epsilon=0.1, step_size=0.1, steps=0, start=start),
        start,
    )


def test_attack_leaves_the_model_and_memory_format_alone(tiny, batch):
    x, y, _ = batch
    x = x.to(memory_format=torch.channels_last)
    model = tiny(1).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x_adv = attacks.pgd(model, x, attacks.cross_entropy(y), **SETTINGS)
    assert x_adv.is_contiguous(memory_format=torch.channels_last) and not x_adv.requires_grad
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_frozen_restores_only_what_it_froze(tiny):
    model = tiny(1)
    model.head.bias.requires_grad_(False)
    with attacks.frozen(model):
        assert not any(p.requires_grad for p in model.parameters())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["head.bias"]


def in_l2(loss_of, x, start, epsilon, step_size, steps):
    """The loop of MadryLab's `robustness` and of torchattacks, image by image."""
    x_adv = start.clone()
    for _ in range(steps):
        x_adv.requires_grad_()
        (g,) = torch.autograd.grad(loss_of(x_adv), x_adv)
        x_adv = x_adv.detach()
        for i in range(len(x)):
            delta = x_adv[i] + step_size * g[i] / g[i].norm() - x[i]
            x_adv[i] = (x[i] + delta * min(1.0, epsilon / delta.norm().item())).clamp(0, 1)
    return x_adv


@pytest.mark.parametrize("inner", [name for name in attacks.INNER if name != "none"])
def test_l2_pgd_equals_the_loop_from_the_formula(inner, tiny, batch):
    x, y, _ = batch
    networks = {"student": tiny(1).eval(), "teacher": tiny(2).eval()}
    logits = {name: network(x).detach() for name, network in networks.items()}
    objective = attacks.INNER[inner].objective(attacks.Clean(x, y, networks, logits))
    loss_of = lambda z: objective(networks["student"](z), z).sum()
    start = attacks.uniform_start(x, 0.5, torch.Generator().manual_seed(2), norm="l2")
    settings = {"epsilon": 0.5, "step_size": 0.1, "steps": 4}
    ours = attacks.pgd(networks["student"], x, objective, **settings, norm="l2", start=start)
    torch.testing.assert_close(ours, in_l2(loss_of, x, start, **settings), rtol=0, atol=1e-12)
    assert (ours - x).flatten(1).norm(dim=1).max() <= 0.5 + 1e-12 and ours.min() >= 0 and ours.max() <= 1
    assert loss_of(ours) > loss_of(start)


def test_l2_start_lies_on_the_sphere_and_tiny_gradients_still_step(batch):
    x = torch.full((4, 3, 6, 6), 0.5)
    first = attacks.uniform_start(x, 0.3, torch.Generator().manual_seed(1), norm="l2")
    torch.testing.assert_close((first - x).flatten(1).norm(dim=1), torch.full((4,), 0.3))
    assert torch.equal(first, attacks.uniform_start(x, 0.3, torch.Generator().manual_seed(1), norm="l2"))
    assert not torch.equal(first[0], first[1])

    tiny_slope = attacks.Objective(lambda logits, x_adv: 1e-30 * logits.flatten(1).sum(1))
    settings = {"epsilon": 0.5, "step_size": 0.2, "steps": 1, "norm": "l2", "start": x}
    moved = attacks.pgd(torch.nn.Flatten(), x, tiny_slope, **settings)
    torch.testing.assert_close((moved - x).flatten(1).norm(dim=1), torch.full((4,), 0.2))
    flat = attacks.Objective(lambda logits, x_adv: 0 * logits.flatten(1).sum(1))
    assert torch.equal(attacks.pgd(torch.nn.Flatten(), x, flat, **settings), x)


def test_l2_equals_torchattacks_on_the_same_start(tiny, batch):
    torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed")
    x, y, _ = batch
    model = tiny(1).eval()
    theirs = torchattacks.PGDL2(model, eps=0.5, alpha=0.1, steps=10, random_start=False)
    ours = attacks.pgd(model, x, attacks.cross_entropy(y), epsilon=0.5, step_size=0.1, steps=10, norm="l2", start=x)
    torch.testing.assert_close(ours, theirs(x, y), rtol=0, atol=1e-7)


def test_precision_overrides_the_autocast_around_an_attack(tiny, batch):
    x, y = batch[0].float(), batch[1]
    network, seen = tiny(1).eval().float(), []

    def model(z):
        logits = network(z)
        seen.append(torch.is_autocast_enabled("cpu"))
        return logits

    def attacked(precision, around):
        seen.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
            found = attacks.pgd(model, x, attacks.cross_entropy(y), **SETTINGS, start=x, precision=precision)
            assert torch.is_autocast_enabled("cpu") is around
        assert found.dtype == torch.float32
        return seen == SETTINGS["steps"] * [True], found

    (plain, full), (cast, half) = attacked(None, False), attacked(None, True)
    assert cast and not plain
    for around in (False, True):
        for precision, expected in (("fp32", full), ("bf16", half)):
            in_bf16, found = attacked(precision, around)
            assert in_bf16 is (precision == "bf16")
            assert torch.equal(found, expected)


OUTSIDE = torch.full((2, 3, 6, 6), 1.5)
ENTRANCES = {
    "pgd": lambda x, **s: attacks.pgd(torch.nn.Flatten(), x, lambda z, x: z.sum(1), **{**SETTINGS, **s}),
    "PGD": lambda x, **s: attacks.PGD(torch.nn.Flatten(), **{**SETTINGS, **s})(x, x, lambda z, x: z.sum(1)),
    "uniform_start": lambda x, epsilon=0.1, **s: attacks.uniform_start(x, epsilon, **s),
}


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_every_entrance_refuses_images_and_radii_outside_the_bounds(entrance):
    enter = ENTRANCES[entrance]
    inside = OUTSIDE - 1
    for x in (OUTSIDE, -OUTSIDE, torch.full_like(OUTSIDE, float("nan"))):
        with pytest.raises(ValueError, match=r"x: got values from .*accepted: pixels in \[0, 1\]"):
            enter(x)
    with pytest.raises(ValueError, match="x: got dtype torch.int64"):
        enter(inside.long())
    for value in (8, 1.001, -0.1, float("nan"), float("inf"), "8/255", True):
        with pytest.raises((ValueError, TypeError), match="epsilon: got .*accepted: a fraction of the pixel range"):
            enter(inside, epsilon=value)
    with pytest.raises(ValueError, match="norm: got 'l3'; accepted: linf, l2"):
        enter(inside, norm="l3")
    with pytest.raises(ValueError, match=r"bounds: got \(1, 0\)"):
        enter(inside, bounds=(1, 0))
    enter(255 * inside, bounds=(0, 255), epsilon=8)
    if entrance != "PGD":  # which does not know how large the images will be
        with pytest.raises(ValueError, match=r"epsilon: got 128; accepted: an l2 norm, such as 0.5, in \[0, 10.39"):
            enter(inside, norm="l2", epsilon=128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": -1}, "epsilon: got -1"),
        ({"step_size": 2}, "step_size: got 2"),
        ({"steps": -2}, "steps: got -2"),
        ({"steps": 1.5}, "steps: got 1.5"),
        ({"start": torch.zeros(1)}, r"start: got torch.float32 \(1,\) on cpu; accepted: the shape of x"),
        ({"start": 0}, "start: got 0; accepted: a Tensor"),
        ({"start": torch.zeros(4, 3, 6, 6).long()}, "start: got torch.int64"),
        ({"epsilon": None}, "epsilon: got None; accepted: a fraction of the pixel range"),
        ({"step_size": None}, "step_size: got None"),
        ({"steps": None}, "steps: got None"),
        ({"norm": ["l2"]}, "norm: got .*accepted: linf, l2"),
        ({"precision": "fp16"}, "precision: got 'fp16'; accepted: fp32, bf16"),
    ],
)
def test_bad_arguments_are_named(change, message, tiny, batch):
    x, y, _ = batch
    with pytest.raises((ValueError, TypeError), match=message):
        attacks.pgd(tiny(1), x, attacks.cross_entropy(y), **{**SETTINGS, **change})


OTHERS = {
    "labels": (
        attacks.cross_entropy,
        lambda y, net: y[:2],
        "y: got 2 class numbers for 4 images; accepted: one for each",
    ),
    "one label": (attacks.margin, lambda y, net: y[:1], "y: got 1 class numbers for 4 images"),
    "one target": (attacks.kl_from, lambda y, net: torch.zeros(1, 4), r"target_logits: got shape \(1, 4\)"),
    "no logits": (attacks.kl_from, lambda y, net: [0.0], "target_logits: got list; accepted: a tensor"),
    "a teacher of one class": (attacks.adaad, lambda y, net: lambda x: net(x)[:, :1], r"teacher: got shape \(4, 1\)"),
    "a detached teacher": (
        attacks.adaad,
        lambda y, net: torch.no_grad()(net.forward),
        "teacher: no gradient reaches x",
    ),
    "a detached teacher of differences": (
        lambda teacher: attacks.gradient_mismatch(teacher, teacher, torch.zeros(4, 3, 6, 6)),
        lambda y, net: torch.no_grad()(net.forward),
        "teacher: no gradient reaches x",
    ),
    "the differences of one image": (
        lambda net: attacks.gradient_mismatch(net, net, torch.zeros(1, 3, 6, 6)),
        lambda y, net: net,
        r"x: got shape \(1, 3, 6, 6\)",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_would_be_broadcast_or_cut_off_is_refused(name, tiny):
    objective, given, message = OTHERS[name]
    x, y, network = torch.rand(4, 3, 6, 6), torch.arange(4), tiny(1).float()
    with pytest.raises((ValueError, TypeError), match=message):
        attacks.pgd(network, x, objective(given(y, network)), **SETTINGS)


@pytest.mark.parametrize(
    ("objective", "got"),
    [
        (lambda z, x: None, "NoneType"),
        (lambda z, x: 1.0, "float"),
        (lambda z, x: (z.sum(1),), "tuple"),
        (lambda z, x: z, r"torch.float32 \(4, 4\)"),
        (lambda z, x: z.sum(), r"torch.float32 \(\)"),
        (lambda z, x: z.argmax(1), "torch.int64"),
        (lambda z, x: z.sum(1) + 0j, "torch.complex64"),
        (lambda z, x: z.sum(1).to("meta"), r"torch.float32 \(4,\) on meta"),
    ],
)
def test_an_objective_gives_a_loss_for_each_image(objective, got, tiny):
    x, network = torch.rand(4, 3, 6, 6), tiny(1).float()
    for attack in (partial(attacks.pgd, **SETTINGS), attacks.input_gradient):
        with pytest.raises((ValueError, TypeError), match=f"^objective: returned {got}.*accepted: .*losses"):
            attack(network, x, objective)
        with pytest.raises(ValueError, match="^objective: no gradient reaches the logits"):
            attack(network, x, lambda z, x: z.detach().sum(1))


IMAGES = torch.rand(4, 3, 6, 6)
IDENTITY = torch.nn.Flatten()
UNFIT = {
    "x": (None, [1.0], torch.zeros(4, 3, 6, 6).to_sparse(), IMAGES.long(), IMAGES.to(torch.float8_e4m3fn)),
    "x on meta": (IMAGES.to("meta"), torch.tensor(0.5)),
    "epsilon": (None, "a", -1, math.nan, math.inf, 1j),
    "generator": ("a", 1, torch.ones(2)),
    "norm": (None, "l3", np.ones(2)),
    "student": (None, 1),
    "teacher": (None, torch.ones(2)),
    "objective": (None, 1.5),
    "model": (None, torch.ones(2)),
    "target_logits": (None, torch.ones(2, 3).long(), torch.ones(2, 3).to_sparse()),
    "y": (None, torch.zeros(4), torch.zeros(4, dtype=torch.int64).to_sparse()),
    "modules": (None, torch.ones(2)),
}
TAKERS = {
    "uniform_start": (attacks.uniform_start, {"x": IMAGES, "epsilon": 0.1, "generator": None, "norm": "l2"}),
    "uniform_noise": (attacks.uniform_noise, {"x": IMAGES, "epsilon": 0.1, "generator": None, "norm": "linf"}),
    "gaussian_start": (attacks.gaussian_start, {"x": IMAGES, "generator": None}),
    "input_gradient": (
        attacks.input_gradient,
        {"x": IMAGES, "model": IDENTITY, "objective": lambda z, x: z.sum(1)},
    ),
    "PGD": (
        lambda x, objective: attacks.PGD(IDENTITY, **SETTINGS)(x, IMAGES, objective),
        {"x": IMAGES, "objective": lambda z, x: z.sum(1)},
    ),
    "gradient_mismatch": (
        attacks.gradient_mismatch,
        {"student": IDENTITY, "teacher": IDENTITY, "x": IMAGES},
    ),
    "adaad": (attacks.adaad, {"teacher": IDENTITY}),
    "kl_from": (attacks.kl_from, {"target_logits": torch.ones(2, 3)}),
    "cross_entropy": (attacks.cross_entropy, {"y": torch.zeros(4, dtype=torch.int64)}),
    "frozen": (lambda modules: attacks.frozen(modules).__enter__(), {"modules": IDENTITY}),
}


@pytest.mark.parametrize("taker", TAKERS)
def test_functions_of_attacks_name_what_they_cannot_take(taker):
    function, arguments = TAKERS[taker]
    function(**arguments)
    for name in arguments:
        values = UNFIT[name]
        if taker in ("uniform_start", "PGD") and name == "x":
            values += UNFIT["x on meta"]
        for value in values:
            with pytest.raises((ValueError, TypeError), match=f"^{name}: got .*accepted: "):
                function(**{**arguments, name: value})


def test_noise_is_in_the_unit_of_the_pixels():
    x = 255 * torch.rand(2, 3, 6, 6)
    for norm in ("linf", "l2"):
        start = attacks.uniform_start(x, 8, bounds=(0, 255), norm=norm)
        assert start.shape == x.shape and not torch.equal(start, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float8_e4m3fn])
def test_a_start_of_another_dtype_than_the_network_is_named(dtype, tiny):
    x, network = torch.rand(4, 3, 6, 6), tiny(1).float()
    with pytest.raises(ValueError, match=f"^start: got {dtype}.*accepted: "):
        attacks.pgd(network, x, lambda z, x: z.sum(1), **{**SETTINGS, "start": x.to(dtype)})
    with pytest.raises(ValueError, match="^start: got torch.float32.*accepted: "):
        attacks.pgd(network, x, lambda z, x: z.sum(1), **{**SETTINGS, "start": x.to("meta")})
    x_adv = attacks.pgd(network, x.half(), lambda z, x: z.sum(1), **{**SETTINGS, "start": x})
    assert x_adv.dtype == torch.float32


@pytest.mark.parametrize("other", ["student", "teacher"])
@pytest.mark.parametrize("output", [None, torch.ones(4), torch.ones(4, 4).long()])
def test_networks_of_an_objective_give_logits(other, output, tiny):
    x, network = torch.rand(4, 3, 6, 6), tiny(1).float()
    networks = {"student": network, "teacher": network, other: lambda x: output}
    with pytest.raises(ValueError, match=f"^{other}: returned .*accepted: "):
        attacks.pgd(network, x, attacks.gradient_mismatch(**networks, x=x), **SETTINGS)


def test_labels_and_targets_lie_where_the_logits_are(tiny):
    x, network = torch.rand(4, 3, 6, 6), tiny(1).float()
    y, target = torch.zeros(4, dtype=torch.int64, device="meta"), torch.zeros(4, 4, device="meta")
    for name, objective in (("y", attacks.margin(y)), ("target_logits", attacks.kl_from(target))):
        with pytest.raises(ValueError, match=f"^{name}: got a tensor on meta; accepted: "):
            attacks.pgd(network, x, objective, **SETTINGS)


def test_a_gradient_that_is_not_a_number_leaves_its_pixel_where_it_is(batch):
    x, _, _ = batch

    def network(z):
        undefined = (0 * z[:, 0, 0, 0]).sqrt()  # finite, its derivative is NaN
        return torch.stack([z.flatten(1).sum(dim=1), undefined], dim=1)

    for norm in ("linf", "l2"):
        options = {**SETTINGS, "norm": norm, "start": x}
        x_adv = attacks.pgd(network, x, lambda logits, _: logits.sum(dim=1), **options)
        assert torch.equal(x_adv[:, 0, 0, 0], x[:, 0, 0, 0])
        assert x_adv.isfinite().all() and not torch.equal(x_adv, x)
