"""Run folders: one process at a time, whole after a kill, readable or refused in one line, and good in any place."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import tomllib
import torch

from fastrd import Recipe, evaluate, evaluate_run, load_student, load_teacher, report, train
from fastrd.cli import main
from fastrd.core import checkpoint
from fastrd.core.documents import is_finished
from fastrd.core.files import InUse, atomic_path, atomic_write, check_writable, locked
from fastrd.engine.step import Distiller
from fastrd.methods import BASES, Method
from fastrd.recipe import Attack

ROOT = Path(__file__).resolve().parent.parent
TABLE = {
    "name": "small",
    "student": {"arch": "cnn", "options": {"width": 2}},
    "base": {"name": "pgd_at"},
    "data": {"name": "digits", "train_limit": 60, "holdout": 12},
    "attack": {"steps": 1, "epsilon": 0.1, "step_size": 0.1},
    "schedule": {"epochs": 1, "kind": "cosine"},
    "training": {"batch_size": 16},
    "validation": {"steps": 1},
}
REPRODUCED = '[tables.t]\nrecipe.student.arch="cnn"\nrecipe.data.name="digits"\nrows={pgd_at={}}\nseeds=1\n'
QUIET = ("--device", "cpu", "--quiet")
CLEAN = ("--attacks", "clean", "--limit", "20", *QUIET)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a teacher, a student distilled from it, and their recipes; and a table to reproduce."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "t.toml").write_text(REPRODUCED)
    recipe = Recipe.from_dict(TABLE)
    (folder / "small.toml").write_text(recipe.to_toml())
    train(recipe, out=folder / "teacher", device="cpu", progress=False)
    student = Recipe.from_dict({**TABLE, "base": {"name": "ard"}, "teacher": {"source": str(folder / "teacher")}})
    train(student, out=folder / "student", device="cpu", progress=False)
    return folder


@pytest.fixture
def place(runs, tmp_path, monkeypatch) -> Path:
    """A copy of `runs` to change, as the current folder."""
    shutil.copytree(runs, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def one_line(capsys) -> str:
    text = capsys.readouterr().err.strip()
    assert text.count("\n") == 0, text
    return text


def python(code: str, *arguments: object, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


HOLD = """
import sys
from fastrd.core.files import locked
with locked(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


class TestLocks:
    @pytest.fixture
    def holder(self, place):
        """A process that holds the lock of place/student."""
        process = python(HOLD, place / "student", stdin=subprocess.PIPE)
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()
        process.communicate()

    @pytest.mark.parametrize(
        "command",
        [
            ["train", "small.toml", "--out", "student", "--resume", *QUIET],
            ["eval", "student", *CLEAN],
            ["eval", "teacher", "--out", "student", *CLEAN],
            ["report", "teacher", "--out", "student/report.html"],
            ["demo", "--out", "student", *QUIET],
            ["pack", "toy.npz", "student/images.beton", "--quiet"],
        ],
        ids=lambda command: " ".join(command[:2]),
    )
    def test_a_second_process_is_refused_with_the_name_of_the_first(self, place, holder, toy_arrays, command, capsys):
        shutil.copy(toy_arrays, place / "toy.npz")
        before = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
        assert main(command) == 2
        line = one_line(capsys)
        assert f"student is in use by process {holder.pid} on " in line
        assert {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()} == before

    def test_the_lock_ends_with_a_killed_process(self, place, holder):
        with pytest.raises(InUse), locked(place / "student"):
            pass
        holder.kill()
        holder.wait()
        with locked(place / "student"):
            assert (place / "student/.lock").read_text().startswith(f"process {os.getpid()} ")
        assert not (place / "student/.lock").exists()

    def test_who_waits_gets_it_next(self, place, holder):
        threading.Timer(0.1, holder.kill).start()
        with locked(place / "student", wait=True):
            assert holder.wait() == -signal.SIGKILL

    def test_reading_needs_no_lock(self, place, holder):
        assert "small" in report.table([place / "student"])

    def test_blocks_of_one_thread_nest_and_those_of_two_do_not(self, tmp_path):
        refused = []

        def other():
            try:
                with locked(tmp_path / "run"):
                    pass
            except InUse as error:
                refused.append(str(error))

        with locked(tmp_path / "run"), locked(tmp_path / "run"):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            assert f"process {os.getpid()}" in refused[0]
        with locked(tmp_path / "run"):
            pass

    def test_a_forked_child_does_not_keep_the_lock(self, tmp_path):
        code = """
import os, sys, time
from fastrd.core.files import locked
with locked(sys.argv[1]):
    child = os.fork()
    if not child:
        print(os.getpid(), flush=True)  # now it has forgotten the lock
        os.close(1)
    time.sleep(600)
"""
        process = python(code, tmp_path / "run")
        child = int(process.stdout.readline())
        try:
            process.kill()
            process.wait()
            with locked(tmp_path / "run"):
                pass
        finally:
            os.kill(child, signal.SIGKILL)
            process.stdout.close()

    def test_a_folder_that_stays_empty_goes_again(self, tmp_path):
        with pytest.raises(KeyError), locked(tmp_path / "run"):
            raise KeyError
        assert not (tmp_path / "run").exists()

    def test_a_file_system_without_locks_is_said(self, tmp_path, monkeypatch):
        def none(*_):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "flock", none)
        with pytest.warns(UserWarning, match="run: this file system has no locks"), locked(tmp_path / "run"):
            atomic_write(tmp_path / "run/x", "text")

    def test_two_reproductions_of_one_table(self, place, capsys):
        holder = python(HOLD, place / "out/t", stdin=subprocess.PIPE)
        assert holder.stdout.readline() == "locked\n"
        assert main(["reproduce", "t.toml", "--out", "out", *QUIET]) == 2
        assert f"out/t is in use by process {holder.pid}" in one_line(capsys)
        holder.communicate()


