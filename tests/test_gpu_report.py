"""The report of a GPU: its plan fits half an hour, and what fails, hangs or dies costs its own figures alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from bench import gpu_report
from bench.gpu_report import Stage

TINY = ("bench/test_pgd_step.py", "-k", "128 and ours")


def test_the_plan_fits_and_begins_with_what_matters_most():
    stages = gpu_report.plan()
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names)
    assert sum(stage.seconds for stage in stages) <= 28 * 60
    assert names[:2] == ["smoke", "numerics"] and names[-1].startswith("first-compiled")
    assert stages[0].seconds < 120
    step = names.index("step-ard-igdm-ours-bf16-512")
    assert {"step-ard-igdm-reference-512", gpu_report.ESSENTIAL} == set(names[step + 1 : step + 3])
    essential = stages[: names.index(gpu_report.ESSENTIAL) + 1]
    assert sum(stage.seconds for stage in essential) <= 60 * gpu_report.ESSENTIAL_MINUTES
    assert {"smoke", "numerics", "info_nce-ours", "nce_bank-ours", "distillation-ours", "pgd_step-ours"} < {
        stage.name for stage in essential
    }
    assert all(stage.seconds < 300 for stage in stages), "two of them at their limits fit a call of ten minutes"


@pytest.mark.slow
def test_every_stage_selects_something():
    """On any machine: the names of the benchmarks do not depend on it. `triton` tests are deselected without a GPU."""
    chosen = [stage for stage in gpu_report.plan() if stage.name != "numerics"]
    files = sorted({stage.arguments[0].partition("::")[0] for stage in chosen})
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *files]
    found = subprocess.run(command, cwd=gpu_report.ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
    tests = found.stdout.splitlines()
    for stage in chosen:
        path, *options = stage.arguments
        words = options[1].split(" and ") if options[:1] == ["-k"] else []
        words = [word for word in words if not word.startswith("not ")]
        alternatives = [w.split(" or ") for w in words]
        assert any(
            test.startswith(path) and all(any(word in test for word in some) for some in alternatives) for test in tests
        ), stage.name


STAND_INS = {
    "passes": "def test(): pass",
    "fails": "def test(): assert False, 'as planned'",
    "dies": "import os, signal\ndef test(): os.kill(os.getpid(), signal.SIGKILL)",
    "hangs": """
import subprocess, sys, time
def test():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(__file__ + ".pid", "w").write(str(child.pid))
    time.sleep(600)
