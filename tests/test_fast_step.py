"""The fast forms of a training step against the plain ones: reference trainer, compiled, tabulated, profiled."""

from __future__ import annotations

import copy
import gzip
import json

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from bench.reference import GACD, Reference
from fastrd import Recipe, attacks, evaluate, train
from fastrd.core.seeding import derive_seed
from fastrd.data import load_dataset
from fastrd.engine.batch_size import try_batch_sizes
from fastrd.engine.step import Distiller, build_distiller
from fastrd.engine.trainer import Trainer
from fastrd.methods import ADDONS, BASES, Method
from fastrd.models import Folded, build_model
from fastrd.recipe import Attack

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
N, CLASSES = 16, 10


def networks():
    torch.manual_seed(1)
    student = build_model("cnn", num_classes=CLASSES, width=4)
    teacher = build_model("resnet8", num_classes=CLASSES, width=8).eval().requires_grad_(False)
    return student, teacher


def distiller(student, teacher, base, addons=None, labels=None, **options):
    method = Method(BASES[base](), {name: ADDONS[name](**values) for name, values in (addons or {}).items()})
    nets = {"student": student, "teacher": teacher}
    labels = torch.arange(N) % CLASSES if labels is None else labels
    return build_distiller(method, nets, Attack(), labels=labels, num_classes=CLASSES, **options)


def batches(count, total):
    for step in range(count):
        generator = torch.Generator().manual_seed(step)
        x = torch.rand(N, 3, 16, 16, generator=generator)
        index = torch.randperm(total, generator=generator)[:N]
        noise = torch.rand(x.shape, generator=generator) * 2 - 1
        yield x, index, noise