def test_temporary_files_of_killed_processes_go_at_the_next_start(place):
    code = """
import sys, time
from fastrd.core.files import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    print(temporary.name, flush=True)
    time.sleep(600)
"""
    process = python(code, place / "student/last.pt")
    name = process.stdout.readline().strip()
    orphan = place / "student/.evaluation/.clean.json.abcdefgh.tmp"
    orphan.parent.mkdir(exist_ok=True)
    orphan.touch()
    mine = place / "student/.notes.tmp"
    mine.write_text("not ours")
    with locked(place / "student"):
        assert (place / "student" / name).exists(), "it is being written"
    process.kill()
    process.communicate()
    assert main(["eval", "student", *CLEAN]) == 0
    assert not (place / "student" / name).exists() and not orphan.exists() and mine.exists()


def test_temporary_files_of_a_killed_writer_go_when_the_file_is_written_again(tmp_path):
    """In a folder that no command locks: that of an export, or of the adversarial images."""
    orphans = [tmp_path / f".{name}.abcdefgh.tmp" for name in ("a[1].npz", "b.npz")]
    for orphan in orphans:
        orphan.touch()
    with atomic_path(tmp_path / "a[1].npz"):
        assert not orphans[0].exists()
        with atomic_path(tmp_path / "a[1].npz"):
            assert len(list(tmp_path.glob(".a*"))) == 2, "both are being written"
    assert orphans[1].exists()


def test_a_link_is_written_through_and_a_pipe_is_refused(tmp_path):
    file, link, pipe = (tmp_path / name for name in ("file", "link", "pipe"))
    file.write_text("old")
    link.symlink_to(file.name)
    atomic_write(link, "new")
    assert link.is_symlink() and file.read_text() == "new"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="pipe: a device or a pipe; accepted: a file"):
        check_writable(pipe)
    assert pipe.is_fifo() and len(list(tmp_path.iterdir())) == 3


def test_an_l2_radius_beyond_all_images_is_refused_before_a_run_begins(place, capsys):
    change = ("--set", "attack.norm=l2", "--set", "attack.epsilon=50", "--set", "attack.step_size=1")
    assert main(["train", "small.toml", "--out", "new", *change, *QUIET]) == 2
    assert "epsilon: got 50.0; accepted: an l2 norm" in capsys.readouterr().err and not Path("new").exists()


