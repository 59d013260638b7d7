"""What float32 decides, found in float64: the reason for which two float32 results may differ.

Machines sum in other orders, with other instructions and other numbers of threads, so float32 results are equal up
to rounding only, and a sign or a ReLU within rounding of zero may fall to either side. How often depends on the
machine; where it can happen does not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

PAIRS = 6
UNIT = 2.0**-24


def neighbours(function: Callable[[], Tensor], *networks: nn.Module, pairs: int = PAIRS) -> Tensor:
    """`function()` for float64 `networks` as they are, then for networks within float32 rounding of them, stacked.

    A float32 sum of n products is the exact sum for factors that differ by at most n 2^-24 of their size (Higham
    2002, section 3.1). So every number that a layer reads changes by 2 n 2^-24, for the sum and for the one in its
    gradient, n being the longest of all, with random signs, anew in each call. Changes come in opposite pairs: a number
    within rounding of a threshold is on the other side of it in one of nearly every pair.
    """
    layers = [module for network in networks for module in network.modules() if hasattr(module, "weight")]
    reach = 2 * UNIT * max(map(_longest_sum, layers))
    results = [function()]
    for pair in range(pairs):
        for direction in (reach, -reach):
            generator = torch.Generator().manual_seed(pair)

            def change(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                x, *rest = inputs
                signs = torch.randint(0, 2, x.shape, generator=generator) * 2 - 1  # noqa: B023
                return (x + x * signs * direction, *rest)  # noqa: B023

            hooks = [layer.register_forward_pre_hook(change) for layer in layers]
            try:
                results.append(function())
            finally:
                for hook in hooks:
                    hook.remove()
    return torch.stack(results)


def decided(results: Tensor) -> Tensor:
    """Where all `neighbours` agree: a mask over one result. Fails where they agree on less than half of it."""
    same = (results - results[0]).abs().amax(dim=0) <= 1e-9
    assert same.double().mean() > 0.5, f"rounding leaves {same.double().mean():.1%} decided"
    return same


def spread(results: Tensor) -> Tensor:
    """How far rounding moves a result, as the largest distance of a neighbour: a number."""
    return (results[1:] - results[0]).flatten(1).norm(dim=1).max()


def _longest_sum(layer: nn.Module) -> int:
    """Of products, in the layer (a row of its weights) or in the gradient for what it reads (a column)."""
    weight = layer.weight
    return max(weight[0].numel(), weight.numel() // weight.shape[1]) if weight.ndim > 1 else 1
