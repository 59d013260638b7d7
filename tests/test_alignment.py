"""Gradient alignment and remainder against values derived by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fastrd.core.seeding import derive_seed
from fastrd.evaluation import gradient_alignment, pointwise_distance, remainder_proportion


def linear(seed: int, classes: int = 4, size: int = 12) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(size, classes))


def gradient_by_hand(model: nn.Sequential, x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    """d CE(W x + b, y) / dx = W^T (softmax(W x + b) - onehot(y))."""
    w, b = (p.detach().double().numpy() for p in model[1].parameters())
    z = x.flatten(1).double().numpy() @ w.T + b
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(y)), y.numpy()] -= 1
    return p @ w


@pytest.fixture
def images():
    return torch.rand(10, 3, 2, 2), torch.randint(0, 4, (10,))


@pytest.mark.parametrize("batch_size", [3, 100])
def test_alignment_of_linear_models(images, batch_size):
    x, y = images
    student, teacher = linear(1), linear(2)
    a, b = gradient_by_hand(student, x, y), gradient_by_hand(teacher, x, y)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    got = gradient_alignment(student, teacher, x, y, batch_size=batch_size)
    assert got["gd"] == pytest.approx(np.linalg.norm(a - b, axis=1).mean(), rel=1e-5)
    assert got["gc"] == pytest.approx(((a * b).sum(1) / norms).mean(), rel=1e-5)
    assert got["n"] == 10 and got["zero_gradients"] == 0


def test_a_model_is_aligned_with_itself_and_opposed_to_its_negative(images):
    x, y = images
    model, negative = linear(1, classes=2), linear(1, classes=2)
    y = y % 2
    assert gradient_alignment(model, model, x, y) == pytest.approx({"gd": 0, "gc": 1, "n": 10, "zero_gradients": 0})
    with torch.no_grad():
        negative[1].weight.neg_()
    assert gradient_alignment(model, negative, x, y)["gc"] == pytest.approx(-1)


def test_tiny_gradients_have_a_direction_and_zero_ones_are_counted(images):
    x, _ = images
    student, teacher = linear(1, classes=2), linear(1, classes=2)
    with torch.no_grad():
        for p in (*student[1].parameters(), *teacher[1].parameters()):
            p.zero_()
        for model, gap in ((student, 60.0), (teacher, 0.0)):
            model[1].bias[0] = gap
            model[1].weight[0] = 1.0
    y = torch.zeros(10, dtype=torch.long)
    confident = gradient_alignment(student, teacher, x, y)
    # 1 - p rounds to 0 in float32 here, so the student has no gradient at all.
    assert confident["zero_gradients"] == 10 and confident["gc"] == 0
    with torch.no_grad():
        student[1].weight.mul_(1e-25)
        student[1].bias[0] = 0.0
    tiny = gradient_alignment(student, teacher, x, y)
    assert tiny["zero_gradients"] == 0 and tiny["gc"] == pytest.approx(1)


def test_alignment_uses_eval_mode_and_leaves_the_models_alone(images):
    x, y = images
    student = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(12, 4)).train()
    student[3].weight.grad = torch.ones_like(student[3].weight)
    state = {k: v.clone() for k, v in student.state_dict().items()}
    first = gradient_alignment(student, linear(2), x, y)
    assert first == gradient_alignment(student, linear(2), x, y, batch_size=10)
    assert student.training and student[1].training
    assert all(torch.equal(v, state[k]) for k, v in student.state_dict().items())
    assert torch.equal(student[3].weight.grad, torch.ones_like(student[3].weight))


def test_remainder_of_a_linear_model_is_zero(images):
    assert remainder_proportion(linear(1), images[0]) < 1e-6


def test_remainder_of_a_quadratic(images):
    class Quadratic(nn.Module):
        def forward(self, x):
            s = x.square().flatten(1).sum(1)
            return torch.stack([s, torch.ones_like(s)], 1)

    x = images[0]
    generator = torch.Generator().manual_seed(derive_seed(4, "remainder", 0))
    e = torch.empty_like(x).uniform_(-0.1, 0.1, generator=generator).double()
    s = (x.double() + e).square().flatten(1).sum(1)
    expected = (e.square().flatten(1).sum(1) / (s.square() + 1).sqrt()).mean().item()
    assert expected > 1e-3
    assert remainder_proportion(Quadratic(), x, epsilon=0.1, seed=4) == pytest.approx(expected, rel=1e-4)
    assert remainder_proportion(Quadratic(), x, epsilon=0.1, seed=5) != pytest.approx(expected, rel=1e-4)


def test_remainder_of_a_smooth_network_is_of_second_order(images):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 8, 2), nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten(), nn.Linear(8, 4)).train()
    wide, narrow = (remainder_proportion(model, images[0], epsilon=epsilon) for epsilon in (0.2, 0.1))
    assert wide / narrow == pytest.approx(4, rel=0.2)
    assert model.training


def test_remainder_of_the_packages_own_networks(images):
    from fastrd.models import build_model

    model = build_model("resnet8", num_classes=10)
    assert 0 < remainder_proportion(model, torch.rand(4, 3, 16, 16)) < 1


@pytest.mark.parametrize("inner", ["ce", "rslad", "adaad"])
def test_pointwise_distance(inner, images):
    x, y = images
    student, teacher = linear(1), linear(2)
    found = pointwise_distance(student, teacher, x, y, inner=inner, batch_size=4, epsilon=0.3, step_size=0.1)
    assert found["n"] == 10 and 0 < found["uniform"] < found["adversarial"] < 2**0.5
    still = pointwise_distance(student, teacher, x, y, inner=inner, epsilon=0.0, step_size=0.0)
    p_s, p_t = (model(x).detach().double().softmax(1) for model in (student, teacher))
    assert still["uniform"] == pytest.approx((p_s - p_t).norm(dim=1).mean().item(), rel=1e-6)
    assert pointwise_distance(student, student, x, y, inner=inner)["adversarial"] == 0


def test_remainder_of_a_network_with_attention():
    """The fused attentions of PyTorch cannot be differentiated twice."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            tokens = x.reshape(len(x), -1, 4)
            return self.head(self.mix(tokens, tokens, tokens, need_weights=False)[0].mean(1))

    torch.manual_seed(0)
    found = remainder_proportion(Attention(), torch.rand(5, 1, 4, 4), epsilon=0.01)
    assert 0 < found < 0.1