def test_what_fails_leaves_none_of_the_folders_it_made(place, toy_arrays, monkeypatch, capsys):
    monkeypatch.setattr("fastrd.data.pack.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    for command in (
        ["train", "small.toml", "--set", "data.name=cifar10", "--data", "nowhere", "--out", "new/a/b", *QUIET],
        ["eval", "student", "--dataset", "cifar10", "--data", "nowhere", "--out", "new/a/b", *CLEAN],
        ["pack", str(toy_arrays), "new/a/images.beton", "--quiet"],
    ):
        assert main(command) == 2
        assert "nowhere" in (said := one_line(capsys)) or "are free" in said
        assert not (place / "new").exists(), command
    with pytest.raises(KeyError), atomic_path(place / "new/a/file"):
        raise KeyError
    assert not (place / "new").exists()
    (place / "empty").mkdir()
    with pytest.raises(KeyError), atomic_path(place / "empty/a/file"):
        raise KeyError
    assert list((place / "empty").iterdir()) == [], "what was there stays"


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        atomic_write(tmp_path / "last.pt", b"x")
    assert str(caught.value) == f"[Errno 28] No space left on device: '{tmp_path / 'last.pt'}'"
    assert list(tmp_path.iterdir()) == []


DEEP = "[" * 100_000
HUGE = "1" + "0" * 400


@pytest.mark.parametrize(
    ("file", "text", "entry"),
    [
        ("evaluation.json", DEEP, "evaluation.json: not JSON: nested too deeply"),
        ("evaluation.json", '{"schema": 1}', "evaluation.json: results: got None"),
        ("evaluation.json", f'{{"schema": 1, "results": {{"clean": {{"accuracy": {HUGE}}}}}}}', "401 digits"),
        ("evaluation.json", '{"schema": 1, "epsilon": 1e99, "results": {}}', "epsilon: got 1e+99"),
        ("evaluation.json", '{"schema": 1, "n": -4, "results": {}}', "n: got -4"),
        ("evaluation.json", '{"schema": 1, "results": {}, "alignment": [1]}', "alignment: got [1]"),
        ("evaluation.json", '{"schema": 1, "results": {}, "probe": {"digits": 3}}', "probe.digits: got 3"),
        ("evaluation.json", '{"schema": 1, "results": {}, "versions": "2"}', "versions: got '2'"),
        (
            "evaluation.json",
            '{"schema": 1, "results": {}, "alignment": {"gd": 1e308}}',
            "got 1e308; accepted: a number",
        ),
        (
            "log.jsonl",
            '{"kind": "epoch", "epoch": 1, "seconds": -1e101}\n',
            "log.jsonl:1: not JSON: got -1e101; accepted",
        ),
        ("log.jsonl", DEEP + "\n", "log.jsonl:1: not JSON: nested too deeply"),
        ("log.jsonl", '{"kind": "epoch", "epoch": 1, "loss": "low"}\n', "log.jsonl:1: loss: got 'low'"),
        ("log.jsonl", '{"kind": ["epoch"], "epoch": 1}\n', "log.jsonl:1: got"),
        ("curve.json", DEEP, "curve.json: not JSON"),
        ("curve.json", f'{{"epsilons": [0, {HUGE}], "accuracies": [1, 1]}}', "curve.json: not JSON"),
        ("run.json", "[]", "run.json:1: got a list"),
        ("run.json", '{"finished": 1, "identity": {}}', "run.json: finished: got 1"),
        ("recipe.toml", "x" + ".a" * 2000 + " = 1", "recipe.toml: nested more than 16 deep"),
        ("recipe.toml", "seed = 1979-05-27", "recipe.toml: seed"),
        (
            "recipe.toml",
            'name = "a"\nstudent.arch = "cnn"\nbase.name = "ard"\nschedule.epochs = "many"',
            "recipe.toml: schedule.epochs: got 'many'",
        ),
    ],
)
def test_a_damaged_file_is_one_line_that_names_file_and_entry(place, file, text, entry, capsys):
    (place / "student" / file).write_text(text)
    for command in (["report", "student"], ["eval", "student", *CLEAN]):
        assert main(command) == 2
        assert entry in (line := one_line(capsys)) and file in line and len(line) < 500
    assert (place / "student" / file).read_text() == text, "it was not overwritten"


def test_resuming_with_a_damaged_log(place, capsys):
    with (place / "student/log.jsonl").open("a") as log:
        log.write(DEEP + "\n")
    assert main(["train", "student/recipe.toml", "--out", "student", "--resume", *QUIET]) == 2
    assert "log.jsonl" in one_line(capsys)