""",
}


@pytest.fixture
def stand_in(tmp_path):
    def stage(kind: str, seconds: float = 30) -> Stage:
        path = tmp_path / f"test_{kind}.py"
        path.write_text(STAND_INS[kind])
        return Stage(kind, seconds, (str(path),))

    return stage


def outcomes(result: Path) -> dict[str, bool]:
    return {stage["stage"]: stage["passed"] for stage in json.loads(result.read_text())["stages"]}


@pytest.mark.slow
def test_stages_that_fail_hang_and_die_stop_no_other(stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASTRD_BENCH_TINY", "1")
    stages = [
        stand_in("fails"),
        stand_in("hangs", 3),
        stand_in("dies"),
        Stage("measures", 60, TINY),
        stand_in("passes"),
    ]
    folder, result = tmp_path / "raw", tmp_path / "gpu.json"
    assert gpu_report.report(stages, folder, result, minutes=5) == gpu_report.FAILED
    expected = {"fails": False, "hangs": False, "dies": False, "measures": True, "passes": True}
    assert outcomes(result) == expected
    told = capsys.readouterr().out
    assert "failed: " in told and "stopped after 6 s" in told and "as planned" in told
    measured = json.loads(result.read_text())["benchmarks"]
    assert [entry["extra_info"]["variant"] for entry in measured] == ["ours"]
    page = (folder / "report.html").read_text()
    assert "PGD step" in page and all(name in page for name in expected) and "stopped after" in page
    pid = int((tmp_path / "test_hangs.py.pid").read_text())
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z", "the child of a stopped stage goes on"

    # The next call begins with nothing that passed, and takes up what failed.
    stages[0] = Stage("fails", 30, stand_in("passes").arguments)
    assert gpu_report.report([stages[0], *stages[3:]], folder, result, minutes=5) == gpu_report.FAILED
    assert "2 of 3 stages passed before" in capsys.readouterr().out
    assert outcomes(result)["fails"]


def test_what_is_left_comes_before_what_failed_and_short_stages_fill_the_time(tmp_path, monkeypatch):
    ran, works = [], {"a": False, "b": True, "c": True, "d": True}

    def run(stage, folder, limit):
        ran.append(stage.name)
        return gpu_report.Outcome(stage.name, works[stage.name], 1.0, "told")

    monkeypatch.setattr(gpu_report, "_run", run)
    stages = [Stage(name, 240 if name == "c" else 20, ("tests/x.py",)) for name in works]
    folder, result = tmp_path / "raw", tmp_path / "gpu.json"
    assert gpu_report.report(stages, folder, result, minutes=2) == gpu_report.FAILED
    assert ran == ["a", "b", "d"], "c would not fit"
    assert "not run yet" in (folder / "report.html").read_text()
    works["a"] = True
    assert gpu_report.report(stages, folder, result, minutes=9) == gpu_report.DONE
    assert ran[3:] == ["c", "a"]
    assert gpu_report.report(stages, folder, result, minutes=9) == gpu_report.DONE and len(ran) == 5
    fresh = tmp_path / "fresh"
    assert gpu_report.report(stages, fresh, result, minutes=1) == gpu_report.UNFINISHED


BARE = """
import sys
sys.path[:] = [{root!r}, *{packages!r}]
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tomli_w", "ffcv", "pyautoattack", "tensorboard", "accelerate"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import bench.gpu_report, bench.test_step, bench.test_loaders, bench.test_info_nce
import fastrd.kernels
assert fastrd.kernels.__file__.startswith({root!r}), fastrd.kernels.__file__
sys.exit(bench.gpu_report.main(["--list"]))
"""


@pytest.mark.slow
def test_a_checkout_needs_no_installation(tmp_path):
    """And none of the packages that a machine without a network may lack."""
    for name in ("fastrd", "kernels", "bench"):
        shutil.copytree(gpu_report.ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    packages = [path for path in sys.path if "site-packages" in path or "lib/python" in path or path.endswith(".zip")]
    done = subprocess.run(
        [sys.executable, "-S", "-c", BARE.format(root=str(tmp_path), packages=packages)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert all(words in done.stdout for words in ("smoke", "for what is essential", "in all"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(capsys):
    assert gpu_report.main([]) == 1
    assert "nothing measured" in capsys.readouterr().err


def test_each_variant_of_a_step_runs_in_the_precision_of_its_name(monkeypatch):
    from types import SimpleNamespace

    from bench import test_step as steps

    inside, seen = [], {}

    @contextmanager
    def float32_precision(precision, device):
        inside.append(precision)
        yield
        inside.pop()

    def made(*arguments, **options):
        return lambda: seen.setdefault(variant, (*inside, options.get("precision", inside[-1]))), flops

    flops = SimpleNamespace(flops=lambda example, epoch: {"attack": 1.0})
    monkeypatch.setattr(steps, "float32_precision", float32_precision)
    monkeypatch.setattr(steps, "engine", made)
    monkeypatch.setattr(steps, "plain", lambda *a, **o: made(*a, **o)[0])
    monkeypatch.setattr(steps, "breakdown", lambda step: {})
    monkeypatch.setattr(steps, "check_machine", lambda variant, batch_size: None)
    benchmark = SimpleNamespace(stats=SimpleNamespace(stats=SimpleNamespace(median=1.0)), extra_info={})
    for variant in steps.VARIANTS:
        steps.test_step(lambda *a, **o: None, benchmark, (None, None), "ARD+IGDM", variant, 512)
    expected = {name: "tf32" if "tf32" in name else "bf16" if "bf16" in name else "fp32" for name in steps.VARIANTS}
    assert seen == {name: (precision, precision) for name, precision in expected.items()}
    assert {"reference", "reference, tf32", "ours, bf16"} <= set(seen)
