import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrd.models import ARCHITECTURES, build_model, classifier, with_features

CIFAR = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))

FAMILIES = [
    ("cnn", {"width": 4}),
    ("resnet8", {"width": 4}),
    ("resnet20", {}),
    ("resnet18", {"width": 4}),
    ("resnet34", {"width": 4}),
    ("preact_resnet18", {"width": 4}),
    ("preact_resnet34", {"width": 4, "final_bn": True, "shortcut": "input"}),
    ("wrn-10-1", {}),
    ("wrn-16-2", {"activation": "silu"}),
    ("dm-wrn-10-1", {}),
    ("mobilenet_v2", {}),
]


def lively(model, seed=0):
    """Batch norm as in a trained network: every statistic and affine parameter matters."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            size = module.num_features
            module.running_mean.copy_(0.3 * torch.randn(size, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(size, generator=generator))
            module.weight.data.copy_(0.5 + torch.rand(size, generator=generator))
            module.bias.data.copy_(0.3 * torch.randn(size, generator=generator))
    return model.eval()


def images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("arch", "classes", "parameters", "feature_dim"),
    [
        ("resnet18", 10, 11_173_962, 512),
        ("resnet18", 100, 11_220_132, 512),
        ("resnet34", 10, 21_282_122, 512),
        ("preact_resnet18", 10, 11_171_146, 512),
        ("mobilenet_v2", 10, 2_296_922, 1280),
        ("wrn-28-10", 10, 36_479_194, 640),
        ("wrn-28-10", 100, 36_536_884, 640),
        ("wrn-34-10", 10, 46_160_474, 640),
        ("dm-wrn-28-10", 10, 36_479_194, 640),
        ("dm-wrn-70-16", 10, 266_796_506, 1024),
        ("resnet20", 10, 272_474, 64),
    ],
)
def test_parameter_counts_are_the_published_ones(arch, classes, parameters, feature_dim):
    with torch.device("meta"):
        model = build_model(arch, num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert (model.feature_dim, model.num_classes) == (feature_dim, classes)


def test_every_listed_architecture_builds():
    for arch in ARCHITECTURES:
        with torch.device("meta"):
            assert build_model(arch, num_classes=3).spec["arch"] == arch


@pytest.mark.parametrize(("arch", "options"), FAMILIES)
def test_features_times_head_are_the_logits(arch, options):
    model = lively(build_model(arch, num_classes=7, **options))
    logits, features = model(images(3, 3, 32, 32), features=True)
    assert logits.shape == (3, 7) and features.shape == (3, model.feature_dim)
    assert torch.equal(model(images(3, 3, 32, 32)), logits)
    torch.testing.assert_close(F.linear(features, classifier(model).weight, classifier(model).bias), logits)
    assert features.std(0).max() > 0


@pytest.mark.parametrize(("arch", "options"), FAMILIES)
def test_any_memory_format_and_training_gives_every_parameter_a_gradient(arch, options):
    model = lively(build_model(arch, num_classes=7, **options)).double()
    x = images(4, 3, 32, 32).double()
    permuted = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(permuted(x.to(memory_format=torch.channels_last)), model(x))
    model.train()(x).logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert torch.equal(x, images(4, 3, 32, 32).double())


@pytest.mark.parametrize("arch", ["cnn", "resnet8"])
def test_small_nets_take_digits(arch):
    model = build_model(arch, num_classes=10, in_channels=1, image_size=8, normalize=([0.3], [0.4]))
    logits, features = model(images(2, 1, 8, 8), features=True)
    assert logits.shape == (2, 10) and features.shape == (2, model.feature_dim)


@pytest.mark.parametrize("arch", ["cnn", "resnet18", "preact_resnet18", "wrn-10-1", "dm-wrn-10-1", "mobilenet_v2"])
def test_large_images_get_a_stem_that_divides_by_four(arch):
    options = {"width": 4} if arch in ("cnn", "resnet18", "preact_resnet18") else {}
    model = build_model(arch, num_classes=10, image_size=96, **options).eval()
    assert model.spec["stem"] == "stl10"
    assert model.pool(model.conv1(images(1, 3, 96, 96))).shape[2:] == (24, 24)
    assert model(images(2, 3, 96, 96)).shape == (2, 10)
    forced = build_model(arch, num_classes=10, image_size=96, stem="cifar", **options)
    assert forced.pool(forced.conv1(images(1, 3, 96, 96))).shape[2] == (48 if arch == "cnn" else 96)
    assert build_model(arch, num_classes=10, image_size=64, **options).spec["stem"] == "cifar"


@pytest.mark.parametrize(("arch", "options"), FAMILIES)
def test_spec_rebuilds_the_network(arch, options):
    model = lively(build_model(arch, num_classes=5, normalize=CIFAR, **options))
    again = build_model(**json.loads(json.dumps(model.spec))).eval()
    assert again.spec == model.spec
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(again(images(2, 3, 32, 32)), model(images(2, 3, 32, 32)))


def test_normalization_is_inside_and_not_trained():
    torch.manual_seed(0)
    plain = build_model("cnn", num_classes=4).eval()
    torch.manual_seed(0)
    model = build_model("cnn", num_classes=4, normalize=CIFAR).eval()
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in CIFAR)
    x = images(2, 3, 16, 16)
    torch.testing.assert_close(model(x), plain((x - mean) / std))
    assert {"mean", "std"} == model.state_dict().keys() - plain.state_dict().keys()
    assert {"mean", "std"}.isdisjoint(dict(model.named_parameters()))


def test_weights_come_from_the_global_generator():
    def weights(seed):
        torch.manual_seed(seed)
        return build_model("resnet8", num_classes=4).state_dict()["layer2.0.conv1.weight"]

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_published_parameter_names():
    keys = build_model("resnet18", num_classes=2, width=2).state_dict().keys()
    assert {"conv1.weight", "bn1.running_var", "layer2.0.shortcut.0.weight", "layer4.1.bn2.bias"} <= keys
    assert {"layer2.0.shortcut.1.weight", "linear.bias"} <= keys
    keys = build_model("wrn-10-1", num_classes=2).state_dict().keys()
    assert {
        "conv1.weight",
        "block1.layer.0.bn1.weight",
        "block3.layer.0.convShortcut.weight",
        "fc.weight",
    } <= keys
    keys = build_model("mobilenet_v2", num_classes=2).state_dict().keys()
    assert {"layers.0.shortcut.1.weight", "layers.16.conv3.weight", "conv2.weight", "linear.weight"} <= keys
    keys = build_model("preact_resnet18", num_classes=2, width=2).state_dict().keys()
    assert {"layer1.0.bn1.weight", "layer2.0.shortcut.0.weight"} <= keys and "bn1.weight" not in keys


def wide_reference(state, x, count, act, same):
    """The wide ResNet written out, with the padding TensorFlow calls SAME computed from its definition."""

    def bn(x, name):
        values = (state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *values)

    def conv(x, name, stride):
        weight = state[name]
        if not same:
            return F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)
        total = [max((-(-size // stride) - 1) * stride + weight.shape[2] - size, 0) for size in x.shape[2:]]
        sides = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
        return F.conv2d(F.pad(x, sides), weight, stride=stride)

    x = conv(x, "conv1.weight", 1)
    for stage in (1, 2, 3):
        for block in range(count):
            name, stride = f"block{stage}.layer.{block}", 2 if stage > 1 and block == 0 else 1
            a = act(bn(x, f"{name}.bn1"))
            out = conv(act(bn(conv(a, f"{name}.conv1.weight", stride), f"{name}.bn2")), f"{name}.conv2.weight", 1)
            project = f"{name}.convShortcut.weight"
            x = out + (F.conv2d(a, state[project], stride=stride) if project in state else x)
    x = act(bn(x, "bn1")).mean((2, 3))
    return F.linear(x, state["fc.weight"], state["fc.bias"])


def test_wide_resnets_of_deepmind_move_bn_statistics_slowly():
    for arch, momentum in (("dm-wrn-10-1", 0.01), ("wrn-10-1", 0.1)):
        norms = [m for m in build_model(arch, num_classes=2).modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms and {norm.momentum for norm in norms} == {momentum}, arch


@pytest.mark.parametrize(("arch", "act", "same"), [("wrn-16-2", F.relu, False), ("dm-wrn-16-2", F.silu, True)])
@pytest.mark.parametrize("side", [16, 18])
def test_wide_resnets_against_the_formula(arch, act, same, side):
    model = lively(build_model(arch, num_classes=6).double())
    x = images(2, 3, side, side).double()
    torch.testing.assert_close(model(x), wide_reference(model.state_dict(), x, 2, act, same))


def test_preact_resnet_variants_against_the_formula():
    for shortcut in ("activated", "input"):
        model = build_model("preact_resnet18", num_classes=6, width=4, final_bn=True, shortcut=shortcut)
        model = lively(model).double()
        x = images(2, 3, 16, 16).double()
        h = model.conv1(x)
        for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
            for block in layer:
                a = block.bn1(h).relu()
                out = block.conv2(block.bn2(block.conv1(a)).relu())
                if block.shortcut is not None:
                    h = block.shortcut[0](a if shortcut == "activated" else h)
                h = h + out
        torch.testing.assert_close(model(x), model.linear(model.bn(h).relu().mean((2, 3))))


def test_options_change_what_they_say():
    x = images(2, 3, 16, 16)

    def pair(arch, first, second, **common):
        a = lively(build_model(arch, num_classes=3, **common, **first))
        b = lively(build_model(arch, num_classes=3, **common, **second))
        b.load_state_dict(a.state_dict())
        return a(x), b(x)

    for arch, first, second, common in (
        ("preact_resnet18", {"shortcut": "activated"}, {"shortcut": "input"}, {"width": 4}),
        ("wrn-10-1", {"activation": "relu"}, {"activation": "silu"}, {}),
    ):
        ours, other = pair(arch, first, second, **common)
        assert not torch.allclose(ours, other)
    assert "bn.weight" in build_model("preact_resnet18", num_classes=3, width=4, final_bn=True).state_dict()
    assert build_model("cnn", num_classes=3, width=32).feature_dim == 256


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("WRN-28-10", "wrn-28-10"),
        ("WideResNet-34-20", "wrn-34-20"),
        ("DM-WRN-28-10", "dm-wrn-28-10"),
        ("PreActResNet18", "preact_resnet18"),
        ("ResNet-18", "resnet18"),
        ("MobileNetV2", "mobilenet_v2"),
    ],
)
def test_other_spellings(spelling, name):
    with torch.device("meta"):
        assert build_model(spelling, num_classes=2).spec["arch"] == name


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"arch": "resent18"}, ValueError, "did you mean 'resnet18'"),
        ({"arch": "resnet50"}, ValueError, "accepted: cnn, resnet8"),
        ({"arch": "wrn-30-10"}, ValueError, "6n \\+ 4"),
        ({"arch": "wrn-28-0"}, ValueError, "width from 1 on"),
        ({"arch": 18}, TypeError, "arch: got int"),
        ({"arch": "cnn", "widht": 8}, TypeError, "did you mean 'width'"),
        ({"arch": "wrn-10-1", "width": 8}, TypeError, "accepted: activation, stem"),
        ({"arch": "cnn", "num_classes": 0}, ValueError, "num_classes: got 0"),
        ({"arch": "cnn", "num_classes": "10"}, ValueError, "num_classes: got '10'"),
        ({"arch": "cnn", "width": 2.5}, ValueError, "width: got 2.5"),
        ({"arch": "cnn", "image_size": -1}, ValueError, "image_size: got -1"),
        ({"arch": "cnn", "stem": "imagenet"}, ValueError, "stem: got 'imagenet'"),
        ({"arch": "wrn-10-1", "activation": "gelu"}, ValueError, "activation: got 'gelu'"),
        ({"arch": "preact_resnet18", "shortcut": "raw"}, ValueError, "shortcut: got 'raw'"),
        ({"arch": "cnn", "normalize": ([0.5], [0.2])}, ValueError, "each 3 finite numbers"),
        ({"arch": "cnn", "normalize": ([0.5] * 3, [0.2, 0.0, 0.2])}, ValueError, r"std in \(0, 1\]"),
        ({"arch": "cnn", "normalize": ([0.5] * 3, [63.0] * 3)}, ValueError, "divide by 255"),
        ({"arch": "cnn", "normalize": ([125.0] * 3, [0.5] * 3)}, ValueError, r"mean in \[0, 1\].*divide by 255"),
        ({"arch": "cnn", "normalize": ([-0.1] * 3, [1.0] * 3)}, ValueError, r"mean in \[0, 1\]"),
        ({"arch": "cnn", "normalize": "cifar-10"}, ValueError, "normalize: got 'cifar-10'"),
    ],
)
def test_bad_requests_say_what_is_accepted(arguments, error, says):
    with pytest.raises(error, match=says):
        build_model(**{"num_classes": 10, **arguments})


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (3, 8, 8)])
def test_wrong_images_are_refused(shape):
    model = build_model("cnn", num_classes=2, width=2, normalize=CIFAR)
    with pytest.raises(ValueError, match=r"accepted: \(N, 3, H, W\)"):
        model(images(*shape))


def foreign():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


class AuxiliaryLast(nn.Module):
    """Its last registered linear layer does not make the logits."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 4)
        self.auxiliary = nn.Linear(3, 9)

    def forward(self, x):
        return self.head(x.mean((2, 3)))


