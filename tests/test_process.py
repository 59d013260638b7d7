"""What a run asks of its process: float32's meaning on a GPU, compiled programs of its own,
averages in few launches."""

from __future__ import annotations

import copy
import os
import signal

import pytest
import torch
from fastrd.kernels import info_nce_triton
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from fastrd.attacks import PGD, cross_entropy
from fastrd.core.capture import compiled
from fastrd.engine.average import MovingAverage
from fastrd.engine.process import float32_precision, stop_signals
from fastrd.models import Folded, build_model

CUDA = torch.device("cuda")


def flags():
    """All of torch's flags of float32, of both generations; reading an old one raises where the new ones differ."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    new = cuda.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    return *new, cuda.allow_tf32, cudnn.allow_tf32, torch.get_float32_matmul_precision(), cudnn.benchmark


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_every_flag_of_float32_can_be_read_during_a_run(precision):
    before = flags()
    with float32_precision(precision, CUDA):
        tf32 = precision != "fp32"
        name = "tf32" if tf32 else "ieee"
        assert flags() == (name, name, name, tf32, tf32, "high" if tf32 else "highest", True)
        with torch.backends.cudnn.flags(deterministic=True):  # reads the old one
            assert info_nce_triton._dots(torch.zeros(1))["PRECISION"] == ("tf32" if tf32 else "tf32x3")
    assert flags() == before


def test_flags_set_in_the_new_way_are_left_as_they_were():
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    try:
        switch.fp32_precision = "tf32"
        assert info_nce_triton._dots(torch.zeros(1))["PRECISION"] == "tf32"
        with float32_precision("fp32", CUDA):
            assert info_nce_triton._dots(torch.zeros(1))["PRECISION"] == "tf32x3"
        assert switch.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
        switch.fp32_precision = before


def test_each_compiled_function_has_programs_of_its_own():
    """Dynamo's limit is for one code object; all networks of a class and all attacks share theirs."""
    counter = CompileCounter()
    x = torch.rand(2, 3)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        networks = [compiled(torch.nn.Linear(3, classes), backend=counter) for classes in (1, 2, 3)]
        assert [network(x).shape[1] for network in networks] == [1, 2, 3]
    assert counter.frame_count == 3


def test_more_attacks_than_programs_of_one_function(monkeypatch):
    monkeypatch.setattr("fastrd.attacks.compiled", lambda *a, **k: compiled(*a, **k, backend="eager"))
    y = torch.tensor([0, 1])
    with torch._dynamo.config.patch(recompile_limit=1):
        for side in (4, 5, 6):
            network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * side * side, 2))
            attack = PGD(network, epsilon=0.1, step_size=0.05, steps=1, compile=True)
            x = torch.rand(2, 3, side, side)
            assert attack(x, x, cross_entropy(y)).shape == x.shape


def test_a_moving_average_by_hand():
    source = torch.nn.BatchNorm1d(1)
    average = MovingAverage(source, 0.2)
    expected = None
    for n, value in enumerate([1.0, 3.0, -2.0, 5.0]):
        with torch.no_grad():
            source.weight.fill_(value)
            source.running_mean.fill_(value)
            source.num_batches_tracked += 1
        average.update(source)
        decay = min(0.2, (1 + n) / (10 + n))
        expected = value if expected is None else decay * expected + (1 - decay) * value
        assert average.network.weight.item() == pytest.approx(expected)
        assert average.network.running_mean.item() == value
        assert average.network.num_batches_tracked.item() == n + 1


class Count(TorchDispatchMode):
    """Operators that launch something, as each does once."""

    def __init__(self):
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.launches += not (function.is_view or "empty" in function._schema.name or "detach" in str(function))
        return function(*args, **(kwargs or {}))


def test_averaging_and_folding_take_few_launches():
    network = build_model("resnet18", num_classes=10)
    average, folded = MovingAverage(network, 0.9), Folded(network, torch.rand(2, 3, 8, 8))
    average.update(network)
    for run, most in ((lambda: average.update(network), 3), (folded.refresh, len(folded._folds) + 10)):
        with Count() as count:
            run()
        assert 0 < count.launches <= most
    twin = copy.deepcopy(network).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.9)
        folded.refresh()
        twin.load_state_dict(network.state_dict())
        x = torch.rand(2, 3, 8, 8)
        torch.testing.assert_close(folded.network(x), twin(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_stops_a_run_unless_nohup_says_otherwise(ignored):
    missed: list[int] = []
    usual = signal.SIG_IGN if ignored else lambda signum, frame: missed.append(signum)
    before = signal.signal(signal.SIGHUP, usual)
    try:
        with stop_signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
        assert received == ([] if ignored else [signal.SIGHUP]) and not missed
        assert signal.getsignal(signal.SIGHUP) == usual
    finally:
        signal.signal(signal.SIGHUP, before)