CASES = {
    "ard": {},
    "rslad": {},
    "adaad": {},
    "ard+igdm": {"igdm": 20.0},
    "rslad+igdm": {"igdm": 2.0},
    "adaad+igdm": {"igdm": 20.0},
    "ard+gacd": {"gacd": 0.8},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_twenty_steps_end_in_the_weights_of_the_reference_trainer(case, dtype):
    """From equal weights, batches and noise. In float64 to rounding, attack and all. In float32 the sign of a
    gradient within rounding of zero is anyone's guess and each guess moves all later steps: there the attacks are
    compared step by step, and both trainers go on from the engine's."""
    exact = dtype == torch.float64
    base, weights = case.split("+")[0], CASES[case]
    total, steps, epochs = 64, 20, 4
    labels = torch.arange(total) % CLASSES
    student, teacher = (net.to(dtype) for net in networks())
    initial, theirs = copy.deepcopy(student.state_dict()), copy.deepcopy(student)

    addons = {"igdm": {"alpha": weights["igdm"]}} if "igdm" in weights else {}
    if "gacd" in weights:
        addons["gacd"] = {"weight": weights["gacd"], "estimator": "strict", "negatives": 40, "dim": 8}
    engine = distiller(student, teacher, base, addons, labels)
    engine.method.to(dtype)
    parameters = [*student.parameters(), *engine.method.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=5e-4, fused=True)
    gacd, place = None, {}
    if "gacd" in weights:
        term = engine.method.terms["gacd"]
        contrast = term.contrast
        heads = copy.deepcopy(contrast.student_head), copy.deepcopy(contrast.teacher_head)

        def draw(index):
            return contrast.table(index, derive_seed(term.seed, "negatives", place["epoch"], place["batch"]))

        gacd = GACD(*heads, contrast.bank_student.clone(), labels, k=40, weight=weights["gacd"], draw=draw)
    reference = Reference(
        theirs, teacher, base, igdm=weights.get("igdm", 0), gacd=gacd, epochs=epochs, lr=0.02
    )
    different = []
    for step, (x, index, noise) in enumerate(batches(steps, total)):
        x, noise, y, epoch = x.to(dtype), noise.to(dtype), labels[index], step // 5 + 1
        place.update(epoch=epoch, batch=step)
        noise = 8 / 255 * noise if base == "ard" else 1e-3 * noise
        start = (x + noise).clamp(0, 1) if base == "ard" else x + noise
        x_adv, their_x_adv = engine.attack(x, y, start=start), reference.attack(x, y, noise)
        different.append((x_adv - their_x_adv).abs().gt(1e-6).float().mean())
        if not exact:
            reference.attack = lambda *_, x_adv=x_adv: x_adv
        optimizer.zero_grad()
        losses, _ = engine.losses(x, y, index, x_adv, epoch=epoch, epochs=epochs, batch=step)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        loss = reference.step(x, y, index, epoch=epoch, noise=noise)
        vars(reference).pop("attack", None)
        assert sum(losses.values()).item() == pytest.approx(loss, rel=1e-9 if exact else 1e-3)
    # Where a unit is within rounding of its kink, all pixels of one image may follow another path.
    assert max(different) == 0 if exact else sum(different) / steps <= 0.02
    for name, value in student.state_dict().items():
        expected = theirs.state_dict()[name].double()
        moved = (expected - initial[name].double()).norm()
        assert (value.double() - expected).norm() <= (1e-8 if exact else 1e-2) * moved, name


def test_the_reference_runs_on_pytorchs_operators_alone():
    """It would be a poor yardstick if it gained from the engine's kernels."""
    seen = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(function.namespace)
            return function(*args, **(kwargs or {}))

    student, teacher = build_model("resnet8", num_classes=4), build_model("resnet8", num_classes=4)
    reference = Reference(student, teacher.eval().requires_grad_(False), "ard", igdm=10.0)
    x, y = torch.rand(4, 3, 16, 16), torch.arange(4)
    with Recorder():
        reference.step(x, y, torch.arange(4))
    assert "aten" in seen and "fastrd" not in seen
    with Recorder():
        student(x.contiguous(memory_format=torch.channels_last))
    assert "fastrd" in seen


OBJECTIVES = {
    "ce": lambda x, y, student, teacher: attacks.cross_entropy(y),
    "margin": lambda x, y, student, teacher: attacks.margin(y),
    "kl": lambda x, y, student, teacher: attacks.kl_from(teacher(x)),
    "adaad": lambda x, y, student, teacher: attacks.adaad(teacher),
    "igdm": lambda x, y, student, teacher: attacks.gradient_mismatch(student, teacher, x),
}
SETTINGS = {"epsilon": 8 / 255, "step_size": 2 / 255, "steps": 3}


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_compiled_attack_is_the_eager_one_and_compiles_once(name):
    student, teacher = (net.eval().requires_grad_(False) for net in networks())
    eager = attacks.PGD(student, **SETTINGS)
    compiled = attacks.PGD(student, **SETTINGS, compile=True)
    for number, (x, index, noise) in enumerate(batches(3, N)):
        objective = OBJECTIVES[name](x, index % CLASSES, student, teacher)
        start = x + 0.01 * noise
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            ours = compiled(x, start, objective)
        different = (ours - eager(x, start, objective)).abs() > 1e-6
        assert different.float().mean() < 2e-3, "only pixels whose gradient is within rounding of zero"


@pytest.mark.slow
def test_a_compiled_step_is_the_eager_one_and_compiles_once():
    """Attack in fp32, teacher and student compiled; no step after the first may compile anything."""
    student, teacher = networks()
    twin = copy.deepcopy(student)
    addons = {"igdm": {"alpha": 5.0}}
    eager = distiller(student, teacher, "adaad", addons)
    compiled = distiller(twin, teacher, "adaad", addons, compile=True)
    for number, (x, index, noise) in enumerate(batches(3, N)):
        known = {"epoch": number + 1, "epochs": 4, "start": x + 1e-3 * noise}
        expected, _ = eager(x, index % CLASSES, index, **known)
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            losses, _ = compiled(x, index % CLASSES, index, **known)
        for name, loss in losses.items():
            assert loss.item() == pytest.approx(expected[name].item(), rel=5e-3)
        for p, q in zip(twin.parameters(), student.parameters(), strict=True):
            assert (p.grad - q.grad).norm() <= 0.05 * q.grad.norm()
            p.grad = q.grad = None
    for (name, ours), theirs in zip(twin.named_buffers(), student.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=name)


@pytest.fixture(scope="module")
def robust(data_root, tmp_path_factory):
    """A network trained on real images for long enough to have some robustness, and 300 test images."""
    recipe = Recipe.from_dict(
        {
            "name": "robust",
            "student": {"arch": "cnn"},
            "base": {"name": "pgd_at"},
            "data": {"train_limit": 3000, "holdout": 0},
            "attack": {"steps": 3, "step_size": 4 / 255},
            "schedule": {"epochs": 4, "kind": "cosine"},
        }
    )
    out = tmp_path_factory.mktemp("robust") / "run"
    student = train(recipe, out=out, data=data_root, progress=False).student
    test = load_dataset("cifar10", root=data_root, test_limit=300)
    return student, test.x_test, test.y_test


@pytest.mark.slow
def test_fast_attacks_are_as_strong_as_the_plain_one(robust):
    student, images, y = robust
    x, y = torch.from_numpy(images).permute(0, 3, 1, 2) / 255, torch.from_numpy(y)
    start = attacks.uniform_start(x, 8 / 255, torch.Generator().manual_seed(0))
    settings = {"epsilon": 8 / 255, "step_size": 2 / 255, "steps": 20}
    folded = Folded(student, x[:2])
    plain = [x, start]
    native = [images.contiguous(memory_format=torch.channels_last) for images in plain]
    forms = [(student, {}, plain), (folded.network, {}, plain), (folded.network, {"compile": True}, plain)]
    forms += [(folded.network, {}, native), (folded, {}, native)]  # our convolutions, and as one operation
    with attacks.frozen(student):
        right = []
        for model, options, (images, begin) in forms:
            found = attacks.PGD(model, **settings, **options)(images, begin, attacks.cross_entropy(y))
            right.append(student(found.contiguous()).argmax(1) == y)
        clean = (student(x).argmax(1) == y).float().mean()
    plain, *fast = [r.float().mean() for r in right]
    assert 0.1 < plain < clean - 0.05, "a robust model under an attack that works"
    for accuracy in fast:
        assert abs(accuracy - plain) <= 0.01


@pytest.mark.slow
def test_compiled_evaluation_reaches_the_same_verdict_for_every_image(robust):
    student, x, y = robust
    options = {"attacks": ("clean", "pgd20", "cw-quick", "aa"), "batch_size": 24, "progress": False}
    plain, compiled = (evaluate(student, x[:24], y[:24], **options, compile=c) for c in (False, True))
    assert 0 < plain["aa"]["accuracy"] < plain["clean"]["accuracy"]
    for name in plain.verdicts:
        assert np.array_equal(plain.verdicts[name], compiled.verdicts[name]), name


def test_frozen_outputs_of_images_that_never_change_are_computed_once(toy, tmp_path, monkeypatch):
    """Without augmentation the teacher sees clean images before training only; the run is the same."""
    recipe = toy.override({"base.name": "rslad", "data.augment": False})
    teacher = build_model("cnn", num_classes=CLASSES, in_channels=1, image_size=8, width=2)
    logs = []
    for tabulate in (Distiller.tabulate, lambda self, batches: None):
        out = tmp_path / str(len(logs))
        with monkeypatch.context() as patch:
            patch.setattr(Distiller, "tabulate", tabulate)
            train(recipe, out=out, data=toy_data(), teacher=teacher, progress=False)
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        logs.append([line["loss"] for line in lines])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)

    seen = []
    engine = distiller(*networks(), "rslad")
    x, index, noise = next(batches(1, N))
    engine.tabulate([x[:7], x[7:]])
    engine._frozen["teacher"].register_forward_hook(lambda *call: seen.append(call))
    engine(x, index % CLASSES, torch.arange(N), epoch=1, epochs=1, start=x + 1e-3 * noise)
    assert not seen