def test_relative_paths_of_a_recipe_hold_in_any_folder(place, monkeypatch, capsys):
    text = (place / "student/recipe.toml").read_text().replace(str(place.parent), "")
    recipe = tomllib.loads(text)
    recipe["teacher"]["source"] = "teacher"
    (place / "own.toml").write_text(Recipe.from_dict(recipe).to_toml())
    assert main(["train", "own.toml", "--out", "deep/run", *QUIET]) == 0
    assert tomllib.loads((place / "deep/run/recipe.toml").read_text())["teacher"]["source"] == str(place / "teacher")

    (place / "else").mkdir()
    monkeypatch.chdir(place / "else")
    assert main(["eval", "../deep/run", *CLEAN]) == 0
    assert main(["train", "../own.toml", "--out", "../deep/run", "--resume", *QUIET]) == 0
    monkeypatch.chdir(place)
    (place / "deep").rename(place / "moved")
    assert main(["eval", "moved/run", *CLEAN]) == 0
    assert "alignment" in json.loads((place / "moved/run/evaluation.json").read_text())

    (place / "teacher").rename(place / "gone")
    (place / "moved/run/evaluation.json").unlink()
    capsys.readouterr()
    with pytest.warns(UserWarning, match="teacher .*teacher of this run is not there; .*--teacher CKPT"):
        assert main(["eval", "moved/run", *CLEAN]) == 0
    assert "alignment" not in json.loads((place / "moved/run/evaluation.json").read_text())
    assert main(["train", "own.toml", "--out", "moved/run", "--resume", *QUIET]) == 2
    assert "--teacher CKPT says where it is now" in one_line(capsys)
    assert main(["train", "own.toml", "--out", "moved/run", "--resume", "--teacher", "gone", *QUIET]) == 0


def test_a_teacher_whose_path_no_recipe_can_hold_is_refused(place, capsys):
    """A run that names it would train, and then neither go on nor be evaluated."""
    name = os.fsdecode(b"t\xff")
    (place / "teacher").rename(place / name)
    assert main(["train", "student/recipe.toml", "--teacher", name, "--out", "new", *QUIET]) == 2
    said = one_line(capsys)
    assert "teacher.source: got" in said and "accepted: a string" in said and not (place / "new").exists()


def test_an_evaluation_is_about_one_teacher(place, capsys):
    measures = ("--measure", "cka", "--measure", "pointwise")

    def sections(*options):
        assert main(["eval", "student", *CLEAN, *options]) == 0
        document = json.loads((place / "student/evaluation.json").read_text())
        assert len({*document["teachers"].values()}) == 1
        return set(document["teachers"])

    assert sections(*measures) == {"alignment", "cka", "pointwise"}, "its own teacher"
    assert sections("--teacher", "teacher") == {"alignment", "cka", "pointwise"}, "the same one, named"
    assert sections("--teacher", "student") == {"alignment"}
    assert "cka" not in json.loads((place / "student/evaluation.json").read_text())
    assert sections("--teacher", "teacher", *measures[:2]) == {"alignment", "cka"}


def test_relative_data_hold_in_any_folder(place, toy_arrays, monkeypatch):
    shutil.copy(toy_arrays, place / "toy.npz")
    recipe = Recipe.from_dict({**TABLE, "data": {"name": "toy.npz", "holdout": 12, "train_limit": 60}})
    (place / "toy.toml").write_text(recipe.to_toml())
    assert main(["train", "toy.toml", "--out", "toy", *QUIET]) == 0
    monkeypatch.chdir("/")
    assert main(["eval", str(place / "toy"), *CLEAN]) == 0
    assert main(["train", str(place / "toy.toml"), "--out", str(place / "toy"), "--resume", *QUIET]) == 0


def test_finished_is_a_field_of_its_own(place):
    assert is_finished(place / "student")
    state = json.loads((place / "student/run.json").read_text())
    assert state["finished"] is True and state["identity"].keys() == {"data", "teacher"}
    (place / "student/run.json").unlink()
    assert (place / "student/card.md").exists() and not is_finished(place / "student"), "a card says nothing"


