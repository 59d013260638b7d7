"""Three loaders, one meaning; and what each does when it is interrupted, misused or let down."""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from fastrd import Recipe, train
from fastrd.data import Augment, PackedFile, make_loader
from fastrd.data import loader as loader_module
from fastrd.data import make as make_module
from fastrd.data.pack import pack
from fastrd.engine.errors import Interrupted

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def ffcv():
    """FFCV as the engine imports it; tests of it are skipped, with the reason, where it is not installed."""
    pytest.importorskip("ffcv", exc_type=ImportError)
    from fastrd.data import ffcv

    return ffcv


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> PackedFile:
    """61 training and 20 test images of 16x12, packed raw."""
    folder = tmp_path_factory.mktemp("packed")
    random = np.random.default_rng(0)
    arrays = {
        f"{kind}_{split}": values
        for split, n in (("train", 61), ("test", 20))
        for kind, values in (
            ("x", random.integers(0, 256, (n, 16, 12, 3), dtype=np.uint8)),
            ("y", np.arange(n) % 4),
        )
    }
    np.savez(folder / "arrays.npz", **arrays)
    return pack(folder / "arrays.npz", folder / "arrays.beton", progress=False)


def make(packed: PackedFile, kind: str, **options):
    options = {"batch_size": 8, "augment": Augment(padding=2), "drop_last": False} | options
    return make_loader(kind, packed.images("train"), packed.labels("train"), **options)


def python(program: str, *arguments: str, **variables: str) -> str:
    """What a program prints in a process of its own."""
    command = [sys.executable, "-c", program, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_same(left, right) -> None:
    left, right = list(left), list(right)
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


STREAMS = ["torch", "ffcv"]


@pytest.fixture(params=STREAMS)
def kind(request) -> str:
    if request.param == "ffcv":
        request.getfixturevalue("ffcv")
    return request.param


@pytest.fixture(params=["resident", *STREAMS])
def any_kind(request) -> str:
    if request.param == "ffcv":
        request.getfixturevalue("ffcv")
    return request.param


@pytest.mark.parametrize("batch_size", [1, 8, 61, 64])
@pytest.mark.parametrize("augment", [None, Augment(padding=2)], ids=["plain", "augmented"])
def test_every_loader_serves_the_same_batches(packed, kind, batch_size, augment):
    options = {"batch_size": batch_size, "augment": augment}
    loader = make(packed, kind, **options)
    for epoch in (1, 2):
        assert_same(loader.epoch(epoch), make(packed, "resident", **options).epoch(epoch))


def test_several_workers_serve_the_same_batches(packed, kind):
    assert_same(make(packed, kind, workers=2).epoch(1), make(packed, "resident").epoch(1))


def test_without_shuffling(packed, kind):
    options = {"shuffle": False, "batch_size": 2}
    batches = list(make(packed, kind, **options).epoch(1))
    assert torch.cat([b.index for b in batches]).tolist() == list(range(61))
    assert_same(batches, make(packed, "resident", **options).epoch(1))


def test_resume_inside_an_epoch_is_bit_identical(packed, any_kind):
    whole = list(make(packed, any_kind).epoch(2))
    loader = make(packed, any_kind)
    next(loader.epoch(9, start=1))
    for start in (0, 3, len(loader) - 1):
        assert_same(loader.epoch(2, start=start), whole[start:])
    assert list(loader.epoch(2, start=len(loader))) == []


def test_batches_outlive_the_next_ones(packed, kind):
    """FFCV writes new batches over old ones."""
    loader = make(packed, kind, augment=None, batch_size=4)
    kept = list(loader.epoch(1))
    again = [tuple(part.clone() for part in batch) for batch in loader.epoch(1)]
    assert_same(kept, again)


def test_global_random_states_are_neither_read_nor_moved(packed, any_kind):
    torch.manual_seed(0), np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    batches = list(make(packed, any_kind).epoch(1))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()
    torch.manual_seed(1), np.random.seed(1)
    assert_same(make(packed, any_kind).epoch(1), batches)


@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_share_each_batch(packed, any_kind, drop_last):
    options = {"batch_size": 12, "drop_last": drop_last}  # 61 = 5 * 12 + 1: the last batch is rank 0's alone
    whole = list(make(packed, "resident", **options).epoch(3))
    shares = [list(make(packed, any_kind, rank=rank, world_size=3, **options).epoch(3)) for rank in range(3)]
    for batch, *parts in zip(whole, *shares, strict=True):
        for rank, part in enumerate(parts):
            assert all(torch.equal(a[rank::3], b) for a, b in zip(batch, part, strict=True))


def test_resident_unlabelled_and_labelled_images_together():
    images, labels = torch.zeros(6, 8, 8, 3, dtype=torch.uint8), torch.tensor([2, -1, 0, -1, -1, 1])
    loader = make_loader("resident", images, labels, batch_size=6, shuffle=False)
    assert torch.equal(next(loader.epoch(1)).y, labels) and torch.equal(loader.labels, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "world_size": 2}, r"rank: got 2 of world_size 2; accepted: 0\.\."),
        (
            {"batch_size": 7, "world_size": 2},
            "batch_size: got 7; accepted: an integer >= 1 and a multiple of world_size 2",
        ),
        ({"batch_size": 62, "drop_last": True}, "batch_size: got 62 for 61 images, which with drop_last"),
        ({"batch_size": 0}, "batch_size: got 0; accepted: an integer >= 1"),
        ({"workers": 0}, "workers: got 0; accepted: an integer >= 1"),
    ],
)
def test_refusals(packed, options, message):
    for loader_kind in ("resident", "torch"):
        with pytest.raises(ValueError, match=message):
            make(packed, loader_kind, **options)


