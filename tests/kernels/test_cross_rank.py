"""Negatives from every rank: two gloo processes against one process that holds everything."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fastrd.kernels import reference

from fastrd.losses import info_nce

WORLD, N, M, D = 2, 5, 9, 6
CASES = {
    "plain": {},
    "labels": {"labelled": True},
    "raw rows, own positives": {"normalize": False, "positives": True},
}


def _problem(case: dict) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    a = torch.randn(WORLD, N, D, generator=generator, dtype=torch.float64)
    c = torch.randn(WORLD, M, D, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (WORLD, N), generator=generator)
    others = torch.randint(0, 3, (WORLD, M), generator=generator)
    positives = torch.randint(0, M, (WORLD, N), generator=generator) if case.get("positives") else None
    weight = torch.rand(WORLD, N, generator=generator, dtype=torch.float64)
    return a, c, labels, others, positives, weight


def _worker(rank: int, port: int, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    out = {}
    for name, case in CASES.items():
        a, c, labels, others, positives, weight = _problem(case)
        for exchange in ("gather", "ring"):
            anchor, candidates = a[rank].clone().requires_grad_(), c[rank].clone().requires_grad_()
            loss = info_nce(
                anchor,
                candidates,
                positives=None if positives is None else positives[rank],
                labels=labels[rank] if case.get("labelled") else None,
                candidate_labels=others[rank] if case.get("labelled") else None,
                weight=weight[rank],
                temperature=0.4,
                normalize=case.get("normalize", True),
                exchange=exchange,
            )
            (3 * loss).backward()
            out[name, exchange] = [x.detach().tolist() for x in (loss, anchor.grad, candidates.grad)]
    dist.destroy_process_group()
    results.put((rank, out))


@pytest.fixture(scope="module")
def ranks() -> dict:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    mp.spawn(_worker, (port, results), nprocs=WORLD)
    return dict(results.get() for _ in range(WORLD))


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_agree_with_one_process(ranks, case, exchange):
    options = CASES[case]
    a, c, labels, others, positives, weight = _problem(options)
    a.requires_grad_()
    c.requires_grad_()
    own = torch.arange(N).expand(WORLD, N) if positives is None else positives
    everywhere = (own + M * torch.arange(WORLD)[:, None]).flatten()
    per_sample = reference.info_nce(
        a.flatten(0, 1),
        c.flatten(0, 1),
        positives=everywhere,
        labels=labels.flatten() if options.get("labelled") else None,
        candidate_labels=others.flatten() if options.get("labelled") else None,
        weight=weight.flatten(),
        temperature=0.4,
        normalize=options.get("normalize", True),
        reduction="none",
    )
    losses = per_sample.reshape(WORLD, N).mean(dim=1)
    (3 * losses).sum().backward()
    for rank in range(WORLD):
        expected = (losses[rank], a.grad[rank], c.grad[rank])
        for actual, wanted in zip(ranks[rank][case, exchange], expected, strict=True):
            torch.testing.assert_close(torch.tensor(actual, dtype=torch.float64), wanted.detach())


def test_one_rank_is_the_plain_loss(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        anchor, candidates = torch.randn(4, 3, requires_grad=True), torch.randn(6, 3, requires_grad=True)
        plain = torch.autograd.grad(info_nce(anchor, candidates), (anchor, candidates))
        for exchange in ("gather", "ring"):
            loss = info_nce(anchor, candidates, exchange=exchange)
            for ours, expected in zip(torch.autograd.grad(loss, (anchor, candidates)), plain, strict=True):
                torch.testing.assert_close(ours, expected)
    finally:
        dist.destroy_process_group()
