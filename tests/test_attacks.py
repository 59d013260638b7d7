"""The PGD loop and every inner objective against the formula, written out."""

from __future__ import annotations

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
    assert (ours - x).abs().max() <= 8 / 255 + 1e-12 and 0 <= ours.min() and ours.max() <= 1
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
    same = attacks.pgd(
        None, x, None, epsilon=0.1, step_size=0, steps=0, generator=torch.Generator().manual_seed(1)
    )
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": -1}, "epsilon: got -1"),
        ({"steps": -2}, "steps: got -2"),
        ({"start": torch.zeros(1)}, "start: got shape"),
    ],
)
def test_bad_arguments_are_named(change, message, tiny, batch):
    x, y, _ = batch
    with pytest.raises(ValueError, match=message):
        attacks.pgd(tiny(1), x, attacks.cross_entropy(y), **{**SETTINGS, **change})


def test_integer_images_are_refused(tiny):
    with pytest.raises(ValueError, match="x: got dtype torch.uint8"):
        attacks.pgd(tiny(1), torch.zeros(1, 3, 6, 6, dtype=torch.uint8), None, **SETTINGS)
