"""Inner maximisation: one PGD loop for any objective and norm, the objectives of the field, and their registry.

An objective is `objective(logits, x_adv) -> (N,) losses` to be maximised, where `logits` are the attacked model's
outputs at `x_adv`. It may run other networks on `x_adv`: the gradient then flows through them too (AdaAD).

`INNER` says everything about each inner maximisation of training in one object. To add one, register it:
`INNER["mine"] = InnerMaximisation(objective, start="uniform", passes={"student": 1})`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from math import inf, prod, sqrt
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .core.arguments import (
    FLOATS,
    INFERENCE,
    check_callable,
    check_classes,
    check_floats,
    check_generator,
    check_logits,
    check_matrices,
    check_same_device,
    check_same_shape,
    check_tensor,
)
from .core.capture import Captured, autocast, capturable, compiled
from .core.images import check_pixels
from .core.kinds import check_kinds
from .core.values import NORMS, check_integer, check_number, check_option, non_negative
from .kernels.pgd_step import pgd_step
from .kernels.reference import upcast
from .losses.functional import kl, log_softmax

PerSample = Callable[..., Tensor]
"""(logits, x_adv, *constants) -> (N,)"""

EPSILON = {"linf": 8 / 255, "l2": 0.5}  # the radii that RobustBench evaluates CIFAR-10 with
IN_PLACE = "model: changes its input in place; accepted: a network that leaves x as it is"
PRECISIONS = ("fp32", "bf16")
GAUSSIAN_START = 1e-3  # standard deviation of the start noise of TRADES, RSLAD and AdaAD, in pixels of [0, 1]


class Objective:
    """`per_sample(logits, x_adv, *constants)` -> (N,) losses, with the batch's own tensors bound.

    A compiled attack is compiled once for all equal `per_sample`, whatever the constants.
    """

    def __init__(self, per_sample: PerSample, *constants: Tensor) -> None:
        check_callable(objective=per_sample)
        self.per_sample, self.constants = per_sample, constants

    def __call__(self, logits: Tensor, x_adv: Tensor) -> Tensor:
        return self.per_sample(logits, x_adv, *self.constants)


def check_settings(
    *,
    norm: str = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    steps: int = 0,
    precision: str | None = None,
    shape: Sequence[int] | None = None,
    zero: bool = True,
    **radii: float,
) -> None:
    """Raises an error that names the argument unless an attack can have these settings.

    This is the one check of recipes, training, evaluation and the functions of this module.

    Args:
        shape: (C, H, W) of the images, which limits an l2 radius: no two images are further apart.
        zero: whether radii may be zero.
        radii: epsilon, step_size, by the names that the message is to have.

    Raises TypeError: not a number. ValueError: out of range, or an unknown norm or precision.
    """
    check_option("norm", norm, NORMS)
    if precision is not None:
        check_option("precision", precision, PRECISIONS)
    pair = isinstance(bounds, (tuple, list)) and len(bounds) == 2 and all(isinstance(b, Real) for b in bounds)
    low, high = bounds if pair else (inf, inf)
    if not -inf < low < high < inf:
        raise ValueError(f"bounds: got {bounds}; accepted: the lowest and the highest pixel, such as (0, 1)")
    check_integer(least=0, steps=steps)
    largest: float | None = high - low
    what = "a fraction of the pixel range, such as 8/255," if bounds == (0, 1) else "a number"
    if norm == "l2":
        largest = None if shape is None else (high - low) * sqrt(prod(shape))
        what = "an l2 norm, such as 0.5,"
    given: dict[str, Any] = {"least" if zero else "above": 0, **radii}
    check_number(most=largest, what=what, **given)


class PGD:
    """Projected gradient ascent with everything but the batch fixed: `attack(x, start, objective)` -> x_adv.

    With `g` the gradient of the SUM over the batch of `objective(model(x'), x')`, each step is

        linf:  x' <- clamp(min(max(x' + step_size sign(g), x - epsilon), x + epsilon), *bounds)
        l2:    x' <- clamp(x + P(x' + step_size g / ||g||_2 - x), *bounds)

    with P(d) = d min(1, epsilon / ||d||_2) for each image (Madry et al. 2018, Eq. 2.1; in l2 as their package
    `robustness` has it).

    Args:
        model: (N, C, H, W) -> logits (N, classes). Used in the mode it is in: call `.eval()` first for frozen BN.
            Parameter gradients are neither computed nor touched.
        epsilon, step_size: in units of pixels: 8/255 and 2/255 in l-infinity, 0.5 and 0.125 in l2, say.
        steps: number of ascent steps; 0 returns the start.
        norm: "linf" or "l2".
        bounds: lowest and highest pixel.
        precision: what the network and the objective are computed in: "fp32", or "bf16" under autocast, of which the
            step in l-infinity reads the signs alone; images stay in their dtype. None: as autocast is around the call.
        compile: compile the step with `torch.compile`, as one graph; on CUDA also capture all steps as ONE CUDA
            graph, which then reads the parameters of `model` where they lay at the first call. In float32 on the CPU
            the result is equal to that of the plain loop, up to pixels whose gradient is within rounding of zero.

    Raises ValueError: a setting out of range, see `check_settings`; when called: images outside `bounds`.
    """

    @check_kinds
    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        *,
        epsilon: float,
        step_size: float,
        steps: int,
        norm: str = "linf",
        bounds: tuple[float, float] = (0.0, 1.0),
        precision: str | None = None,
        compile: bool = False,
    ) -> None:
        check_settings(norm=norm, bounds=bounds, steps=steps, precision=precision, epsilon=epsilon, step_size=step_size)
        self.model, self.epsilon, self.step_size, self.steps = model, epsilon, step_size, steps
        self.norm, self.bounds, self.precision, self.compile = norm, bounds, precision, compile
        self._compiled: dict[PerSample, Callable[..., Tensor]] = {}

    def __call__(self, x: Tensor, start: Tensor, objective: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """x, start: (N, C, H, W) floating point -> x_adv, shape, dtype and memory format of `start`, detached."""
        check_pixels(x, self.bounds)
        _check_start(start, x)
        if not isinstance(objective, Objective):
            objective = Objective(objective)
        loop = self._loop_for(objective.per_sample, capture=capturable(x))
        precision = nullcontext() if self.precision is None else autocast(x, self.precision, cache=not self.compile)
        try:
            with torch.no_grad(), precision:
                return loop(start.detach(), x.detach(), *objective.constants)
        except RuntimeError as error:
            weights = next(self.model.parameters(), start).dtype if isinstance(self.model, nn.Module) else start.dtype
            if weights == start.dtype or torch.is_autocast_enabled(x.device.type):
                raise
            name = "x" if start.dtype == x.dtype else "start"
            raise ValueError(f"{name}: got {start.dtype}; accepted: {weights}, which the model computes in") from error

    def _step(self, per_sample: PerSample, x_adv: Tensor, x: Tensor, *constants: Tensor) -> Tensor:
        gradient = _gradient(lambda z: _total(self.model, z, per_sample, *constants), x_adv)
        settings: dict[str, Any] = {"step_size": self.step_size, "epsilon": self.epsilon, "bounds": self.bounds}
        if self.norm == "l2":
            return _l2_step(x_adv, gradient, x, **settings)
        # Compiled, the update is fused into the kernel that ends the backward pass.
        backend = "torch" if torch.compiler.is_compiling() else "auto"
        return pgd_step(x_adv, gradient, x, **settings, backend=backend)

    def _loop(self, step: PerSample, x_adv: Tensor, x: Tensor, *constants: Tensor) -> Tensor:
        for _ in range(self.steps):
            x_adv = step(x_adv, x, *constants)
        return x_adv

    def _loop_for(self, per_sample: PerSample, *, capture: bool) -> Callable[..., Tensor]:
        """The loop of an objective, compiled at its first use."""

        def step(x_adv: Tensor, x: Tensor, *constants: Tensor) -> Tensor:
            return self._step(per_sample, x_adv, x, *constants)

        if not self.compile:
            return partial(self._loop, step)
        if per_sample not in self._compiled:
            loop = partial(self._loop, compiled(step, fullgraph=True, dynamic=False))
            self._compiled[per_sample] = Captured(loop) if capture else loop
        return self._compiled[per_sample]


def _check_start(start: Tensor, x: Tensor) -> None:
    if not isinstance(start, Tensor):
        raise TypeError(f"start: got {type(start).__name__}; accepted: a tensor like x, {x.dtype} {tuple(x.shape)}")
    if start.shape != x.shape or start.device != x.device or start.dtype not in FLOATS or start.layout != x.layout:
        raise ValueError(
            f"start: got {start.dtype} {tuple(start.shape)} on {start.device}; accepted: the shape of x, "
            f"{tuple(x.shape)}, floating point, on {x.device}"
        )


def _l2_step(
    x_adv: Tensor, gradient: Tensor, x: Tensor, *, step_size: float, epsilon: float, bounds: tuple[float, float]
) -> Tensor:
    centre = upcast(x)
    # One NaN would make the whole image NaN; the sign of l-infinity leaves its pixel where it is.
    delta = upcast(x_adv) + step_size * _unit(upcast(gradient).nan_to_num()) - centre
    delta = delta * (epsilon / _l2_norm(delta).clamp_min(max(epsilon, torch.finfo(delta.dtype).tiny)))
    return (centre + delta).clamp(*bounds).to(x_adv.dtype)


def _l2_norm(images: Tensor) -> Tensor:
    """(N, ...) -> (N, 1, ...)"""
    return torch.linalg.vector_norm(images, dim=tuple(range(1, images.ndim)), keepdim=True)


def _unit(images: Tensor) -> Tensor:
    """Each image over its l2 norm; zero stays zero. The largest entry goes first: squares of tiny ones are zero."""
    largest = images.abs().amax(dim=tuple(range(1, images.ndim)), keepdim=True)
    images = images / largest.clamp_min(torch.finfo(images.dtype).tiny)
    return images / _l2_norm(images).clamp_min(1)


@check_kinds
def pgd(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    objective: Callable[[Tensor, Tensor], Tensor],
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    norm: str = "linf",
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    precision: str | None = None,
) -> Tensor:
    """Runs projected gradient ascent on one batch; see `PGD` for the equation and the arguments not named here.

    Args:
        x: clean images (N, C, H, W), floating point, in `bounds`.
        objective: per-sample losses (N,) to maximise, see the module docstring.
        start: first iterate, taken as it is. None: that of `uniform_start`.
        generator: source of the random start, on the device of `x`; None uses the global one.

    Returns:
        x_adv, same shape, dtype and memory format as `x`, detached.

    Raises ValueError: a setting out of range, images not floating point or not in `bounds`, a start of another shape.
    """
    ball: dict[str, Any] = {"norm": norm, "bounds": bounds, "epsilon": epsilon, "step_size": step_size}
    check_settings(shape=x.shape[1:], **ball)
    attack = PGD(model, steps=steps, precision=precision, **ball)
    start = uniform_start(x.detach(), epsilon, generator, bounds, norm) if start is None else start
    return attack(x, start, objective)


def input_gradient(
    model: Callable[[Tensor], Tensor], x: Tensor, objective: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Returns what PGD ascends along: the gradient with respect to x of the sum over the batch of the objective."""
    check_callable(model=model, objective=objective)
    check_floats(x=x)
    return _gradient(lambda z: _total(model, z, objective), x)


