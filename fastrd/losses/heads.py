"""Projection heads, initialised from the run's seed without touching the global random state."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..core.seeding import derive_seed


def linear_head(source: int, target: int, seed: int, name: str) -> nn.Linear:
    """Returns nn.Linear(source, target) with PyTorch's default initialisation, U(-1/sqrt(source), 1/sqrt(source)).

    Its weights, float32, depend on `seed` and `name` alone, so a head of one method moves no noise and no weight of
    another.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "head", name))
    head = nn.Linear(source, target, device="meta", dtype=torch.float32).to_empty(device="cpu")
    bound = 1 / math.sqrt(source)
    for parameter in head.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return head
