"""Projection heads, initialised from the run's seed without touching the global random state."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..core.seeding import derive_seed
from .base import Setup


def linear_head(source: int, target: int, setup: Setup, name: str) -> nn.Linear:
    """nn.Linear(source, target) with PyTorch's default initialisation, U(-1/sqrt(source), 1/sqrt(source)), seeded.

    Adding a head to a method must not move the noise or the initial weights of anything else.
    """
    generator = torch.Generator().manual_seed(derive_seed(setup.seed, "head", name))
    head = nn.Linear(source, target, device="meta").to_empty(device="cpu")
    bound = 1 / math.sqrt(source)
    for parameter in head.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return head.to(setup.device)
