"""Exported students: what is read again gives the student's logits; a file that does not is not written."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch

import fastrd
from fastrd import Recipe, deploy, load_student, load_teacher, train
from fastrd.cli import main
from fastrd.core import checkpoint
from fastrd.data import load_dataset
from fastrd.models import build_model
from fastrd.models.base import Conv2d
from fastrd.models.foreign import NETWORKS
from fastrd.report.card import write_card


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained student with a normalisation of its own and class names that are words."""
    folder = tmp_path_factory.mktemp("export")
    digits = load_dataset("digits").limit(40, 20)
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    np.savez(folder / "words.npz", x_train=digits.x_train, y_train=digits.y_train, x_test=digits.x_test,
             y_test=digits.y_test, class_names=np.array(words))  # fmt: skip
    recipe = Recipe.from_dict(
        {
            "name": "words",
            "student": {"arch": "resnet8", "options": {"width": 4, "normalize": [[0.3], [0.4]]}},
            "base": {"name": "pgd_at"},
            "data": {"name": str(folder / "words.npz"), "holdout": 8},
            "attack": {"steps": 1},
            "schedule": {"epochs": 1, "milestones": []},
            "training": {"batch_size": 16},
            "validation": {"steps": 0},
        }
    )
    train(recipe, out=folder / "run", progress=False, device="cpu")
    return folder / "run"


@pytest.fixture
def images():
    return torch.rand(5, 1, 8, 8)


def logits(run, images):
    with torch.no_grad():
        return load_student(run)(images)


def close(found, expected):
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-3, atol=1e-4)


def said(capsys):
    """The difference that the command prints."""
    return float(re.search(r"when read again ([\d.e+-]+)", capsys.readouterr().out)[1])