ODD = (None, "a", torch.ones(2))
UNFIT = {
    "batch_size": (*ODD, 2.5, np.ones(2)),
    "extra": (*ODD, -1, 1.5, 12, math.inf),
    "extra_fraction": (*ODD, -0.1, 1, math.nan),
    "rank": (*ODD, -1),
    "world_size": (*ODD, 0, 1.5),
    "workers": (None, "a"),
    "seed": ODD,
    "shuffle": ODD,
    "drop_last": ODD,
    "channels_last": ODD,
    "augment": ("a", True),
    "device": ("tpu", -1, "cuda:999"),
    "images": (None, torch.zeros(12, 8, 8, 3).to_sparse(), torch.zeros(12, 8, 8, 3, dtype=torch.uint8).to_sparse()),
    "images ": (torch.zeros(12, 8, 8, 3, dtype=torch.uint8, device="meta"),),
    "labels": (None, torch.zeros(12, dtype=torch.int64, device="meta")),
}


@pytest.mark.parametrize("name", UNFIT)
def test_loaders_name_what_they_cannot_take(name):
    images, labels = np.zeros((12, 8, 8, 3), np.uint8), np.zeros(12, np.int64)
    good = {"images": images, "labels": labels, "batch_size": 4}
    for kind in ("auto", "resident", "torch"):
        for value in UNFIT[name]:
            with pytest.raises((ValueError, TypeError), match=rf"^{name.strip()}: got .*accepted: "):
                make_loader(kind, **{**good, name.strip(): value})
    loader = make_loader("resident", **{**good, "batch_size": np.int64(4), "extra": np.int64(4), "seed": np.int64(1)})
    assert len(list(loader.epoch(np.int64(0)))) == 2
    for place in ({"epoch": None}, {"epoch": 0.5}, {"epoch": 0, "start": None}, {"epoch": 0, "start": "a"}):
        with pytest.raises((ValueError, TypeError), match=r"^(epoch|start): got .*accepted: "):
            loader.epoch(**place)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: Augment(padding=None), "padding"),
        (lambda: Augment(flip="no"), "flip"),
        (lambda: Augment.for_size("a", 8), "height"),
        (lambda: Augment.for_size(8, None), "width"),
        (lambda: Augment().draw(-1, torch.Generator()), "n"),
        (lambda: Augment().draw(3, None), "generator"),
    ],
)
def test_augmentations_name_what_they_cannot_take(call, name):
    with pytest.raises((ValueError, TypeError), match=f"^{name}: got .*accepted: "):
        call()


def test_refuses_unknown_kinds_and_ffcv_without_a_packed_file(packed):
    with pytest.raises(ValueError, match="loader: got 'dali'; accepted: auto, resident, ffcv, torch"):
        make(packed, "dali")
    images = np.asarray(packed.images("train"))
    with pytest.raises(ValueError, match="loader: got 'ffcv' for images in memory; .*fastrd pack"):
        make_loader("ffcv", images, packed.labels("train"), batch_size=2)


