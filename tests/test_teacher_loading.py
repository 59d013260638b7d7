import json
import os
import pickle
import re
import sys
import types
import warnings
from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastrd.core import checkpoint
from fastrd.models import NORMALIZATION, build_model, load_teacher
from fastrd.models.teacher import warn_if_poor

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616]

LAYOUTS = [
    ("cnn", {"width": 4}),
    ("resnet8", {"width": 4}),
    ("resnet20", {}),
    ("resnet18", {"width": 4}),
    ("resnet34", {"width": 4}),
    ("preact_resnet18", {"width": 4, "final_bn": True}),
    ("preact_resnet34", {"width": 4}),
    ("wrn-10-1", {}),
    ("wrn-16-2", {}),
    ("mobilenet_v2", {}),
    ("resnet18", {"width": 4, "stem": "stl10"}),
]


def network(arch, **options):
    """A network whose batch norm statistics and affine parameters all matter."""
    model = build_model(arch, **{"num_classes": 6, **options})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


def images(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def saved(tmp_path, payload, name="teacher.pt"):
    path = tmp_path / name
    torch.save(payload, path)
    return path


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def same(teacher, model, x=None):
    x = images(2, 3, 32, 32) if x is None else x
    torch.testing.assert_close(teacher(x), model(x), rtol=1e-5, atol=1e-5)


def deepmind_names(state):
    """Our wide ResNet's keys as the DeepMind family spells them."""
    top = {"conv1": "init_conv", "bn1": "batchnorm", "fc": "logits"}
    inner = {
        "bn1": "batchnorm_0",
        "conv1": "conv_0",
        "bn2": "batchnorm_1",
        "conv2": "conv_1",
        "convShortcut": "shortcut",
    }
    renamed = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0].startswith("block"):
            stage, block, layer, leaf = int(parts[0][-1]) - 1, parts[2], parts[3], parts[4]
            renamed[f"layer.{stage}.block.{block}.{inner[layer]}.{leaf}"] = value
        else:
            renamed[f"{top[parts[0]]}.{parts[1]}"] = value
    return renamed


@pytest.mark.parametrize(("arch", "options"), LAYOUTS)
def test_architecture_is_read_off_keys_and_shapes(tmp_path, arch, options):
    model = network(arch, in_channels=2, **options)
    teacher = load_teacher(saved(tmp_path, model.state_dict()))
    assert teacher.spec == model.spec
    same(teacher, model, images(2, 2, 32, 32))
    again = load_teacher(tmp_path / "teacher.pt", arch=arch.upper(), num_classes=6, in_channels=2)
    assert again.spec == model.spec


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3, "best_acc": 0.5},
        lambda s: {"model": s, "optimizer": {"state": {}, "param_groups": []}},
        lambda s: {"net": s, "acc": 1.0},
        lambda s: {"model_state_dict": s},
        lambda s: {"ema": s},
        lambda s: {"last": {"state_dict": prefixed("module.", s)}, "best": None},
        lambda s: {"state_dict": s, "model": {"other": torch.zeros(1)}},
        lambda s: OrderedDict(prefixed("module.", s)),
        lambda s: prefixed("model.", s),
        lambda s: prefixed("_orig_mod.", s),
        lambda s: prefixed("module.model._orig_mod.", s),
        lambda s: {"state_dict": prefixed("module.0.", s)},
    ],
)
def test_wrappers_and_prefixes(tmp_path, wrap):
    model = network("resnet8", width=4)
    teacher = load_teacher(saved(tmp_path, wrap(model.state_dict())))
    same(teacher, model)


