"""The doctor, with things faked missing or broken for it and for the processes it starts."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fastrd.kernels.cpu import native

from fastrd import doctor
from fastrd.doctor import Check

ROOT = Path(__file__).resolve().parent.parent
FIELDS = {"name", "status", "purpose", "detail", "remedy", "required"}


def consult(*options: str, shadow: Path, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """`fastrd doctor` where the modules in `shadow` come before the installed ones."""
    path = os.pathsep.join([str(shadow), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "fastrd.cli", "doctor", *options],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path} | env,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def sick(tmp_path_factory) -> tuple[int, dict]:
    """(exit status, answer) of a machine without scikit-learn, with torch, ffcv, matplotlib broken."""
    shadow = tmp_path_factory.mktemp("shadow")
    (shadow / "sitecustomize.py").write_text("import sys; sys.modules['sklearn'] = None\n")
    (shadow / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open\\nshared object file')\n")
    (shadow / "ffcv.py").write_text("raise ModuleNotFoundError('No module named numba', name='numba')\n")
    (shadow / "matplotlib.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)\n")
    (shadow / "tensorboard.py").write_text("print('hello')\n")
    done = consult("--json", shadow=shadow, cwd=shadow, CXX="no-such-compiler")
    assert done.stdout.startswith("{"), done.stderr
    return done.returncode, json.loads(done.stdout)


def find(answer: dict, name: str) -> dict:
    (check,) = [check for check in answer["checks"] if check["name"] == name]
    assert set(check) == FIELDS
    return check


def test_required_and_broken_fails(sick):
    status, answer = sick
    torch = find(answer, "torch")
    assert (status, answer["ok"]) == (1, False)
    assert (torch["status"], torch["required"]) == ("broken", True)
    assert torch["detail"] == "ImportError: libcudart.so.13: cannot open shared object file"
    assert torch["remedy"].endswith("install --upgrade torch torchvision")


def test_missing_module_names_its_distribution_and_command(sick):
    sklearn = find(sick[1], "scikit-learn")
    assert (sklearn["status"], sklearn["detail"]) == ("missing", "not installed")
    assert sklearn["remedy"].endswith("-m pip install --upgrade scikit-learn")


def test_ffcv_without_its_own_needs_is_broken_and_what_installs_it_is_named(sick):
    ffcv = find(sick[1], "ffcv")
    assert ffcv["status"] == "broken"
    assert "numba" in ffcv["detail"]
    assert shlex.split(ffcv["remedy"]) == [
        "sh",
        str(ROOT / "tools/ffcv/install.sh"),
        os.path.abspath(sys.executable),
    ]


def test_ffcv_of_an_installed_package_comes_by_apt_and_pip(tmp_path):
    """There is no tools/ beside it."""
    (tmp_path / "fastrd").mkdir()
    for name in ("__init__.py", "doctor.py"):
        shutil.copy(ROOT / "fastrd" / name, tmp_path / "fastrd")
    code = "import fastrd.doctor as d; print(d.__file__, d._FFCV)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(tmp_path))
    assert "apt-get install -y --no-install-recommends libopencv-dev libturbojpeg0-dev" in done.stdout
    assert done.stdout.endswith("install ffcv pillow\n")


def test_crashing_import_is_a_line_of_the_answer(sick):
    matplotlib = find(sick[1], "matplotlib")
    assert (matplotlib["status"], matplotlib["detail"]) == ("broken", "crashed with SIGSEGV")


def test_module_that_imports_is_ok_whatever_it_prints(sick):
    tensorboard = find(sick[1], "tensorboard")
    assert (tensorboard["status"], tensorboard["remedy"]) == ("ok", "")


def test_what_needs_torch_says_that_torch_is_at_fault(sick):
    assert "libcudart" in find(sick[1], "GPU")["detail"]
    assert find(sick[1], "GPU")["status"] == "broken"


def test_missing_compiler(sick):
    compiler = find(sick[1], "C++ compiler")
    assert (compiler["status"], compiler["detail"]) == ("missing", "no no-such-compiler on PATH")
    other = shutil.which("g++") or shutil.which("clang++")
    assert compiler["remedy"].startswith("unset CXX" if other else "apt-get install -y g++ python3.")


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> subprocess.CompletedProcess:
    """This environment, on a folder of data with one small cifar10.npz and a cifar100.npz that is none."""
    folder = tmp_path_factory.mktemp("data")
    import numpy as np

    labels = np.arange(20) % 10
    images = np.zeros((20, 32, 32, 3), np.uint8)
    np.savez(folder / "cifar10.npz", x_train=images, y_train=labels, x_test=images[:10], y_test=labels[:10])
    (folder / "cifar100.npz").write_bytes(b"torn")
    return consult(shadow=folder, cwd=folder, FASTRD_DATA=str(folder))


def line(done: subprocess.CompletedProcess, name: str) -> str:
    (found,) = [text for text in done.stdout.splitlines() if text.split()[1:2] == [name]]
    return found


def test_this_environment_is_well(healthy):
    assert healthy.returncode == 0, healthy.stdout + healthy.stderr
    assert healthy.stdout.splitlines()[-1] == "All that is required is here."
    assert line(healthy, "torch").startswith("ok")


def test_data_are_read_not_only_looked_for(healthy):
    assert "20 training and 10 test images of 3x32x32" in line(healthy, "cifar10")
    assert line(healthy, "cifar100").startswith("broken")
    assert line(healthy, "stl10").startswith("missing")
    assert "load_dataset('stl10', download=True)" in healthy.stdout
    assert line(healthy, "digits").startswith("ok")


def test_old_version_of_a_module_is_broken():
    check = doctor._Module("pytest", "tests", minimum=(999, 1)).check((True, None))
    assert (check.status, check.remedy.split()[-1]) == ("broken", "pytest")
    assert check.detail == f"{pytest.__version__} is older than 999.1"
    assert doctor._Module("pytest", "tests", minimum=(1, 0)).check((True, None)).status == "ok"


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler that takes the kernels")
def test_a_compiler_that_refuses_the_kernels_options_is_broken(monkeypatch):
    assert doctor._compiler().status == "ok"
    monkeypatch.setenv("FASTRD_CXXFLAGS", "-march=nonsense")
    check = doctor._compiler()
    assert check.status == "broken" and "nonsense" in check.detail


@pytest.mark.parametrize(("header", "package"), [("Python.h", "-dev"), ("omp.h", "libomp-dev")])
def test_a_compiler_without_a_header_is_broken(tmp_path, monkeypatch, header, package):
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/bin/sh\necho 'stdin:1: fatal error: {header}: No such file' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"{compiler} -pipe")
    check = doctor._compiler()
    assert check.status == "broken" and header in check.detail
    assert check.remedy.startswith("apt-get install -y ") and check.remedy.endswith(package)


def test_questions_after_a_crash_are_still_answered():
    answers = doctor._ask(["answer = 1", "import os; os.abort()", "print('noise'); answer = 3", "1 / 0"])
    assert answers == [
        (True, 1),
        (False, "crashed with SIGABRT"),
        (True, 3),
        (False, "ZeroDivisionError: division by zero"),
    ]


def test_question_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(doctor, "TIMEOUT_SECONDS", 0.2)
    assert doctor._ask(["while True: pass"]) == [(False, "no answer in 0.2 seconds")]


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        (["CUDA 13.2", ["NVIDIA H200, sm_90, 139 GiB"], ""], "ok", "NVIDIA H200, sm_90, 139 GiB; CUDA 13.2"),
        (["CUDA 13.2", [], ""], "missing", "torch, built for CUDA 13.2, sees none"),
        (["CUDA 13.2", [], "driver too old"], "missing", "torch, built for CUDA 13.2, sees none: driver too old"),
        ([None, [], ""], "missing", "this torch is built for the CPU only"),
    ],
)
def test_gpu(answer, status, words):
    check = doctor._gpu((True, answer))
    assert (check.status, check.detail) == (status, words)
    assert bool(check.remedy) == (status != "ok")


def test_full_disk(monkeypatch):
    usage = type("usage", (), {"free": 2**29})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    check = doctor._disk()
    assert (check.status, check.required) == ("broken", False)
    assert check.detail.startswith("0.5 GiB free")


def test_report_counts_only_what_is_required():
    optional = Check("ffcv", "missing", "packed data", "not installed", "install it")
    required = Check("torch", "missing", "everything", "not installed", "pip install torch", required=True)
    text, ok = doctor.report([optional])
    assert ok
    assert "-> install it" in text
    text, ok = doctor.report([optional, required])
    assert not ok
    assert text.splitlines()[-1] == "Required and not usable: torch."
