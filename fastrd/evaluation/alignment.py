"""How a student's input gradients and features agree with its teacher's, and how linear a network is."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import attacks
from ..core.arguments import check_module
from ..core.images import as_images, as_labels, pixels
from ..core.seeding import derive_seed
from ..models import with_features
from ..models.foreign import copied
from .inputs import PAIR, batches, count_classes, evaluating


def gradient_alignment(
    student: nn.Module, teacher: nn.Module, x: Tensor | np.ndarray, y: Any, *, batch_size: int = 250
) -> dict[str, float | int]:
    """Computes the distance and cosine of g_f = d CE(f(x), y) / dx in eval mode, x clean (IGDM; Lee, Cho, Kim 2025).

    Args:
        student, teacher: images (N, C, H, W) in [0, 1] -> logits (N, classes), float32, left as they were.
            The teacher is measured on the student's device.
        x: float (N, C, H, W) in [0, 1] or uint8 (N, H, W, C).
        y: (N,) class indices.

    Returns:
        "gd": mean over images of ||g_S - g_T||_2. "gc": mean over images of cos(g_S, g_T). "n": images.
        "zero_gradients": images where either gradient is exactly zero (softmax saturated in float32); these
        have no direction and count as cosine 0.
    """
    images, labels = as_images(x), as_labels(y, len(x))
    distance, cosine, zero = [], [], 0
    with evaluating(student, teacher) as device:
        for name, model in zip(PAIR, (student, teacher), strict=True):
            count_classes(model, images, labels, device, name)
        for part in batches(len(images), batch_size):
            xb, yb = pixels(images[part], device), labels[part].to(device)
            # Gradients of well-classified images are so small that their squares underflow in float32.
            gradients = (attacks.input_gradient(model, xb, attacks.cross_entropy(yb)) for model in (student, teacher))
            g_s, g_t = (gradient.flatten(1).double() for gradient in gradients)
            norms = g_s.norm(dim=1) * g_t.norm(dim=1)
            distance.append((g_s - g_t).norm(dim=1))
            cosine.append(torch.where(norms > 0, (g_s * g_t).sum(1) / norms, 0.0))
            zero += int((norms == 0).sum())
    return {
        "gd": torch.cat(distance).mean().item(),
        "gc": torch.cat(cosine).mean().item(),
        "n": len(images),
        "zero_gradients": zero,
    }


def remainder_proportion(
    model: nn.Module,
    x: Tensor | np.ndarray,
    *,
    epsilon: float = 8 / 255,
    norm: str = "linf",
    seed: int = 0,
    batch_size: int = 250,
) -> float:
    """Computes the mean of ||f(x+e) - f(x) - J e|| / ||f(x+e)|| over images, f the logits, J their Jacobian (IGDM).

    `e` is that of `attacks.uniform_noise`, reproducibly from `seed`, and x + e is not clamped.
    0 means that the network is linear over the perturbation. `x` as in `gradient_alignment`. The model must
    be twice differentiable by autograd, as networks of PyTorch's own layers are.
    """
    images = as_images(x)
    attacks.check_settings(norm=norm, shape=images.shape[1:], epsilon=epsilon)
    derive_seed(seed)
    proportions = []
    model = getattr(model, "_orig_mod", model)  # compiled backward passes cannot be differentiated
    with evaluating(model) as device:
        count_classes(model, images, None, device)
        for part in batches(len(images), batch_size):
            xb = pixels(images[part], device)
            generator = torch.Generator(device).manual_seed(derive_seed(seed, "remainder", part.start))
            e = attacks.uniform_noise(xb, epsilon, generator, norm)
            f_x, j_e = _directional(model, xb, e)
            with torch.no_grad():
                f_xe = model(xb + e).double()
            remainder = (f_xe - f_x - j_e).norm(dim=1)
            proportions.append(remainder / f_xe.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny))
    return torch.cat(proportions).mean().item()


def pointwise_distance(
    student: nn.Module,
    teacher: nn.Module,
    x: Tensor | np.ndarray,
    y: Any,
    *,
    inner: str = "ce",
    epsilon: float = 8 / 255,
    step_size: float = 2 / 255,
    steps: int = 20,
    norm: str = "linf",
    seed: int = 0,
    batch_size: int = 250,
) -> dict[str, float | int]:
    """Computes the mean over images of ||P_S(x + d) - P_T(x + d)||_2, P the softmax (IGDM, Table 5).

    That P and not the logits are compared is our reading: the printed magnitudes fit it. `x`, `y` as in
    `gradient_alignment`.

    Args:
        inner: name of the inner maximisation (`attacks.INNER`) that finds the adversarial d.
        epsilon, step_size, norm: of the ball, as for `PGD`.
        seed: of the draws of d and of the start of the attack.

    Returns:
        "uniform": d drawn as `uniform_noise`. "adversarial": d found by `steps` of `inner`. "n": images.
    """
    images, labels = as_images(x), as_labels(y, len(x))
    maximisation = attacks.inner_maximisation(inner)
    settings: dict[str, Any] = {"norm": norm, "steps": steps, "epsilon": epsilon, "step_size": step_size}
    attacks.check_settings(shape=images.shape[1:], **settings)
    derive_seed(seed)
    networks = {"student": student, "teacher": teacher}
    sums = {"uniform": 0.0, "adversarial": 0.0}
    with evaluating(student, teacher) as device:
        classes = [count_classes(network, images, labels, device, name) for name, network in networks.items()]
        if classes[0] != classes[1]:
            raise ValueError(f"teacher: got {classes[1]} classes; accepted: those of the student, {classes[0]}")
        attack = attacks.PGD(student, **settings)
        for part in batches(len(images), batch_size):
            xb, yb = pixels(images[part], device), labels[part].to(device)
            generator = torch.Generator(device).manual_seed(derive_seed(seed, "pointwise", part.start))
            with torch.no_grad():
                logits = {name: networks[name](xb) for name in maximisation.clean}
            start = attacks.STARTS[maximisation.start](xb, epsilon, norm, generator)
            batch = attacks.Clean(xb, yb, networks, logits)
            found = {
                "uniform": attacks.uniform_start(xb, epsilon, generator, norm=norm),
                "adversarial": attack(xb, start, maximisation.objective(batch)),
            }
            for name, perturbed in found.items():
                with torch.no_grad():
                    p_s, p_t = (network(perturbed).double().softmax(1) for network in networks.values())
                sums[name] += (p_s - p_t).norm(dim=1).sum().item()
    return {name: value / len(images) for name, value in sums.items()} | {"n": len(images)}


def cka(student: nn.Module, teacher: nn.Module, x: Tensor | np.ndarray, *, batch_size: int = 250) -> float:
    """Computes the linear centred kernel alignment of penultimate features (Kornblith et al. 2019), in [0, 1].

    ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F) with X, Y the centred features of student and teacher at the same images;
    widths may differ. 1: equal up to rotation and scale. 0 where either has constant features. `x` as in
    `gradient_alignment`; eval mode, on the student's device, both networks left as they were.
    """
    for name, model in zip(PAIR, (student, teacher), strict=True):
        check_module(name, model, "a torch.nn.Module")
    # Of copies: features are read by a hook, which would stay.
    networks = [with_features(copied(*pair)) for pair in zip(PAIR, (student, teacher), strict=True)]
    images = as_images(x)
    total: list[Tensor] = []
    with evaluating(*networks) as device, torch.no_grad():
        for part in batches(len(images), batch_size):
            xb = pixels(images[part], device)
            a, b = (network(xb, features=True)[1].double() for network in networks)
            sums = [a.T @ a, b.T @ b, b.T @ a, a.sum(0), b.sum(0)]
            total = [t + s for t, s in zip(total, sums, strict=True)] if total else sums
    aa, bb, ba, a, b = total
    n = len(images)
    aa, bb, ba = aa - torch.outer(a, a) / n, bb - torch.outer(b, b) / n, ba - torch.outer(b, a) / n
    scale = (aa.norm() * bb.norm()).item()
    return ba.square().sum().item() / scale if scale > 0 else 0.0


def _directional(model: nn.Module, x: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """f(x) and J e, by two backward passes: J^T u is linear in u, and J e is the gradient of <J^T u, e> in u.

    Forward mode would be one pass, but torch scripts its whole table of formulas at first use: seconds and a
    warning.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused attentions have one derivative
        f_x = model(x)
        u = torch.zeros_like(f_x, requires_grad=True)
        (back,) = torch.autograd.grad(f_x, x, u, create_graph=True)
    return f_x.detach(), torch.autograd.grad(back, u, e)[0]
