"""One run in several processes started by `torchrun`: each trains on its share of every batch, all hold one state.

Gradients are averaged after the backward pass instead of during it (as DistributedDataParallel would): a step of
adversarial training is mostly attack, which needs no communication, so there is next to nothing to overlap with, and
a step that runs the student several times needs no care.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..evaluation import Share
from ..kernels.cross_rank import gather

TIMEOUT = timedelta(hours=1)  # the other processes wait while the first validates and saves


class World(Share):
    """Which of how many processes this is."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def mean(self, tensor: Tensor) -> Tensor:
        """Takes the mean over processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor /= self.size
        return tensor

    def any(self, flag: bool, device: torch.device) -> bool:
        """Returns whether the flag is up in some process."""
        return bool(self.mean(torch.tensor(float(flag), device=device))) if self.size > 1 else flag

    def gather(self, rows: Tensor) -> Tensor:
        """This process's rows (n, ...) -> those of the whole batch (n size, ...), in its order, differentiable.

        A loss of the gathered rows must be computed by every process; averaged over processes, its gradients are then
        those of the whole batch.
        """
        if self.size == 1:
            return rows
        by_process = gather(rows, dist.group.WORLD).unflatten(0, (self.size, -1))
        return by_process.transpose(0, 1).flatten(0, 1)  # process r has rows r, r + size, ... of the batch

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    @torch.no_grad()
    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by its mean over processes; one message for each dtype."""
        if self.size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
        for tensor in tensors:
            by_dtype[tensor.dtype].append(tensor)
        for group in by_dtype.values():
            flat = self.mean(torch.cat([tensor.reshape(-1) for tensor in group]))
            for tensor, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
                tensor.copy_(part.view_as(tensor))


ALONE = World()


def is_main_process() -> bool:
    """Returns whether this is the main process, before and after the processes have joined."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[World, torch.device]]:
    """Yields the processes that `torchrun` set up, or this one alone, and the device of this one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield ALONE, device
        return
    local = int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    starts_group = not dist.is_initialized()
    if starts_group:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield World(dist.get_rank(), dist.get_world_size()), device
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):  # gloo's errors have no type of their own
            raise
        problem = "another process of this run ended or cannot be reached, and says why where it can"
        raise ConnectionError(f"{problem}; the same command goes on, a training with --resume") from None
    finally:
        if starts_group:
            dist.destroy_process_group()


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation by the statistics of all processes' samples, on any device (torch's own is for GPUs only).

    Every process must hold equally many samples.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = _MeanOverProcesses.apply(wide.mean((0, 2, 3)))
        centred = wide - mean[:, None, None]
        variance = _MeanOverProcesses.apply(centred.square().mean((0, 2, 3)))
        steps, average, spread = self.num_batches_tracked, self.running_mean, self.running_var
        if steps is not None and average is not None and spread is not None:
            with torch.no_grad():
                steps += 1
                share = 1 / float(steps) if self.momentum is None else self.momentum
                count = dist.get_world_size() * x.numel() / x.shape[1]
                average.lerp_(mean.to(average.dtype), share)
                unbiased = variance * (count / (count - 1))
                spread.lerp_(unbiased.to(spread.dtype), share)
        out = centred * torch.rsqrt(variance + self.eps)[:, None, None]
        if self.affine:
            out = out * self.weight[:, None, None] + self.bias[:, None, None]
        return out.to(x.dtype)


def _mean(value: Tensor) -> Tensor:
    return World(size=dist.get_world_size()).mean(value.clone())


class _MeanOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        return _mean(value)

    # Every process's loss depends on the mean, so the gradient is the mean of all of theirs.
    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _mean(gradient)


def synchronised(network: nn.Module) -> nn.Module:
    """Makes every BatchNorm2d of `network` normalise over all processes, in place; returns the network."""
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d  # nothing but the forward pass differs
    return network