def test_auto_takes_what_fits(packed, monkeypatch):
    images, size = packed.images("train"), 61 * 16 * 12 * 3
    in_memory = np.asarray(images)
    cpu, other = torch.device("cpu"), torch.device("meta")
    monkeypatch.setattr(make_module, "free_memory", lambda device: 2 * size)
    assert make_module._choose(images, cpu) == make_module._choose(in_memory, other) == "resident"
    monkeypatch.setattr(make_module, "free_memory", lambda device: 2 * size - 2)
    assert make_module._choose(in_memory, cpu) == "resident", "it is there already"
    assert make_module._choose(in_memory, other) == "torch"
    monkeypatch.setitem(sys.modules, "fastrd.data.ffcv", object())
    monkeypatch.setattr("fastrd.data.ffcv", object(), raising=False)
    assert make_module._choose(images, cpu) == "ffcv"


def test_auto_without_ffcv_takes_worker_processes(packed, tmp_path):
    (tmp_path / "numba.py").write_text("raise ImportError('no numba here')")  # FFCV's own need
    program = f"""
import fastrd.data.make as module, torch
from fastrd.data import PackedFile, make_loader
images = PackedFile({str(packed.path)!r}).images("train")
module.free_memory = lambda device: 0
print(module._choose(images, torch.device("cpu")))
try:
    make_loader("ffcv", images, [0] * 61, batch_size=2)
except ImportError as error:
    print(error)
"""
    kind, error = python(program, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}").splitlines()
    assert kind == "torch" and "no numba here" in error and "fastrd doctor" in error


def test_free_memory_is_what_the_system_says():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 2**20 < loader_module.free_memory(torch.device("cpu")) <= total


def test_stall_time_counts_waiting_and_nothing_else(packed, monkeypatch):
    loader = make(packed, "resident")
    clock = [0.0]
    monkeypatch.setattr(loader_module.time, "perf_counter", lambda: clock[0])
    draw = Augment.draw

    def slow(*arguments):
        clock[0] += 3
        return draw(*arguments)

    monkeypatch.setattr(Augment, "draw", slow)
    for _ in loader.epoch(1):
        clock[0] += 100  # the step
    assert loader.stall_seconds == 3


def threads_of_readers() -> list[str]:
    return [type(thread).__name__ for thread in threading.enumerate() if type(thread).__name__ == "_Epoch"]


def children() -> int:
    return len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_a_loop_left_early_leaves_nothing_running(packed, kind):
    before = children()
    loader = make(packed, kind, batch_size=2)
    for batch in loader.epoch(1):
        assert len(batch.y) == 2
        break
    del batch
    with pytest.raises(KeyError):
        for _ in loader.epoch(1):
            raise KeyError
    gc.collect()
    assert threads_of_readers() == [] and children() == before
    assert_same(loader.epoch(1), make(packed, "resident", batch_size=2).epoch(1))


def test_two_loaders_at_once(packed, ffcv):
    pair = [make(packed, "ffcv", seed=seed, workers=2) for seed in (0, 1)]
    expected = [list(make(packed, "resident", seed=seed).epoch(1)) for seed in (0, 1)]
    together = list(zip(*(loader.epoch(1) for loader in pair), strict=True))
    for got, wanted in zip(zip(*together, strict=True), expected, strict=True):
        assert_same(got, wanted)


@pytest.mark.slow
def test_threads_of_torch_and_numba_are_left_alone(packed, ffcv):
    """FFCV sets both to one when imported, and to its number of workers with every loader and epoch."""
    program = f"""
import torch, numba
torch.set_num_threads(3)
numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
from fastrd.data import PackedFile, make_loader
file = PackedFile({str(packed.path)!r})
loader = make_loader("ffcv", file.images("train"), file.labels("train"), batch_size=8)
for batch in loader.epoch(1):
    assert torch.get_num_threads() == 3
print(torch.get_num_threads(), numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS)
"""
    assert python(program).split() == ["3", "True"]


def test_one_worker_under_a_threading_layer_that_aborts(ffcv, monkeypatch):
    monkeypatch.setattr(ffcv.numba.config, "THREADING_LAYER", "workqueue")
    assert not ffcv._can_share_threads()
    monkeypatch.setattr(ffcv.numba.config, "THREADING_LAYER", "omp")
    assert ffcv._can_share_threads()


def test_an_error_inside_ffcv_reaches_the_caller(packed, ffcv, monkeypatch):
    """FFCV's own iterator waits for ever."""
    loader = make(packed, "ffcv")

    def fail(self, number, *rest, run=ffcv._Epoch.run_pipeline):
        if number == 2:
            raise ZeroDivisionError("a stage failed")
        return run(self, number, *rest)

    monkeypatch.setattr(ffcv._Epoch, "run_pipeline", fail)
    batches = loader.epoch(1)
    next(batches), next(batches)
    with pytest.raises(RuntimeError, match="ffcv: ZeroDivisionError: a stage failed"):
        next(batches)
    assert threads_of_readers() == []


