"""Students of other makers: timm, torchvision, modules of one's own. Trained, resumed bit for bit, evaluated,
refused."""

from __future__ import annotations

import json
import re
import threading

import pytest
import torch
from test_train import assert_same_run, final_state, interrupt_after
from torch import nn
from torch.utils.checkpoint import checkpoint as checkpointed

from fastrd import Recipe, train
from fastrd.cli import main
from fastrd.core import checkpoint
from fastrd.data import load_dataset
from fastrd.engine.errors import Interrupted
from fastrd.models import build_model, load_teacher
from fastrd.models.foreign import adopt, check_network
from fastrd.workflow import evaluate_run, load_student

DIGITS = """
name = "digits"
student = {student}
base.name = "ard"
igdm.alpha = 1
data = {{ name = "digits", train_limit = 40, test_limit = 20, holdout = 8 }}
schedule = {{ epochs = 2, milestones = [] }}
training = {{ batch_size = 16, ema = 0.9 }}
attack.steps = 1
validation.steps = 1
evaluation.attacks = ["clean", "pgd2"]
"""
VIT = '{ arch = "timm:vit_tiny_patch16_224", options = { patch_size = 4, embed_dim = 8, depth = 1, num_heads = 2 } }'
SHUFFLE = '{ arch = "torchvision:shufflenet_v2_x0_5", repeat_grey = true }'
NEEDS = {VIT: "timm", SHUFFLE: "torchvision"}


