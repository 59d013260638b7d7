"""The command line as a user meets it."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastrd.cli import main

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def fastrd(*arguments, **options):
    """The installed command, in its own process."""
    return subprocess.run(
        [sys.executable, "-m", "fastrd.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
        **options,
    )


@pytest.fixture
def recipe(toy_arrays, tmp_path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(f"""
name = "tiny"
[student]
arch = "cnn"
options = {{ width = 2 }}
[base]
name = "pgd_at"
[data]
name = "{toy_arrays}"
holdout = 20
[attack]
steps = 2
[schedule]
epochs = 2
[training]
batch_size = 32
""")
    return path


def test_train_eval_report_as_subprocesses(recipe, tmp_path):
    run = tmp_path / "run"
    trained = fastrd("train", recipe, "--out", run, "--device", "cpu", "--set", "optimizer.lr=0.2")
    assert trained.returncode == 0, trained.stderr
    assert "done after 2 epochs; best.pt is of epoch" in trained.stdout
    assert "img/s" in trained.stderr, "progress shows throughput"
    assert "lr = 0.2" in (run / "recipe.toml").read_text()

    evaluated = fastrd("eval", run, "--attacks", "clean,fgsm,pgd5", "--limit", 12, "--device", "cpu", "--figures")
    assert evaluated.returncode == 0, evaluated.stderr
    document = json.loads((run / "evaluation.json").read_text())
    assert set(document["results"]) == {"clean", "fgsm", "pgd5"} and document["n"] == 12
    assert document["results"]["pgd5"]["accuracy"] <= document["results"]["clean"]["accuracy"]
    assert f"{100 * document['results']['clean']['accuracy']:.2f} %" in evaluated.stdout
    assert (run / "curve.json").exists() and (run / "panel.npz").exists()

    page = tmp_path / "page.html"
    reported = fastrd("report", run, "--out", page)
    assert reported.returncode == 0, reported.stderr
    assert "tiny" in reported.stdout and "tiny" in page.read_text()


def test_eval_keeps_results_of_the_same_weights(recipe, tmp_path):
    run = tmp_path / "run"
    assert main(["train", str(recipe), "--out", str(run), "--device", "cpu", "--quiet"]) == 0
    teacher = tmp_path / "teacher"
    assert main(["train", str(recipe), "--out", str(teacher), "--device", "cpu", "--quiet", "--set", "seed=5"]) == 0
    common = ["--limit", "12", "--device", "cpu", "--quiet"]
    assert main(["eval", str(run), "--attacks", "clean", *common]) == 0
    assert main(["eval", str(run), "--attacks", "fgsm", *common, "--teacher", str(teacher)]) == 0
    document = json.loads((run / "evaluation.json").read_text())
    assert set(document["results"]) == {"clean", "fgsm"}
    assert -1 <= document["alignment"]["gc"] <= 1 and document["alignment"]["gd"] > 0
    assert main(["eval", str(run), "--attacks", "clean", "--checkpoint", "best", *common]) == 0
    assert json.loads((run / "evaluation-best.json").read_text())["checkpoint"] == "best"
    assert main(["eval", str(run / "last.pt"), "--attacks", "clean", *common, "--out", str(tmp_path / "x")]) == 0
    again = json.loads((tmp_path / "x" / "last-evaluation.json").read_text())
    assert again["results"]["clean"]["accuracy"] == document["results"]["clean"]["accuracy"]


def test_a_distilled_run_remembers_its_teacher_and_what_is_measured_is_printed(recipe, tmp_path, capsys):
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    quiet = ["--device", "cpu", "--quiet"]
    assert main(["train", str(recipe), "--out", str(teacher), *quiet]) == 0
    settings = ["--set", "base.name=ard", "--set", "igdm.alpha=3"]
    assert main(["train", str(recipe), "--out", str(run), "--teacher", str(teacher), *settings, *quiet]) == 0
    measures = ["--measure", "cka", "--measure", "pointwise"]
    assert main(["eval", str(run), "--attacks", "clean", "--limit", "8", *measures, *quiet]) == 0
    document = json.loads((run / "evaluation.json").read_text())
    assert "gc" in document["alignment"]
    printed = capsys.readouterr().out
    assert f"  cka: {document['cka']:.4g}\n" in printed
    assert f"adversarial {document['pointwise']['adversarial']:.4g}" in printed


@pytest.mark.slow
def test_eval_reads_a_published_state_dict(data_root, tmp_path, capsys):
    package = importlib.util.find_spec("pyautoattack")
    checkpoint = Path(package.origin).parent / "examples" / "model_test.pt"
    arguments = [
        "eval",
        str(checkpoint),
        "--data",
        str(data_root),
        "--attacks",
        "clean,pgd10",
        "--limit",
        "50",
    ]
    assert main([*arguments, "--out", str(tmp_path), "--device", "cpu", "--quiet"]) == 0
    results = json.loads((tmp_path / "model_test-evaluation.json").read_text())["results"]
    assert results["clean"]["accuracy"] > 0.85, "naturally trained: accurate"
    assert results["pgd10"]["accuracy"] == 0, "and not robust at all"
    assert "PGD-10" in capsys.readouterr().out


def test_recipes_lists_and_prints(capsys):
    assert main(["recipes"]) == 0
    listing = capsys.readouterr().out
    assert "igdm-ard-cifar100-resnet18" in listing and "IGDM's Table 2" in listing
    assert main(["recipes", "igdm-ard-cifar100-resnet18"]) == 0
    printed = capsys.readouterr().out
    assert "alpha = 100.0" in printed and "milestones = [" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "demo-adr", "--out", "x"], "did you mean 'demo-ard'"),
        (["train", "demo-ard", "--out", "x", "--set", "igdm=3"], "igdm: got 3; accepted: a table"),
        (["train", "demo-ard", "--out", "x", "--set", "schedule.epohcs=3"], "did you mean 'epochs'"),
        (["train", "demo-ard", "--out", "x", "--data", "nowhere"], "nowhere"),
        (["eval", "nowhere.pt"], "nowhere.pt"),
        (["eval", ".", "--attacks", "clean"], "has no last.pt"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_errors_are_one_line_and_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastrd: ") and message in error and "Traceback" not in error
    assert not (tmp_path / "x").exists()


def test_usage_without_a_command():
    result = fastrd()
    assert result.returncode == 2 and "usage: fastrd" in result.stderr
    assert fastrd("--version").stdout.startswith("fastrd 0.")


def test_losses_import_alone():
    """A trainer's author who imports one loss gets neither the engine nor changed global state."""
    program = """
import torch, sys
def state():
    modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    return torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed(), *modes
before = state()
from fastrd.losses import info_nce, nce_bank, gradient_matching, distillation_kl, feature_alignment
assert before == state(), (before, state())
packages = {"triton", "torchvision", "sklearn", "pandas", "matplotlib", "ffcv", "pyautoattack"}
heavy = packages & sys.modules.keys()
assert not heavy, heavy
ours = sorted(m for m in sys.modules if m.startswith("fastrd"))
assert not any(m.startswith(("fastrd.engine", "fastrd.data", "fastrd.models", "fastrd.evaluation")) for m in ours), ours
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_public_names():
    import fastrd

    for name in fastrd.__all__:
        assert getattr(fastrd, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        fastrd.nothing  # noqa: B018


def test_a_terminal_of_another_encoding_gets_a_question_mark(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    assert main(["recipes", "--table", "igdm-2"]) == 0
    sys.stdout.flush()
    assert b"?" in written.getvalue()


CLOSED = """
import os, sys
import fastrd.cli
def recipes(**_):
    file = open(sys.argv[2], "wb", 0)
    if sys.argv[3] != "2>/dev/full":
        os.write(2, b"from a library")
    raise ValueError("no such thing")
