"""Which networks run as chains of convolutions, and that they remain themselves."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from fastrd.kernels.cpu import native
from torch import nn

from fastrd.models import Folded, build_model, with_features

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler that takes the kernels")

NETWORKS = {
    "resnet8": {"arch": "resnet8", "width": 16},
    "resnet8, 5 channels": {"arch": "resnet8", "width": 16, "in_channels": 5},
    "cnn": {"arch": "cnn", "width": 16},
    "cnn, width 20": {"arch": "cnn", "width": 20},
    "preact_resnet18": {"arch": "preact_resnet18", "width": 8},
    "wrn-10-1": {"arch": "wrn-10-1"},
    "mobilenet_v2": {"arch": "mobilenet_v2"},
    "cnn, normalised": {"arch": "cnn", "width": 16, "normalize": ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))},
}
SIDES = [(32, 32), (13, 18)]


def case(name: str, sides: tuple[int, int] = (16, 16), images: int = 3):
    torch.manual_seed(0)
    options = dict(NETWORKS[name])
    model = build_model(options.pop("arch"), num_classes=7, **options).to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    x = torch.rand(images, model.in_channels, *sides).contiguous(memory_format=torch.channels_last)
    return model, Folded(model, x[:2]), x


class Instead(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def value_and_gradient(function, x):
    x = x.clone().requires_grad_()
    logits = function(x)
    return logits.detach(), torch.autograd.grad(F.cross_entropy(logits, torch.arange(len(x))), x)[0]


@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_input_gradient_are_the_networks(name, sides):
    _, folded, x = case(name, sides)
    assert torch.float32 in folded.chains
    exact = value_and_gradient(copy.deepcopy(folded.network).double(), x.double())
    for function in (folded, folded.network):
        for value, reference in zip(value_and_gradient(function, x), exact, strict=True):
            assert (value - reference).norm() <= 1e-5 * reference.norm()
    logits, features = folded(x, features=True)
    assert torch.equal(logits, folded(x))
    torch.testing.assert_close(features, folded.network(x, features=True)[1], rtol=1e-5, atol=1e-6)


def test_it_is_the_chain_that_runs(monkeypatch):
    _, folded, x = case("cnn")
    monkeypatch.setattr(folded.network, "embed", None)
    folded(x)
    with pytest.raises(TypeError):
        folded(x.contiguous())


@pytest.fixture
def tiles(monkeypatch):
    """A processor that multiplies tiles: where it is not one, they are computed a number at a time."""
    if native.library().chain_bf16_runs() == 0:
        pytest.skip("the system refuses the processor's tiles")
    monkeypatch.setattr("fastrd.models.chained.multiplies_tiles", lambda: True)


@pytest.mark.parametrize("name", NETWORKS)
def test_under_autocast_the_chain_is_the_one_in_bfloat16(name, tiles, monkeypatch):
    _, folded, x = case(name)
    exact = value_and_gradient(copy.deepcopy(folded.network).double(), x.double())
    monkeypatch.setattr(folded.network, "embed", None)
    with torch.autocast("cpu", torch.bfloat16):
        logits, gradient = value_and_gradient(folded, x)
    assert 1e-4 * exact[0].norm() < (logits - exact[0]).norm() <= 0.03 * exact[0].norm()
    assert F.cosine_similarity(gradient.flatten(), exact[1].flatten().float(), dim=0) > 0.95
    assert not torch.equal(folded(x), logits), "without autocast it is the other"


def test_without_tiles_there_is_none_in_bfloat16(monkeypatch):
    monkeypatch.setattr("fastrd.models.chained.multiplies_tiles", lambda: False)
    assert case("cnn")[1].chains.keys() == {torch.float32}


def test_it_follows_the_source_through_refresh():
    model, folded, x = case("cnn")
    stale = folded(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folded.refresh()
    assert not torch.allclose(folded(x), stale)
    torch.testing.assert_close(folded(x), folded.network(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda folded, x: (folded.network.double(), x.double()), "float64"),
        (lambda folded, x: (folded.network, x.contiguous()), "another memory format"),
    ],
)
def test_what_it_is_not_made_for_runs_through_the_network(change, why):
    _, folded, x = case("cnn")
    network, x = change(folded, x)
    assert torch.equal(folded(x), network(x)), why


@pytest.mark.parametrize("name", ["cnn", "cnn, normalised"])
@pytest.mark.parametrize("channels", [1, 16])
def test_images_with_other_channels_are_refused_after_the_first_too(name, channels):
    _, folded, x = case(name)
    folded(x)
    wrong = torch.rand(2, channels, 16, 16).contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"x: got shape .*accepted: \(N, 3, H, W\)"):
        folded(wrong)


@pytest.mark.parametrize(
    "instead",
    [
        lambda x: x.sigmoid(),
        lambda x: x.relu() + x,
        lambda x: 2 * x.relu(),
        lambda x: F.avg_pool2d(x, 2),
        lambda x: F.relu6(x),
        lambda x: F.conv2d(x, torch.ones(16, 4, 3, 3), groups=4),
        lambda x: F.conv2d(x, torch.ones(16, 16, 1, 1), dilation=2),
        lambda x: F.conv2d(x, torch.ones(16, 16, 3, 1), padding=(1, 0)),
        lambda x: F.batch_norm(x, None, None, training=True),
        lambda x: x.mean((2, 3), keepdim=True),
        lambda x: x[:, :, 1:],
    ],
)
def test_a_network_with_other_layers_runs_as_it_is(instead, monkeypatch):
    model = build_model("cnn", num_classes=3, width=16).to(memory_format=torch.channels_last)
    monkeypatch.setattr(model, "bn1", Instead(instead))
    x = torch.rand(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    folded = Folded(model, x)
    assert not folded.chains
    assert torch.equal(folded(x), folded.network(x))


def test_somebody_elses_network_is_not_looked_into():
    body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Flatten(), nn.Linear(1024, 2))
    x = torch.rand(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    folded = Folded(with_features(body), x)
    assert not folded.chains
    assert torch.equal(folded(x), folded.network(x))


def test_in_inference_mode_it_follows_too():
    model, folded, x = case("cnn")
    with torch.inference_mode():
        stale = folded(x)
        model.conv1.weight.mul_(1.5)
        folded.refresh()
        assert not torch.allclose(folded(x), stale)
        torch.testing.assert_close(folded(x), folded.network(x), rtol=1e-5, atol=1e-6)
