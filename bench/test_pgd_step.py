"""One PGD step on a batch of CIFAR images: ours, the textbook form, torch.compile of it."""

from __future__ import annotations

import pytest
import torch
from fastrd.kernels import reference
from fastrd.kernels.pgd_step import pgd_step

from bench.sizes import DEVICE, variants

STEP = {"step_size": 2 / 255, "epsilon": 8 / 255}
VARIANTS = variants(
    lambda *images: pgd_step(*images, **STEP, inplace=True), lambda *images: reference.pgd_step(*images, **STEP)
)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", [128, 1024])
def test_pgd_step(measure, batch, variant):
    images = [torch.rand(batch, 3, 32, 32, device=DEVICE) for _ in range(3)]
    images[1] -= 0.5
    step = VARIANTS[variant]()
    measure(
        lambda: step(*images),
        problem=f"PGD step, {batch} x 3 x 32 x 32, fp32",
        variant=variant,
        replay=variant == "ours",
        bytes=4 * 4 * images[0].numel(),
        flops=8 * images[0].numel(),
        rounds=50,
    )
