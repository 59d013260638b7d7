"""The logits side of a step, forward and backward: ours in one launch, the textbook form, torch.compile of it,
a peer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fastrd.kernels import reference
from torch import Tensor

from bench.sizes import CUDA, DEVICE, variants
from fastrd.losses.functional import distillation_kl, fused_objective

BATCH = 128
ALPHA, RAMP, TEMPERATURE = 10.0, 0.5, 4.0


def ours(s: Tensor, m: Tensor, t: Tensor, plus: Tensor, minus: Tensor, labels: Tensor) -> Tensor:
    """Base KL, difference KL and the samples' weights, which the base is weighed by."""
    options = {"alpha": ALPHA, "ramp": RAMP, "temperature": TEMPERATURE, "reweight": ("base",)}
    return fused_objective(s, m, plus, minus, teacher=t, labels=labels, **options).total


def eager(s: Tensor, m: Tensor, t: Tensor, plus: Tensor, minus: Tensor, labels: Tensor) -> Tensor:
    weight = plus.softmax(dim=1).gather(1, labels[:, None]).squeeze(1)
    base = reference.distillation_kl(s, t, temperature=TEMPERATURE, weight=weight)
    return base + ALPHA * RAMP * reference.gradient_matching(s, m, plus, minus)


def liger() -> Callable[..., Tensor]:
    if not CUDA:
        pytest.skip("liger-kernel runs on GPUs only")
    peer = pytest.importorskip("liger_kernel.transformers.kl_div").LigerKLDIVLoss(log_target=True)

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return peer(s.log_softmax(dim=1), t.log_softmax(dim=1))

    return loss


OBJECTIVES = variants(ours, eager)
DIVERGENCES = variants(distillation_kl, reference.distillation_kl) | {"liger-kernel": liger}


def logits(classes: int, count: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [3 * torch.randn(BATCH, classes, device=DEVICE) for _ in range(count)]


@pytest.mark.parametrize("variant", OBJECTIVES)
@pytest.mark.parametrize("classes", [10, 100, 200, 1000])
def test_objective(measure, classes, variant):
    s, m, t, plus, minus = logits(classes, 5)
    labels = torch.randint(0, classes, (BATCH,), device=DEVICE)
    loss = OBJECTIVES[variant]()
    s.requires_grad_(), m.requires_grad_()

    def step() -> None:
        s.grad = m.grad = None
        loss(s, m, t, plus, minus, labels).backward()

    measure(
        step,
        problem=f"base KL + difference KL + weights, B = {BATCH}, C = {classes}, fp32",
        variant=variant,
        replay=variant == "ours",
        bytes=7 * 4 * BATCH * classes,
        flops=60 * BATCH * classes,
        rounds=200,
    )


@pytest.mark.parametrize("variant", DIVERGENCES)
@pytest.mark.parametrize("classes", [100, 1000])
def test_distillation_kl(measure, classes, variant):
    s, t = logits(classes, 2)
    loss = DIVERGENCES[variant]()
    s.requires_grad_()

    def step() -> None:
        s.grad = None
        loss(s, t).backward()

    measure(
        step,
        problem=f"KL, B = {BATCH}, C = {classes}, fp32",
        variant=variant,
        replay=variant == "ours",
        bytes=3 * 4 * BATCH * classes,
        flops=20 * BATCH * classes,
        rounds=200,
    )
