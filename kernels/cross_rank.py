"""InfoNCE whose negatives are the candidates of every rank, in two exchanges with equal results.

"gather": all candidates on every rank, memory and traffic O(world M D); gradients come back by a reduce-scatter.
"ring": candidates travel from rank to rank, each rank holding its own and one block in transit, O(M D) whatever the
world; the next block is under way while the present one is scored. Backward sends the blocks round again, with the
gradients they have gathered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .info_nce import Pair, finish, info_nce, inverse_norms, partials, project, unit_gradients


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.shape = group, x.shape
        out = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        out = gradient.new_empty(ctx.shape)
        dist.reduce_scatter_tensor(out, gradient.contiguous(), group=ctx.group)
        return out, None


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        c: Tensor,
        positives: Tensor,
        labels: Tensor | None,
        candidate_labels: Tensor | None,
        temperature: float,
        normalize: bool,
        fused: bool,
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.options = temperature, normalize, fused, group
        a, c = a.contiguous(), c.contiguous()
        own = _pair(a, c, positives, labels, candidate_labels, temperature, normalize, fused)
        parts = []
        for pair in _blocks(own, fused, group):
            parts.append(partials(pair, fused))
        loss, lse = finish(torch.cat(parts), own, fused)
        ctx.save_for_backward(a, c, positives, labels, candidate_labels, loss, lse)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        temperature, normalize, fused, group = ctx.options
        *inputs, loss, lse = ctx.saved_tensors
        own = _pair(*inputs, temperature, normalize, fused)
        factor = upstream / temperature
        a_gradient = torch.zeros(own.a.shape, dtype=loss.dtype, device=loss.device)
        travelling = torch.zeros(own.c.shape, dtype=loss.dtype, device=loss.device)
        for step, pair in enumerate(_blocks(own, fused, group)):
            if step:
                travelling = _wait(*_send([travelling], group))[0]
            a_part, c_part = unit_gradients(pair, loss, lse, factor, fused)
            a_gradient += a_part.sum(0)
            travelling += c_part.sum(0)
        travelling = _wait(*_send([travelling], group))[0]
        return (
            project(a_gradient[None], own.a, own.a_norm, factor, normalize, fused),
            project(travelling[None], own.c, own.c_norm, None, normalize, fused),
            *(None,) * 7,
        )


def _pair(
    a: Tensor,
    c: Tensor,
    positives: Tensor,
    labels: Tensor | None,
    candidate_labels: Tensor | None,
    temperature: float,
    normalize: bool,
    fused: bool,
) -> Pair:
    norms = inverse_norms(a, normalize, fused), inverse_norms(c, normalize, fused)
    return Pair(a, c, *norms, positives, labels, candidate_labels, temperature, normalize)


def _blocks(own: Pair, fused: bool, group: dist.ProcessGroup) -> Iterator[Pair]:
    """This rank's anchors against its own candidates, then against each other rank's, which hold no positive."""
    pair = own
    nowhere = torch.full_like(own.positives, -1)
    for step in range(dist.get_world_size(group)):
        last = step + 1 == dist.get_world_size(group)
        if not last:
            block = [pair.c] if pair.c_labels is None else [pair.c, pair.c_labels]
            transfer = _send(block, group)
        yield pair
        if not last:
            c, *labels = _wait(*transfer)
            pair = own._replace(
                c=c,
                c_norm=inverse_norms(c, own.normalize, fused),
                positives=nowhere,
                c_labels=labels[0] if labels else None,
            )


def _send(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> tuple[list[Tensor], list[dist.Work]]:
    """Start sending to the next rank and receiving the same from the previous one."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    if world == 1:
        return list(tensors), []
    successor = dist.get_global_rank(group, (rank + 1) % world)
    predecessor = dist.get_global_rank(group, (rank - 1) % world)
    received = [torch.empty_like(x) for x in tensors]
    operations = [dist.P2POp(dist.isend, x.contiguous(), successor, group) for x in tensors]
    operations += [dist.P2POp(dist.irecv, x, predecessor, group) for x in received]
    return received, dist.batch_isend_irecv(operations)


def _wait(received: list[Tensor], work: list[dist.Work]) -> list[Tensor]:
    for request in work:
        request.wait()
    return received


def cross_rank_info_nce(
    anchor: Tensor,
    candidates: Tensor,
    *,
    positives: Tensor,
    labels: Tensor | None,
    candidate_labels: Tensor | None,
    temperature: float,
    normalize: bool,
    exchange: str,
    group: dist.ProcessGroup | None,
    fused: bool,
) -> Tensor:
    """Per-sample losses (N,) of this rank's anchors; see `fastrd.losses.info_nce` for the arguments."""
    group = dist.group.WORLD if group is None else group
    dtype = torch.promote_types(anchor.dtype, candidates.dtype)
    anchor, candidates = anchor.to(dtype), candidates.to(dtype)
    positives = positives.contiguous()
    if labels is not None:
        labels, candidate_labels = labels.contiguous(), candidate_labels.contiguous()
    if exchange == "ring":
        return _Ring.apply(
            anchor, candidates, positives, labels, candidate_labels, temperature, normalize, fused, group
        )
    return info_nce(
        anchor,
        _Gather.apply(candidates, group),
        positives=positives + dist.get_rank(group) * len(candidates),
        labels=labels,
        candidate_labels=None if labels is None else _Gather.apply(candidate_labels, group),
        temperature=temperature,
        normalize=normalize,
        fused=fused,
    )
