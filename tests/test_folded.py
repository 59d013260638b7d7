"""Networks folded for eval mode against the networks themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastrd.models import Folded, build_model, with_features


def shaken(model: nn.Module) -> nn.Module:
    """The model with batch norms that do something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.1)
    return model


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(
    ("arch", "left"),
    # A norm that follows an addition has no convolution of its own.
    [("cnn", 0), ("resnet8", 0), ("mobilenet_v2", 0), ("preact_resnet18", 8), ("wrn-10-1", 4)],
)
def test_same_logits_features_and_input_gradient(arch, left):
    model = shaken(build_model(arch, num_classes=4)).double()
    x = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    folded = Folded(model, x[:2])
    assert (norms(folded.network), len(folded._folds)) == (left, norms(model) - left)
    model.eval()
    for ours, theirs in zip(folded.network(x, features=True), model(x, features=True), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    x.requires_grad_()
    gradients = [torch.autograd.grad(net(x).square().sum(), x)[0] for net in (folded.network, model)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)


def test_the_source_is_left_alone_and_refresh_follows_it():
    model = shaken(build_model("resnet8", num_classes=4)).train()
    before = copy.deepcopy(model.state_dict())
    x = torch.rand(4, 3, 32, 32)
    folded = Folded(model, x[:2])
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not folded.network.training and not any(p.requires_grad for p in folded.network.parameters())

    places = [t.data_ptr() for t in folded.network.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    stale = folded.network(x)
    folded.refresh()
    fresh = folded.network(x)
    assert not torch.allclose(fresh, stale)
    torch.testing.assert_close(fresh, model.eval()(x), rtol=1e-4, atol=1e-5)
    assert places == [t.data_ptr() for t in folded.network.parameters()], "a captured graph reads these addresses"


class Shared(nn.Module):
    """What the convolution makes goes to the norm and past it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x):
        z = self.conv(x)
        return self.linear((self.norm(z) + z).mean((2, 3)))


class Hidden(Shared):
    """The same, but the autograd graph does not show it."""

    def forward(self, x):
        z = self.conv(x)
        return self.linear((self.norm(z) + z.detach()).mean((2, 3)))


class Repeated(Shared):
    """One convolution with one norm, run twice: folding is right for both runs, but not looked into."""

    def forward(self, x):
        return self.linear(self.norm(self.conv(x)).mean((2, 3)) + self.norm(self.conv(x / 2)).mean((2, 3)))


class Reading(Shared):
    """Folding would be right, but takes away what forward reads."""

    def forward(self, x):
        return self.linear(self.norm(self.conv(x).to(self.norm.weight.dtype)).mean((2, 3)))


@pytest.mark.parametrize("network", [Shared, Hidden, Repeated, Reading])
def test_what_cannot_be_folded_is_left_as_it_is(network):
    model, x = shaken(network()), torch.rand(5, 3, 8, 8)
    folded = Folded(model, x[:2])
    assert len(folded._folds) == 0
    assert torch.equal(folded.network(x), model.eval()(x))
    model.linear.bias.data += 1
    folded.refresh()
    assert torch.equal(folded.network(x), model(x))


class Tied(Shared):
    """The weight that is folded is another layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.last = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
        self.last.weight = self.other.weight

    def forward(self, x):
        return self.linear(self.last(self.norm(self.other(self.conv(x)))).mean((2, 3)))


class Hooked(Shared):
    """A hook changes what the convolution made."""

    def __init__(self) -> None:
        super().__init__()
        self.conv.register_forward_hook(lambda module, inputs, output: 2 * output)

    def forward(self, x):
        return self.linear(self.norm(self.conv(x)).mean((2, 3)))


class Aliased(Hooked):
    """The norm has two names, of which one is used."""

    def __init__(self) -> None:
        Shared.__init__(self)
        self.used = self.norm

    def forward(self, x):
        return self.linear(self.used(self.conv(x)).mean((2, 3)))


class Renewed(Shared):
    """A forward pass puts another tensor in the place of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.seen = self.seen + x.mean().detach()
        return self.linear(self.norm(self.conv(x - self.seen)).mean((2, 3)))


@pytest.mark.parametrize("network", [Tied, Hooked, Aliased, Renewed])
def test_a_network_that_is_not_trained_yet_is_followed_in_training(network):
    """Its norms change nothing at first, so that a mistake would not show when it is folded."""
    model, x = network(), torch.rand(5, 3, 8, 8)
    folded = Folded(model, x[:2])
    shaken(model).train()(x)
    folded.refresh()
    torch.testing.assert_close(folded.network(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_norms_without_statistics_or_affine_parameters():
    x = torch.rand(5, 3, 8, 8)
    body = [nn.Conv2d(3, 4, 3, bias=True), nn.BatchNorm2d(4, affine=False), nn.ReLU()]
    tail = [nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.Linear(64, 2)]
    model = nn.Sequential(*body, *tail)
    model[1].running_mean.normal_()
    folded = Folded(model, x[:2])
    assert len(folded._folds) == 1, "a norm that uses the statistics of its batch is no affine map"
    torch.testing.assert_close(folded.network(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_foreign_and_compiled_modules():
    model = shaken(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)))
    x = torch.rand(5, 3, 8, 8)
    expected = copy.deepcopy(model).eval()(x)
    for source in (with_features(model), torch.compile(model)):
        folded = Folded(source, x[:2])
        assert len(folded._folds) == 1
        torch.testing.assert_close(folded.network(x), expected, rtol=1e-4, atol=1e-5)
    assert folded.network is not model


class Casts(TorchDispatchMode):
    """How often weights of convolutions are cast."""

    def __init__(self):
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found += func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("arch", ["cnn", "preact_resnet18", "mobilenet_v2", "dm-wrn-10-1"])
def test_under_autocast_weights_are_cast_once_for_all_passes_and_follow_the_source(arch, monkeypatch):
    monkeypatch.setenv("FASTRD_FORM", "pytorch")
    model = shaken(build_model(arch, num_classes=4)).to(memory_format=torch.channels_last)
    x = torch.rand(2, 3, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_()
    folded = Folded(model, x.detach())

    def results(network):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, features = network(x, features=True)
        return logits, features, torch.autograd.grad(logits.sum(), x)[0]

    for _ in range(2):
        assert all(map(torch.equal, results(folded), results(folded.network)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)
        assert all(map(torch.equal, results(folded), results(folded.network)))
        folded.refresh()
    with Casts() as casts:
        results(folded)
    assert casts.found == 0
    with Casts() as casts:
        results(folded.network)
    assert casts.found > 0
    plain = folded.network(x)
    assert all(p.dtype == torch.float32 for p in folded.network.parameters()) and plain.dtype == torch.float32


def test_a_network_without_parameters_is_served():
    folded = Folded(nn.Flatten(), torch.zeros(2, 3, 4, 4))
    assert folded(torch.ones(2, 3, 4, 4)).shape == (2, 48)


def test_the_default_dtype_of_the_caller_changes_no_logit():
    network = build_model("resnet8", num_classes=10, in_channels=3).eval().to(memory_format=torch.channels_last)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.bias.data.uniform_(-0.5, 0.5)
    x = torch.rand(4, 3, 32, 32).to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = network(x)
        torch.set_default_dtype(torch.float64)
        try:
            found = Folded(network, x[:2])(x)
        finally:
            torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
