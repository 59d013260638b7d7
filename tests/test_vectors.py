"""The engine against single training steps recorded from the published implementations (tests/vectors)."""

from __future__ import annotations

import numpy as np
import pytest
import rounding
import torch
from torch import nn

from bench.reference import Reference
from fastrd import attacks
from fastrd.engine.step import Distiller
from fastrd.losses import ContrastiveDistillation
from fastrd.methods import ADDONS, BASES, Method
from fastrd.models import with_features
from fastrd.recipe import Attack


def network(recorded, prefix):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 10),
    )
    state = {k.removeprefix(prefix): torch.from_numpy(recorded[k]) for k in recorded if k.startswith(prefix)}
    net.load_state_dict(state)
    return net


BASE = {"ard": {}, "rslad": {"scale": 10.0}, "adaad": {}}


@pytest.mark.parametrize("name", BASE)
def test_one_published_igdm_step(name, vectors):
    recorded = dict(np.load(vectors / f"igdm-{name}-step.npz"))
    x, y, noise = (torch.from_numpy(recorded[k]) for k in ("x", "y", "noise"))
    x, noise = x.double(), noise.double()
    student, teacher = (network(recorded, prefix).double() for prefix in ("student.", "teacher."))
    networks = {
        "student": with_features(student),
        "teacher": with_features(teacher.eval().requires_grad_(False)),
    }
    igdm = ADDONS["igdm"](alpha=float(recorded["alpha"]), ramp_epochs=int(recorded["ramp_epochs"]))
    distiller = Distiller(Method(BASES[name](**BASE[name]), {"igdm": igdm}), networks, Attack())

    start = (x + noise).clamp(0, 1) if name == "ard" else x + attacks.GAUSSIAN_START * noise
    x_adv = distiller.attack(x, y, start=start)
    added = noise if name == "ard" else attacks.GAUSSIAN_START * noise
    plain = Reference(*networks.values(), name, attack_gradient="grad")
    exact = rounding.neighbours(lambda: plain.attack(x, y, added), student, teacher)
    torch.testing.assert_close(x_adv, exact[0], rtol=0, atol=1e-9)
    published = torch.from_numpy(recorded["x_adv"]).double()  # computed in float32
    rounding.assert_among(published, exact)

    # The rest from the recorded x', so that those pixels do not blur the comparison.
    losses, _ = distiller.losses(
        x,
        y,
        torch.arange(len(x)),
        published,
        epoch=int(recorded["epoch"]),
        epochs=1000,
    )
    total = sum(losses.values())
    expected = float(recorded["loss"])
    if name == "rslad":
        # The published code takes log(p + 1e-5) of the teacher's probabilities: a constant without gradient.
        p = networks["teacher"](x).softmax(1)
        expected -= 10 * (p * ((p + 1e-5) / p).log()).mean().item()
    assert total.item() == pytest.approx(expected, rel=1e-6)
    total.backward()
    for key, parameter in student.named_parameters():
        expected = torch.from_numpy(recorded[f"grad.{key}"]).double()
        scale = expected.abs().max()
        torch.testing.assert_close(
            parameter.grad / scale, expected / scale, rtol=0, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_three_published_crd_steps(vectors):
    recorded = {k: torch.from_numpy(v) for k, v in np.load(vectors / "crd.npz").items()}
    k, temperature, z_student, z_teacher, momentum = recorded["step0.params_after"].tolist()
    crd = ContrastiveDistillation(
        24,
        40,
        recorded["labels"],
        estimator="crd",
        dim=32,
        temperature=temperature,
        negatives=int(k),
        momentum=momentum,
    )
    crd.bank_student.copy_(recorded["memory_student"])
    crd.bank_teacher.copy_(recorded["memory_teacher"])
    with torch.no_grad():
        for head, side in ((crd.student_head, "s"), (crd.teacher_head, "t")):
            head.weight.copy_(recorded[f"embed_{side}.linear.weight"])
            head.bias.copy_(recorded[f"embed_{side}.linear.bias"])

    for number in range(3):
        now = {key.split(".", 1)[1]: v for key, v in recorded.items() if key.startswith(f"step{number}.")}
        # Column 0 of the recorded table is the positive.
        f_student, f_teacher = now["f_student"].requires_grad_(), now["f_teacher"].requires_grad_()
        crd.zero_grad()
        loss = crd(f_student, f_teacher, now["index"], draw=now["contrast_index"][:, 1:])
        loss.backward()
        assert loss.item() == pytest.approx(now["loss"].item(), rel=1e-5)
        assert crd.normalizers.tolist() == pytest.approx([z_student, z_teacher], rel=1e-5)
        for got, key in (
            (f_student.grad, "grad_f_student"),
            (f_teacher.grad, "grad_f_teacher"),
            (crd.student_head.weight.grad, "grad_head_student"),
            (crd.teacher_head.weight.grad, "grad_head_teacher"),
            (crd.bank_student, "memory_student_after"),
            (crd.bank_teacher, "memory_teacher_after"),
        ):
            torch.testing.assert_close(
                got, now[key], rtol=1e-4, atol=1e-6, msg=lambda m, k=f"step {number}, {key}": f"{k}: {m}"
            )
