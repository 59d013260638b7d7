"""A frozen network as one operation against the network itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrd.models import Folded, build_model, with_features
from fastrd.models.tape import Tape

NETWORKS = {
    "resnet8": {"arch": "resnet8", "width": 16},
    "resnet8, 5 channels": {"arch": "resnet8", "width": 16, "in_channels": 5},
    "cnn": {"arch": "cnn", "width": 16},
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


def value_and_gradient(function, x):
    x = x.clone().requires_grad_()
    logits = function(x)
    return logits.detach(), torch.autograd.grad(F.cross_entropy(logits, torch.arange(len(x))), x)[0]


@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_and_input_gradient_are_the_networks(name, sides):
    _, folded, x = case(name, sides)
    ours, theirs = value_and_gradient(folded, x), value_and_gradient(folded.network, x)
    assert isinstance(folded._layers, Tape), "the network was written down"
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-7)
    assert ours[1].is_contiguous(memory_format=torch.channels_last)
    exact = value_and_gradient(folded.network.double(), x.double())
    for value, reference in zip(ours, exact, strict=True):
        assert (value - reference).norm() <= 1e-5 * reference.norm()


def test_without_gradient_values_are_dropped_once_read():
    _, folded, x = case("resnet8")
    folded(x)
    kept, dropped = (folded._layers.run(x, keep=keep) for keep in (True, False))
    assert torch.equal(kept[-1], dropped[-1])
    assert None not in kept and dropped[:-1] == [None] * len(folded._layers.layers)


def test_several_passes_may_wait_for_their_gradients():
    """Two images at once through one network, and one pass asked twice, as FAB does."""
    _, folded, x = case("resnet8")
    mirror = 1 - x
    x, mirror = x.requires_grad_(), mirror.requires_grad_()
    first, second = folded(x), folded(mirror)
    joint = torch.autograd.grad((first * second).sum(), (x, mirror), retain_graph=True)
    again = torch.autograd.grad((first * second).sum(), (x, mirror))
    expected = torch.autograd.grad((folded.network(x) * folded.network(mirror)).sum(), (x, mirror))
    for a, b, c in zip(joint, again, expected, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-6)


def test_it_follows_the_source_through_refresh():
    model, folded, x = case("cnn")
    stale = folded(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folded.refresh()
    assert not torch.allclose(folded(x), stale)
    assert torch.equal(folded(x), folded.network(x))


def test_a_second_derivative_is_refused():
    _, folded, x = case("cnn")
    x.requires_grad_()
    (slope,) = torch.autograd.grad(folded(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        torch.autograd.grad(slope.square().sum(), x)


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
    assert folded._layers is None


@pytest.mark.parametrize("name", ["cnn", "cnn, normalised"])
@pytest.mark.parametrize("channels", [1, 16])
def test_images_with_other_channels_are_refused_after_the_first_too(name, channels):
    _, folded, x = case(name)
    folded(x)
    wrong = torch.rand(2, channels, 16, 16).contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"x: got shape .*accepted: \(N, 3, H, W\)"):
        folded(wrong)


@pytest.mark.parametrize("arch", ["wrn-10-1", "preact_resnet18", "mobilenet_v2"])
def test_a_network_with_other_layers_runs_as_it_is(arch):
    model = build_model(arch, num_classes=3).to(memory_format=torch.channels_last)
    x = torch.rand(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    folded = Folded(model, x)
    assert torch.equal(folded(x), folded.network(x))
    assert folded._layers is folded.network


def test_somebody_elses_network_is_not_looked_into():
    body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Flatten(), nn.Linear(1024, 2))
    x = torch.rand(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    folded = Folded(with_features(body), x)
    assert torch.equal(folded(x), folded.network(x))
    assert folded._layers is None