def test_with_features_wraps_a_foreign_module():
    module = lively(foreign())
    wrapped = with_features(module)
    logits, features = wrapped(images(2, 3, 8, 8), features=True)
    assert (wrapped.feature_dim, wrapped.num_classes) == (16, 5) and wrapped.module is module
    assert torch.equal(features, module[:5](images(2, 3, 8, 8)))
    assert torch.equal(logits, module(images(2, 3, 8, 8))) and torch.equal(wrapped(images(2, 3, 8, 8)), logits)
    assert classifier(wrapped) is module[5]
    assert wrapped.module.state_dict().keys() == foreign().state_dict().keys()
    assert with_features(wrapped) is wrapped


def test_with_features_leaves_the_contract_alone():
    model = build_model("cnn", num_classes=2, width=2)
    assert with_features(model) is model


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_of_a_wrapper_have_features_of_their_own(clone):
    wrapped = with_features(lively(foreign()))
    twin = clone(wrapped)
    with torch.no_grad():
        twin.module[0].weight.zero_()
    x = images(2, 3, 8, 8)
    assert torch.equal(twin(x, features=True)[1], twin.module[:5](x))
    assert torch.equal(wrapped(x, features=True)[1], wrapped.module[:5](x))
    assert not torch.equal(twin(x, features=True)[1], wrapped(x, features=True)[1])