def test_resuming_with_other_batches_or_test_images_is_the_same_run(place):
    recipe = Recipe.load(place / "teacher/recipe.toml")
    for changed in (
        {"data.loader": "torch"},
        {"data.test_limit": 10},
        {"name": "another"},
        {"evaluation.attacks": ["clean"]},
    ):
        train(recipe.override(changed), out=place / "teacher", resume=True, device="cpu", progress=False)
    with pytest.raises(ValueError, match="resume: the recipe is not the one of .*: seed: 0 -> 1"):
        train(recipe.override({"seed": 1}), out=place / "teacher", resume=True, device="cpu", progress=False)


def test_runs_of_two_teachers_are_two_rows(place):
    def labels(**kept):
        for name, identity in kept.items():
            run = place / name
            shutil.copytree(place / "student", run)
            recipe = Recipe.stored(run / "recipe.toml").override({"seed": ord(name)})
            (run / "recipe.toml").write_text(recipe.to_toml())
            (run / "run.json").write_text(
                json.dumps({"finished": True, "identity": {"data": "d", "teacher": identity}})
            )
        text = report.table([place / name for name in kept])
        for name in kept:
            shutil.rmtree(place / name)
        return text

    assert "(2 seeds)" in labels(a="one", b="one")
    assert "(2 seeds)" not in labels(a="one", b="another")


@pytest.mark.parametrize(
    "device", ["gpu", "mps", "meta", "cuda:x", "cuda:256", *([] if torch.cuda.is_available() else ["cuda"])]
)
def test_a_device_that_is_not_there_is_one_line(place, device, capsys):
    commands = (["train", "small.toml", "--out", "new"], ["eval", "student"], ["batch-sizes", "small.toml"])
    for command in (*commands, ["demo", "--out", "new"], ["reproduce", "t.toml", "--out", "new"]):
        assert main([*command, "--device", device]) == 2
        assert f"device: got '{device}'" in (line := one_line(capsys)) and "accepted: cpu" in line
    assert not (place / "new").exists()
    for call in (
        lambda: train(Recipe.from_dict(TABLE), out="new", device=device),
        lambda: evaluate_run("student", device=device),
        lambda: load_student("student", device=device),
        lambda: load_teacher("student", device=device),
        lambda: evaluate(load_student("student"), torch.rand(2, 1, 8, 8), [0, 1], attacks="clean", device=device),
    ):
        with pytest.raises(ValueError, match="device: got"):
            call()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("eval student --attacks ", "attacks: got ''"),
        ("eval student --attacks clean,", "attacks: got ''"),
        ("eval student --attacks clean,pdg20", "attacks: got 'pdg20'"),
        ("eval student --out ", "out: got ''"),
        ("eval student --epsilon nan", "epsilon: got 'nan'"),
        ("eval student --epsilon 8/zero", "epsilon: got '8/zero'"),
        ("eval student --epsilon 0", "epsilon: got 0.0"),
        ("eval student --limit 0", "limit: got 0"),
        ("eval student --batch-size -1", "batch_size: got -1"),
        ("eval student --teacher ", "teacher: got ''"),
        ("eval student --out small.toml", "small.toml"),
        ("train small.toml --out ", "out: got ''"),
        ("train small.toml --out small.toml/run", "small.toml"),
        ("train small.toml --out new --data ", "data: got ''"),
        ("train small.toml --out new --set optimizer.lr=nan", "optimizer.lr: got nan"),
        ("train small.toml --out new --set attack.epsilon=0", "attack.epsilon: got 0.0"),
        (f"train small.toml --out new --set optimizer.lr={HUGE}", "optimizer.lr: got 1000"),
        ("report student --out ", "out: got ''"),
        ("report student --out small.toml/page.html", "small.toml"),
        ("reproduce t.toml --jobs -1", "jobs: got -1; accepted: an integer >= 1"),
        ("reproduce t.toml --jobs 0", "jobs: got 0"),
        ("reproduce t.toml --seeds 100000000", "seeds: got 100000000"),
        ("reproduce t.toml --budget nan", "budget: got 'nan'"),
        ("reproduce t.toml --budget .h", "budget: got '.h'"),
        ("reproduce t.toml --out ", "out: got ''"),
        ("reproduce t.toml --out small.toml/runs", "small.toml/runs"),
    ],
)
def test_bad_options_are_one_line_and_status_2(place, command, message, capsys):
    before = sorted(place.rglob("*"))
    quiet = [] if command.startswith("report") else QUIET
    assert main([*command.split(" "), *quiet]) == 2
    assert message in one_line(capsys)
    assert sorted(place.rglob("*")) == before, "nothing was left behind"


