"""What a step costs the host: operators, and microseconds of one thread, for every method.

The device is faked out by its work: a ResNet-18 of width 1 on two images of 4 x 4 runs the operators that the real one
runs, each on next to nothing, so that what is left is Python, autograd and the dispatch of operators (and oneDNN's
set-up of each convolution, which a GPU does not have). Nothing is compiled or captured: this is the most that a host
has to do. Views are no operators here; one of ours counts as one, as it is one kernel on a GPU.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.sizes import TINY
from fastrd.engine.step import build_distiller
from fastrd.methods import ADDONS, BASES, Method
from fastrd.models import build_model
from fastrd.recipe import Attack

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of the host alone")
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


@pytest.mark.parametrize("case", CASES)
def test_step(benchmark, case):
    base, addons = CASES[case]
    names, ledger = ("student", "teacher", "clean_teacher"), Ledger()
    networks = {name: build_model("resnet18", num_classes=10, width=1, image_size=4) for name in names}
    for name in names[1:]:
        networks[name].eval().requires_grad_(False)
    terms = {name: ADDONS[name](**({"alpha": 10.0} if name in WEIGHED else {})) for name in addons}
    method = Method(BASES[base](), terms)
    labels = torch.arange(100) % 10
    distiller = build_distiller(method, networks, Attack(), labels=labels, num_classes=10, phase=ledger.phase)
    parameters = [*networks["student"].parameters(), *method.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True)
    x, index = torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last), torch.arange(2)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        distiller(x, labels[index], index, epoch=2, epochs=200)
        with ledger.phase("optimiser"):
            optimizer.step()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        step()
        with ledger:
            step()
        parts = []
        for _ in range(ROUNDS):
            ledger.seconds.clear()
            step()
            parts.append(dict(ledger.seconds))
        benchmark.pedantic(step, rounds=ROUNDS)
    finally:
        torch.set_num_threads(threads)
    micro = {name: round(1e6 * median(part.get(name, 0) for part in parts)) for name in parts[0]}
    benchmark.extra_info |= {
        "problem": f"{case}: ResNet-18, PGD-10",
        "variant": "ours",
        "operators": dict(ledger.operators),
        "host_us": micro,
    }
