"""Whole networks on a CPU, as an attack runs them: batch norms folded, and the gradient for the images alone.

"ours" is the form that is measured to be the fastest, "ours, compiled" where `training.compile` offers one form more;
"PyTorch" is the same folded network by PyTorch's convolutions (oneDNN's), also under torch.compile.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from fastrd.kernels.cpu import native

from bench.sizes import CUDA, TINY
from fastrd.core.capture import compiled
from fastrd.engine.profile import forward_flops
from fastrd.models import Folded, build_model

pytestmark = pytest.mark.skipif(CUDA, reason="of CPUs alone")
# name -> architecture, options, images; the CNN of width 24 is the demo's teacher, whose channels are no whole vectors
NETWORKS = {
    "cnn": ("cnn", {}, 128),
    "cnn, width 24": ("cnn", {"width": 24}, 128),
    "resnet8": ("resnet8", {}, 128),
    "resnet20": ("resnet20", {}, 128),
    "resnet18": ("resnet18", {}, 64),
    "preact_resnet18": ("preact_resnet18", {}, 64),
    "mobilenet_v2": ("mobilenet_v2", {}, 64),
    "wrn-28-10": ("wrn-28-10", {}, 4),
}
VARIANTS = ("ours", "ours, compiled", "PyTorch", "PyTorch, compiled")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("passes", ["forward", "input gradient"])
@pytest.mark.parametrize("name", NETWORKS)
def test_network(measure, name, passes, precision, variant):
    """Times of "input gradient" include the forward pass. Operations are those of the definition."""
    wanted, compile = passes == "input gradient", "compiled" in variant
    if compile and not wanted:
        pytest.skip("half a minute of compiling for a forward pass")
    arch, options, images = NETWORKS[name]
    images = 2 if TINY else images
    x = torch.rand(images, 3, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_(wanted)
    network = build_model(arch, num_classes=10, **options).to(memory_format=torch.channels_last)
    flops = images * forward_flops(network, x[:1].detach())
    upstream = torch.randn(images, 10)
    if variant.startswith("ours"):
        run = Folded(network, x[:2].detach(), compile=compile)
    else:
        with mock.patch.object(native, "library", lambda: None):
            plain = Folded(network, x[:2].detach()).network
        run = compiled(plain, dynamic=False) if compile else plain

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            y = run(x)
        return torch.autograd.grad(y, x, upstream) if wanted else y

    library = mock.patch.object(native, "library", native.library if variant.startswith("ours") else lambda: None)
    with library, torch.set_grad_enabled(wanted):
        measure(
            step,
            problem=f"{name}, {images} x 3 x 32 x 32: {passes}" + (", bf16" if precision == "bf16" else ""),
            variant=variant,
            bytes=None,
            flops=(1 + wanted) * flops,
            rounds=5 if TINY else 11,
        )
