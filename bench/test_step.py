"""A whole training step, batch from the loader to weight update: the engine against the reference trainer.

Each variant runs in the precision that its name says, "reference" and "ours" in IEEE float32: cuDNN's own default for
convolutions is tf32. All let cuDNN choose its algorithms by trying.

`images_per_s` is what to read. "reference" calls `loss.backward()` in its attack, as most published code does;
"reference, input gradient" asks autograd for nothing else. Operations are counted as the method needs them, without
the weight gradients of the reference's attack.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import reference
from bench.breakdown import breakdown
from bench.sizes import CUDA, DEVICE, TINY, seconds
from fastrd import attacks
from fastrd.data import Augment, load_dataset, make_loader
from fastrd.engine.process import float32_precision
from fastrd.engine.step import build_distiller
from fastrd.methods import ADDONS, BASES, Method
from fastrd.models import build_model
from fastrd.recipe import Attack

STUDENT, TEACHER = ("resnet18", "wrn-28-10") if CUDA else ("cnn", "cnn") if TINY else ("resnet8", "resnet20")
BATCHES = (128, 512)
CASES = {
    "ARD+IGDM": ("ard", {"igdm": {"alpha": 10.0}}),
    "AdaAD": ("adaad", {}),
    "AdaAD+IGDM": ("adaad", {"igdm": {"alpha": 10.0}}),
    "RSLAD+IGDM": ("rslad", {"igdm": {"alpha": 10.0}}),
    "ARD+GACD": ("ard", {"gacd": {"estimator": "strict", "negatives": 64 if TINY else 16384}}),
}
# name -> who steps, in which precision, and how
VARIANTS = {
    "reference": ("reference", "fp32", {}),
    "reference, tf32": ("reference", "tf32", {}),
    "reference, input gradient": ("reference", "fp32", {"attack_gradient": "grad"}),
    "ours": ("engine", "fp32", {"compile": CUDA}),
    "ours, tf32": ("engine", "tf32", {"compile": CUDA}),
    "ours, bf16": ("engine", "bf16", {"compile": CUDA}),
    "ours, compiled": ("engine", "fp32", {"compile": True}),
}
CPU_VARIANTS = ("reference", "reference, input gradient", "ours", "ours, compiled")


def check_machine(variant: str, batch_size: int) -> None:
    """Skip what says nothing on this machine; the names of all benchmarks are the same everywhere."""
    if CUDA and variant == "ours, compiled":
        pytest.skip('on a GPU "ours" is compiled')
    if not CUDA and not TINY and (variant not in CPU_VARIANTS or batch_size > 128):
        pytest.skip("of GPUs")


@pytest.fixture(scope="module")
def images() -> tuple[np.ndarray, np.ndarray]:
    """CIFAR-10's training set where it is to be had, else noise of its shape: the arithmetic is the same."""
    for root in (None, Path(__file__).parents[1] / ".data"):
        try:
            data = load_dataset("cifar10", root=root)
            return data.x_train, data.y_train
        except FileNotFoundError:
            continue
    generator = np.random.default_rng(0)
    n = 50_000
    return generator.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), generator.integers(0, 10, n)


def engine(base, addons, images, labels, batch_size, *, compile, precision="fp32"):
    """The parts of `fastrd.train` that make a step: a function that takes one, and the engine."""
    torch.manual_seed(0)
    student = build_model(STUDENT, num_classes=10).to(DEVICE, memory_format=torch.channels_last)
    teacher = build_model(TEACHER, num_classes=10).to(DEVICE, memory_format=torch.channels_last)
    networks = {"student": student, "teacher": teacher.eval().requires_grad_(False)}
    method = Method(BASES[base](), {name: ADDONS[name](**options) for name, options in addons.items()})
    options = {"labels": torch.from_numpy(labels), "num_classes": 10}
    distiller = build_distiller(method, networks, Attack(), **options, compile=compile, precision=precision)
    parameters = [*student.parameters(), *method.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)
    loader = make_loader(
        "resident",
        images,
        labels,
        batch_size=batch_size,
        device=torch.device(DEVICE),
        augment=Augment.for_size(32, 32),
    )
    batches = endless(lambda epoch: loader.epoch(epoch))
    generator = torch.Generator(DEVICE).manual_seed(0)

    def step():
        batch = next(batches)
        optimizer.zero_grad(set_to_none=True)
        losses, _ = distiller(*batch, epoch=1, epochs=200, generator=generator)
        optimizer.step()
        return losses

    return step, distiller


def plain(base, addons, images, labels, batch_size, **options):
    """The reference trainer's step."""
    torch.manual_seed(0)
    student = build_model(STUDENT, num_classes=10).to(DEVICE)
    teacher = build_model(TEACHER, num_classes=10).to(DEVICE).eval().requires_grad_(False)
    gacd = None
    if "gacd" in addons:
        heads = [torch.nn.Linear(net.feature_dim, 128).to(DEVICE) for net in (student, teacher)]
        bank = torch.nn.functional.normalize(torch.randn(len(labels), 128, device=DEVICE), dim=1)
        y = torch.from_numpy(labels).to(DEVICE)
        gacd = reference.GACD(*heads, bank, y, k=addons["gacd"]["negatives"])
    alpha = addons.get("igdm", {}).get("alpha", 0.0)
    trainer = reference.Reference(student, teacher, base, igdm=alpha, gacd=gacd, **options)
    loader = reference.loader(torch.from_numpy(images), torch.from_numpy(labels), batch_size=batch_size)
    batches = endless(lambda epoch: loader)
    return lambda: trainer.step(*(part.to(DEVICE) for part in next(batches)))


