"""The exponential moving average of a network's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..core.foreach import copy_all


class MovingAverage:
    """`network`: a copy of `source` whose parameters are moving averages; its buffers are those of `source`.

    average <- average + (1 - d) (current - average), with d = min(decay, (1 + n) / (10 + n)) after n updates: d grows,
    so that a short run is not an average with its random start. The first update copies.
    """

    def __init__(self, source: nn.Module, decay: float) -> None:
        self.network, self.decay = copy.deepcopy(source), decay
        self.updates = 0  # on the host: a step that read it from the device would wait

    @torch.no_grad()
    def update(self, source: nn.Module) -> None:
        """Moves the average towards the weights of `source`, in a few launches."""
        average: list[Tensor] = list(self.network.parameters())
        current: list[Tensor] = list(source.parameters())
        if self.updates:
            share = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_(average, current, share)
        else:
            copy_all(zip(average, current, strict=True))
        copy_all(zip(self.network.buffers(), source.buffers(), strict=True))
        self.updates += 1