def test_with_features_refuses_what_has_no_head():
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        with_features(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()))
    with pytest.raises(TypeError, match="got function"):
        with_features(lambda x: x)
    with pytest.raises(ValueError, match="head: got 'fc'"):
        with_features(foreign(), head="fc")


def test_with_features_notices_a_linear_layer_that_is_not_the_head():
    module = AuxiliaryLast()
    with pytest.raises(ValueError, match=r"head='\.\.\.'"):
        with_features(module)(images(2, 3, 8, 8), features=True)
    logits, features = with_features(module, head="head")(images(2, 3, 8, 8), features=True)
    torch.testing.assert_close(module.head(features), logits)


@pytest.mark.parametrize("make", [lambda: build_model("cnn", num_classes=5, width=4, normalize=CIFAR), foreign])
def test_one_graph_and_func_grad(make):
    model = with_features(lively(make()))
    x = images(2, 3, 16, 16)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ours, reference in zip(compiled(x, features=True), model(x, features=True), strict=True):
        torch.testing.assert_close(ours, reference)

    def gradient(x):
        return torch.func.grad(lambda z: model(z).logsumexp(1).sum())(x)

    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(model(leaf).logsumexp(1).sum(), leaf)[0]
    torch.testing.assert_close(gradient(x), expected)
    torch.testing.assert_close(torch.compile(gradient, fullgraph=True, backend="aot_eager")(x), expected)
    torch._dynamo.reset()