@pytest.mark.parametrize(
    ("names", "prefix", "shape"),
    [
        (("mu", "sigma"), "", (1, 3, 1, 1)),
        (("mean", "std"), "", (3, 1, 1)),
        (("0.mean", "0.std"), "1.", (3,)),
        (("module.0.mean", "module.0.std"), "module.1.", (1, 3, 1, 1)),
        (("normalize.mean", "normalize.std"), "model.", (1, 3, 1, 1)),
        (("module.mu", "module.sigma"), "module.", (1, 3, 1, 1)),
    ],
)
@pytest.mark.parametrize("arch", ["resnet8", "wrn-10-1"])
def test_normalization_in_the_file(tmp_path, names, prefix, shape, arch):
    model = network(arch, normalize=(MEAN, STD))
    state = model.state_dict()
    mean, std = state.pop("mean"), state.pop("std")
    path = saved(tmp_path, {**prefixed(prefix, state), names[0]: mean.reshape(shape), names[1]: std.reshape(shape)})
    same(load_teacher(path), model)
    same(load_teacher(path, normalize=(MEAN, STD)), model)
    with pytest.raises(ValueError, match="normalize: got"):
        load_teacher(path, normalize=([0.5] * 3, [0.5] * 3))


def test_scalar_normalization_and_half_of_one(tmp_path):
    model = network("resnet8", normalize=([0.5] * 3, [0.25] * 3))
    state = {k: v for k, v in model.state_dict().items() if k not in ("mean", "std")}
    mean, std = torch.tensor(0.5), torch.tensor(0.25)
    same(load_teacher(saved(tmp_path, {**state, "mean": mean, "std": std})), model)
    with pytest.raises(ValueError, match="half a normalisation: 'mean'"):
        load_teacher(saved(tmp_path, {**state, "mean": mean}))
    for wrong in (torch.ones(3).to_sparse(), torch.ones(3).to(torch.float8_e4m3fn), torch.ones(3) + 0j):
        with pytest.raises(ValueError, match=rf"mean \(3,\) .*{'complex' if wrong.is_complex() else wrong.dtype}"):
            load_teacher(saved(tmp_path, {**state, "mean": wrong, "std": wrong}))


def test_normalization_of_a_file_that_says_what_it_is(tmp_path):
    model = network("resnet8")
    content = {"model": {"spec": model.spec, "state": model.state_dict()}}
    path = checkpoint.write(tmp_path / "last.pt", content)
    same(load_teacher(path, normalize="none"), model)
    with pytest.raises(ValueError, match="normalize: got cifar10; the file normalises with None"):
        load_teacher(path, normalize="cifar10")
    with pytest.raises(ValueError, match="normalize: got 'foo'; accepted: none, per-image"):
        load_teacher(path, normalize="foo")


def test_normalization_given_by_the_caller(tmp_path):
    model = network("resnet8", normalize=(MEAN, STD))
    state = {k: v for k, v in model.state_dict().items() if k not in ("mean", "std")}
    same(load_teacher(saved(tmp_path, state), normalize=(MEAN, STD)), model)


@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("prefix", ["", "module.", "module.0."])
def test_deepmind_layout(tmp_path, activation, prefix):
    model = network("dm-wrn-16-2", activation=activation, normalize=NORMALIZATION["cifar100"])
    state = model.state_dict()
    mean, std = state.pop("mean"), state.pop("std")
    options = {} if activation == "silu" else {"activation": "relu"}
    bare = prefixed(prefix, deepmind_names(state))
    path = saved(tmp_path, bare)
    teacher = load_teacher(path, dataset="cifar100", **options)
    assert teacher.spec["arch"] == "dm-wrn-16-2"
    same(teacher, model)
    same(load_teacher(path, normalize=NORMALIZATION["cifar100"], **options), model)
    path = saved(tmp_path, {**bare, prefix + "mean": mean, prefix + "std": std})
    same(load_teacher(path, arch="dm-wrn-16-2", **options), model)


def test_deepmind_layout_is_never_loaded_without_its_normalization_or_as_another_family(tmp_path):
    path = saved(tmp_path, deepmind_names(network("dm-wrn-10-1").state_dict()))
    with pytest.raises(ValueError, match=r"give normalize=.*got dataset=None"):
        load_teacher(path)
    with pytest.raises(ValueError, match="the keys are the DeepMind family's, dm-wrn-10-1"):
        load_teacher(path, arch="wrn-10-1", dataset="cifar10")