@pytest.mark.parametrize("epsilon", ["0.1", "1/10", "1e-1"])
def test_a_radius_is_a_number_or_a_fraction(place, epsilon):
    assert main(["eval", "student", "--epsilon", epsilon, *CLEAN]) == 0
    assert json.loads((place / "student/evaluation.json").read_text())["epsilon"] == 0.1


STOPPED = {
    "SIGTERM": ("torch", 143, "stopped by SIGTERM"),
    "SIGHUP": ("torch", 129, "stopped by SIGHUP"),
    "SIGINT": ("concurrent", 130, "interrupted"),
}


@pytest.mark.parametrize("name", STOPPED)
def test_a_signal_before_training_ends_the_command_as_during_it(place, name):
    """A signal while a module is still being imported: its status and one line, as once training has set handlers."""
    module, status, said = STOPPED[name]
    code = f"""
import os, signal, sys
from fastrd import cli
class Import:
    def find_spec(self, name, *_):
        if name == "{module}":
            os.kill(os.getpid(), signal.{name})
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # where the tests run under nohup, or behind a shell, which ignore them
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Import())
cli.run()
"""
    process = python(code, "train", place / "small.toml", "--out", place / "new", *QUIET, stderr=subprocess.PIPE)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (status, f"fastrd: {said}\n")
    assert not (place / "new").exists()


def test_out_of_memory_is_one_line(place, monkeypatch, capsys):
    from fastrd import workflow

    for error in (
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried 9 bytes"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("Storage size calculation overflowed with sizes=[9, 9]"),
    ):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(workflow, "load_inputs", fail)
        assert main(["train", "small.toml", "--out", "new", *QUIET]) == 2
        line = one_line(capsys)
        assert "out of memory" in line and "a smaller batch size, image or network needs less" in line


class TestPythonCalls:
    def test_arguments_are_named(self, place):
        recipe = Recipe.from_dict(TABLE)
        for options, kind, message in (
            ({"data": {"holdout": 3}}, TypeError, "data: got .* accepted: a Dataset or a path"),
            ({"teacher": 3}, TypeError, "teacher: got 3"),
            ({"out": ""}, ValueError, "out: got ''"),
            ({"out": None}, TypeError, "out: got None"),
            ({"out": "a\0b"}, ValueError, "out: got"),
        ):
            with pytest.raises(kind, match=message):
                train(recipe, **{"out": "new", "device": "cpu", "progress": False, **options})
        with pytest.raises(TypeError, match="recipe: got .*; accepted: a Recipe"):
            train("small.toml", out="new")
        for options, kind, message in (
            ({"checkpoint": "first"}, ValueError, "checkpoint: got 'first'"),
            ({"attacks": ""}, ValueError, "attacks: got ''"),
            ({"attacks": [3]}, TypeError, "attacks: got"),
            ({"limit": 2.5}, TypeError, "limit: got 2.5"),
            ({"batch_size": 2.5}, TypeError, "batch_size: got 2.5"),
            ({"epsilon": float("nan")}, ValueError, "epsilon: got nan"),
        ):
            with pytest.raises(kind, match=message):
                evaluate_run("student", **{"device": "cpu", "progress": False, **options})

    def test_what_the_caller_has_set_in_torch_does_not_matter(self, place):
        whole = torch.load("teacher/last.pt", weights_only=True)["model"]["state"]
        torch.set_default_dtype(torch.float64)
        try:
            with torch.no_grad(), torch.autocast("cpu"), torch.device("meta"):
                train(Recipe.from_dict(TABLE), out="again", device="cpu", progress=False)
            assert torch.get_default_dtype() == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)
        again = torch.load("again/last.pt", weights_only=True)["model"]["state"]
        assert all(torch.equal(whole[name], value) for name, value in again.items())

    def test_a_module_without_features_is_refused_by_its_role(self):
        bare = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        with pytest.raises(TypeError, match="student: got Sequential, which returns logits alone"):
            Distiller(Method(BASES["pgd_at"]()), {"student": bare}, Attack(steps=1))

    def test_a_recipe_that_was_put_together_is_checked(self, place):
        from dataclasses import replace

        recipe = replace(Recipe.from_dict(TABLE), seed=float("nan"))
        with pytest.raises(ValueError, match="small: seed: got nan"):
            train(recipe, out="new", device="cpu", progress=False)

    def test_the_student_of_a_run(self, place):
        student = load_student("student")
        assert not student.training and all(p.requires_grad for p in student.parameters())
        state = torch.load("student/last.pt", weights_only=True)["model"]["state"]
        assert all(torch.equal(state[name], value) for name, value in student.state_dict().items())

    def test_report_is_a_function_and_the_home_of_its_parts(self, place):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert report(["student"], "page.html").read_text() == report.build(["student"], "page.html").read_text()