def _total(model: Callable[[Tensor], Tensor], x: Tensor, per_sample: PerSample, *constants: Tensor) -> Tensor:
    logits = model(x)
    check_logits(logits, len(x))
    losses = per_sample(logits, x, *constants)
    if not isinstance(losses, Tensor):
        raise TypeError(f"objective: returned {type(losses).__name__}; accepted: a tensor of losses ({len(x)},)")
    if losses.shape != x.shape[:1] or losses.dtype not in FLOATS or losses.device != x.device:
        got = f"{losses.dtype} {tuple(losses.shape)} on {losses.device}"
        raise ValueError(f"objective: returned {got}; accepted: floating point losses ({len(x)},) on {x.device}")
    if logits.requires_grad and not losses.requires_grad and not torch.compiler.is_compiling():
        raise ValueError("objective: no gradient reaches the logits; accepted: losses that are not detached from them")
    return losses.sum()


def _gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.func.grad(function)(x)  # the form that every torch from 2.11 on traces
    with torch.inference_mode(False), torch.enable_grad():
        x = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
        try:
            value = function(x)
        except RuntimeError as error:
            if "a leaf Variable that requires grad" in str(error):
                raise ValueError(IN_PLACE) from None
            if "Inference tensors cannot be saved" in str(error):
                raise ValueError(f"model: a weight {INFERENCE}") from None
            raise
        gradient = torch.autograd.grad(value, x, allow_unused=True)[0] if value.requires_grad else None
    if gradient is None:
        raise ValueError("model: no gradient reaches x; accepted: logits that depend on x, not detached from it")
    return gradient