def test_unused_sub_block_of_trades_files_is_dropped(tmp_path):
    model = network("wrn-16-2")
    state = model.state_dict()
    unused = {key.replace("block1.", "sub_block1."): value for key, value in state.items() if key.startswith("block1.")}
    same(load_teacher(saved(tmp_path, {"state_dict": prefixed("module.", {**state, **unused})})), model)


def test_options_that_keys_do_not_tell(tmp_path):
    model = network("preact_resnet18", width=4, shortcut="input")
    path = saved(tmp_path, model.state_dict())
    same(load_teacher(path, shortcut="input"), model)
    assert not torch.allclose(load_teacher(path)(images(2, 3, 32, 32)), model(images(2, 3, 32, 32)))


def test_a_teacher_is_frozen_float32_in_eval_and_leaves_the_random_state_alone(tmp_path):
    model = network("wrn-10-1")
    path = saved(tmp_path, {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()})
    before = torch.get_rng_state()
    teacher = load_teacher(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert {v.dtype for v in teacher.state_dict().values()} == {torch.float32, torch.int64}
    assert not any(v.is_meta for v in teacher.state_dict().values())
    torch.testing.assert_close(teacher(images(2, 3, 32, 32)), model(images(2, 3, 32, 32)), rtol=0.02, atol=0.02)


def test_files_from_before_batch_counters(tmp_path):
    model = network("resnet8", width=4)
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    same(load_teacher(saved(tmp_path, state)), model)


@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_mismatches_list_keys_shapes_and_what_was_tried(tmp_path):
    state = network("resnet18", width=4).state_dict()
    path = saved(tmp_path, state)
    with pytest.raises(ValueError, match=r"do not fit.*missing: .*unexpected: .*Tried: arch='wrn-10-1'"):
        load_teacher(path, arch="wrn-10-1")
    with pytest.raises(ValueError, match=r"2 unlike: linear.weight file \(6, 32\), network \(10, 32\)"):
        load_teacher(path, num_classes=10)
    with pytest.raises(ValueError, match=r"unlike: conv1.weight"):
        load_teacher(path, width=8)
    with pytest.raises(ValueError, match="widht: not an option of resnet18"):
        load_teacher(path, widht=8)
    short = {key: value for key, value in state.items() if key != "layer3.1.bn2.weight"}
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}.*1 missing: layer3.1.bn2.weight \(16,\)"):
        load_teacher(saved(tmp_path, short))
    with pytest.raises(ValueError, match=r"1 unexpected: extra.weight \(2,\)"):
        load_teacher(saved(tmp_path, {**state, "extra.weight": torch.zeros(2)}))
    for odd in (torch.zeros(4, 3, 3, 3, dtype=torch.int64), torch.zeros(4, 3, 3, 3).to_sparse()):
        with pytest.raises(ValueError, match=r"unlike: conv1.weight"):
            load_teacher(saved(tmp_path, {**state, "conv1.weight": odd}))