def test_a_reproduction_that_can_do_nothing_does_not_succeed(place, monkeypatch, capsys):
    """Jobs that fail without leaving a word: the command says which, and ends with status 2."""
    from fastrd.reproduce import run

    def dying(self, task):
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"], stdin=subprocess.PIPE, text=True)

    monkeypatch.setattr(run._Workers, "_start", dying)
    assert main(["reproduce", "t.toml", "--out", "out", *QUIET]) == 2
    assert "pgd_at, seed 0: training: failed with status 1" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["recipe.toml", "best.pt", "log.jsonl", "card.md", "evaluation.json"])
@pytest.mark.parametrize("options", [(), ("--resume",)])
def test_a_new_run_replaces_no_file_of_something_else(place, capsys, name, options):
    mine = place / "mine" / name
    mine.parent.mkdir()
    mine.write_text("precious")
    assert main(["train", "small.toml", "--out", "mine", *options, *QUIET]) == 2
    assert f"out: mine holds {name} of something else" in capsys.readouterr().err
    assert mine.read_text() == "precious" and [path.name for path in mine.parent.iterdir()] == [name]


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(place):
    for name in ("last.pt", "previous.pt", "card.md"):
        (place / "teacher" / name).unlink(missing_ok=True)
    assert main(["train", "small.toml", "--out", "teacher", *QUIET]) == 0
    assert is_finished(place / "teacher")


@pytest.mark.parametrize("change", [("training.batch_size=1",), ("training.batch_size=47", "training.drop_last=false")])
def test_a_batch_of_one_image_is_refused_before_a_folder_is_made(place, capsys, change):
    changes = [part for text in change for part in ("--set", text)]
    assert main(["train", "small.toml", "--out", "new", *changes, *QUIET]) == 2
    assert re.search("training.batch_size: got .*, which leaves a batch of one image", capsys.readouterr().err)
    assert not (place / "new").exists()


@pytest.mark.parametrize("out", ["small.toml", "small.toml/run", "dangling"])
def test_a_run_folder_that_cannot_be_one_is_named(place, capsys, out):
    (place / "dangling").symlink_to("nowhere")
    assert main(["train", "small.toml", "--out", out, *QUIET]) == 2
    assert f"{out}: got a file; accepted: a folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["recipe.toml", "run.json", "evaluation.json", "log.jsonl"])
