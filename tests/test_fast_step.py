"""The fast forms of a training step against the plain ones: reference trainer, compiled, tabulated, profiled."""

from __future__ import annotations

import copy
import gzip
import json

import numpy as np
import pytest
import rounding
import torch
from fastrd.kernels.cpu import native
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from bench.reference import GACD, Reference
from fastrd import Recipe, attacks, evaluate, train
from fastrd.core.seeding import derive_seed
from fastrd.data import load_dataset
from fastrd.engine.batch_size import try_batch_sizes
from fastrd.engine.profile import Profiler
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


def distiller(student, teacher, base, addons=None, labels=None, attack=None, **options):
    method = Method(BASES[base](), {name: ADDONS[name](**values) for name, values in (addons or {}).items()})
    nets = {"student": student, "teacher": teacher}
    labels = torch.arange(N) % CLASSES if labels is None else labels
    return build_distiller(method, nets, attack or Attack(), labels=labels, num_classes=CLASSES, **options)


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


def engine_and_reference(case, dtype, labels, epochs=4, lr=0.02):
    """The engine, the reference trainer, each with the same networks, heads, banks and draws; and where they are in the
    run, which draws depend on."""
    base, weights = case.split("+")[0], CASES[case]
    student, teacher = (net.to(dtype) for net in networks())
    addons = {"igdm": {"alpha": weights["igdm"]}} if "igdm" in weights else {}
    if "gacd" in weights:
        addons["gacd"] = {"weight": weights["gacd"], "estimator": "strict", "negatives": 40, "dim": 8}
    engine = distiller(student, teacher, base, addons, labels)
    engine.method.to(dtype)
    gacd, place = None, {}
    if "gacd" in weights:
        term = engine.method.terms["gacd"]
        contrast = term.contrast
        heads = copy.deepcopy(contrast.student_head), copy.deepcopy(contrast.teacher_head)

        def draw(index):
            return contrast.table(index, derive_seed(term.seed, "negatives", place["epoch"], place["batch"]))

        gacd = GACD(*heads, contrast.bank_student.clone(), labels, k=40, weight=weights["gacd"], draw=draw)
    reference = Reference(
        copy.deepcopy(student),
        copy.deepcopy(teacher),
        base,
        igdm=weights.get("igdm", 0),
        gacd=gacd,
        epochs=epochs,
        lr=lr,
    )
    return engine, reference, place


def start_noise(base, noise):
    return 8 / 255 * noise if base == "ard" else 1e-3 * noise


@pytest.mark.parametrize(("outer", "inner"), [("fp32", "bf16"), ("bf16", "fp32"), ("bf16", None)])
def test_the_attack_has_its_own_precision(outer, inner):
    """RSLAD: its attack reads the teacher's clean logits, which the outer loss reads too."""
    student, teacher = networks()
    engine = distiller(student, teacher, "rslad", precision=outer, attack=Attack(steps=2, precision=inner))
    x, index, noise = next(batches(1, N))
    y = index % CLASSES
    known: dict = {}
    x_adv = engine.attack(x, y, start=x + 1e-3 * noise, known=known)

    def logits(network, precision):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            return network(x)

    (clean,) = known.values()
    assert torch.equal(clean.logits, logits(engine._folded["teacher"], outer))
    copy_of_student = Folded(student, x[:2])
    expected = attacks.pgd(
        copy_of_student,
        x,
        attacks.kl_from(clean.logits),
        epsilon=8 / 255,
        step_size=2 / 255,
        steps=2,
        start=x + 1e-3 * noise,
        precision=inner or outer,
    )
    assert torch.equal(x_adv, expected)
    assert not torch.equal(logits(copy_of_student, "fp32"), logits(copy_of_student, "bf16"))


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_end_in_the_weights_of_the_reference_trainer(case):
    """From equal weights, batches and noise, in float64, where rounding decides nothing."""
    total, steps, epochs, base = 64, 20, 4, case.split("+")[0]
    labels = torch.arange(total) % CLASSES
    engine, reference, place = engine_and_reference(case, torch.float64, labels, epochs)
    student, theirs = engine.student, reference.student
    initial = copy.deepcopy(student.state_dict())
    parameters = [*student.parameters(), *engine.method.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=5e-4, fused=True)
    for step, (x, index, noise) in enumerate(batches(steps, total)):
        x, noise, y, epoch = x.double(), start_noise(base, noise.double()), labels[index], step // 5 + 1
        place.update(epoch=epoch, batch=step)
        start = (x + noise).clamp(0, 1) if base == "ard" else x + noise
        x_adv = engine.attack(x, y, start=start)
        torch.testing.assert_close(x_adv, reference.attack(x, y, noise), rtol=0, atol=1e-9)
        optimizer.zero_grad()
        losses, _ = engine.losses(x, y, index, x_adv, epoch=epoch, epochs=epochs, batch=step)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        loss = reference.step(x, y, index, epoch=epoch, noise=noise)
        assert sum(losses.values()).item() == pytest.approx(loss, rel=1e-9)
    for name, value in student.state_dict().items():
        moved = (theirs.state_dict()[name].double() - initial[name].double()).norm()
        assert (value.double() - theirs.state_dict()[name]).norm() <= 1e-8 * moved, name