def test_unknown_layouts_say_what_was_seen_and_tried(tmp_path):
    path = saved(tmp_path, {"patch.weight": torch.zeros(4, 3, 4, 4), "head.weight": torch.zeros(6, 4)})
    with pytest.raises(ValueError, match=r"no known architecture: patch.weight \(4, 3, 4, 4\).*with_features"):
        load_teacher(path)
    with pytest.raises(ValueError, match=r"22 missing: .*unexpected: patch\.weight"):
        load_teacher(path, arch="cnn", num_classes=6)


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'resnet18'"):
        load_teacher(tmp_path, arch="resnet19")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_teacher(tmp_path / "absent.pt")
    with pytest.raises(FileNotFoundError, match=r"best.pt"):
        load_teacher(tmp_path)


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("legacy", [False, True])
def test_hostile_pickles_are_refused_and_nothing_runs(tmp_path, legacy):
    marker = tmp_path / "executed"
    path = tmp_path / "teacher.pt"
    torch.save({"state_dict": Hostile(marker)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_teacher(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


def test_plain_pickles_and_whole_modules_are_refused(tmp_path):
    marker = tmp_path / "executed"
    path = tmp_path / "teacher.pkl"
    path.write_bytes(pickle.dumps(Hostile(marker), protocol=2))
    with pytest.raises(ValueError, match="never loaded"):
        load_teacher(path)
    assert not marker.exists()
    with pytest.raises(ValueError, match="save its state dict alone"):
        load_teacher(saved(tmp_path, network("cnn", width=2)))


@pytest.mark.parametrize("keep", [0, 1, 64, 0.3, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path, keep):
    path = saved(tmp_path, network("cnn", width=2).state_dict())
    blob = path.read_bytes()
    path.write_bytes(blob[: keep if isinstance(keep, int) else int(keep * len(blob))])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_teacher(path)


@pytest.mark.parametrize("blob", [b"hello", b"\x80\x02.", b"PK\x03\x04" + bytes(40), bytes(range(256)) * 8])
def test_foreign_bytes_are_refused(tmp_path, blob):
    path = tmp_path / "teacher.pth"
    path.write_bytes(blob)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_teacher(path)


@pytest.mark.parametrize(
    "payload", [{}, [1, 2], "text", {"epoch": 3, "lr": 0.1}, {"state_dict": {"a": 1}}, torch.zeros(3)]
)
def test_files_without_a_state_dict_are_refused(tmp_path, payload):
    with pytest.raises(ValueError, match="holds no state dict"):
        load_teacher(saved(tmp_path, payload))


def run_folder(tmp_path, **checkpoints):
    run = tmp_path / "run"
    for name, (model, extra) in checkpoints.items():
        payload = {"model": {"spec": model.spec, "state": model.state_dict()}, **extra}
        checkpoint.write(run / f"{name}.pt", payload)
    return run


def test_run_folders_give_best_then_last_then_previous(tmp_path):
    best, last, previous = (network("cnn", width=2, normalize=(MEAN, STD)) for _ in range(3))
    run = run_folder(tmp_path, best=(best, {}), last=(last, {}), previous=(previous, {}))
    same(load_teacher(run), best)
    same(load_teacher(run / "last.pt", arch="cnn", num_classes=6, normalize=(MEAN, STD)), last)
    (run / "best.pt").unlink()
    same(load_teacher(str(run)), last)
    (run / "last.pt").write_bytes((run / "last.pt").read_bytes()[:-100])
    with pytest.warns(UserWarning, match="going on from previous.pt"):
        same(load_teacher(run), previous)


def test_checkpoints_prefer_averaged_weights(tmp_path):
    model, averaged = network("cnn", width=2), network("cnn", width=2)
    same(load_teacher(run_folder(tmp_path, last=(model, {"ema": averaged.state_dict()}))), averaged)


def test_checkpoints_that_contradict_are_refused(tmp_path):
    run = run_folder(tmp_path, last=(network("cnn", width=2), {}))
    with pytest.raises(ValueError, match="num_classes: got 10; the file says 6"):
        load_teacher(run, num_classes=10)
    with pytest.raises(ValueError, match="arch: got 'resnet8'; the file says 'cnn'"):
        load_teacher(run, arch="resnet8")
    with pytest.raises(ValueError, match="normalize: got"):
        load_teacher(run, normalize=(MEAN, STD))


def test_tampered_checkpoints_are_refused(tmp_path):
    path = run_folder(tmp_path, best=(network("cnn", width=2), {})) / "best.pt"
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 1
    path.write_bytes(blob)
    for source in (path, path.parent):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            load_teacher(source)


@pytest.mark.parametrize(
    "model",
    [
        {"spec": {"arch": "nothing", "num_classes": 2}, "state": {"a": torch.zeros(1)}},
        {"state": {}},
        {"spec": 3},
        None,
    ],
)
def test_checkpoints_with_a_broken_model_are_refused(tmp_path, model):
    path = checkpoint.write(tmp_path / "last.pt", {"model": model})
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_teacher(path)


@pytest.fixture
def save_safetensors():
    return pytest.importorskip("safetensors.torch", reason="safetensors is not installed").save_file


def test_safetensors_with_and_without_a_spec(tmp_path, save_safetensors):
    model = network("preact_resnet18", width=4, shortcut="input", normalize=(MEAN, STD))
    path = tmp_path / "teacher.safetensors"
    save_safetensors(model.state_dict(), str(path), metadata={"fastrd_spec": json.dumps(model.spec)})
    teacher = load_teacher(path)
    assert teacher.spec == model.spec
    same(teacher, model)
    save_safetensors(prefixed("module.", model.state_dict()), str(path))
    same(load_teacher(path, arch="preact_resnet18", shortcut="input"), model)


def test_bad_safetensors_are_refused(tmp_path, save_safetensors):
    path = tmp_path / "teacher.safetensors"
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_teacher(path)
    for spec in ("{", "[1]", '{"arch": "cnn", "num_classes": 2, "depth": 3}'):
        save_safetensors(network("cnn", width=2).state_dict(), str(path), metadata={"fastrd_spec": spec})
        with pytest.raises(ValueError, match=re.escape(str(path))):
            load_teacher(path)


def test_missing_packages_are_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "robustbench", None)
    monkeypatch.setitem(sys.modules, "robustbench.utils", None)
    with pytest.raises(ModuleNotFoundError, match=r"Wang2023Better_WRN-28-10: no such file.*pip install robustbench"):
        load_teacher("Wang2023Better_WRN-28-10", dataset="cifar100")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    (tmp_path / "teacher.safetensors").touch()
    with pytest.raises(ModuleNotFoundError, match="pip install safetensors"):
        load_teacher(tmp_path / "teacher.safetensors")


@pytest.fixture
def robustbench(monkeypatch):
    """A stand-in for the package: one zoo with one foreign model."""
    zoo = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 100))
    calls = []

    def load_model(*, model_name, dataset, threat_model):
        calls.append((model_name, dataset, threat_model))
        return {"Wang2023Better_WRN-28-10": zoo}[model_name]

    utils = types.ModuleType("robustbench.utils")
    utils.load_model, utils.BenchmarkDataset, utils.ThreatModel = load_model, str, str
    utils.all_models = {"cifar100": {"Linf": {"Wang2023Better_WRN-28-10": {}}}}
    monkeypatch.setitem(sys.modules, "robustbench", types.ModuleType("robustbench"))
    monkeypatch.setitem(sys.modules, "robustbench.utils", utils)
    return zoo, calls


def test_robustbench_ids_resolve_through_the_package(robustbench):
    zoo, calls = robustbench
    teacher = load_teacher("Wang2023Better_WRN-28-10", dataset="cifar100", num_classes=100, in_channels=3)
    assert calls == [("Wang2023Better_WRN-28-10", "cifar100", "Linf")]
    x = images(2, 3, 8, 8)
    logits, features = teacher(x, features=True)
    assert torch.equal(logits, zoo(x)) and torch.equal(features, zoo[:4](x))
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "dataset: got None"),
        ({"dataset": "cifar100", "num_classes": 10}, "num_classes: got 10"),
        ({"dataset": "cifar100", "arch": "wrn-28-10"}, "brings its own architecture"),
        ({"dataset": "cifar100", "in_channels": 1}, "three channels"),
        ({"dataset": "cifar100", "source": "Wang2023Beter_WRN-28-10"}, "nearest: Wang2023Better_WRN-28-10"),
    ],
)
def test_bad_robustbench_requests(robustbench, arguments, says):
    with pytest.raises(ValueError, match=says):
        load_teacher(**{"source": "Wang2023Better_WRN-28-10", **arguments})