def test_a_stage_that_hangs_is_given_up(packed, ffcv, monkeypatch):
    stuck = threading.Event()
    loader = make(packed, "ffcv")
    monkeypatch.setattr(ffcv, "PATIENCE", 1.0)
    monkeypatch.setattr(ffcv._Epoch, "run_pipeline", lambda *arguments: stuck.wait())
    with pytest.raises(TimeoutError, match="ffcv: no batch in 1 seconds"):
        next(loader.epoch(1))
    stuck.set()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_is_told_to_make_its_own_loader(packed, ffcv):
    loader = make(packed, "ffcv")
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            next(loader.epoch(1))
        except RuntimeError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        assert pipe.read().startswith("loader: it was made in another process")


def test_a_file_changed_underneath_is_noticed(packed, kind, tmp_path):
    path = tmp_path / "copy.beton"
    path.write_bytes(packed.path.read_bytes())
    path.with_name("copy.beton.json").write_bytes(packed.path.with_name("arrays.beton.json").read_bytes())
    file = PackedFile(path)
    loader = make(file, kind)
    assert len(list(loader.epoch(1))) == 8
    os.utime(path, ns=(0, 0))
    with pytest.raises(ValueError, match="copy.beton: changed since it was opened"):
        list(loader.epoch(2))
    with pytest.raises(ValueError, match="changed since it was opened"):
        np.asarray(file.images("test")), make(file, "ffcv" if kind == "ffcv" else "torch").epoch(1).__next__()


SOAK = """
import gc, json, os, sys, threading
from fastrd.data import Augment, PackedFile, make_loader
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
counts = []
for number in range(int(sys.argv[3])):
    file = PackedFile(sys.argv[1])
    images, labels = file.images("train"), file.labels("train")
    loader = make_loader(sys.argv[2], images, labels, batch_size=8, augment=Augment(padding=2))
    for epoch in range(1, 4):
        for batch in loader.epoch(epoch):
            if epoch == 3:
                break
    del batch, loader, file
    gc.collect()
    counts.append((resident(), threading.active_count(), len(os.listdir("/proc/self/fd"))))
print(json.dumps(counts))
"""


@pytest.mark.slow
@pytest.mark.parametrize("soaked", ["ffcv", "resident"])
def test_opening_and_closing_leaks_nothing(packed, soaked, request):
    """51 loaders of three epochs each, the last left early: after the first ones memory, threads and files stay."""
    if soaked == "ffcv":
        request.getfixturevalue("ffcv")
    times = 51
    told = python(SOAK, str(packed.path), soaked, str(times), OMP_NUM_THREADS="1")
    memory, threads, files = zip(*json.loads(told), strict=True)
    assert len(memory) == times
    assert threads[-1] == threads[1] and files[-1] == files[1]
    # A pipeline that FFCV compiles anew takes 4 MB, a mapped file that stays 2 MB.
    assert memory[-1] - memory[10] < 2**22


def test_a_run_resumes_with_another_loader(packed, ffcv, tmp_path, monkeypatch):
    """Weights do not depend on the loader, and a run may change it when it goes on."""
    table = {
        "name": "loaders",
        "student": {"arch": "cnn", "options": {"width": 2}},
        "base": {"name": "pgd_at"},
        "data": {"name": str(packed.path), "holdout": 9},
        "attack": {"steps": 1},
        "schedule": {"epochs": 2},
        "training": {"batch_size": 16},
        "validation": {"steps": 0},
    }

    def run(folder: str, loader: str, **options):
        recipe = Recipe.from_dict({**table, "data": {**table["data"], "loader": loader}})
        trained = train(recipe, out=tmp_path / folder, device="cpu", progress=False, **options)
        return trained.student.state_dict()

    weights = [run("resident", "resident"), run("auto", "auto")]
    with monkeypatch.context() as patch:
        batches = []

        def stop_in_the_fifth(*arguments, make=loader_module.transformed, **options):
            batches.append(arguments)
            if len(batches) == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return make(*arguments, **options)

        patch.setattr(loader_module, "transformed", stop_in_the_fifth)
        with pytest.raises(Interrupted):
            run("changed", "ffcv")
    assert len(batches) == 5, "stopped in the second epoch"
    weights.append(run("changed", "torch", resume=True))
    for other in weights[1:]:
        assert all(torch.equal(value, other[key]) for key, value in weights[0].items())