def test_safetensors_hold_weights_normalisation_and_names(run, images, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr("os.link")  # some file systems have no hard links
    out = tmp_path / "s.safetensors"
    assert main(["export", str(run), "--out", str(out)]) == 0
    assert said(capsys) < 1e-4
    close(load_teacher(out)(images), logits(run, images))
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(str(out), framework="pt") as file:
        facts = file.metadata()
    assert json.loads(facts["class_names"])[3] == "three"
    assert json.loads(facts["fastrd_spec"])["normalize"] == [[0.3], [0.4]]
    card = (tmp_path / "s.safetensors.md").read_text()
    assert "## Measured" in card and "three" in card and "## Exported" in card
    assert {path.name for path in tmp_path.iterdir()} == {out.name, f"{out.name}.md"}


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_export(fold, dynamic, run, images, tmp_path):
    done = fastrd.export(run, format="torch-export", out=tmp_path / "s.pt2", fold=fold, dynamic_batch=dynamic)
    assert done.difference < 1e-4 and done.class_names[9] == "nine"
    files = {"class_names.json": ""}
    program = torch.export.load(tmp_path / "s.pt2", extra_files=files)
    parts = [images] if dynamic else images.split(1)
    close(torch.cat([program.module()(part) for part in parts]), logits(run, images))
    assert json.loads(files["class_names.json"])[0] == "zero"
    operators = {str(node.target) for node in program.graph.nodes}
    assert not any("fastrd" in name for name in operators)
    assert any("batch_norm" in name for name in operators) != fold


@pytest.mark.parametrize(("fold", "dynamic"), [(False, True), (True, False)])
def test_onnx_is_read_again_by_onnxruntime(fold, dynamic, run, images, tmp_path, capsys):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "s.onnx"
    options = ["--fold"] * fold + ["--dynamic-batch"] * dynamic
    assert main(["export", str(run), "--format", "onnx", "--out", str(out), *options]) == 0
    assert said(capsys) < 1e-4
    session = runtime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    assert [put.name for put in (*session.get_inputs(), *session.get_outputs())] == ["images", "logits"]
    parts = [images] if dynamic else images.split(1)
    found = np.concatenate([session.run(None, {"images": part.numpy()})[0] for part in parts])
    close(found, logits(run, images))
    facts = {entry.key: entry.value for entry in onnx.load(str(out)).metadata_props}
    assert json.loads(facts["class_names"])[1] == "one"
    assert {path.name for path in tmp_path.iterdir()} == {"s.onnx", "s.onnx.md"}


def test_a_file_that_gives_other_logits_is_not_written(run, tmp_path, monkeypatch, capsys):
    class Wrong(deploy._PlainConv2d):
        def forward(self, x, *, add=None, relu=False):
            return 1.1 * super().forward(x, add=add, relu=relu)

    monkeypatch.setattr(deploy, "_PlainConv2d", Wrong)
    out = tmp_path / "s.pt2"
    assert main(["export", str(run), "--format", "torch-export", "--out", str(out)]) == 2
    assert "its logits differ by" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_student_itself_is_left_alone(run, images, tmp_path):
    before = logits(run, images)
    fastrd.export(run, format="torch-export", out=tmp_path / "s.pt2", fold=True)
    network = load_student(run)
    assert torch.equal(logits(run, images), before)
    assert any(type(module) is Conv2d for module in network.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere"),
        (["RUN", "--fold"], "fold: got True for safetensors; accepted: for onnx and torch-export"),
        (["RUN", "--dynamic-batch"], "dynamic_batch: got True for safetensors"),
        (["RUN", "--out", "s.onnx"], r"out: got '.*s.onnx'; accepted: a file name that ends in .safetensors"),
    ],
)
def test_bad_input_is_named(arguments, message, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", *(str(run) if a == "RUN" else a for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="format: got 'pickle'; accepted"):
        fastrd.export(run, format="pickle")


def test_onnx_without_its_packages_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(ImportError, match="pip install onnx onnxscript"):
        fastrd.export(run, format="onnx", out=tmp_path / "s.onnx")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def altered(run, tmp_path):
    """Makes a copy of the run's last checkpoint with another entry of its model."""

    def write(**entries):
        payload = checkpoint.read(run / "last.pt")
        payload["model"].update(entries)
        return checkpoint.write(tmp_path / "altered.pt", payload)

    return write


def test_what_is_named_by_others_is_text_in_the_card(altered, run, tmp_path):
    names = ["*cat*", "<b>dog</b>", "a\n\n# heading", "[x](y)", "_", "`", "|", "8", "9", "10"]
    card = fastrd.export(altered(class_names=names), out=tmp_path / "a*b*.safetensors").card.read_text()
    assert card.startswith(r"# a\*b\*" + "\n")
    assert (
        r"**Classes:** \*cat\*, &lt;b&gt;dog&lt;/b&gt;, a \# heading, \[x\](y), \_, \`, \|, 8, 9, 10" + "\n"
    ) in card
    copy = shutil.copytree(run, tmp_path / "copy")
    text = (copy / "recipe.toml").read_text()
    (copy / "recipe.toml").write_text(text.replace("words.npz", "*words*.npz"))
    card = write_card(copy).read_text()
    assert r"**Data:** \*words\*.npz, 8 training images" in card and str(tmp_path) not in card
    assert "\n\n\n" not in card, "a recipe without a description leaves no empty lines"


def test_a_checkpoint_of_other_classes_or_images_is_named(altered, monkeypatch):
    with pytest.raises(ValueError, match=r"altered\.pt: model\.class_names: got 2; accepted: 10"):
        fastrd.export(altered(class_names=["a", "b"]))
    monkeypatch.setitem(NETWORKS, "unsized", lambda image_size, **shape: build_model("cnn", **shape))
    student = build_model("unsized", num_classes=10, in_channels=1, image_size=None)
    path = altered(spec=student.spec, state=student.state_dict())
    with pytest.raises(ValueError, match=r"altered\.pt: model\.spec\.image_size: missing"):
        fastrd.export(path)