def test_a_text_file_of_a_run_that_is_a_pipe_is_refused_at_once(place, capsys, name):
    (place / "student" / name).unlink(missing_ok=True)
    os.mkfifo(place / "student" / name)
    capsys.readouterr()
    for command in (["report", "student"], ["eval", "student", *CLEAN]):
        assert main(command) == 2, command
        assert f"{name}: a device or a pipe; accepted: a file" in one_line(capsys)


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_a_checkpoint_that_is_a_pipe_or_a_device_is_refused_at_once(place, capsys, name):
    path = place / "student" / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=f"{name}: a device or a pipe; accepted: a file"):
        checkpoint.read(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert main(["eval", str(path), "--dataset", "digits", *CLEAN]) == 2
    assert f"{name}: a device or a pipe; accepted: a file" in capsys.readouterr().err


EVAL = ("eval", "student", *CLEAN)
WRITES = {  # command -> (files it writes in the end, what it works with until then)
    (*EVAL, "--figures", "--save-adversarial", "o/adv.npz"): (
        ["o/adv.npz", *(f"student/{name}" for name in ("evaluation.json", "card.md", "curve.json", "panel.npz"))],
        "fastrd.workflow.load_dataset",
    ),
    ("train", "small.toml", "--out", "teacher", "--resume", *QUIET): (
        [f"teacher/{name}" for name in ("staged.pt", "previous.pt", "best.pt", "failed.pt", "run.json", "card.md")],
        "fastrd.workflow.Trainer.fit",
    ),
    ("reproduce", "t.toml", "--out", "o", *QUIET): (
        ["o/t.html", "o/t.md", "o/t.json"],
        "fastrd.reproduce.run._Workers",
    ),
    ("demo", "--out", "o", *QUIET, "--data", "."): (["o/digits-cpu/report.html"], "fastrd.demo.train"),
    ("pack", "digits", "o/d.beton", "--quiet"): (["o/d.beton", "o/d.beton.json"], "fastrd.data.pack.load_dataset"),
    ("export", "student", "--out", "o/s.safetensors"): (
        ["o/s.safetensors", "o/s.safetensors.md"],
        "fastrd.deploy._safetensors",
    ),
    ("report", "student", "--out", "o/r.html"): (["o/r.html", "o/r.md"], "fastrd.report.load"),
    ("report", "--out", "o/r.html", "--bench", "b.json"): (["o/r.html", "o/r.md"], "fastrd.report.benchmarks.load"),
}


@pytest.mark.parametrize("command", WRITES, ids=lambda command: command[0])
def test_whether_results_can_be_written_is_checked_before_the_work(place, monkeypatch, capsys, command):
    paths, work = WRITES[command]
    monkeypatch.setattr(work, lambda *_, **__: pytest.fail("it has begun"))
    for path in map(Path, paths):
        path.unlink(missing_ok=True)
        path.mkdir(parents=True)
        capsys.readouterr()
        assert main([*command]) == 2, path
        assert re.search(rf"{path}.* accepted: the name of an? (\.html )?file", one_line(capsys)), path
        path.rmdir()
    if paths[0].startswith("o/"):
        shutil.rmtree("o", ignore_errors=True)
        Path("o").touch()
        assert main([*command]) == 2
        assert re.search("Not a directory|File exists|got a file; accepted: a folder", one_line(capsys))


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", "2"), ("l2", "9")])
def test_a_radius_that_no_attack_takes_is_refused_before_anything_is_measured(
    place, monkeypatch, capsys, norm, epsilon
):
    monkeypatch.setattr("fastrd.workflow._load", lambda *_, **__: pytest.fail("it has begun"))
    assert main([*EVAL, "--norm", norm, "--epsilon", epsilon]) == 2
    assert f"epsilon: got {epsilon}.0; accepted: " in one_line(capsys)


@pytest.mark.parametrize("name", ["evaluation.json", "curve.json", "recipe.toml"])
def test_a_card_that_cannot_be_written_stops_a_resumed_run_before_it_trains(place, monkeypatch, capsys, name):
    (place / "teacher" / name).write_text("{")
    monkeypatch.setattr("fastrd.workflow.Trainer.fit", lambda *_, **__: pytest.fail("it has begun"))
    assert main(["train", "small.toml", "--out", "teacher", "--resume", *QUIET]) == 2
    assert f"teacher/{name}" in one_line(capsys)


def test_what_is_checked_is_left_as_it_was(tmp_path):
    (tmp_path / "there").write_text("whole")
    check_writable(tmp_path / "there", tmp_path / "a/b/c", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["there"] and (tmp_path / "there").read_text() == "whole"
    with pytest.raises(OSError, match="there"):
        check_writable(tmp_path / "there/x")


def test_an_unfinished_run_is_evaluated_with_a_warning(place):
    options = {"device": "cpu", "progress": False, "attacks": "clean", "limit": 20}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate_run("student", **options)
    state = json.loads((place / "student/run.json").read_text())
    (place / "student/run.json").write_text(json.dumps({**state, "finished": False}))
    with pytest.warns(UserWarning, match="student: the run is unfinished, and is evaluated as far as it came"):
        evaluate_run("student", **options)
