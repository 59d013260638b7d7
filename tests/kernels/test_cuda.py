"""What only a GPU can show: capture into a graph, which fails at any wait for the device, and sizes beyond 2**31."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastrd.kernels.pgd_step import pgd_step
from torch import Tensor

from fastrd.losses.functional import (
    class_table,
    distillation_kl,
    fused_objective,
    gradient_matching,
    info_nce,
    nce_bank,
    update_bank,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ROWS, BATCH, DEPTH = 500, 24, 32


def _unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, device="cuda"), dim=1)


def _problems() -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Scalar losses of tensors that get gradients."""
    labels = torch.arange(BATCH, device="cuda") % 5
    bank, classes = _unit(ROWS, DEPTH), class_table(torch.arange(ROWS, device="cuda") % 5)
    table = torch.randint(-1, ROWS, (BATCH, 40), device="cuda")
    rows, ramp = torch.arange(BATCH, device="cuda"), torch.tensor(0.5, device="cuda")
    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    s, m, t, p, q = (3 * torch.randn(BATCH, 10, device="cuda") for _ in range(5))
    anchor, candidates = _unit(BATCH, DEPTH), _unit(BATCH, DEPTH)
    scored = partial(nce_bank, bank=bank, positives=rows, normalizer=600.0)

    def counted(a: Tensor) -> Tensor:
        seed.add_(1)
        return scored(a, negatives=40, labels=classes, seed=seed)

    def objective(s: Tensor, m: Tensor, c: Tensor) -> Tensor:
        contrast = partial(info_nce, anchor, c, labels=labels)
        return fused_objective(s, m, p, q, teacher=t, labels=labels, alpha=3.0, ramp=ramp, contrast=contrast).total

    return {
        "info_nce": (partial(info_nce, labels=labels), [anchor, candidates]),
        "nce_bank, table": (partial(scored, negatives=table), [anchor]),
        "nce_bank, drawn": (counted, [anchor]),
        "nce_bank, all": (partial(scored, negatives="all", labels=classes), [anchor]),
        "distillation_kl": (lambda s: distillation_kl(s, t, temperature=4.0), [s]),
        "gradient_matching": (lambda s, m: gradient_matching(s, m, p, q), [s, m]),
        "fused_objective": (objective, [s, m, candidates]),
    }


NAMES = (
    "info_nce",
    "nce_bank, table",
    "nce_bank, drawn",
    "nce_bank, all",
    "distillation_kl",
    "gradient_matching",
    "fused_objective",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_captured_and_replayed(name):
    loss, inputs = _problems()[name]
    leaves = [x.clone().requires_grad_() for x in inputs]

    def step() -> list[Tensor]:
        value = loss(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    first = [x.clone() for x in captured]
    if name == "nce_bank, drawn":
        graph.replay()
        assert not torch.equal(captured[0], first[0]), "the seed counts up inside the graph"
        return
    with torch.no_grad():
        for x in leaves:
            x.add_(0.3 * torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(captured, step())
    assert not torch.equal(captured[0], first[0])


def test_updates_and_attack_steps_are_captured():
    bank, rows, values = _unit(ROWS, DEPTH), torch.arange(BATCH, device="cuda"), _unit(BATCH, DEPTH)
    x_adv, gradient, x = torch.rand(3, 4, 3, 8, 8, device="cuda")
    options = {"step_size": 0.1, "epsilon": 0.2}
    expected = update_bank(bank, rows, values, 0.5), pgd_step(x_adv, gradient, x, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update_bank(bank, rows, values, 0.5, inplace=True)
        pgd_step(x_adv, gradient, x, **options, inplace=True)
    graph.replay()
    torch.testing.assert_close((bank, x_adv), expected)


@pytest.mark.slow
def test_offsets_beyond_31_bits():
    """Candidates of more than 2**31 numbers; the value and the last rows' gradient by their equations in float64."""
    n, m, d, temperature = 16, 1_100_000, 2048, 0.1
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    anchor = _unit(n, d).bfloat16()
    candidates = torch.randn(m, d, device="cuda", dtype=torch.bfloat16).div_(d**0.5).requires_grad_()
    positives = m - 1 - torch.arange(n, device="cuda")
    loss = info_nce(anchor, candidates, positives=positives, temperature=temperature, normalize=False, reduction="none")
    (slope,) = torch.autograd.grad(loss.sum(), candidates)
    with torch.no_grad():
        a = anchor.double()
        scores = torch.cat([a @ rows.double().T for rows in candidates.split(50_000)], dim=1) / temperature
        expected = scores.logsumexp(dim=1) - scores.gather(1, positives[:, None]).squeeze(1)
        share = scores[:, -n:].sub(scores.logsumexp(dim=1, keepdim=True)).exp()
        share -= torch.eye(n, device="cuda", dtype=torch.float64).flip(0)
        last = share.T @ a / temperature
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(slope[-n:].double(), last, rtol=2e-2, atol=2e-2 * float(last.abs().max()))


@pytest.mark.parametrize("classes", [100, 1000])
def test_sums_over_programs_repeat_bit_for_bit(classes):
    """Whichever program ends last adds up: two thousand replays of a graph, whose programs end in any order."""
    logits = [3 * torch.randn(128, classes, device="cuda") for _ in range(4)]
    labels = torch.randint(0, classes, (128,), device="cuda")
    graph = torch.cuda.CUDAGraph()
    run = partial(fused_objective, *logits, labels=labels, alpha=3.0)
    expected = run().total.clone()
    with torch.cuda.graph(graph):
        total = run().total
    seen = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(2000):
        graph.replay()
        seen += total != expected
    assert seen.item() == 0
