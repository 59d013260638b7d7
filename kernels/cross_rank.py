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

from .info_nce import Pair, form, info_nce, inverse_norms, pair_of


def gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """x (n, ...) of every rank, one after the other; differentiable once: a rank gets the sum of its gradients."""
    return _Gather.apply(x, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.shape = group, x.shape
        out = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        out = gradient.new_empty(ctx.shape)
        dist.reduce_scatter_tensor(out, gradient.contiguous(), group=ctx.group)
        return out, None


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *arguments: Any) -> Tensor:
        """arguments: those of `pair_of`."""
        with torch.autocast(arguments[0].device.type, enabled=False):
            own = pair_of(*arguments)
            module = form(own.fused)
            loss, lse = module.finish(torch.cat([module.partials(pair) for pair in _blocks(own, group)]), own)
        ctx.group, ctx.options = group, own[7:]
        ctx.save_for_backward(*own[:7], loss, lse)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        *operands, loss, lse = ctx.saved_tensors
        own = Pair(*operands, *ctx.options)
        factor, module = upstream / own.temperature, form(own.fused)
        with torch.autocast(upstream.device.type, enabled=False):
            a_sum, travelling = (torch.zeros_like(x, dtype=loss.dtype) for x in (own.a, own.c))
            for step, pair in enumerate(_blocks(own, ctx.group)):
                if step:
                    travelling = _wait(*_send([travelling], ctx.group))[0]
                a_part, c_part = module.unit_gradients(pair, loss, lse, factor)
                a_sum += a_part.sum(0)
                travelling += c_part.sum(0)
            travelling = _wait(*_send([travelling], ctx.group))[0]
            gradients = (
                module.project(own, a_sum[None], factor),
                module.project(own, travelling[None], None),
            )
        return None, *gradients, *(None,) * 6


def _blocks(own: Pair, group: dist.ProcessGroup) -> Iterator[Pair]:
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
                c_norm=inverse_norms(c, own.normalize, own.fused),
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
    if exchange == "ring":
        keys = (None if x is None else x.contiguous() for x in (positives, labels, candidate_labels))
        return _Ring.apply(group, anchor.contiguous(), candidates.contiguous(), *keys, temperature, normalize, fused)
    return info_nce(
        anchor,
        gather(candidates, group),
        positives=positives + dist.get_rank(group) * len(candidates),
        labels=labels,
        candidate_labels=None if labels is None or candidate_labels is None else gather(candidate_labels, group),
        temperature=temperature,
        normalize=normalize,
        fused=fused,
    )