def test_the_published_resnet18_recognises_real_images(data_root):
    package = find_spec("pyautoattack")
    if package is None:
        pytest.skip("pyautoattack, which carries the weights, is not installed")
    weights = Path(package.origin).parent / "examples" / "model_test.pt"
    if not weights.is_file():
        pytest.skip(f"this pyautoattack carries no {weights.name}")
    teacher = load_teacher(weights)
    assert teacher.spec["arch"] == "resnet18" and teacher.num_classes == 10
    with open(data_root / "cifar-10-batches-py" / "test_batch", "rb") as file:
        batch = pickle.load(file, encoding="bytes")
    x = torch.from_numpy(np.asarray(batch[b"data"][:100]).reshape(-1, 3, 32, 32)).float() / 255
    with torch.no_grad():
        right = teacher(x).argmax(1) == torch.tensor(batch[b"labels"][:100])
    assert right.sum() == 94


class Plain(nn.Module):
    """Normalises with numbers that leave nothing in its state dict."""

    def forward(self, x):
        return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def test_a_later_part_of_a_sequential_without_a_normalisation_is_refused(tmp_path):
    net = network("resnet8")
    path = saved(tmp_path, nn.DataParallel(nn.Sequential(Plain(), net)).state_dict())
    with pytest.raises(ValueError, match=r"at 'module\.1\.'.*give normalize="):
        load_teacher(path)
    same(load_teacher(path, normalize="none"), net)
    with torch.no_grad():
        torch.testing.assert_close(
            load_teacher(path, normalize=(MEAN, STD))(images(2, 3, 8, 8)), net(Plain()(images(2, 3, 8, 8)))
        )