@pytest.mark.parametrize("case", CASES)
def test_a_float32_step_is_the_float64_one_up_to_rounding(case):
    """The engine in float32, with its folded networks and kernels, against the reference trainer in float64: pixels
    are equal where rounding decides none, and gradients are within what rounding makes of the reference's."""
    total, base = 64, case.split("+")[0]
    labels = torch.arange(total) % CLASSES
    engine, _, _ = engine_and_reference(case, torch.float32, labels)
    _, gold, place = engine_and_reference(case, torch.float64, labels)
    if gold.gacd is not None:
        bank = engine.method.terms["gacd"].contrast.bank_student
    place.update(epoch=2, batch=0)
    x, index, noise = next(batches(1, total))
    noise, y = start_noise(base, noise), labels[index]
    start = (x + noise).clamp(0, 1) if base == "ard" else x + noise
    x_adv = engine.attack(x, y, start=start)
    exact = rounding.neighbours(lambda: gold.attack(x.double(), y, noise.double()), gold.student, gold.teacher)
    rounding.assert_among(x_adv, exact)

    gold.attack = lambda *_: x_adv.double()
    gold.optimizer.step = lambda: None

    def gradient():
        if gold.gacd is not None:
            gold.gacd.normalizer = None
            gold.gacd.bank = bank.double().clone()
        gold.step(x.double(), y, index, epoch=2, noise=noise)
        return torch.cat([p.grad.flatten() for p in gold.student.parameters()])

    theirs = rounding.neighbours(gradient, gold.student, gold.teacher)
    losses, _ = engine.losses(x, y, index, x_adv, epoch=2, epochs=4, batch=0)
    torch.stack(list(losses.values())).sum().backward()
    ours = torch.cat([p.grad.flatten() for p in engine.student.parameters()])
    assert (ours - theirs[0]).norm() <= rounding.spread(theirs) <= 0.2 * theirs[0].norm()


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
    assert ("fastrd" in seen) == (native.library() is not None), "ours are seen where there are any"