def endless(epoch):
    number = 0
    while True:
        number += 1
        yield from epoch(number)


@pytest.fixture
def measure_images(measure, benchmark):
    """`measure` of what takes `batch_size` images, with their number per second and what the time is spent on."""

    def take(run, *, batch_size: int, unit: str, **options) -> None:
        measure(run, bytes=None, unit=unit, rounds=5, **options)
        speed = batch_size / benchmark.stats.stats.median
        benchmark.extra_info |= {"images_per_s": speed, "seconds_by_kind": breakdown(run), "precision": unit}

    return take


@pytest.mark.parametrize("batch_size", BATCHES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES)
def test_step(measure_images, benchmark, images, case, variant, batch_size):
    check_machine(variant, batch_size)
    (base, addons), (who, precision, options) = CASES[case], VARIANTS[variant]
    problem = f"{case}: {STUDENT} student, {TEACHER} teacher, batch {batch_size}"
    batch_size = 8 if TINY else batch_size
    with float32_precision(precision, torch.device(DEVICE)):
        _, distiller = engine(base, addons, *images, batch_size, compile=False)
        flops = sum(distiller.flops(torch.zeros(1, 3, 32, 32, device=DEVICE), epoch=1).values())
        if who == "engine":
            step, _ = engine(base, addons, *images, batch_size, precision=precision, **options)
        else:
            step = plain(base, addons, *images, batch_size, **options)
        benchmark.extra_info["first_step_s"] = seconds(step)
        options = {"batch_size": batch_size, "flops": batch_size * flops, "unit": precision}
        measure_images(step, problem=problem, variant=variant, **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_attack(measure_images, images, variant):
    """PGD-10 on cross-entropy alone."""
    batch_size = 8 if TINY else 512 if CUDA else 128
    check_machine(variant, batch_size)
    who, precision, options = VARIANTS[variant]
    x = torch.rand(batch_size, 3, 32, 32, device=DEVICE)
    y = torch.randint(0, 10, (batch_size,), device=DEVICE)
    made = {"precision": precision, **options} if who == "engine" else {"compile": False}
    with float32_precision(precision, torch.device(DEVICE)):
        _, distiller = engine("ard", {}, *images, batch_size, **made)
        flops = distiller.flops(x[:1], epoch=1)["attack"]
        if who == "engine":
            x = x.contiguous(memory_format=torch.channels_last)
            start = attacks.uniform_start(x, 8 / 255)
            run = lambda: distiller.attack(x, y, start=start)
        else:
            network = build_model(STUDENT, num_classes=10).to(DEVICE)
            trainer = reference.Reference(network, network, "ard", **options)
            run = lambda: trainer.attack(x, y)
        options = {"batch_size": batch_size, "flops": batch_size * flops, "unit": precision}
        measure_images(run, problem=f"PGD-10 alone: {STUDENT}, batch {batch_size}", variant=variant, **options)


COLD = """
import time, numpy, torch
from bench.test_step import engine
images = numpy.zeros((1024, 32, 32, 3), numpy.uint8), numpy.arange(1024) %% 10
step, _ = engine("ard", {"igdm": {"alpha": 10.0}}, *images, %d, compile=True)
began = time.perf_counter()
step()
if torch.cuda.is_available():
    torch.cuda.synchronize()
print(time.perf_counter() - began)
"""


@pytest.mark.parametrize("cache", ["cold", "cached"])
def test_first_compiled_step(benchmark, cache, tmp_path):
    """What compilation costs before the first step of ARD+IGDM, in a process of its own; torch keeps the results."""
    batch_size = 8 if TINY else BATCHES[0]
    command = [sys.executable, "-c", COLD % batch_size]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).resolve().parents[1]

    def first_step():
        done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True)
        return float(done.stdout.splitlines()[-1])

    if cache == "cached":
        first_step()
    seconds = benchmark.pedantic(first_step, rounds=1)
    problem = f"first compiled step, ARD+IGDM: {STUDENT} student, {TEACHER} teacher, batch {batch_size}"
    benchmark.extra_info.update({"problem": problem, "variant": cache, "first_step_s": seconds})


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_matrix_product(measure, precision):
    """What the machine reaches where nothing but arithmetic is asked for: the ceiling of every step."""
    check_machine("ours" if precision == "fp32" else "ours, bf16", 128)
    side = 64 if TINY else 8192 if CUDA else 2048
    a = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16 if precision == "bf16" else None)
    with float32_precision(precision, torch.device(DEVICE)):
        measure(
            lambda: a @ a,
            problem=f"{side}^3 product, {precision}",
            variant="torch",
            bytes=None,
            flops=2 * side**3,
            unit=precision,
        )
