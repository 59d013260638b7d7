"""InfoNCE, forward and backward: ours, the textbook form, torch.compile of it, and public peers where installed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fastrd.kernels import reference
from torch import Tensor

from bench.sizes import CUDA, DEVICE, TINY, variants
from fastrd.losses.functional import info_nce

TEMPERATURE = 0.07

VIEWS = "N = 1024 pairs of views, D = 128, fp32"
"""NT-Xent: each of the 2 N views against all others, its own hidden; four times the products of N = M = 1024."""

# name: N, M, D, dtype, classes (0: no mask)
PROBLEMS = {
    "N = M = 8192, D = 128, fp32": (8192, 8192, 128, torch.float32, 0),
    "N = M = 8192, D = 128, fp32, 10 classes": (8192, 8192, 128, torch.float32, 10),
    "N = M = 1024, D = 128, fp32": (1024, 1024, 128, torch.float32, 0),
    "N = M = 128, D = 128, fp32": (128, 128, 128, torch.float32, 0),
    VIEWS: (1024, 1024, 128, torch.float32, 0),
}
if CUDA:
    PROBLEMS |= {
        "N = M = 32768, D = 128, bf16": (32768, 32768, 128, torch.bfloat16, 0),
        "N = M = 32768, D = 128, bf16, 100 classes": (32768, 32768, 128, torch.bfloat16, 100),
        "N = M = 32768, D = 128, fp32": (32768, 32768, 128, torch.float32, 0),
        "N = M = 8192, D = 2048, bf16": (8192, 8192, 2048, torch.bfloat16, 0),
        "N = 128, M = 50000, D = 128, bf16": (128, 50000, 128, torch.bfloat16, 0),
    }
if TINY:
    PROBLEMS = {"N = M = 32, D = 16, fp32": (32, 32, 16, torch.float32, 0)}


Loss = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


def ours(a: Tensor, c: Tensor, labels: Tensor | None, others: Tensor | None, **options: Tensor) -> Tensor:
    return info_nce(a, c, labels=labels, candidate_labels=others, temperature=TEMPERATURE, **options)


def eager(a: Tensor, c: Tensor, labels: Tensor | None, others: Tensor | None, **options: Tensor) -> Tensor:
    return reference.info_nce(a, c, labels=labels, candidate_labels=others, temperature=TEMPERATURE, **options)


def of_views(loss: Callable[..., Tensor]) -> Loss:
    """NT-Xent by a loss that hides candidates of the anchor's label: every view has a label of its own."""

    def symmetric(a: Tensor, c: Tensor, *_: Tensor | None) -> Tensor:
        views = torch.cat([a, c])
        place = torch.arange(len(views), device=views.device)
        return loss(views, views, place, place, positives=place.roll(len(a)))

    return symmetric


def metric_learning() -> Loss:
    peer = pytest.importorskip("pytorch_metric_learning.losses").NTXentLoss(temperature=TEMPERATURE)

    def loss(a: Tensor, c: Tensor, *_: Tensor | None) -> Tensor:
        index = torch.arange(len(a), device=a.device)
        # A clone: of one tensor given twice the package leaves out the diagonal, which are the positives.
        return peer(a, index, ref_emb=c, ref_labels=index.clone())

    return loss


def lightly() -> Loss:
    peer = pytest.importorskip("lightly.loss.ntx_ent_loss").NTXentLoss(temperature=TEMPERATURE)
    return lambda a, c, labels, others: peer(a, c)


def inf_cl() -> Loss:
    if not CUDA:
        pytest.skip("inf-cl runs on CUDA only")
    flash = pytest.importorskip("inf_cl").cal_flash_loss

    def loss(a: Tensor, c: Tensor, *_: Tensor | None) -> Tensor:
        unit = torch.nn.functional.normalize
        scale = torch.tensor(1 / TEMPERATURE, device=a.device)
        return flash(unit(a, dim=1), unit(c, dim=1), scale=scale).mean()

    return loss


PEERS = {"inf-cl": inf_cl, "pytorch-metric-learning": metric_learning, "lightly": lightly}
VARIANTS = variants(ours, eager) | PEERS


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_info_nce(measure, problem, variant):
    n, m, d, dtype, classes = PROBLEMS[problem]
    if variant in PEERS and (classes or n != m):
        pytest.skip(f"{variant} has no class mask beside the positive, or wants N = M")
    if variant != "lightly" and variant in PEERS and problem == VIEWS:
        pytest.skip(f"{variant} has the loss of one side")
    if variant == "lightly" and problem != VIEWS:
        pytest.skip("lightly has the loss of both sides alone")
    if variant == "pytorch-metric-learning" and n > 128:
        pytest.skip("it lists all N^2 (N - 1) triplets: gigabytes at this size")
    torch.manual_seed(0)
    a, c = (torch.randn(rows, d, device=DEVICE).to(dtype).requires_grad_() for rows in (n, m))
    labels, others = (torch.randint(0, classes, (rows,), device=DEVICE) if classes else None for rows in (n, m))
    loss = VARIANTS[variant]()
    expected = eager
    if problem == VIEWS:
        expected = of_views(eager)
        loss = loss if variant in PEERS else of_views(loss)
    if variant in PEERS:  # or the times are of different work
        torch.testing.assert_close(
            loss(a, c, None, None), expected(a, c, None, None), rtol=1e-2, atol=1e-3, check_dtype=False
        )

    def step() -> None:
        a.grad = c.grad = None
        loss(a, c, labels, others).backward()

    measure(
        step,
        problem=problem,
        variant=variant,
        # Each input read and each gradient written once; scores for the value, again for the gradient, two products.
        bytes=2 * (n + m) * d * dtype.itemsize,
        flops=8 * n * m * d * (4 if problem == VIEWS else 1),
        rounds=5 if n * m > 1 << 21 else 51,
        unit="tf32x3" if dtype == torch.float32 else "bf16",
    )
