"""Negatives from every rank: two gloo processes against one process that holds everything."""

from __future__ import annotations

import socket
from functools import partial
from pathlib import Path

import mutants
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fastrd.kernels import cross_rank, reference

from fastrd.losses.functional import info_nce

WORLD, N, M, D = 2, 5, 9, 6
CASES = {
    "plain": {},
    "labels": {"labelled": True},
    "raw rows, own positives": {"normalize": False, "positives": True},
}


def _problem(case: dict) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Both sides and what goes with them, rank by rank."""
    generator = torch.Generator().manual_seed(5)
    a = torch.randn(WORLD, N, D, generator=generator, dtype=torch.float64)
    c = torch.randn(WORLD, M, D, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (WORLD, N), generator=generator)
    others = torch.randint(0, 3, (WORLD, M), generator=generator)
    given = {"labels": labels, "candidate_labels": others} if case.get("labelled") else {}
    if case.get("positives"):
        given["positives"] = torch.randint(0, M, (WORLD, N), generator=generator)
    return a, c, given | {"weight": torch.rand(WORLD, N, generator=generator, dtype=torch.float64)}


MUTATIONS = {
    "gather: positives are of rank 0": ("positives + dist.get_rank(group) * len(candidates)", "positives"),
    "gather: gradients of other ranks are lost": (
        "dist.reduce_scatter_tensor(out, gradient.contiguous(), group=ctx.group)",
        "out.copy_(gradient.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)])",
    ),
    "ring: only the own candidates count": (
        "[module.partials(pair) for pair in _blocks(own, group)]",
        "[module.partials(pair) for pair in _blocks(own, group)][:1]",
    ),
    "ring: a block travels without its classes": ("labels[0] if labels else None", "own.c_labels"),
    "ring: norms stay behind": ("c_norm=inverse_norms(c, own.normalize, own.fused)", "c_norm=pair.c_norm"),
    "ring: other ranks' candidates are positives": ("positives=nowhere", "positives=own.positives"),
    "ring: gradients do not add up": ("travelling += c_part.sum(0)", "travelling = c_part.sum(0)"),
    "ring: gradients do not come home": (
        "travelling = _wait(*_send([travelling], ctx.group))[0]\n            gradients",
        "gradients",
    ),
}


def _worker(rank: int, port: int, sources: dict, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    out = {None: _losses(rank)}
    for name, path in sources.items():
        cross_rank.cross_rank_info_nce = mutants.load(path).cross_rank_info_nce
        out[name] = _losses(rank)
    dist.destroy_process_group()
    torch.save(out, folder / f"{rank}.pt")


def _losses(rank: int) -> dict:
    """(loss, gradients of both sides) by case and exchange."""
    out = {}
    for name, case in CASES.items():
        a, c, given = _problem(case)
        for exchange in ("gather", "ring"):
            anchor, candidates = a[rank].clone().requires_grad_(), c[rank].clone().requires_grad_()
            loss = info_nce(
                anchor,
                candidates,
                **{name: x[rank] for name, x in given.items()},
                temperature=0.4,
                normalize=case.get("normalize", True),
                exchange=exchange,
            )
            (3 * loss).backward()
            out[name, exchange] = [x.detach().tolist() for x in (loss, anchor.grad, candidates.grad)]
    return out


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> dict:
    """By rank and mutation (None: sound), what `_losses` gives; the processes start once for all."""
    sources = {}
    for number, (name, (old, new)) in enumerate(MUTATIONS.items()):
        path = mutants.write(cross_rank, old, new, tmp_path_factory.mktemp("mutant"))
        sources[name] = path.rename(path.with_name(f"{path.stem}_{number}.py"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_worker, (port, sources, folder), nprocs=WORLD)
    return {rank: torch.load(folder / f"{rank}.pt") for rank in range(WORLD)}


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_agree_with_one_process(ranks, case, exchange):
    _check(ranks, None, case, exchange)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_planted_bugs_are_caught(ranks, mutation):
    exchange = mutation.partition(":")[0]
    mutants.assert_caught(partial(_check, ranks, mutation, case, exchange) for case in CASES)


def _check(ranks: dict, mutation: str | None, case: str, exchange: str) -> None:
    a, c, given = _problem(CASES[case])
    a.requires_grad_()
    c.requires_grad_()
    own = given.pop("positives", torch.arange(N).expand(WORLD, N))
    everywhere = (own + M * torch.arange(WORLD)[:, None]).flatten()
    per_sample = reference.info_nce(
        a.flatten(0, 1),
        c.flatten(0, 1),
        positives=everywhere,
        **{name: x.flatten() for name, x in given.items()},
        temperature=0.4,
        normalize=CASES[case].get("normalize", True),
        reduction="none",
    )
    losses = per_sample.reshape(WORLD, N).mean(dim=1)
    (3 * losses).sum().backward()
    for rank in range(WORLD):
        expected = (losses[rank], a.grad[rank], c.grad[rank])
        for actual, wanted in zip(ranks[rank][mutation][case, exchange], expected, strict=True):
            torch.testing.assert_close(torch.tensor(actual, dtype=torch.float64), wanted.detach())


def test_one_rank_is_the_plain_loss_also_under_autocast(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        anchor, candidates = torch.randn(4, 3, requires_grad=True), torch.randn(6, 3, requires_grad=True)
        plain = torch.autograd.grad(info_nce(anchor, candidates), (anchor, candidates))
        for exchange in ("gather", "ring"):
            loss = info_nce(anchor, candidates, exchange=exchange)
            torch.testing.assert_close(torch.autograd.grad(loss, (anchor, candidates)), plain)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                under = info_nce(anchor, candidates, exchange=exchange)
                slopes = torch.autograd.grad(under, (anchor, candidates))
            torch.testing.assert_close(under, loss)
            if exchange == "ring":
                torch.testing.assert_close(slopes, plain)
    finally:
        dist.destroy_process_group()
