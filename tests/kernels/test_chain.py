"""chain: networks of layers and their input gradient against PyTorch in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial

import mutants
import pytest
import torch
import torch.nn.functional as F
from fastrd.kernels.cpu import chain as module
from fastrd.kernels.cpu import native
from fastrd.kernels.cpu.chain import Chain, Convolution, Normalization
from torch import Tensor

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler that takes the kernels")

# x, kernel, stride, padding, channels out, add, relu. Kernels: 0 is a normalisation, one below 0 is for each channel.
Spec = tuple[int, int, int, int, int, int | None, bool]

STEM: Spec = (0, 3, 1, 1, 16, None, True)
Layers = list[Convolution | Normalization]
CHAINS: dict[str, list[Spec]] = {
    "stem": [STEM],
    "stem, halved": [(0, 3, 2, 1, 16, None, True)],
    "no relu": [(0, 3, 1, 1, 16, None, False)],
    "block": [STEM, (1, 3, 1, 1, 16, None, True), (2, 3, 1, 1, 16, 1, True)],
    "two blocks": [
        STEM,
        (1, 3, 1, 1, 16, None, True),
        (2, 3, 1, 1, 16, 1, True),
        (3, 3, 1, 1, 16, None, True),
        (4, 3, 1, 1, 16, 3, True),
    ],
    "projection": [
        STEM,
        (1, 3, 2, 1, 32, None, True),
        (1, 1, 2, 0, 32, None, False),
        (2, 3, 1, 1, 32, 3, True),
        (4, 3, 2, 1, 64, None, True),
    ],
    "added where it is convolved": [STEM, (1, 3, 1, 1, 16, 1, True)],
    "images read twice": [STEM, (0, 3, 1, 1, 16, None, False), (1, 3, 1, 1, 16, 2, True)],
    "wide, and a kernel of one": [STEM, (1, 3, 1, 1, 20, None, True), (2, 1, 1, 0, 40, None, True)],
    "strides over three vectors": [STEM, (1, 1, 1, 0, 40, None, True), (2, 3, 2, 1, 24, None, True)],
    "channels that fill no vector": [
        (0, 3, 1, 1, 12, None, True),
        (1, 3, 1, 1, 12, 1, True),
        (2, 3, 2, 1, 24, None, False),
        (2, 1, 2, 0, 24, 3, True),
        (4, 3, 1, 1, 7, None, True),
    ],
    "each channel by itself": [
        STEM,
        (1, 1, 1, 0, 40, None, True),
        (2, -3, 1, 1, 40, None, True),
        (3, 1, 1, 0, 16, 1, False),
        (4, -3, 2, 1, 16, None, True),
        (5, -2, 2, 0, 16, None, False),
    ],
    "normalised after sums": [
        (0, 3, 1, 1, 16, None, False),
        (1, 0, 1, 0, 16, None, True),
        (2, 3, 1, 1, 16, None, True),
        (3, 3, 1, 1, 16, 1, False),
        (4, 0, 1, 0, 16, None, True),
        (5, 1, 2, 0, 24, None, False),
        (5, 3, 2, 1, 24, None, True),
        (7, 3, 1, 1, 24, 6, False),
        (8, 0, 1, 0, 24, None, True),
    ],
    "all linear": [(0, 3, 2, 1, 16, None, False), (1, 3, 1, 1, 16, 1, False), (2, 2, 2, 0, 32, None, False)],
}


def build(specs: list[Spec], channels: int = 3) -> Layers:
    width, layers = [channels], []
    for number, (x, kernel, stride, padding, k, add, relu) in enumerate(specs):
        if kernel == 0:
            mean, gamma, beta = torch.randn(3, k) / 3
            layers.append(Normalization(x, mean, torch.rand(k) + 0.5, 1 + gamma, beta, 0.1, relu))
        else:
            groups, side = (1, kernel) if kernel > 0 else (k, -kernel)
            weight = torch.randn(k, width[x] // groups, side, side) / side / (width[x] // groups) ** 0.5
            bias = torch.randn(k) / 3 if number % 3 != 2 else None
            layers.append(Convolution(x, weight, bias, add, stride, padding, relu, groups))
        width.append(k)
    return layers


def results(layers: Layers, x: Tensor) -> list[Tensor]:
    """What the layers make of x, before ReLU, by definition."""
    before, values = [], [x]
    for layer in layers:
        if isinstance(layer, Normalization):
            mean, var, gamma, beta = (tensor.to(x)[:, None, None] for tensor in layer.tensors())
            y = (values[layer.x] - mean) * gamma / (var + layer.eps).sqrt() + beta
        else:
            weight, bias = (None if t is None else t.to(x) for t in (layer.weight, layer.bias))
            y = F.conv2d(values[layer.x], weight, bias, layer.stride, layer.padding, groups=layer.groups)
        before.append(y if layer.add is None else y + values[layer.add])
        values.append(before[-1].relu() if layer.relu else before[-1])
    return [*before, values[-1].mean((2, 3))]


def images(layers: Layers, *shape: int) -> Tensor:
    """For which nothing that ReLU is applied to is within rounding of zero, but for sums of nothing else."""
    while True:
        x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        *before, _ = results(layers, x.double())
        cut = [y for y, layer in zip(before, layers, strict=True) if layer.relu]
        if all(y[y != 0].abs().min() > 2e-6 * y.square().mean().sqrt() for y in cut):
            return x


def value_and_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return y.detach(), torch.autograd.grad(y, x, upstream)[0]


def assert_exact(chain: Chain, layers: Layers, x: Tensor) -> None:
    found = value_and_gradient(chain, x)
    exact = value_and_gradient(lambda x: results(layers, x)[-1], x.double())
    for name, ours, gold in zip(("value", "gradient"), found, exact, strict=True):
        assert ours.shape == gold.shape and ours.dtype == torch.float32, name
        assert (ours - gold).norm() <= 3e-6 * gold.norm(), name
    assert found[1].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(chain(x), found[0]), "the same without a gradient"


def case(
    name: str = "projection", *, n: int = 5, channels: int = 3, sides: tuple[int, int] = (8, 8)
) -> tuple[Chain, Layers, Tensor]:
    torch.manual_seed(0)
    layers = build(CHAINS[name], channels)
    x = images(layers, n, channels, *sides)
    return Chain(layers, x), layers, x


@pytest.mark.parametrize("channels", [1, 3, 5, 16])
@pytest.mark.parametrize("sides", [(8, 8), (13, 18), (13, 16), (3, 5)], ids=str)
@pytest.mark.parametrize("name", CHAINS)
def test_value_and_gradient_are_exact_to_rounding(name, sides, channels):
    assert_exact(*case(name, sides=sides, channels=channels))


@pytest.mark.parametrize("n", [0, 1, 3, 4, 9])
def test_any_number_of_images(n):
    chain, layers, x = case(n=max(n, 1))
    if n:
        assert_exact(chain, layers, x)
    else:
        y, dx = value_and_gradient(chain, x[:0])
        assert y.shape == (0, 64) and dx.shape == (0, 3, 8, 8)


def test_one_chain_takes_images_of_several_sizes():
    chain, layers, _ = case()
    for sides in ((6, 11), (8, 8), (16, 4)):
        assert_exact(chain, layers, images(layers, 2, 3, *sides))


HALF = [name for name in CHAINS if name != "images read twice"]


def whole_numbers(name: str, channels: int, *sides: int) -> tuple[Chain, Layers, Tensor]:
    """A chain in bfloat16 all of whose numbers are whole and small, so that none is rounded."""
    torch.manual_seed(0)
    layers: Layers = []
    for layer in build(CHAINS[name], channels):
        if isinstance(layer, Normalization):
            mean, gamma, beta = torch.randint(-1, 2, (3, layer.channels)).float()
            layers.append(Normalization(layer.x, mean, torch.full_like(mean, 0.25), gamma / 2, beta, 0, layer.relu))
            continue
        k, c, *kernel = layer.weight.shape
        weight = torch.zeros(k, c * math.prod(kernel))
        for _ in range(2):
            weight.scatter_(1, torch.randint(weight.shape[1], (k, 1)), torch.randint(-1, 2, (k, 1)).float())
        layers.append(layer._replace(weight=weight.reshape(k, c, *kernel), bias=None))
    layers[0] = layers[0]._replace(bias=torch.randint(-2, 3, (layers[0].channels,)).float())
    x = torch.randint(-3, 4, (5, channels, *sides)).float().contiguous(memory_format=torch.channels_last)
    return Chain(layers, x, dtype=torch.bfloat16), layers, x


@pytest.mark.parametrize("channels", [1, 3, 5, 16])
@pytest.mark.parametrize("sides", [(8, 8), (4, 32), (16, 8), (32, 32)], ids=str)
@pytest.mark.parametrize("name", HALF)
def test_in_bfloat16_whole_numbers_are_exact(name, sides, channels):
    assert_whole_numbers_are_exact(name, channels, *sides)


def assert_whole_numbers_are_exact(name: str, channels: int, *sides: int) -> None:
    chain, layers, x = whole_numbers(name, channels, *sides)
    upstream = 1024 * torch.randint(-3, 4, (5, layers[-1].channels))
    for function, values in ((chain, x), (lambda x: results(layers, x)[-1], x.double())):
        values.requires_grad_()
        y = function(values)
        y.backward(upstream.to(y))
        if function is chain:
            ours = y.detach(), values.grad
    assert torch.equal(ours[0].double(), y) and torch.equal(ours[1].double(), values.grad)
    assert y.count_nonzero() > y.numel() / 10 and values.grad.count_nonzero() > values.numel() / 100


@pytest.mark.parametrize("sides", [(8, 8), (13, 18), (13, 16), (3, 5), (9, 21)], ids=str)
@pytest.mark.parametrize("name", HALF)
def test_in_bfloat16_numbers_have_eight_bits(name, sides):
    assert_eight_bits(name, *sides)


def assert_eight_bits(name: str, *sides: int) -> None:
    """Each rounding is by 2^-9 at most. (Where ReLU decides, it may do so the other way: no bound for gradients.)"""
    _, layers, x = case(name, sides=sides)
    found = value_and_gradient(Chain(layers, x, dtype=torch.bfloat16), x)
    exact = value_and_gradient(lambda x: results(layers, x)[-1], x.double())
    roundings = 2 * len(layers) + 1  # of each weight, of each value, of the gradient or the images
    for ours, gold in list(zip(found, exact, strict=True))[: 1 if any(layer.relu for layer in layers) else 2]:
        assert 1e-6 * gold.norm() < (ours - gold).norm() <= roundings * 2**-9 * gold.norm()


def test_in_bfloat16_images_keep_sixteen_bits():
    """A change of less than bfloat16 can tell from 1 is seen: attacks move pixels by as little."""
    weight = torch.zeros(16, 3, 3, 3)
    weight[:, 0, 1, 1] = 1
    x = torch.ones(1, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    chain = Chain([Convolution(0, weight, torch.full((16,), -1.0), None, 1, 1, False)], x, dtype=torch.bfloat16)
    y = chain(x + 2**-12)
    assert (y == 2**-12).all()


def test_in_bfloat16_an_image_is_the_same_in_any_batch_and_on_any_number_of_threads(set_threads):
    _, layers, x = case("projection", n=9)
    chain = Chain(layers, x, dtype=torch.bfloat16)
    whole = chain(x)
    for threads in (1, 2):
        set_threads(threads)
        for part in (slice(0, 9), slice(0, 1), slice(3, 8)):
            assert torch.equal(chain(x[part]), whole[part])


@pytest.mark.parametrize(
    "change",
    [{"add": 0}, {"padding": 2}, {"weight": torch.zeros(16, 3, 2, 4), "stride": 2}],
    ids=str,
)
def test_what_bfloat16_has_no_tiles_for_is_refused(change):
    x = torch.zeros(1, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"layers\[0\]: got"):
        Chain(
            [Convolution(0, torch.zeros(16, 3, 3, 3), None, None, 1, 1, True)._replace(**change)],
            x,
            dtype=torch.bfloat16,
        )


def random_specs(seed: int) -> list[Spec]:
    """Layers that read any values of fitting shapes."""
    rng = random.Random(seed)
    specs: list[Spec] = []
    shapes = [(9, 3)]
    for _ in range(rng.randint(2, 8)):
        x = rng.choice([len(shapes) - 1, len(shapes) - 1, rng.randrange(len(shapes))])
        kernel, stride, padding = rng.choice(
            [(3, 1, 1), (3, 1, 1), (3, 2, 1), (1, 2, 0), (1, 1, 0), (0, 1, 0), (-3, 2, 1)]
        )
        if kernel == 0 and x > 0:
            made, add = shapes[x], None
        else:
            kernel = kernel if kernel > 0 or (kernel < 0 < x) else 3
            k = shapes[x][1] if kernel < 0 else rng.choice([12, 16, 32])
            made = (shapes[x][0] + 2 * padding - abs(kernel)) // stride + 1, k
            fitting = [None, *(value for value, shape in enumerate(shapes) if shape == made and value > 0)]
            add = rng.choice(fitting[-2:])
        specs.append((x, kernel, stride, padding, made[1], add, rng.random() < 0.7))
        shapes.append(made)
    return specs


def allowed(specs: list[Spec]) -> bool:
    """Each result is read; one that is added is read by no later layer and, made by ReLU, by one up to then."""
    for value in range(1, len(specs)):
        convolved = [number for number, spec in enumerate(specs) if spec[0] == value]
        added = [number for number, spec in enumerate(specs) if spec[5] == value]
        if not convolved + added or len(added) > 1:
            return False
        if added and any(number > added[0] for number in convolved):
            return False
        if added and specs[value - 1][6] and not convolved:
            return False
    return True


@pytest.mark.parametrize("seed", range(150))
def test_random_networks(seed):
    specs = random_specs(seed)
    torch.manual_seed(seed)
    layers = build(specs)
    x = images(layers, 5, 3, 9, 9)
    if allowed(specs):
        assert_exact(Chain(layers, x), layers, x)
    else:
        with pytest.raises(ValueError, match="layers: got v"):
            Chain(layers, x)


def test_random_networks_are_of_both_kinds():
    kinds = [allowed(random_specs(seed)) for seed in range(150)]
    assert 40 < sum(kinds) < 110


@pytest.mark.parametrize("large", [False, True])
def test_an_image_is_the_same_in_any_batch_and_on_any_number_of_threads(large, monkeypatch, set_threads):
    if large:
        monkeypatch.setattr(module, "OUTWEIGHS", 0)
    chain, _, x = case(n=70)
    upstream = torch.randn(70, 64)

    def there_and_back(part: slice) -> tuple[Tensor, Tensor]:
        y, signs = chain.run(x[part])
        return y, chain.backward(upstream[part], x[part].shape, signs)

    whole = there_and_back(slice(70))
    for threads in (1, 2, 5):
        set_threads(threads)
        for part in (slice(70), slice(1), slice(33, 42), slice(69, 70)):
            for all_of_it, some in zip(whole, there_and_back(part), strict=True):
                assert torch.equal(all_of_it[part], some), (threads, part)


def test_several_passes_may_wait_for_their_gradients():
    """Two images at once through one network, and one pass asked twice, as FAB does."""
    chain, layers, x = case()
    mirror = (-x).requires_grad_()
    x.requires_grad_()
    first, second = chain(x), chain(mirror)
    joint = torch.autograd.grad((first * second).sum(), (x, mirror), retain_graph=True)
    again = torch.autograd.grad((first * second).sum(), (x, mirror))
    both = (results(layers, image)[-1] for image in (x, mirror))
    expected = torch.autograd.grad(torch.mul(*both).sum(), (x, mirror))
    for a, b, c in zip(joint, again, expected, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("what", ["weight", "bias"])
@pytest.mark.parametrize("how", ["in place", "in inference mode", "another storage"])
def test_parameters_are_those_of_the_moment(what, how):
    chain, layers, x = case()
    stale = value_and_gradient(chain, x)
    tensor = getattr(layers[1], what)
    if how == "another storage":
        tensor.data = tensor * 1.5
    else:
        with torch.inference_mode(how == "in inference mode"):
            tensor.mul_(1.5)
    fresh = value_and_gradient(chain, x)
    expected = value_and_gradient(Chain(layers, x), x)
    for old, new, gold in zip(stale, fresh, expected, strict=True):
        assert not torch.equal(old, new) and torch.equal(new, gold)


def test_a_weight_that_changes_before_the_backward_pass_is_said():
    chain, layers, x = case()
    y = chain(x.requires_grad_())
    with torch.no_grad():
        layers[1].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified in place between the forward and the backward pass"):
        y.sum().backward()


def test_a_weight_may_lie_in_memory_in_any_order():
    chain, layers, x = case()
    moved = [c._replace(weight=c.weight.transpose(2, 3).contiguous().transpose(2, 3)) for c in layers]
    assert any(a.weight.stride() != b.weight.stride() for a, b in zip(moved, layers, strict=True))
    for a, b in zip(value_and_gradient(chain, x), value_and_gradient(Chain(moved, x), x), strict=True):
        assert torch.equal(a, b)


def test_a_gradient_may_lie_in_memory_in_any_order():
    chain, _, x = case()
    x.requires_grad_()
    weight = torch.randn(64, 5)
    one = torch.autograd.grad((chain(x).t() * weight).sum(), x)[0]
    assert torch.equal(one, torch.autograd.grad(chain(x), x, weight.t().contiguous())[0])


def test_nan_stays_nan_in_its_image():
    chain, _, x = case("block")
    x[2, 1, 3, 3] = float("nan")
    y, dx = value_and_gradient(chain, x)
    others = [0, 1, 3, 4]
    assert y[2].isnan().all() and y[others].isfinite().all()
    assert dx[others].isfinite().all() and dx[2].isfinite().all()  # a NaN lets the gradient through


def test_relu_has_no_slope_at_zero():
    x = torch.zeros(3, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    layers = [conv._replace(bias=None) for conv in build(CHAINS["projection"])]
    _, dx = value_and_gradient(Chain(layers, x), x)
    assert not dx.any()


def test_a_second_derivative_is_refused():
    chain, _, x = case()
    x.requires_grad_()
    (slope,) = torch.autograd.grad(chain(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()


def test_images_too_small_for_a_layer_are_refused():
    layers = build([(0, 2, 2, 0, 16, None, True), (1, 2, 2, 0, 16, None, True)])
    chain = Chain(layers, torch.zeros(1, 3, 4, 4))
    for side in (3, 1, 0):
        with pytest.raises(ValueError, match=rf"x: got shape \(2, 3, {side}, {side}\); accepted: images of which"):
            chain(torch.zeros(2, 3, side, side).contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize(
    "change",
    [
        Tensor.contiguous,
        Tensor.double,
        lambda x: x[:, :2],
        lambda x: x[0],
        lambda x: x[:, :, ::2],
        lambda x: x.to("meta"),
    ],
    ids=["contiguous", "float64", "2 channels", "one image", "every other line", "elsewhere"],
)
def test_other_images_are_refused(change):
    chain, _, x = case(sides=(8, 8))
    with pytest.raises(ValueError, match=r"x: got .*; accepted: float32 \(N, 3, H, W\) in channels_last on a CPU"):
        chain(change(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layers: [], "layers: got 0; accepted: at least one"),
        (lambda layers: [Normalization(0, *torch.ones(4, 3), 0, True)], "the first a convolution"),
        (lambda layers: [layers[0], Normalization(0, *torch.ones(4, 3), 0, True)], "accepted: what a layer made"),
        (lambda layers: [layers[0], Normalization(1, *torch.ones(4, 3), 0, True)], "and four of 16 numbers"),
        (
            lambda layers: [layers[0], layers[1]._replace(x=2)],
            r"layers\[1\]: got x=2, add=None; accepted: values",
        ),
        (lambda layers: [layers[0]._replace(add=-1)], r"layers\[0\]: got x=0, add=-1"),
        (
            lambda layers: [layers[0]._replace(stride=3)],
            "stride 3, padding 1, 1 groups; accepted: .* of at most 9 taps, stride 1 or 2",
        ),
        (
            lambda layers: [layers[0]._replace(weight=layers[0].weight.double())],
            "got torch.float64 on cpu, .*; accepted: float32 on a CPU",
        ),
        (lambda layers: [layers[0], layers[1]._replace(x=0)], r"channels; accepted: 3 in"),
        (lambda layers: [layers[0]._replace(groups=3)], "padding 1, 3 groups; accepted: .* of as many groups"),
        (
            lambda layers: [layers[0]._replace(bias=torch.zeros(3))],
            r"got weight and bias for \(3, 3\) channels",
        ),
        (
            lambda layers: [layers[0], layers[1]._replace(add=1)],
            r"got \(8, 8, 16\) to be added to \(4, 4, 32\)",
        ),
    ],
)
def test_layers_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Chain(change(build(CHAINS["projection"])), torch.zeros(1, 3, 8, 8))


def test_without_a_compiler_there_is_no_chain(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler was found"):
        Chain(build(CHAINS["block"]), torch.zeros(1, 3, 8, 8))


def test_no_two_values_are_in_one_place():
    rng, memory, taken = random.Random(0), module._Places(math.prod), {}
    for _ in range(500):
        if taken and rng.random() < 0.45:
            place = rng.choice(list(taken))
            memory.free(place)
            del taken[place]
            continue
        shape = rng.randint(1, 5), rng.randint(1, 5), 16
        place, floats = memory.take(shape), shape[0] * shape[1] * shape[2]
        assert all(place + floats <= other or other + length <= place for other, length in taken.items())
        taken[place] = floats
        assert place + floats <= memory.size
    assert memory.size < sum(taken.values()) * 3


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("chain.cpp", "sum / float(pixels)", "sum"),
        ("chain.cpp", "layer.signs * n + first", "layer.signs + first"),
        ("chain.cpp", "now * strided[i]->bands", "strided[i]->bands"),
        ("strided.h", "column_inside[j + count - 1]", "column_inside[j]"),
        ("strided.h", "* FEW + i % LANES;", "* FEW + (i + 1) % LANES;"),
        ("vectors.h", "a[n > 1 ? 2 * i + 1 : 0]", "a[0]"),
        ("chain.cpp", "finish.keep : finish.clear", "finish.keep : finish.keep"),
        ("vectors.h", "if (clear) a = where", "if (clear && !add) a = where"),
        ("chain.cpp", "weight + p) + finish.shift(p, LANES)", "weight + p)"),
        ("chain.cpp", "(image * s.h + taps[t].h) * s.w", "image * s.h * s.w + taps[t].h * s.h"),
        ("depthwise.h", "dh % step || ", ""),
        ("depthwise.h", "dw / step >= s.w", "dw / step >= s.h"),
        (
            "vectors.h",
            "if (keep) keep[at / LANES] = positive(a);",
            "if (keep) keep[at / LANES] = positive(-a);",
        ),
    ],
)
def test_planted_bugs_are_caught(file, old, new, plant):
    plant(file, old, new, "chain.cpp")
    names = "projection", "two blocks", "images read twice", "normalised after sums", "each channel by itself"
    chains = [case(name, n=8, sides=(13, 16)) for name in names]
    mutants.assert_caught([partial(assert_exact, *one) for one in chains])


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("chain_bf16.cpp", "h + 2) * pitch(w, c)", "h + 1) * pitch(w, c)"),
        ("chain_bf16.cpp", "std::fill_n(y + i * line + c + w * c, after, 0);", ""),
        ("chain_bf16.cpp", "layer.signs * n + first", "layer.signs + first"),
        ("chain_bf16.cpp", "(y + i) * s.stride + tap", "y * s.stride + tap"),
        ("chain_bf16.cpp", "inside ? i * s.y_w + j : NONE", "i * s.y_w + j"),
        ("chain_bf16.cpp", "j + phase.together > s.y_w", "j + phase.together >= s.y_w"),
        ("chain_bf16.cpp", "phase.left + at % y_line * phase.span", "phase.left + at % y_line"),
        ("chain_bf16.cpp", "2 : 1) * own", "2 : 2) * own"),
        ("chain_bf16.cpp", "load16(sums[b][r])", "load16(sums[b][0])"),
        ("chain_bf16.cpp", "where16(signs[vector], a)", "where16(signs[vector + 1], a)"),
        ("chain_bf16.cpp", "last.bias ? a + load16(last.bias + c) : a", "a"),
        ("chain_bf16.cpp", "place(taps[t].h, taps[t].w, s.w, s.c)", "place(taps[t].h, taps[t].w, s.w, s.k + 1)"),
        ("depthwise.h", "dh % step || ", ""),
    ],
)
def test_planted_bugs_of_bfloat16_are_caught(file, old, new, plant):
    plant(file, old, new, "chain_bf16.cpp")
    cases = [(name, 3, *sides) for name in HALF for sides in ((4, 64), (8, 8))]
    checks = [partial(assert_whole_numbers_are_exact, *one) for one in cases]
    mutants.assert_caught([*checks, *(partial(assert_eight_bits, name, 9, 21) for name in HALF)])