def uniform_start(
    x: Tensor,
    epsilon: float,
    generator: torch.Generator | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    norm: str = "linf",
) -> Tensor:
    """Returns x + `uniform_noise`, clamped to `bounds`: the start of PGD-AT. Raises as `pgd` does."""
    check_tensor(x=x)
    check_settings(norm=norm, bounds=bounds, shape=x.shape[1:], epsilon=epsilon)
    check_pixels(x, bounds)
    return (x + uniform_noise(x, epsilon, generator, norm)).clamp_(*bounds)


def uniform_noise(x: Tensor, epsilon: float, generator: torch.Generator | None = None, norm: str = "linf") -> Tensor:
    """Returns noise: U(-epsilon, epsilon) for each pixel, or, as AutoAttack in l2, uniform on the sphere of epsilon."""
    check_floats(x=x)
    check_option("norm", norm, NORMS)
    non_negative(epsilon=epsilon)
    check_generator(generator, x)
    if norm == "linf":
        return torch.empty_like(x).uniform_(-epsilon, epsilon, generator=generator)
    return (epsilon * _unit(upcast(torch.empty_like(x).normal_(generator=generator)))).to(x.dtype)


def gaussian_start(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Returns x + 0.001 N(0, 1), not clamped: the start of TRADES, RSLAD and AdaAD."""
    check_floats(x=x)
    check_generator(generator, x)
    return x + GAUSSIAN_START * torch.empty_like(x).normal_(generator=generator)


def cross_entropy(y: Tensor) -> Objective:
    """Returns the objective CE(S(x'), y): PGD-AT, MART, ARD, IAD, AKD. y: (N,) int64 classes."""
    check_classes(y)
    return Objective(_cross_entropy, y)


def _cross_entropy(logits: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    check_classes(y, logits)
    return F.nll_loss(log_softmax(logits), y, reduction="none")


def margin(y: Tensor) -> Objective:
    """Returns the objective max_{k != y} z_k - z_y, Carlini and Wagner's loss in a ball. y as in `cross_entropy`."""
    check_classes(y)
    return Objective(_margin, y)


def _margin(logits: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    check_classes(y, logits)
    true = y[:, None] == torch.arange(logits.shape[1], device=y.device)  # torch 2.11 cannot compile F.one_hot
    others = logits.masked_fill(true, float("-inf")).amax(dim=1)
    return others - logits.gather(1, y[:, None]).squeeze(1)


def kl_from(target_logits: Tensor) -> Objective:
    """Returns the objective KL(P || P_S(x')), P = softmax(target_logits) constant: TRADES (P_S(x)), RSLAD (P_T(x))."""
    check_matrices(target_logits=target_logits)
    check_floats(target_logits=target_logits)
    return Objective(_kl_from, target_logits.detach())


def _kl_from(logits: Tensor, x_adv: Tensor, target_logits: Tensor) -> Tensor:
    check_same_shape(logits=logits, target_logits=target_logits)
    check_same_device(logits, target_logits=target_logits)
    return kl(target_logits, logits)


def adaad(teacher: Callable[[Tensor], Tensor]) -> Objective:
    """Returns the objective KL(P_T(x') || P_S(x')), the gradient through BOTH networks (AdaAD, Huang et al. 2023)."""
    check_callable(teacher=teacher)
    return Objective(_AdaAD(teacher))


@dataclass(frozen=True)
class _AdaAD:
    teacher: Callable[[Tensor], Tensor]

    def __call__(self, logits: Tensor, x_adv: Tensor) -> Tensor:
        taught = self.teacher(x_adv)
        _check_teaches(taught, logits)
        return kl(taught, logits)


def _check_teaches(taught: Tensor, logits: Tensor) -> None:
    """Raises where the teacher's logits are of other classes, or detached from the images that they are of."""
    check_logits(taught, len(logits), "teacher")
    check_same_shape(logits=logits, teacher=taught)
    if logits.requires_grad and not taught.requires_grad and not torch.compiler.is_compiling():
        raise ValueError("teacher: no gradient reaches x; accepted: a network that does not run under no_grad")


def gradient_mismatch(student: Callable[[Tensor], Tensor], teacher: Callable[[Tensor], Tensor], x: Tensor) -> Objective:
    """Returns IGDM's term as objective: KL(softmax dT || softmax dS), df = f(x+d) - f(x-d), through both networks."""
    check_callable(student=student, teacher=teacher)
    check_floats(x=x)
    return Objective(_GradientMismatch(student, teacher), x.detach())


@dataclass(frozen=True)
class _GradientMismatch:
    student: Callable[[Tensor], Tensor]
    teacher: Callable[[Tensor], Tensor]

    def __call__(self, logits: Tensor, x_adv: Tensor, x: Tensor) -> Tensor:
        check_same_shape(x_adv=x_adv, x=x)
        check_same_device(x_adv, x=x)
        mirror = 2 * x - x_adv
        taught = self.teacher(x_adv)
        _check_teaches(taught, logits)
        mirrored = self.student(mirror)
        check_logits(mirrored, len(logits), "student")
        check_same_shape(logits=logits, student=mirrored)
        return kl(taught - self.teacher(mirror), logits - mirrored)


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Parameters take no gradient inside the block, so the attack keeps no activation for weight gradients."""
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(f"modules: got {type(module).__name__}; accepted: torch.nn.Modules")
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class Clean(NamedTuple):
    """What an objective of training may be made from: one batch before the attack."""

    x: Tensor  # (N, C, H, W) in [0, 1]
    y: Tensor  # (N,) int64
    networks: Mapping[str, Callable[[Tensor], Tensor]]  # name -> x -> logits, those of `passes`
    logits: Mapping[str, Tensor]  # name -> (N, classes) at x, those of `clean`; constant


STARTS: dict[str, Callable[[Tensor, float, str, torch.Generator | None], Tensor]] = {
    "clean": lambda x, epsilon, norm, generator: x,
    "uniform": lambda x, epsilon, norm, generator: uniform_start(x, epsilon, generator, norm=norm),
    "gaussian": lambda x, epsilon, norm, generator: gaussian_start(x, generator),
}
"""name -> (x, epsilon, norm, generator) -> first iterate"""


@dataclass(frozen=True)
class InnerMaximisation:
    """How training finds x'.

    objective: the batch -> what PGD maximises.
    start: name of the first iterate, a key of `STARTS`.
    passes: network name -> forward passes that one ascent step runs through it, with gradient. Empty: no attack.
    clean: names of networks whose logits on the clean images the objective reads, as constants.
    """

    objective: Callable[[Clean], Objective]
    start: str = "gaussian"
    passes: Mapping[str, int] = field(default_factory=lambda: {"student": 1})
    clean: tuple[str, ...] = ()

    @property
    def networks(self) -> set[str]:
        """Names of all networks that the attack needs."""
        return {*self.passes, *self.clean}


INNER: dict[str, InnerMaximisation] = {
    "none": InnerMaximisation(lambda batch: cross_entropy(batch.y), start="clean", passes={}),
    "ce": InnerMaximisation(lambda batch: cross_entropy(batch.y), start="uniform"),  # PGD-AT, ARD, IAD, AKD
    "mart": InnerMaximisation(lambda batch: cross_entropy(batch.y)),
    "trades": InnerMaximisation(lambda batch: kl_from(batch.logits["student"]), clean=("student",)),
    "rslad": InnerMaximisation(lambda batch: kl_from(batch.logits["teacher"]), clean=("teacher",)),
    "adaad": InnerMaximisation(lambda batch: adaad(batch.networks["teacher"]), passes={"student": 1, "teacher": 1}),
    # The true gradient: it flows through the mirror image too. The public copy of IGDM's code takes d as a constant
    # there.
    "igdm": InnerMaximisation(
        lambda batch: gradient_mismatch(batch.networks["student"], batch.networks["teacher"], batch.x),
        passes={"student": 2, "teacher": 2},
    ),
}
"""Inner maximisations by the name that `attack.inner` of a recipe has."""


def inner_maximisation(name: str) -> InnerMaximisation:
    """Returns the registered inner maximisation, or raises a ValueError that lists the known names."""
    check_option("inner", name, INNER)
    check_option("start", INNER[name].start, STARTS)
    return INNER[name]
