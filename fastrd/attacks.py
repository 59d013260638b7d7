"""Inner maximisation: one l-infinity PGD loop for any objective, and the objectives of the field.

An objective is `objective(logits, x_adv) -> (N,) losses` to be maximised, where `logits` are the attacked model's
outputs at `x_adv`. It may run other networks on `x_adv`: the gradient then flows through them too (AdaAD).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .divergence import kl, log_softmax

Objective = Callable[[Tensor, Tensor], Tensor]

GAUSSIAN_START = 1e-3  # standard deviation of the start noise of TRADES, RSLAD and AdaAD, in pixels of [0, 1]


def pgd(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    objective: Objective,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Projected gradient ascent on the sign of the input gradient (Madry et al. 2018, Eq. 2.1 with l-infinity).

    Each step: `x <- clamp(min(max(x + step_size * sign(g), x0 - epsilon), x0 + epsilon), *bounds)` with `g` the
    gradient of the SUM over the batch of `objective(model(x), x)`.

    Args:
        model: (N, C, H, W) -> logits (N, classes). Used in the mode it is in: call `.eval()` first for frozen BN.
            Parameter gradients are neither computed nor touched.
        x: clean images (N, C, H, W), floating point, in `bounds`.
        objective: per-sample losses (N,) to maximise, see the module docstring.
        epsilon, step_size: fractions of the pixel range, e.g. 8/255 and 2/255.
        steps: number of ascent steps; 0 returns the start.
        start: first iterate, taken as it is. None: uniform in [-epsilon, epsilon] around `x`, clamped to `bounds`.
        generator: source of the random start, on the device of `x`; None uses the global one.

    Returns:
        x_adv, same shape, dtype and memory format as `x`, detached.

    Raises:
        ValueError: negative epsilon, step_size or steps, integer images, or a start of another shape.
    """
    if not x.is_floating_point():
        raise ValueError(
            f"x: got dtype {x.dtype}; accepted: floating point images in [{bounds[0]}, {bounds[1]}]"
        )
    for name, value in (("epsilon", epsilon), ("step_size", step_size), ("steps", steps)):
        if not value >= 0:
            raise ValueError(f"{name}: got {value}; accepted: a number >= 0")
    if start is not None and start.shape != x.shape:
        raise ValueError(f"start: got shape {tuple(start.shape)}; accepted: the shape of x, {tuple(x.shape)}")

    x = x.detach()
    lower, upper = x - epsilon, x + epsilon
    x_adv = uniform_start(x, epsilon, generator, bounds) if start is None else start.detach()
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        with torch.enable_grad():
            loss = objective(model(x_adv), x_adv).sum()
        (gradient,) = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach() + step_size * gradient.sign()
        x_adv = torch.clamp(torch.minimum(torch.maximum(x_adv, lower), upper), *bounds)
    return x_adv.detach()


def uniform_start(
    x: Tensor,
    epsilon: float,
    generator: torch.Generator | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """x + U(-epsilon, epsilon), clamped to `bounds`: the start of PGD-AT."""
    noise = torch.empty_like(x).uniform_(-epsilon, epsilon, generator=generator)
    return (x + noise).clamp_(*bounds)


def gaussian_start(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """x + 0.001 N(0, 1), not clamped: the start of TRADES, RSLAD and AdaAD."""
    return x + GAUSSIAN_START * torch.empty_like(x).normal_(generator=generator)


def cross_entropy(y: Tensor) -> Objective:
    """CE(S(x'), y): PGD-AT, MART, ARD, IAD, AKD."""
    return lambda logits, x_adv: F.nll_loss(log_softmax(logits), y, reduction="none")


def margin(y: Tensor) -> Objective:
    """max_{k != y} z_k - z_y: the l-infinity form of Carlini and Wagner's loss, positive once misclassified."""

    def objective(logits: Tensor, x_adv: Tensor) -> Tensor:
        true = F.one_hot(y, logits.shape[1]).bool()
        return logits.masked_fill(true, float("-inf")).amax(dim=1) - logits[true]

    return objective


def kl_from(target_logits: Tensor) -> Objective:
    """KL(P || P_S(x')) with P = softmax(target_logits) constant: TRADES (P = P_S(x)) and RSLAD (P = P_T(x))."""
    target_logits = target_logits.detach()
    return lambda logits, x_adv: kl(target_logits, logits)


def adaad(teacher: Callable[[Tensor], Tensor]) -> Objective:
    """KL(P_T(x') || P_S(x')) with the gradient through BOTH networks (Huang et al. 2023, AdaAD)."""
    return lambda logits, x_adv: kl(teacher(x_adv), logits)


def gradient_mismatch(
    student: Callable[[Tensor], Tensor], teacher: Callable[[Tensor], Tensor], x: Tensor
) -> Objective:
    """KL(softmax dT || softmax dS), df = f(x+d) - f(x-d), d = x'-x, through both networks: IGDM's term, maximised."""
    x = x.detach()

    def objective(logits: Tensor, x_adv: Tensor) -> Tensor:
        mirror = 2 * x - x_adv
        return kl(teacher(x_adv) - teacher(mirror), logits - student(mirror))

    return objective


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Parameters take no gradient inside the block, so the attack keeps no activation for weight gradients."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