class Net(nn.Module):
    """A network as people write them: batch norm, dropout, no thought of us."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.adaptive_avg_pool2d(torch.relu(self.bn(self.conv(x))), 2)
        return self.fc(self.drop(x.flatten(1)))


@pytest.fixture
def teacher():
    torch.manual_seed(11)
    return build_model("cnn", num_classes=10, in_channels=1, image_size=8, width=2)


@pytest.fixture
def recipe(tmp_path):
    def write(student: str = '{ arch = "cnn" }', extra: str = ""):
        path = tmp_path / "digits.toml"
        path.write_text(DIGITS.format(student=student) + extra)
        return path

    return write


def cut_and_resume(recipe, tmp_path, monkeypatch, **options):
    train(recipe, out=tmp_path / "whole", progress=False, device="cpu", **options)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(Interrupted):
            train(recipe, out=tmp_path / "cut", progress=False, device="cpu", **options)
    assert checkpoint.read(tmp_path / "cut/last.pt")["position"] == {"epoch": 2, "batch": 1}
    train(recipe, out=tmp_path / "cut", resume=True, progress=False, device="cpu", **options)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("student", [VIT, pytest.param(SHUFFLE, marks=pytest.mark.slow)], ids=["timm", "torchvision"])
def test_a_named_student_is_trained_resumed_and_evaluated(student, recipe, teacher, tmp_path, monkeypatch, capsys):
    pytest.importorskip(NEEDS[student])
    loaded = Recipe.load(recipe(student))
    cut_and_resume(loaded, tmp_path, monkeypatch, teacher=teacher)
    run = tmp_path / "whole"
    x = torch.rand(3, 1, 8, 8)
    network = load_student(run)
    assert torch.equal(network(x), load_teacher(run / "last.pt", num_classes=10)(x))
    assert not network.training and network(x).shape == (3, 10)
    assert main(["eval", str(run), "--quiet", "--device", "cpu"]) == 0
    assert "clean" in capsys.readouterr().out and (run / "evaluation.json").is_file() and (run / "card.md").is_file()


def test_the_same_from_the_command_line(recipe, tmp_path, monkeypatch):
    pytest.importorskip("timm")
    path = recipe(VIT, 'teacher.source = "teacher"\n').rename(tmp_path / "vit.toml")
    monkeypatch.chdir(tmp_path)
    cnn = recipe('{ arch = "cnn", options = { width = 2 } }').read_text().replace('"ard"\nigdm.alpha = 1', '"pgd_at"')
    (tmp_path / "teacher.toml").write_text(cnn)
    common = ["--quiet", "--device", "cpu"]
    assert main(["train", "teacher.toml", "--out", "teacher", *common]) == 0
    assert main(["train", str(path), "--out", "whole", *common]) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        assert main(["train", str(path), "--out", "cut", *common]) == 128 + 15
    assert main(["train", str(path), "--out", "cut", "--resume", *common]) == 0
    assert_same_run("whole", "cut")


def test_ones_own_module_is_trained_resumed_and_evaluated(recipe, teacher, tmp_path, monkeypatch):
    loaded = Recipe.load(recipe())
    cut_and_resume(loaded, tmp_path, monkeypatch, teacher=teacher, student=Net)
    run = tmp_path / "whole"
    assert 'arch = "given:Net"' in (run / "recipe.toml").read_text()
    network = load_student(run, student=Net)
    document = evaluate_run(run, student=Net, progress=False, device="cpu")
    data = load_dataset("digits").limit(40, 20)
    x = torch.from_numpy(data.x_test).permute(0, 3, 1, 2) / 255
    right = (network(x).argmax(1).numpy() == data.y_test).mean()
    assert document["results"]["clean"]["accuracy"] == pytest.approx(right)


def test_what_cannot_be_rebuilt_is_asked_for_again(recipe, teacher, tmp_path, capsys):
    loaded, run = Recipe.load(recipe(extra="")).override({"schedule.epochs": 1}), tmp_path / "run"
    train(loaded, out=run, teacher=teacher, student=Net, progress=False)
    options = {"out": run, "teacher": teacher, "resume": True, "progress": False}
    with pytest.raises(ValueError, match="given:Net.*same network given again"):
        load_student(run)
    with pytest.raises(ValueError, match="tensors are not those of given:Net"):
        load_student(run, student=lambda: Net(width=5))
    with pytest.raises(ValueError, match="resume: the student is not the one of .*tensors"):
        train(loaded, student=lambda: Net(width=5), **options)
    with pytest.raises(ValueError, match="student.arch: 'given:Net' -> 'cnn'"):
        train(loaded, **options)
    assert main(["eval", str(run), "--quiet"]) == 2
    assert "given again" in capsys.readouterr().err
    assert main(["train", str(run / "recipe.toml"), "--out", str(tmp_path / "again"), "--quiet"]) == 2


def test_a_module_is_copied_and_starts_from_its_weights(recipe, teacher, tmp_path):
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    loaded = Recipe.load(recipe()).override({"optimizer.lr": 0.0, "schedule.epochs": 1, "igdm.alpha": 0})
    trained = train(loaded, out=tmp_path / "run", teacher=teacher, student=net, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(trained.student.module.fc.weight, before["fc.weight"])


class TwoOutputs(Net):
    def forward(self, x):
        logits = super().forward(x)
        return (logits, logits) if self.training else logits


class Detached(Net):
    def forward(self, x):
        return super().forward(x.detach())


class Viewed(Net):
    def forward(self, x):
        return self.fc(torch.relu(self.bn(self.conv(x)))[:, :, :2, :2].view(len(x), -1))


class Scaled(Net):
    def forward(self, x):
        return 2 * super().forward(x)


class Counting(Net):
    """What it learns of the images is in no checkpoint."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.seen += 1
        return super().forward(x * (1 + self.seen))


class Rechecked(Net):
    def forward(self, x):
        return checkpointed(super().forward, x, use_reentrant=True)


class Finer(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.zeros((), dtype=torch.float64))


def locked():
    net = Net()
    net.lock = threading.Lock()
    return net


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (
            lambda: Net(9),
            r"logits in train mode: got \(torch.float32, \(2, 9\)\); accepted: float32 \(2, 10\)",
        ),
        (lambda: Net(in_channels=3), r"given:Net: fails on images \(2, 1, 8, 8\)"),
        (lambda: Net().double(), r"got parameters or buffers of float64; accepted: float32 \(module.float\(\)\)"),
        (lambda: Net().requires_grad_(False), "no parameter takes a gradient"),
        (TwoOutputs, r"logits in train mode: got tuple; accepted: float32 \(2, 10\)"),
        (Detached, "no gradient reaches the images"),
        (Viewed, "fails on images .*view"),
        (Counting, r"gives other logits with the state_dict\(\) that it had"),
        (Rechecked, r"fails on images \(2, 1, 8, 8\): .*use_reentrant"),
        (Finer, "got parameters or buffers of float32, float64; accepted: float32"),
        (locked(), r"student: cannot be copied \(.*\); accepted: a module that copy.deepcopy takes"),
        (Scaled, "does not make the logits"),
        (lambda: nn.Conv2d(1, 10, 8), "no nn.Linear inside"),
        (lambda: 3, "got a int of what was called"),
        (3, "student: got 3; accepted: a Module or a function"),
    ],
)
def test_a_module_that_cannot_be_trained_is_refused_before_the_folder_exists(
    student, message, recipe, teacher, tmp_path
):
    with pytest.raises((ValueError, TypeError), match=message):
        train(Recipe.load(recipe()), out=tmp_path / "run", teacher=teacher, student=student, progress=False)
    assert not (tmp_path / "run").exists()