def test_what_training_leaves_beside_a_network_is_not_taken_for_it(tmp_path):
    net = network("resnet18", width=4)
    state, mean, std = net.state_dict(), torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25)
    normalizer = {"normalizer.new_mean": mean, "normalizer.new_std": std}
    madry = {
        **prefixed("module.", normalizer),
        **prefixed("module.model.", state),
        **prefixed(
            "module.attacker.",
            {**prefixed("model.", state), "normalize.new_mean": mean, "normalize.new_std": std},
        ),
    }
    normalised = load_teacher(saved(tmp_path, {"model": madry}))
    assert normalised.spec["normalize"] == [[0.5] * 3, [0.25] * 3]
    torch.testing.assert_close(normalised(images(2, 3, 8, 8)), net((images(2, 3, 8, 8) - 0.5) / 0.25))
    same(
        load_teacher(saved(tmp_path, {**state, "total_ops": torch.zeros(1), "layer1.0.total_params": torch.zeros(1)})),
        net,
    )
    same(load_teacher(saved(tmp_path, {"n_averaged": torch.tensor(3), **prefixed("module.", state)})), net)
    torchvision = {k.replace("shortcut", "downsample").replace("linear", "fc"): v for k, v in state.items()}
    same(load_teacher(saved(tmp_path, torchvision)), net)
    with pytest.warns(UserWarning, match=r"taken: 'model\.'; ignored beside it: centers \(5, 7\)"):
        same(load_teacher(saved(tmp_path, {**prefixed("model.", state), "centers": torch.zeros(5, 7)})), net)


def test_several_networks_and_unsupported_ones_are_named(tmp_path):
    student, teacher = network("resnet8", width=4), network("resnet8", width=4)
    both = {**prefixed("student.", student.state_dict()), **prefixed("teacher.", teacher.state_dict())}
    path = saved(tmp_path, both)
    with pytest.raises(ValueError, match=r"several networks: 'student\.', 'teacher\.'; give the prefix"):
        load_teacher(path)
    with pytest.warns(UserWarning, match="ignored beside it"):
        same(load_teacher(path, prefix="teacher"), teacher)
    bottleneck = {**student.state_dict(), "layer1.0.conv3.weight": torch.zeros(4, 4, 1, 1)}
    with pytest.raises(ValueError, match=r"bottleneck blocks \(ResNet-50 and deeper\) are not supported"):
        load_teacher(saved(tmp_path, bottleneck))


def labelled(net):
    """Images, and the classes that a network gives them: it is right on all."""
    x = images(200, 3, 8, 8)
    with torch.no_grad():
        return x, net(x).argmax(1)