fastrd.cli._recipes = recipes
sys.exit(fastrd.cli.main(["recipes"]))
"""


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full"])
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_streams_that_are_closed_or_full_change_no_status_and_no_file(closed, tmp_path):
    """A file that is opened in the place of a closed stream would get what is written to it."""
    words = [sys.executable, "-c", CLOSED, "recipes", tmp_path / "file", closed]
    shell = f"{shlex.join(map(str, words))} {closed}"
    assert subprocess.run(shell, shell=True, cwd=ROOT, check=False).returncode == 2
    assert (tmp_path / "file").read_bytes() == b""


def test_a_removed_current_folder_is_one_line(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    command = shlex.join(map(str, [sys.executable, "-m", "fastrd", "report", tmp_path, "--out", tmp_path / "r.html"]))
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    shell = f"rmdir {shlex.quote(str(gone))}; exec {command}"
    options = {"shell": True, "cwd": gone, "env": environment, "capture_output": True, "text": True, "check": False}
    done = subprocess.run(shell, **options)
    assert done.returncode == 2 and done.stderr.startswith("fastrd: the current folder cannot be used"), done.stderr
    assert done.stderr.count("\n") == 1


def test_a_warning_that_is_an_error_is_one_line(recipe):
    command = [sys.executable, "-W", "error", "-m", "fastrd", "recipes", recipe]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "schedule.milestones: 100, 150 have no effect" in done.stderr, done.stderr
    assert done.stderr.startswith("fastrd: ") and done.stderr.count("\n") == 1


AT_EXIT = """
import atexit, os, signal
import fastrd.cli
fastrd.cli.main = lambda: 130
atexit.register(lambda: [os.kill(os.getpid(), s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)])
fastrd.cli.run()
"""


def test_a_second_signal_does_not_interrupt_the_exit():
    done = subprocess.run([sys.executable, "-c", AT_EXIT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")


def test_paths_that_lead_nowhere_are_one_line(tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    commands = [
        ["report", str(tmp_path / "loop"), "--out", str(tmp_path / "r.html")],
        ["train", "demo-teacher", "--out", str(tmp_path / "loop")],
        ["recipes", "--plugin", "~nosuchuser/p.py"],
        ["train", "demo-teacher", "--out", str(tmp_path / "run"), "--data", "~nosuchuser"],
    ]
    for command in commands:
        assert main(command) == 2, command
        said = capsys.readouterr().err
        assert said.startswith("fastrd: ") and said.count("\n") == 1, said