def test_every_family_is_one_graph():
    for arch, options in (("resnet8", {"width": 4}), ("preact_resnet18", {"width": 2}), ("dm-wrn-10-1", {})):
        torch._dynamo.reset()
        model = lively(build_model(arch, num_classes=3, **options))
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images(2, 3, 16, 16)), model(images(2, 3, 16, 16)))
    torch._dynamo.reset()


class AuxiliaryHead(nn.Module):
    """Registers last, and runs, a layer of the head's size that does not make the logits."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.fc, self.aux = nn.Linear(128, 10), nn.Linear(128, 10)

    def forward(self, x):
        features = self.body(x)
        self.side = self.aux(features.relu())
        return self.fc(features)


def test_with_features_notices_a_layer_of_the_right_size_that_is_not_the_head():
    module = AuxiliaryHead()
    with pytest.raises(ValueError, match=r"'aux' gave other logits.*head="):
        with_features(module)(images(2, 3, 8, 8), features=True)
    wrapped = with_features(module, head="fc")
    logits, features = wrapped(images(2, 3, 8, 8), features=True)
    torch.testing.assert_close(wrapped.head(features), logits)


def test_with_features_refuses_outputs_that_are_no_logits():
    class Two(nn.Sequential):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(ValueError, match="model: returned tuple"):
        with_features(Two(nn.Flatten(), nn.Linear(192, 4)))(images(2, 3, 8, 8), features=True)
