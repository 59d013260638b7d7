"""Convolutions of CIFAR's networks on a CPU, with the ReLU after them: ours against PyTorch's (oneDNN's) own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fastrd.kernels.cpu.conv2d import conv2d

from bench.sizes import CUDA, TINY

pytestmark = pytest.mark.skipif(CUDA, reason="of CPUs alone")
LAYERS = {  # channels in and out, side, stride
    "ResNet-8, stage 1": (16, 16, 32, 1),
    "ResNet-8, stage 2": (32, 32, 16, 1),
    "ResNet-8, stage 3": (64, 64, 8, 1),
    "ResNet-8, into stage 2": (16, 32, 32, 2),
    "ResNet-8, into stage 3": (32, 64, 16, 2),
    "ResNet-18, stage 1": (64, 64, 32, 1),
    "ResNet-18, stage 2": (128, 128, 16, 1),
    "ResNet-18, stage 3": (256, 256, 8, 1),
    "ResNet-18, stage 4": (512, 512, 4, 1),
    "WRN-28-10, stage 1": (160, 160, 32, 1),
}
VARIANTS = {
    "ours": lambda x, w, b, **geometry: conv2d(x, w, b, **geometry, relu=True),
    "PyTorch": lambda x, w, b, stride, padding: F.relu(F.conv2d(x, w, b, stride, padding)),
}
PASSES = {"forward": (), "input gradient": (0,), "both gradients": (0, 1)}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("layer", LAYERS)
def test_conv2d(measure, layer, passes, variant):
    """Times of "gradients" include the forward pass. Operations are those of the definition."""
    c, k, side, stride = LAYERS[layer]
    images = 2 if TINY else 128 if c < 160 else 32
    x = torch.randn(images, c, side, side).contiguous(memory_format=torch.channels_last)
    w = (torch.randn(k, c, 3, 3) / (9 * c) ** 0.5).contiguous(memory_format=torch.channels_last)
    wanted = [(x, w)[place].requires_grad_() for place in PASSES[passes]]
    bias, run = torch.randn(k), VARIANTS[variant]
    upstream = torch.randn_like(run(x, w, bias, stride=stride, padding=1).detach())

    def step():
        y = run(x, w, bias, stride=stride, padding=1)
        return torch.autograd.grad(y, wanted, upstream) if wanted else y

    one_pass = 2 * 9 * c * k * images * (side // stride) ** 2
    measure(
        step,
        problem=f"{layer}, {images} x {c} -> {k} x {side} x {side}: {passes}",
        variant=variant,
        bytes=None,
        flops=(1 + len(wanted)) * one_pass,
        rounds=20,
    )
