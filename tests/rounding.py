"""What float32 decides, found in float64: the reason for which two float32 results may differ, and by how much.

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
APPROXIMATE = 2.0**-22
"""Largest error of a GPU's ex2.approx and lg2.approx, 2 units in the last place (PTX ISA, sections on ex2 and lg2)."""
VISIBLE = 17.0
"""e^-17 < UNIT: what is smaller is lost beside the 1 that a softmax or a softplus adds it to."""


def kernel_tolerance(reach: float, score: float = 0.0) -> float:
    """Returns how far a float32 kernel may be from the exact result, as a fraction of its largest element.

    The interpreter of Triton has exact functions and products; a GPU has not. In units of APPROXIMATE:

    - e^x is ex2.approx(x log2 e): 1 for the function. The constant and the product are each rounded by 1/4 of a unit,
      and an absolute error of the argument is a relative one of the result: |x| / 2.
    - log y is lg2.approx(y) ln 2: 1 where y is near 1, elsewhere |log y|.
    - A product in tf32x3 is that of a_hi + a_lo and b_hi + b_lo, of 11 bits each: 1 for a_lo b_lo, which is left out,
      and 1 each for the bits that a_lo and b_lo lack. That is 3 of the score, and of each product in a gradient.

    Args:
        reach: largest |x| of e^x and |log y|; above VISIBLE it no longer matters.
        score: largest sum of |a b| that makes an x by a matrix product; 0 where there is none.
    """
    functions = 2 + 1.5 * min(reach, VISIBLE)
    products = 3 * (1 + score) if score else 0
    return APPROXIMATE * (functions + products)


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


def assert_among(found: Tensor, results: Tensor) -> None:
    """Fails unless a float32 result is like one more of the `neighbours`.

    It may differ from what all of them agree on in no more numbers than one of them from what all others agree on:
    few neighbours do not find each number that rounding decides. They must agree on more than half.
    """
    same = _agreed(results)
    assert same.double().mean() > 0.5, f"rounding leaves {same.double().mean():.1%} decided"
    unlike = []
    for i in range(1, len(results)):
        others = torch.cat([results[:i], results[i + 1 :]])
        unlike.append(int(((results[i] - others[0]).abs() > 1e-9)[_agreed(others)].sum()))
    differing = int(((found.double() - results[0]).abs() > 1e-6)[same].sum())
    assert differing <= max(unlike), f"{differing} of {int(same.sum())} numbers that rounding does not decide differ"


def _agreed(results: Tensor) -> Tensor:
    return (results - results[0]).abs().amax(dim=0) <= 1e-9


def spread(results: Tensor) -> Tensor:
    """How far rounding moves a result, as the largest distance of a neighbour: a number."""
    return (results[1:] - results[0]).flatten(1).norm(dim=1).max()


def _longest_sum(layer: nn.Module) -> int:
    """Of products, in the layer (a row of its weights) or in the gradient for what it reads (a column)."""
    weight = layer.weight
    return max(weight[0].numel(), weight.numel() // weight.shape[1]) if weight.ndim > 1 else 1
