"""The step as it runs on a GPU, in CUDA graphs, played on a CPU.

`graphs` stands in for CUDA: what is run under capture is written down operation by operation, and a replay repeats
those, reading and writing where the recorded ones did; what torch.compile's graphs have given is spoilt when the next
step begins. Whatever the step would read too late, or forget to copy, comes out wrong here too.
"""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastrd.core.capture import Captured
from fastrd.engine.distributed import World
from fastrd.engine.step import build_distiller
from fastrd.methods import ADDONS, BASES, Method
from fastrd.models import build_model
from fastrd.recipe import Attack

N, CLASSES = 12, 4


class Recorder(TorchDispatchMode):
    def __init__(self, operations):
        super().__init__()
        self.operations = operations

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result


class Graph:
    def __init__(self):
        self.operations = []

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, before in self.operations:
            given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
            for old, new in zip(tensors(before), tensors(function(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() not in given:  # neither a view nor in place
                    old.copy_(new)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Pool:
    """Of torch.compile's graphs."""

    def __init__(self):
        self.given, self.networks, self.steps = [], [], 0

    def compile(self, function, mode=None, **options):
        if mode is None:
            return function
        assert mode == "reduce-overhead"
        self.networks.append(function)
        for parameter in function.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: self.given.append(p.grad.detach()))

        def run(*args, **kwargs):
            outputs = function(*args, **kwargs)
            self.given += [output.detach() for output in outputs]
            return outputs

        return run

    def new_step(self):
        for tensor in self.given:
            tensor.data.fill_(math.nan)
        self.given, self.steps = [], self.steps + 1


@pytest.fixture
def graphs(monkeypatch):
    pool = Pool()
    for name in (
        "fastrd.core.capture.capturable",
        "fastrd.attacks.capturable",
        "fastrd.methods.views._one_batch",
    ):
        monkeypatch.setattr(name, lambda x: True)
    stream = type("Stream", (), {"wait_stream": lambda self, other: None})
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: Recorder(graph.operations))
    for module in ("core.capture", "engine.step", "attacks"):
        monkeypatch.setattr(f"fastrd.{module}.compiled", pool.compile)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", pool.new_step)
    return pool


def test_a_graph_reads_its_inputs_and_parameters_anew_and_gives_its_output_away(graphs):
    weight, calls = torch.tensor([2.0, 3.0]), []

    def function(a, b):
        calls.append(1)
        return (weight * a).add_(b).relu()

    captured = Captured(function)
    generator = torch.Generator().manual_seed(0)
    earlier = []
    for _ in range(4):
        a, b = torch.randn(2, 5, 2, generator=generator)
        weight += 1
        output = captured(a, b)
        expected = (weight * a + b).relu()
        assert torch.equal(output, expected)
        earlier.append((output, expected))
    assert all(torch.equal(output, expected) for output, expected in earlier)
    recorded = len(calls)
    assert torch.equal(captured(torch.ones(3, 2), torch.zeros(3, 2)), weight.expand(3, 2))
    assert len(calls) == 2 * recorded, "another shape is another graph"
    captured(torch.randn(5, 2), torch.randn(5, 2))
    assert len(calls) == 2 * recorded, "and the first is still there"


STEPS = {
    "pgd_at": ("pgd_at", {}),
    "trades": ("trades", {}),
    "mart": ("mart", {}),
    "ard": ("ard", {}),
    "akd": ("akd", {}),
    "iad": ("iad", {}),
    "rslad+igdm": ("rslad", {"igdm": {"alpha": 5.0}}),
    "adaad+igdm": ("adaad", {"igdm": {"alpha": 5.0}}),
    "adaiad": ("adaiad", {}),
    "ard+gacd": ("ard", {"gacd": {"negatives": 20, "dim": 8}}),
    "ard+crd": ("ard", {"gacd": {"negatives": 20, "dim": 8, "estimator": "crd", "input": "clean"}}),
    "ard+infonce": ("ard", {"gacd": {"dim": 8, "estimator": "infonce", "candidates": "bank"}}),
    "pgd_at+vfd": ("pgd_at", {"vfd": {}}),
    "ard+direct": ("ard", {"direct": {"alpha": 1.0}}),
}


def make(case, networks, **options):
    base, addons = STEPS[case]
    networks = copy.deepcopy(networks)
    method = Method(BASES[base](), {name: ADDONS[name](**values) for name, values in addons.items()})
    torch.manual_seed(0)  # of the heads
    options |= {"labels": torch.arange(3 * N) % CLASSES, "num_classes": CLASSES, "extra_clean_bn_pass": True}
    return build_distiller(method, networks, Attack(steps=2), **options)


@pytest.fixture
def networks():
    torch.manual_seed(0)
    made = {name: build_model("cnn", num_classes=CLASSES, image_size=8, width=3) for name in ("student", "teacher")}
    made["clean_teacher"] = build_model("cnn", num_classes=CLASSES, image_size=8, width=4)
    for name in ("teacher", "clean_teacher"):
        made[name].eval().requires_grad_(False)
    return made


def batches(count):
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        x = torch.rand(N, 3, 8, 8, generator=generator)
        index = torch.randperm(3 * N, generator=generator)[:N]
        yield x, index % CLASSES, index


@pytest.mark.parametrize("case", STEPS)
def test_a_step_in_graphs_is_the_plain_one(graphs, networks, case):
    """Losses, weights, statistics and banks over four steps; the losses are read when all is over."""
    told, ends = [], []
    for compile in (False, True):
        engine = make(case, networks, compile=compile)
        parameters = [*engine.student.parameters(), *engine.method.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        losses = []
        for number, (x, y, index) in enumerate(batches(4)):
            optimizer.zero_grad(set_to_none=True)
            generator = torch.Generator().manual_seed(number)
            losses.append(engine(x, y, index, epoch=1 + number, epochs=4, batch=number, generator=generator))
            optimizer.step()
        told.append([{**terms, **metrics} for terms, metrics in losses])
        ends.append({**engine.student.state_dict(), **engine.method.state_dict()})
    assert graphs.steps == 4
    assert engine.student in graphs.networks and len(graphs.networks) == len(engine._folded) + 1
    for plain, captured in zip(*told, strict=True):
        assert {name: v.item() for name, v in plain.items()} == pytest.approx(
            {name: v.item() for name, v in captured.items()}, rel=1e-4
        )
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_gradients_of_several_steps_add_up_in_graphs_too(graphs, networks):
    gradients = []
    for compile in (False, True):
        engine = make("ard", networks, compile=compile)
        for x, y, index in batches(3):
            engine(x, y, index, epoch=1, epochs=1, generator=torch.Generator().manual_seed(0))
        gradients.append([p.grad for p in engine.student.parameters()])
    torch.testing.assert_close(*gradients)


def test_what_is_captured(graphs, networks):
    """Not an attack that moves batch norm's statistics, nor passes with other processes inside."""
    x, y, index = next(batches(1))
    training = make("ard", networks, compile=True)
    training.config = Attack(steps=2, attack_bn="train")
    training(x, y, index, epoch=1, epochs=1)
    assert training.student in graphs.networks and not training._pgd.compile

    shared = make("ard", networks, compile=True, world=World(0, 2))
    shared.attack(x, y)
    assert shared._pgd.compile and shared.student not in graphs.networks
