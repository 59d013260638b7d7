"""Adversarial weight perturbation (Wu, Xia, Wang 2020, arXiv 2004.05884): lowers the loss around the weights too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..core.foreach import copy_all
from .distributed import World


@contextmanager
def perturbed(student: nn.Module, loss: Callable[[], Tensor], gamma: float, world: World) -> Iterator[None]:
    """Moves the weights of `student` to where `loss` is higher, for the length of the block.

    Each weight tensor w of two or more dimensions moves by gamma ||w|| g / ||g||, g the gradient of the loss with
    respect to it: the authors' step, which is one of SGD scaled to a relative length. When the block ends the weights
    have their old values, bit for bit; so have the statistics of batch normalisation when the block begins.
    """
    weights = [parameter for parameter in student.parameters() if parameter.requires_grad and parameter.ndim > 1]
    kept = [weight.detach().clone() for weight in weights]
    buffers = [buffer.clone() for buffer in student.buffers()]
    gradients = torch.autograd.grad(loss(), weights, materialize_grads=True)
    world.average(gradients)
    with torch.no_grad():
        copy_all(zip(student.buffers(), buffers, strict=True))
        for weight, gradient in zip(weights, gradients, strict=True):
            direction = gradient / gradient.norm().clamp_min(torch.finfo(gradient.dtype).tiny)  # 0 where it is 0
            weight.add_(gamma * weight.norm() * direction)
    try:
        yield
    finally:
        with torch.no_grad():
            copy_all(zip(weights, kept, strict=True))