@pytest.mark.parametrize(
    ("arch", "options", "remedy"),
    [
        ("wrn-10-1", {"normalize": "half"}, "normalize='half'"),
        ("wrn-10-1", {"normalize": "per-image"}, "normalize='per-image'"),
        ("preact_resnet18", {"width": 4, "shortcut": "input"}, "shortcut='input'"),
        (
            "preact_resnet18",
            {"width": 4, "shortcut": "input", "normalize": "cifar10"},
            "normalize='cifar10', shortcut='input'",
        ),
    ],
)
def test_a_teacher_that_needs_what_its_file_does_not_say_is_refused_with_the_remedy(tmp_path, arch, options, remedy):
    net = network(arch, **options)
    state = {key: value for key, value in net.state_dict().items() if key not in ("mean", "std")}
    path = saved(tmp_path, state)
    with pytest.raises(ValueError, match=rf"and on 100\.0% with {remedy}; give {remedy}"):
        load_teacher(path, check=labelled(net))
    given = {key: value for key, value in options.items() if key != "width"}
    same(load_teacher(path, check=labelled(net), **given), net)


def test_teachers_are_measured_and_poor_ones_said(tmp_path, recwarn):
    net = network("resnet8")
    path, (x, y) = saved(tmp_path, net.state_dict()), labelled(net)
    load_teacher(path, check=(x, y), expected=0.9)
    assert not recwarn
    with pytest.warns(UserWarning, match="not decidedly better than guessing"):
        load_teacher(path, check=(x, (y + 1) % 6))
    half = torch.where(torch.arange(200) % 2 == 0, y, (y + 1) % 6)
    with pytest.warns(UserWarning, match=r"right on 50\.0% of 200 clean images, far below the published 90\.0%"):
        load_teacher(path, check=(x, half), expected=0.9)


def test_per_image_normalisation_is_that_of_mma():
    net, x = network("wrn-10-1", normalize="per-image"), images(3, 3, 8, 8)
    x[0] = 0.5  # a flat image: its deviation is 0
    flat = x.flatten(1)
    deviation = ((flat - flat.mean(1, keepdim=True)).square().sum(1) / 191).sqrt().clamp_min(192**-0.5)
    expected = (x - flat.mean(1).view(-1, 1, 1, 1)) / deviation.view(-1, 1, 1, 1)
    torch.testing.assert_close(net.normalized(x), expected)
    assert build_model(**net.spec).spec == net.spec
    with pytest.raises(ValueError, match="did you mean 'per-image'"):
        network("wrn-10-1", normalize="perimage")


@pytest.mark.parametrize(
    ("name", "arch", "options"),
    [
        ("Hendrycks2019Using", "wrn-10-1", {"normalize": "half"}),
        ("Ding2020MMA", "wrn-10-1", {"normalize": "per-image"}),
        ("Rice2020Overfitting", "wrn-10-1", {"normalize": (MEAN, STD)}),
        ("Andriushchenko2020Understanding", "preact_resnet18", {"width": 4, "shortcut": "input"}),
    ],
)
def test_files_named_by_robustbench_load_as_its_classes_do(tmp_path, name, arch, options):
    net = network(arch, **options)
    state = {key: value for key, value in net.state_dict().items() if key not in ("mean", "std")}
    same(load_teacher(saved(tmp_path, state, f"{name}.pt")), net)


class Right(nn.Module):
    """Right on the first `count` images, all of class 1."""

    num_classes = 10

    def __init__(self, count: int) -> None:
        super().__init__()
        self.left = count

    def forward(self, x):
        classes = torch.arange(len(x)) < self.left
        self.left -= len(x)
        return nn.functional.one_hot(classes.long(), 10).float()


@pytest.mark.parametrize(
    ("count", "n", "guessing"),
    # Of 50 images of ten classes chance is right on 13 or more with probability 0.0010046, on 14 with 0.0003; of 256
    # on 42 with 0.00099.
    [(13, 50, True), (14, 50, False), (5, 49, False), (41, 256, True), (42, 256, False)],
)
def test_guessing_is_what_chance_reaches_once_in_a_thousand_batches(count, n, guessing):
    check = torch.rand(n, 3, 8, 8), torch.ones(n, dtype=torch.long)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert warn_if_poor("t", Right(count), check) == count / n
    assert ["not decidedly better than guessing" in str(w.message) for w in said] == [True] * guessing
