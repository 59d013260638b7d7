"""Attacks of one batch by `fastrd.evaluate` and by the packages that people use, on the same network and images.

PGD of 20 steps and APGD-CE of 100, on 128 images of CIFAR's size. The labels are the network's own predictions, so that
every package attacks every image. The peers are no dependency of fastrd:

    pip install --no-deps --target build/peers torchattacks foolbox eagerpy gitpython gitdb smmap
    PYTHONPATH=build/peers python -m pytest bench/test_attacks.py --benchmark-only
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastrd
from bench.sizes import CUDA, DEVICE, TINY
from fastrd.engine.profile import forward_flops

BATCH = 8 if TINY else 128
BALL = {"epsilon": 8 / 255, "step_size": 2 / 255}
NETWORKS = ("resnet8",) if TINY else ("resnet8", "resnet18") if CUDA else ("cnn", "resnet8", "resnet20")

Attack = Callable[[], object]


def ours(name: str) -> Callable[[nn.Module, Tensor, Tensor], Attack]:
    def make(model: nn.Module, x: Tensor, y: Tensor) -> Attack:
        options = {"attacks": name, "batch_size": len(x), "progress": False, **BALL}
        return lambda: fastrd.evaluate(model, x, y, **options)

    return make


def torchattacks(name: str) -> Callable[[nn.Module, Tensor, Tensor], Attack]:
    def make(model: nn.Module, x: Tensor, y: Tensor) -> Attack:
        package = pytest.importorskip("torchattacks")
        if name == "pgd20":
            attack = package.PGD(model, eps=BALL["epsilon"], alpha=BALL["step_size"], steps=20)
        else:
            attack = package.APGD(model, eps=BALL["epsilon"], steps=100)
        return lambda: attack(x, y)

    return make


def foolbox(model: nn.Module, x: Tensor, y: Tensor) -> Attack:
    package = pytest.importorskip("foolbox")
    attack = package.attacks.LinfPGD(abs_stepsize=BALL["step_size"], steps=20)
    wrapped = package.PyTorchModel(model, bounds=(0, 1), device=DEVICE)
    return lambda: attack(wrapped, x, y, epsilons=BALL["epsilon"])


def autoattack(model: nn.Module, x: Tensor, y: Tensor) -> Attack:
    from pyautoattack import AutoAttack

    attack = AutoAttack(model, norm="Linf", eps=BALL["epsilon"], seed=0, device=DEVICE)
    attack.attacks_to_run = ["apgd-ce"]
    return lambda: attack.run_standard_evaluation(x, y, batch_size=len(x))


VARIANTS = {
    "pgd20": {"ours": ours("pgd20"), "torchattacks": torchattacks("pgd20"), "foolbox": foolbox},
    "apgd-ce": {"ours": ours("apgd-ce"), "torchattacks": torchattacks("apgd-ce"), "autoattack": autoattack},
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("name", "variant"), [(name, way) for name, ways in VARIANTS.items() for way in ways])
def test_attacks(measure, network, name, variant):
    torch.manual_seed(0)
    model = fastrd.build_model(network, num_classes=10).to(DEVICE).eval()
    x = torch.rand(BATCH, 3, 32, 32, device=DEVICE)
    with torch.no_grad():
        y = model(x).argmax(dim=1)
    steps = 20 if name == "pgd20" else 100
    run = VARIANTS[name][variant](model, x, y)
    measure(
        run,
        problem=f"{name}, {network}, {BATCH} images of 3 x 32 x 32",
        variant=variant,
        bytes=None,
        flops=int(2 * steps * len(x) * forward_flops(model, x[:1])),
        rounds=5 if name == "pgd20" else 3,
    )
