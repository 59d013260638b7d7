"""Whole networks on a CPU, as an attack runs them: batch norms folded, and the gradient for the images alone.

"ours" takes a few images at a time through all layers; "layer by layer" runs our convolutions on the whole batch;
"PyTorch" its own (oneDNN's).
"""

from __future__ import annotations

import pytest
import torch
from fastrd.kernels.cpu import native

from bench.sizes import TINY
from fastrd.engine.profile import forward_flops
from fastrd.models import Folded, build_model

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of CPUs alone")
NETWORKS = {"cnn": 128, "resnet8": 128, "resnet20": 128, "resnet18": 64}  # and images
VARIANTS = ("ours", "layer by layer", "PyTorch")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("passes", ["forward", "input gradient"])
@pytest.mark.parametrize("arch", NETWORKS)
def test_network(measure, monkeypatch, arch, passes, variant):
    """Times of "input gradient" include the forward pass. Operations are those of the definition."""
    images = 2 if TINY else NETWORKS[arch]
    x = torch.rand(images, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    network = build_model(arch, num_classes=10).to(memory_format=torch.channels_last)
    flops = images * forward_flops(network, x[:1])
    if variant == "PyTorch":
        monkeypatch.setattr(native, "library", lambda: None)
    folded = Folded(network, x[:2])
    run = folded if variant == "ours" else folded.network
    upstream = torch.randn(images, 10)
    wanted = passes == "input gradient"

    def step():
        y = run(x.requires_grad_(wanted))
        return torch.autograd.grad(y, x, upstream) if wanted else y

    measure(
        step,
        problem=f"{arch}, {images} x 3 x 32 x 32: {passes}",
        variant=variant,
        bytes=None,
        flops=(1 + wanted) * flops,
        rounds=20,
    )