def test_the_check_leaves_network_and_random_state_alone():
    network = adopt(Net, {"num_classes": 10, "in_channels": 1, "image_size": 8})
    before, state = final(network), torch.get_rng_state()
    check_network(network, torch.rand(2, 1, 8, 8, generator=torch.Generator()), 10)
    assert all(torch.equal(a, b) for a, b in zip(before, final(network), strict=True))
    assert torch.equal(state, torch.get_rng_state()) and network.training


def final(network):
    return [value.clone() for value in network.state_dict().values()]


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ('{ arch = "torchvision:resnet18" }', "got 1 for torchvision:resnet18.*student.repeat_grey = true"),
        ('{ arch = "torchvision:resnet19" }', "torchvision has no model 'resnet19'; did you mean 'resnet18'"),
        ('{ arch = "timm:vit_tiny_patch16_22" }', "timm has no model .*did you mean 'vit_tiny_patch16_224'"),
        (
            '{ arch = "timm:vit_tiny_patch16_224", options = { patches = 4 } }',
            "cannot be built with options .*patches",
        ),
        (
            '{ arch = "timm:vit_tiny_patch16_224", options = { patch_size = 0 } }',
            "arch: timm:vit_tiny_patch16_224 cannot be built with options .*: ZeroDivisionError",
        ),
        (
            '{ arch = "timm:resnet18", options = { act_layer = "nope" } }',
            "arch: timm:resnet18 cannot be built with options .*: KeyError: 'nope'",
        ),
        ('{ arch = "keras:resnet18" }', "got 'keras:resnet18'; accepted: timm:NAME or torchvision:NAME"),
        (
            '{ arch = "cnn", repeat_grey = true }',
            "repeat_grey: got true for cnn; accepted: only for a network of another",
        ),
        ('{ arch = "cnn", weights = "nowhere.pt" }', "weights: nowhere.pt: no such file"),
    ],
)
def test_names_and_options_that_cannot_be_used(student, message, recipe, tmp_path, capsys):
    for library in ("timm", "torchvision"):
        pytest.importorskip(library)
    arguments = ["train", str(recipe(student)), "--out", str(tmp_path / "run"), "--quiet", "--device", "cpu"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_student_starts_from_weights_with_a_rate_of_its_own_for_the_head(recipe, teacher, tmp_path):
    """A teacher of four classes: all but the last layer is taken over, which alone is trained."""
    torch.manual_seed(3)
    old = build_model("cnn", num_classes=4, in_channels=1, image_size=8, width=4)
    torch.save(old.state_dict(), tmp_path / "old.pt")
    student = f'{{ arch = "cnn", options = {{ width = 4 }}, weights = "{tmp_path / "old.pt"}" }}'
    loaded = Recipe.load(recipe(student)).override(
        {"optimizer.lr": 1e-12, "optimizer.head_lr": 0.1, "optimizer.weight_decay": 0.0, "training.ema": 0.5}
    )
    train(loaded, out=tmp_path / "run", teacher=teacher, progress=False)
    state = checkpoint.read(tmp_path / "run/last.pt")["model"]["state"]
    torch.testing.assert_close(state["conv3.weight"], old.conv3.weight.detach(), rtol=0, atol=1e-8)
    line = [json.loads(text) for text in (tmp_path / "run/log.jsonl").read_text().splitlines()][-1]
    assert line["lr"] == pytest.approx(1e-12)
    assert (final_state(tmp_path / "run")["linear.weight"]).shape == (10, 32)
    torch.save(build_model("cnn", num_classes=10, in_channels=1, width=5).state_dict(), tmp_path / "old.pt")
    with pytest.raises(
        ValueError, match=r"old.pt: the weights do not fit the student: .* of another shape: conv1.weight"
    ):
        train(loaded, out=tmp_path / "other", teacher=teacher, progress=False)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w * torch.nan, "weights: .*old.pt: conv1.weight: got NaN or infinity; accepted: finite"),
        (lambda w: w.to_sparse(), "weights: .*old.pt: conv1.weight: got torch.float32, torch.sparse_coo; accepted"),
        (lambda w: w.to(torch.float8_e4m3fn), "weights: .*old.pt: conv1.weight: got torch.float8_e4m3fn"),
        (lambda w: w + 0j, "old.pt: the weights do not fit the student: 1 of other numbers: conv1.weight"),
        (lambda w: w.long(), "old.pt: the weights do not fit the student: 1 of other numbers: conv1.weight"),
    ],
)
def test_weights_that_cannot_be_trained_on_are_refused(recipe, teacher, tmp_path, change, message):
    state = build_model("cnn", num_classes=10, in_channels=1, image_size=8, width=4).state_dict()
    torch.save({**state, "conv1.weight": change(state["conv1.weight"])}, tmp_path / "old.pt")
    student = f'{{ arch = "cnn", options = {{ width = 4 }}, weights = "{tmp_path / "old.pt"}" }}'
    with pytest.raises(ValueError, match=message):
        train(Recipe.load(recipe(student)), out=tmp_path / "run", teacher=teacher, progress=False)
    assert not (tmp_path / "run").exists()


