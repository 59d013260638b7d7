"""Noise-contrastive estimation against a bank, forward and backward: ours,
and gathering as CRD's formula is usually coded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastrd.kernels.runtime.aot import SHORT_NAMES
from torch import Tensor

from bench.sizes import CUDA, DEVICE, TINY, variants
from fastrd.losses.functional import class_table, nce_bank, sample_negatives, update_bank

TEMPERATURE = 0.07
K, DEPTH, ROWS, CLASSES = (64, 16, 200, 10) if TINY else (16384, 128, 50_000, 10)

BATCHES = (8,) if TINY else (64, 128, 512) if CUDA else (64,)
DTYPES = (torch.float32, torch.bfloat16) if CUDA else (torch.float32,)


class Problem:
    def __init__(self, batch: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.anchor, self.bank = (
            F.normalize(torch.randn(n, DEPTH, device=DEVICE), dim=1).to(dtype) for n in (batch, ROWS)
        )
        self.anchor.requires_grad_()
        self.labels = torch.arange(ROWS, device=DEVICE) % CLASSES
        self.classes = class_table(self.labels)
        self.positives = torch.randint(0, ROWS, (batch,), device=DEVICE)
        self.table = sample_negatives(self.classes, self.positives, K, seed=0)
        self.weight = torch.rand(batch, device=DEVICE)
        self.normalizer = torch.tensor(1.5 * ROWS, device=DEVICE)
        self.others = torch.stack([(self.labels != c).nonzero().flatten() for c in range(CLASSES)])
        self.step = torch.zeros((), dtype=torch.int64, device=DEVICE)

    def ours(self, negatives: Tensor | int | str) -> Tensor:
        self.step += 1
        return nce_bank(
            self.anchor,
            self.bank,
            self.positives,
            negatives=negatives,
            normalizer=self.normalizer,
            labels=self.classes,
            weight=self.weight,
            temperature=TEMPERATURE,
            seed=self.step,
        )

    def draw(self) -> Tensor:
        """k rows of other classes with replacement: the cheapest draw there is, from a list of each class's others."""
        column = torch.randint(0, self.others.shape[1], (len(self.anchor), K), device=DEVICE)
        return self.others[self.labels[self.positives, None], column]


def gathered(
    anchor: Tensor, bank: Tensor, positives: Tensor, table: Tensor, normalizer: Tensor, weight: Tensor
) -> Tensor:
    rows = bank[torch.cat([positives[:, None], table], dim=1)]
    score = torch.bmm(rows, anchor[:, :, None]).squeeze(2).float() / TEMPERATURE
    odds = score.exp() / normalizer
    noise = K / ROWS
    log_h = (odds[:, 0] / (odds[:, 0] + noise)).log()
    log_rest = (noise / (odds[:, 1:] + noise)).log().sum(dim=1)
    return -(weight * (log_h + log_rest)).mean()


def textbook(p: Problem, table: Tensor, function: Callable[..., Tensor]) -> Tensor:
    return function(p.anchor, p.bank, p.positives, table, p.normalizer, p.weight)


compiled = torch.compile(gathered)
VARIANTS = {
    ("table", "ours"): lambda p: p.ours(p.table),
    ("table", "eager, gathering"): lambda p: textbook(p, p.table, gathered),
    ("table", "compiled eager, gathering"): lambda p: textbook(p, p.table, compiled),
    ("drawn", "ours"): lambda p: p.ours(K),
    ("drawn", "eager, gathering"): lambda p: textbook(p, p.draw(), gathered),
    ("drawn", "compiled eager, gathering"): lambda p: textbook(p, p.draw(), compiled),
    ("all", "ours"): lambda p: p.ours("all"),
}


@pytest.mark.parametrize(("negatives", "variant"), VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_nce_bank(measure, batch, dtype, negatives, variant):
    problem = Problem(batch, dtype)
    loss = VARIANTS[negatives, variant]

    def step() -> None:
        problem.anchor.grad = None
        loss(problem).backward()

    scored = ROWS - ROWS // CLASSES if negatives == "all" else K
    measure(
        step,
        problem=f"B = {batch}, k = {K}, D = {DEPTH}, M = {ROWS}, {SHORT_NAMES[dtype]}, {negatives}",
        variant=variant,
        # Every row of the bank is somebody's negative: each read once; a product for the value, one for the gradient.
        bytes=ROWS * DEPTH * dtype.itemsize + (8 * batch * K if negatives == "table" else 4 * ROWS),
        flops=4 * batch * (scored + 1) * DEPTH,
        unit="tf32x3" if dtype == torch.float32 else "bf16",
        rounds=20 if CUDA else 7,
    )


def eager_update(bank: Tensor, rows: Tensor, values: Tensor) -> None:
    """As the published CRD code has it; which of two equal rows wins is left to the device."""
    bank.index_copy_(0, rows, F.normalize(0.5 * bank[rows] + 0.5 * values, dim=1))


UPDATES = variants(partial(update_bank, momentum=0.5, inplace=True), eager_update)


@pytest.mark.parametrize("variant", UPDATES)
def test_update_bank(measure, variant):
    problem = Problem(64, torch.float32)
    values, update = problem.anchor.detach(), UPDATES[variant]()
    measure(
        lambda: update(problem.bank, problem.positives, values),
        problem=f"update of 64 of {ROWS} rows, D = {DEPTH}, fp32",
        variant=variant,
        bytes=3 * 4 * 64 * DEPTH,
        flops=6 * 64 * DEPTH,
        rounds=50,
    )
