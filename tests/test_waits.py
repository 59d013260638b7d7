"""No training step waits for its GPU, whatever the method and the loader: proved on tensors without values.

Tensors of the device "meta" stand for a GPU's: whatever reads a value of one raises. A dispatch mode sees the copies
between host and device, and for all of those but the ones out of pinned memory the host waits.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastrd.kernels import distillation, info_nce, nce_bank, pgd_step
from fastrd.kernels.augment import augment
from fastrd.kernels.runtime import jit, ops
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastrd.data import Augment, make_loader
from fastrd.data.pack import pack
from fastrd.engine.average import MovingAverage
from fastrd.engine.distributed import ALONE
from fastrd.engine.step import Distiller
from fastrd.engine.trainer import Trainer
from fastrd.methods import ADDONS, BASES, Method, Setup
from fastrd.models import build_model
from fastrd.recipe import Attack

N, CLASSES = 8, 4
CUDA, META = torch.device("cuda"), torch.device("meta")
OPS = {
    "info_nce": info_nce._run,
    "info_nce_backward": info_nce._run_backward,
    "nce_bank": nce_bank._run,
    "update_bank": nce_bank._update,
    "distillation": distillation._run,
    "scale_gradient": ops._scale,
    "pgd_step": pgd_step._run,
}
"""What our operators do, up to their kernels, which are recorded and not launched."""


class NoWaits(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "fastrd":
            name = function._schema.name.partition("::")[2]
            with self:
                return OPS[name](*args, **kwargs)
        result = function(*args, **kwargs)
        if "copy" in function._schema.name:
            devices = {x.device.type for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)}
            assert len(devices) < 2, f"{function} copies between {devices}"
        return result


@pytest.fixture
def gpu(monkeypatch):
    """Code takes the ways of a GPU."""

    def made(create):
        def check(data, *args, device=None, **kwargs):
            assert device is None or torch.device(device).type == "cpu", "a copy from the host"
            return create(data, *args, device=device, **kwargs)

        return check

    monkeypatch.setattr(torch, "tensor", made(torch.tensor))
    monkeypatch.setattr(torch, "as_tensor", made(torch.as_tensor))
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # knows no such device
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda x: x.is_meta), raising=False)
    monkeypatch.setattr("fastrd.models.folded._close", lambda actual, expected: True)


VARIANTS = {
    "gacd": [
        {"estimator": "strict"},
        {"estimator": "crd"},
        {"estimator": "infonce"},
        {"estimator": "infonce", "candidates": "bank"},
    ],
}


def required(term: type) -> dict[str, float]:
    """The options of a term that have no default: weights."""
    parameters = inspect.signature(term).parameters.values()
    return {p.name: 1.0 for p in parameters if p.default is p.empty}


STEPS = [(name, {}, None) for name in sorted(BASES)]
STEPS += [
    ("ard", {name: options}, None)
    for name in sorted(ADDONS)
    for options in VARIANTS.get(name, [required(ADDONS[name])])
]
STEPS += [("ard", {}, "igdm")]


@pytest.mark.parametrize(("base", "addons", "inner"), STEPS, ids=str)
def test_no_method_waits_in_a_step(gpu, monkeypatch, base, addons, inner):
    with META:
        networks = {
            name: build_model("cnn", num_classes=CLASSES, image_size=8, width=2)
            for name in ("student", "teacher", "clean_teacher")
        }
    for name in ("teacher", "clean_teacher"):
        networks[name].eval().requires_grad_(False)
    student = networks["student"]
    method = Method(BASES[base](), {name: ADDONS[name](**options) for name, options in addons.items()}, inner)
    dims = {name: network.feature_dim for name, network in networks.items()}
    labels, cpu = torch.arange(3 * N) % CLASSES, torch.device("cpu")
    method.prepare(Setup(CLASSES, dims, labels, student, cpu, 0, networks["teacher"]))  # looks at labels, once
    method.to(META)
    for module in method.modules():
        module._normalized = True  # GACD's first batch waits
    distiller = Distiller(method, networks, Attack(steps=2), extra_clean_bn_pass=True)
    parameters = [*student.parameters(), *method.parameters()]
    trainer = SimpleNamespace(
        world=ALONE,
        recipe=SimpleNamespace(training=SimpleNamespace(clip_grad=1.0)),
        parameters=parameters,
        student=student,
        optimizer=torch.optim.SGD(parameters, lr=0.1, momentum=0.9, foreach=True),
        ema=MovingAverage(student, 0.9),
    )
    x = torch.rand(N, 3, 8, 8, device=META)
    y = index = torch.zeros(N, dtype=torch.int64, device=META)
    with monkeypatch.context() as patch:
        patch.setattr("fastrd.engine.step.check_pixels", lambda *args, **options: None)  # once, and it waits
        distiller._prepare(x)
    with jit.recording("sm_90"), NoWaits():
        distiller(x, y, index, epoch=100, epochs=200)
        Trainer._update(trainer)


WAITS = {
    "a read": lambda x: x.sum().item(),
    "a boolean index": lambda x: x[x > 0],
    "a copy to the host": lambda x: x.cpu(),
    "a copy from the host": lambda x: x.copy_(torch.ones(4)),
    "a number copied": lambda x: torch.as_tensor(3, device=META),
}


@pytest.mark.parametrize("wait", WAITS)
def test_waits_are_noticed(gpu, wait):
    with pytest.raises((AssertionError, NotImplementedError, RuntimeError)), NoWaits():
        WAITS[wait](torch.rand(4, device=META))


@pytest.mark.parametrize("kind", ["resident", "torch", pytest.param("ffcv", marks=pytest.mark.slow)])
def test_no_loader_waits_for_a_copy(kind, tmp_path, monkeypatch):
    if kind == "ffcv":
        pytest.importorskip("ffcv", exc_type=ImportError)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(12) % CLASSES
    if kind == "ffcv":
        np.savez(tmp_path / "a.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
        from fastrd.data import load_dataset

        pixels = load_dataset(pack(tmp_path / "a.npz", tmp_path / "a.beton", progress=False).path).x_train
    loader = make_loader(kind, pixels, labels, batch_size=4, augment=Augment.for_size(8, 8))
    loader._device = CUDA  # what is copied there stays here
    pinned, copies, to = [], [], Tensor.to

    def pin_memory(self):
        pinned.append(self.clone())
        return pinned[-1]

    def copied(self, *args, **kwargs):
        if CUDA not in (*args, *kwargs.values()):
            return to(self, *args, **kwargs)
        copies.append(any(self is x for x in pinned) and kwargs.get("non_blocking", False))
        return self.clone()

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(Tensor, "to", copied)
    batches = list(loader.epoch(1))
    assert len(batches) == 3 and len(copies) == (2 if kind == "resident" else 5) and all(copies)


def test_augmentation_and_attack_steps_do_not_wait():
    with FakeTensorMode(), jit.recording("sm_90") as tape:
        images = torch.zeros(9, 8, 8, 3, dtype=torch.uint8, device=CUDA)
        rows, draws = (torch.zeros(shape, dtype=torch.int64, device=CUDA) for shape in ((4,), (4, 3)))
        with NoWaits():
            x = augment(images, rows, draws, padding=1, flip=True)
            assert pgd_step.pgd_step(x, x, x, step_size=0.1, epsilon=0.1).device.type == "cuda"
    assert [kernel.__name__ for kernel, _ in tape.calls] == ["_augment", "_step"]