def toy_data():
    return load_dataset("digits", train_limit=200)


@pytest.fixture
def toy():
    return Recipe.from_dict(
        {
            "name": "toy",
            "student": {"arch": "cnn", "options": {"width": 2}},
            "base": {"name": "pgd_at"},
            "data": {"name": "digits", "holdout": 20},
            "attack": {"steps": 2},
            "training": {"batch_size": 36},
            "schedule": {"epochs": 2},
            "validation": {"steps": 0},
        }
    )


def test_profile_says_where_the_time_goes(toy, tmp_path, capsys):
    teacher = build_model("cnn", num_classes=CLASSES, in_channels=1, image_size=8, width=2)
    recipe = toy.override({"base.name": "adaad"})
    train(recipe, out=tmp_path / "run", data=toy_data(), teacher=teacher, progress=False, profile=True)
    told = capsys.readouterr()
    text = told.out + told.err
    for phase in ("data", "attack", "teacher", "student", "optimiser", "all"):
        assert text.count(f"\n  {phase} ") == 2, f"{phase} in both epochs"
    assert "TFLOP/s" in text and "utilisation" in text and "images/s" in text
    with gzip.open(tmp_path / "run" / "trace.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"attack", "teacher", "student", "optimiser"} <= names


def test_flops_are_counted_by_hand():
    student, teacher = networks()
    engine = distiller(student, teacher, "adaad", {"igdm": {"alpha": 1.0}})
    example = torch.zeros(1, 3, 16, 16)
    # cnn, width 4: 3x3 convolutions at 8x8, 8x8, 4x4, 2x2 and the last layer
    s = 2 * (9 * (3 * 4 * 64 + 4 * 8 * 64 + 8 * 16 * 16 + 16 * 32 * 4) + 32 * 10)
    t = engine.flops(example, 1)["teacher"] / 2  # T(x') and T(x - d)
    assert engine.flops(example, 1) == {"attack": 2 * 10 * (s + t), "teacher": 2 * t, "student": 3 * 2 * s}


@CUDA
def test_a_captured_step_is_the_eager_one_and_nothing_in_it_waits():
    student, teacher = (net.cuda() for net in networks())
    twin = copy.deepcopy(student)
    eager, captured = (
        distiller(net, teacher, "adaad", {"igdm": {"alpha": 1.0}}, labels=torch.arange(N).cuda(), compile=c)
        for net, c in ((student, False), (twin, True))
    )
    counters.clear()
    for number, (x, index, noise) in enumerate(batches(6, N)):
        x, index, noise = x.cuda(), index.cuda(), noise.cuda()
        options = {"epoch": 1, "epochs": 2, "start": x + 1e-3 * noise}
        # The first two compile, choose algorithms and record.
        torch.cuda.set_sync_debug_mode("error" if number > 2 else "default")
        try:
            ours, _ = captured(x, index % CLASSES, index, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        expected, _ = eager(x, index % CLASSES, index, **options)
        for name, loss in ours.items():
            assert loss.item() == pytest.approx(expected[name].item(), rel=2e-2)
        for p, q in zip(twin.parameters(), student.parameters(), strict=True):
            assert (p.grad - q.grad).norm() <= 0.05 * q.grad.norm()
            p.grad = q.grad = None
    assert not counters["inductor"]["cudagraph_skips"], "all passes are graphs"
    for (name, ours), theirs in zip(twin.named_buffers(), student.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=name)


def test_batch_sizes_are_tried_until_data_or_memory_run_out(toy, monkeypatch):
    rows = list(try_batch_sizes(toy, data=toy_data(), device="cpu"))
    assert [row.batch_size for row in rows] == [36, 72, 144], "of 180 images"
    assert all(row.images_per_s > 0 and row.peak_bytes > 2**20 for row in rows)

    def full(self, batch):
        if len(batch.x) > 36:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, batch)

    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", full)
    rows = list(try_batch_sizes(toy, data=toy_data(), device="cpu"))
    assert [(row.batch_size, row.images_per_s is None) for row in rows] == [(36, False), (72, True)]
    with pytest.raises(ValueError, match="batch_size: got 500"):
        next(try_batch_sizes(toy.override({"training.batch_size": 500}), data=toy_data(), device="cpu"))
