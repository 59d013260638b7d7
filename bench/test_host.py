"""What a step costs the host: operators, and microseconds of one thread, for every method; and what a loss costs it.

The device is faked out by its work: a ResNet-18 of width 1 on two images of 4 x 4 runs the operators that the real one
runs, each on next to nothing, so that what is left is Python, autograd and the dispatch of operators (and oneDNN's
set-up of each convolution, which a GPU does not have). "ours": nothing is compiled or captured, which is the most a
host has to do. "ours, captured": as on a GPU under `training.compile`, the attack and each pass of a network are
graphs, whose replay is left out: all that the host does but start them. Views are no operators here; one of ours counts
as one, as it is one kernel on a GPU.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from fastrd.kernels.pgd_step import pgd_step
from fastrd.kernels.runtime import jit
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.sizes import CUDA, TINY
from fastrd import attacks
from fastrd.core import capture
from fastrd.engine.step import build_distiller
from fastrd.losses import functional as losses
from fastrd.methods import ADDONS, BASES, Method
from fastrd.models import build_model, fastest
from fastrd.recipe import Attack

pytestmark = pytest.mark.skipif(CUDA, reason="of the host alone")
ROUNDS = 1 if TINY else 11
WEIGHED = ("igdm", "direct", "smooth_clean", "smooth_mirror")  # add-ons that have no default for it
CASES = {**{base: (base, ()) for base in BASES}, **{f"ard+{addon}": ("ard", (addon,)) for addon in ADDONS}}


class Ledger(TorchDispatchMode):
    """Operators and seconds by the part of the step that they are of."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.operators, self.seconds = "optimiser", Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators[self.part] += not func.is_view
        return func(*args, **(kwargs or {}))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before, self.part, began = self.part, name, time.thread_time()
        try:
            yield
        finally:
            self.seconds[name] += time.thread_time() - began
            self.part = before


class Replayed(capture.Captured):
    """A graph of an attack whose replay does nothing: the first call's output is the output of all."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        if not self._recorded:
            self._recorded[()] = tuple(torch.empty_like(t) for t in inputs), inputs[0].clone()
        held, output = self._recorded[()]
        for own, given in zip(held, inputs, strict=True):
            own.copy_(given)
        return output.clone()


class Pass(torch.autograd.Function):
    """A captured pass of a network, forward and backward, whose replays do nothing."""

    @staticmethod
    def forward(ctx, outputs, *parameters):
        ctx.gradients = parameters
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx, *upstream):
        return None, *(parameter.detach() for parameter in ctx.gradients)


def replayed_passes(network: torch.nn.Module) -> Callable[..., tuple[Tensor, ...]]:
    """In place of `capture.captured_passes`."""
    parameters, outputs = [p for p in network.parameters() if p.requires_grad], []

    def call(x: Tensor, features: bool = True) -> tuple[Tensor, ...]:
        if not outputs:
            with torch.no_grad():
                outputs.extend(network(x, features=features))
        return Pass.apply(outputs, *parameters)

    return call


@pytest.mark.parametrize("variant", ["ours", "ours, captured"])
@pytest.mark.parametrize("case", CASES)
def test_step(benchmark, case, variant, monkeypatch):
    monkeypatch.setenv(fastest.VARIABLE, "pytorch")  # as on a GPU: a chain would be one operator
    captured = variant != "ours"
    if captured:
        monkeypatch.setattr(capture, "captured_passes", replayed_passes)
        for module in (attacks, capture):
            monkeypatch.setattr(module, "capturable", lambda x: True)
        monkeypatch.setattr(attacks, "Captured", Replayed)
    base, addons = CASES[case]
    names, ledger = ("student", "teacher", "clean_teacher"), Ledger()
    networks = {name: build_model("resnet18", num_classes=10, width=1, image_size=4) for name in names}
    for name in names[1:]:
        networks[name].eval().requires_grad_(False)
    terms = {name: ADDONS[name](**({"alpha": 10.0} if name in WEIGHED else {})) for name in addons}
    method = Method(BASES[base](), terms)
    labels = torch.arange(100) % 10
    options = {"labels": labels, "num_classes": 10, "phase": ledger.phase, "compile": captured}
    distiller = build_distiller(method, networks, Attack(), **options)
    parameters = [*networks["student"].parameters(), *method.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True)
    x, index = torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last), torch.arange(2)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        distiller(x, labels[index], index, epoch=2, epochs=200)
        with ledger.phase("optimiser"):
            optimizer.step()

    torch.set_num_threads(1)
    step()
    with ledger:
        step()
    parts = []
    for _ in range(ROUNDS):
        ledger.seconds.clear()
        step()
        parts.append(dict(ledger.seconds))
    benchmark.pedantic(step, rounds=ROUNDS)
    micro = {name: round(1e6 * median(part.get(name, 0) for part in parts)) for name in parts[0]}
    benchmark.extra_info |= {
        "problem": f"{case}: ResNet-18, PGD-10",
        "variant": variant,
        "operators": dict(ledger.operators),
        "host_us": micro,
    }


def _losses() -> tuple[dict[str, Callable[[], torch.Tensor]], list[torch.Tensor]]:
    """The losses of a step on two samples, with what PyTorch's own operators cost beside them; and their leaves."""
    student, minus, teacher, plus = (torch.randn(2, 10, requires_grad=need) for need in (True, True, False, False))
    anchor, features = (F.normalize(torch.randn(2, 16)).requires_grad_() for _ in range(2))
    bank, rows, labels = F.normalize(torch.randn(32, 16)), torch.arange(2), torch.arange(2)
    options: dict = {"backend": "triton"}
    objective = {"teacher": teacher, "labels": labels, "alpha": 10.0, "temperature": 4.0, "reweight": ("base",)}
    contrast = {"negatives": 4, "normalizer": torch.tensor(30.0), "seed": torch.tensor(0)}
    contrast["labels"] = losses.class_table(torch.arange(32) % 4)
    cases = {
        "KL, PyTorch's operators": lambda: F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean"),
        "distillation_kl": lambda: losses.distillation_kl(student, teacher, **options),
        "gradient_matching": lambda: losses.gradient_matching(student, minus, teacher, plus, **options),
        "fused_objective": lambda: losses.fused_objective(student, minus, plus, plus, **objective, **options).total,
        "info_nce": lambda: losses.info_nce(anchor, features, labels=labels, **options),
        "nce_bank": lambda: losses.nce_bank(anchor, bank, rows, **contrast, **options),
        "pgd_step": lambda: pgd_step(student, teacher, plus, step_size=0.01, epsilon=0.03, **options),
    }
    return cases, [student, minus, anchor, features]


@pytest.mark.parametrize("case", list(_losses()[0]))
def test_loss(benchmark, case, monkeypatch):
    """Forward and backward, without Triton's part: launches are recorded, not made."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # lets tensors of the CPU through; nothing is interpreted
    cases, leaves = _losses()

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        value = cases[case]()
        if value.requires_grad:
            value.backward()
        tape.calls.clear()

    torch.set_num_threads(1)
    with jit.recording("sm_90") as tape:
        benchmark.pedantic(step, rounds=ROUNDS if TINY else 500, iterations=10, warmup_rounds=1)
    benchmark.extra_info |= {"problem": f"{case}, two samples, launches faked", "variant": "ours"}