def test_weights_as_published_fit_a_wrapped_network(recipe, teacher, tmp_path):
    timm = pytest.importorskip("timm")
    options = {"patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2, "img_size": 8, "in_chans": 1}
    published = timm.create_model("vit_tiny_patch16_224", num_classes=10, **options)
    torch.save(published.state_dict(), tmp_path / "vit.pt")
    student = VIT.replace(" }}", f' }}, weights = "{tmp_path / "vit.pt"}" }}').replace(
        "2 } }", f'2 }}, weights = "{tmp_path / "vit.pt"}" }}'
    )
    loaded = Recipe.load(recipe(student)).override({"optimizer.lr": 0.0, "schedule.epochs": 1})
    trained = train(loaded, out=tmp_path / "run", teacher=teacher, progress=False)
    # In float64: the student lies in memory otherwise, and rounds otherwise.
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    expected = published.eval().double()(x)
    torch.testing.assert_close(trained.student.double()(x), expected)
    again = load_teacher(tmp_path / "vit.pt", arch="timm:vit_tiny_patch16_224", num_classes=10, in_channels=1,
                         image_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2)  # fmt: skip
    torch.testing.assert_close(again.double()(x), expected)


@pytest.mark.parametrize("prefix", ["", "module.", "module.model."])
def test_a_published_teacher_of_another_maker_is_loaded_by_the_name_of_its_architecture(prefix, tmp_path):
    """As RobustBench holds networks for ImageNet: torchvision's names behind a prefix, the normalisation beside it."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(5)
    net = torchvision.models.shufflenet_v2_x0_5(num_classes=7)
    state = {f"{prefix}{name}": value for name, value in net.state_dict().items()}
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    norm = {"normalize.mean": torch.tensor(mean), "normalize.std": torch.tensor(std)}
    torch.save({**state, **norm}, tmp_path / "net.pt")
    teacher = load_teacher(tmp_path / "net.pt", arch="torchvision:shufflenet_v2_x0_5", num_classes=7, image_size=32)
    x = torch.rand(2, 3, 32, 32)
    columns = [torch.tensor(values).reshape(-1, 1, 1) for values in (mean, std)]
    torch.testing.assert_close(teacher(x), net.eval()((x - columns[0]) / columns[1]))
    with pytest.raises(ValueError, match="the weights do not fit the network"):
        load_teacher(tmp_path / "net.pt", arch="torchvision:resnet18", num_classes=7, image_size=32)