OBJECTIVES = {
    "ce": lambda x, y, student, teacher: attacks.cross_entropy(y),
    "margin": lambda x, y, student, teacher: attacks.margin(y),
    "kl": lambda x, y, student, teacher: attacks.kl_from(teacher(x)),
    "adaad": lambda x, y, student, teacher: attacks.adaad(teacher),
    "igdm": lambda x, y, student, teacher: attacks.gradient_mismatch(student, teacher, x),
}
SETTINGS = {"epsilon": 8 / 255, "step_size": 2 / 255, "steps": 3}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "norm"), [*((name, "linf") for name in OBJECTIVES), ("ce", "l2")])
@pytest.mark.inductor
def test_a_compiled_attack_is_the_eager_one_and_compiles_once(name, norm):
    student, teacher = (net.double().eval().requires_grad_(False) for net in networks())
    settings = SETTINGS if norm == "linf" else {"norm": norm, "epsilon": 0.5, "step_size": 0.125, "steps": 3}
    eager = attacks.PGD(student, **settings)
    compiled = attacks.PGD(student, **settings, compile=True)
    for number, (x, index, noise) in enumerate(batches(3, N)):
        x = x.double()
        objective = OBJECTIVES[name](x, index % CLASSES, student, teacher)
        start = x + 0.01 * noise
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            ours = compiled(x, start, objective)
        torch.testing.assert_close(ours, eager(x, start, objective), rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ce", "igdm"])
@pytest.mark.inductor
def test_a_compiled_float32_attack_ends_where_rounding_does_not_decide_it(name):
    """IGDM's gradient is a difference of outputs that nearly cancel: more pixels than elsewhere lie within rounding."""
    student, teacher = (net.eval().requires_grad_(False) for net in networks())
    wide = [copy.deepcopy(net).double() for net in (student, teacher)]
    x, index, noise = next(batches(1, N))
    start, y = x + 0.01 * noise, index % CLASSES
    compiled = attacks.PGD(student, **SETTINGS, compile=True)
    found = compiled(x, start, OBJECTIVES[name](x, y, student, teacher))

    def exact():
        objective = OBJECTIVES[name](x.double(), y, *wide)
        return attacks.PGD(wide[0], **SETTINGS)(x.double(), start.double(), objective)

    results = rounding.neighbours(exact, *wide)
    rounding.assert_among(found, results)


@pytest.mark.slow
@pytest.mark.inductor
def test_a_compiled_step_is_the_eager_one_and_compiles_once():
    """Teacher and student compiled, in float64; no step after the first may compile anything."""
    student, teacher = (net.double() for net in networks())
    twin = copy.deepcopy(student)
    addons = {"igdm": {"alpha": 5.0}}
    eager = distiller(student, teacher, "adaad", addons)
    compiled = distiller(twin, teacher, "adaad", addons, compile=True)
    for number, (x, index, noise) in enumerate(batches(3, N)):
        x = x.double()
        known = {"epoch": number + 1, "epochs": 4, "start": x + 1e-3 * noise}
        expected, _ = eager(x, index % CLASSES, index, **known)
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            losses, _ = compiled(x, index % CLASSES, index, **known)
        for name, loss in losses.items():
            assert loss.item() == pytest.approx(expected[name].item(), rel=1e-9)
        for p, q in zip(twin.parameters(), student.parameters(), strict=True):
            assert (p.grad - q.grad).norm() <= 1e-8 * q.grad.norm()
            p.grad = q.grad = None
    for (name, ours), theirs in zip(twin.named_buffers(), student.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, msg=name)


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
@pytest.mark.inductor
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
    plain, *fast = right
    assert 0.1 < plain.float().mean() < clean - 0.05, "a robust model under an attack that works"
    for r in fast:
        # Rounding moves the verdict of images at the edge, as often to one side as to the other (McNemar, 4 sigma).
        weaker, stronger = int((r & ~plain).sum()), int((plain & ~r).sum())
        assert abs(weaker - stronger) <= 4 * (weaker + stronger) ** 0.5


class InFloat64(nn.Module):
    """A float32 network to look at, whose layers compute in float64: what it decides, rounding does not."""

    def __init__(self, network):
        super().__init__()
        self._layers = [copy.deepcopy(network).double().eval().requires_grad_(False)]  # in a list: not registered

    def forward(self, x):
        return self._layers[0](x.double()).float()


@pytest.mark.slow
@pytest.mark.inductor
def test_compiled_evaluation_reaches_the_same_verdict_for_every_image(robust):
    student, x, y = robust
    # One of AutoAttack's: the others go through the same compiled network, and take six times as long.
    options = {"attacks": ("clean", "pgd20", "cw-quick", "apgd-t"), "batch_size": 12, "progress": False}
    network = InFloat64(student)
    plain, compiled = (evaluate(network, x[:12], y[:12], **options, compile=c) for c in (False, True))
    assert 0 < plain["apgd-t"]["accuracy"] < plain["clean"]["accuracy"]
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
    frozen = engine._frozen["teacher"]
    engine._frozen["teacher"] = lambda *given, **options: (seen.append(given), frozen(*given, **options))[1]
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


def test_utilisation_is_the_share_of_the_time_that_each_peak_would_take(tmp_path):
    profiler = Profiler(tmp_path, torch.device("cpu"), 100.0, attack_peak=400.0)
    profiler.close()
    profiler.seconds = {"attack": 5.0, "student": 4.0, "data": 1.0}
    attack, student, data, whole, _ = profiler.epoch(10, {"attack": 40.0, "student": 20.0}).splitlines()
    assert attack.endswith(" 20% model-flops utilisation") and student.endswith(" 50% model-flops utilisation")
    assert "FLOP" not in data and whole.endswith(" 30% model-flops utilisation")


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

    partial = {"training.batch_size": 100, "training.drop_last": False}
    rows = list(try_batch_sizes(toy.override(partial), data=toy_data(), device="cpu"))
    assert [row.batch_size for row in rows] == [100], "a batch of 200 would be one of 180"

    step = Trainer.step
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):

        def full(self, batch, error=error):
            if len(batch.x) > 36:
                raise error
            return step(self, batch)

        monkeypatch.setattr(Trainer, "step", full)
        rows = list(try_batch_sizes(toy, data=toy_data(), device="cpu"))
        assert [(row.batch_size, row.images_per_s is None) for row in rows] == [(36, False), (72, True)]
    with pytest.raises(ValueError, match="batch_size: got 500"):
        next(try_batch_sizes(toy.override({"training.batch_size": 500}), data=toy_data(), device="cpu"))
