"""What gets installed, and the commands that install it. Downloads nothing, leaves the working tree alone."""

from __future__ import annotations

import ast
import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from fastrd import __version__, doctor

ROOT = Path(__file__).resolve().parent.parent


def run(*command, cwd, env=None, check=True):
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))} | (env or {})
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def copy_tree(to: Path) -> Path:
    for name in ("fastrd", "kernels", "tools", ".ci"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__", ".*.tmp"))
    for name in ("setup.py", "pyproject.toml", "Makefile", ".gitignore"):
        shutil.copy2(ROOT / name, to / name)
    return to


def contents(wheel: Path) -> dict[str, bytes]:
    files = (path for path in wheel.rglob("*") if path.is_file() and path.name != "RECORD")
    return {path.relative_to(wheel).as_posix(): path.read_bytes() for path in files}


def build(kind: str, tree: Path, to: Path) -> Path:
    """Call the hook that pip calls, in the tree, and unpack the wheel it makes."""
    to.mkdir(exist_ok=True)
    hook = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(to)!r}))"
    wheel = run(sys.executable, "-c", hook, cwd=tree).stdout.strip().splitlines()[-1]
    with zipfile.ZipFile(to / wheel) as archive:
        archive.extractall(to)
    (to / wheel).unlink()
    return to


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return copy_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    return build("wheel", tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def metadata(wheel):
    return email.message_from_string(next(wheel.glob("*.dist-info/METADATA")).read_text(encoding="utf-8"))


def test_wheel_holds_every_file_of_the_tree_and_no_other(tree, wheel):
    def files(folder: Path, prefix: str) -> set[str]:
        return {f"{prefix}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*") if path.is_file()}

    installed = {
        path.relative_to(wheel).as_posix()
        for path in wheel.rglob("*")
        if path.is_file() and ".dist-info" not in path.parts[len(wheel.parts)]
    }
    assert installed == files(tree / "fastrd", "fastrd") | files(tree / "kernels", "fastrd/kernels")
    assert any(name.startswith("fastrd/recipes/") for name in installed)


def test_wheel_imports_its_own_kernels(wheel, tmp_path):
    code = "import fastrd.kernels, fastrd.cli; print(fastrd.kernels.__file__)"
    found = run(sys.executable, "-c", code, cwd=tmp_path, env={"PYTHONPATH": str(wheel)}).stdout.strip()
    assert Path(found) == wheel / "fastrd" / "kernels" / "__init__.py"


def test_wheel_names_version_command_and_python(wheel, metadata):
    assert metadata["Name"] == "fastrd"
    assert metadata["Version"] == __version__
    assert metadata["Requires-Python"] == ">=3.10"
    entry_points = next(wheel.glob("*.dist-info/entry_points.txt")).read_text(encoding="utf-8")
    assert "fastrd = fastrd.cli:run" in entry_points


def test_default_install_leaves_ffcv_out(metadata):
    wanting_ffcv = [line for line in metadata.get_all("Requires-Dist") if line.startswith("ffcv")]
    assert wanting_ffcv == ['ffcv; extra == "ffcv"']


def test_doctor_names_every_extra(metadata):
    purposes = " ".join(module.purpose for module in doctor._MODULES)
    extras = metadata.get_all("Provides-Extra")
    assert set(extras) == {"gpu", "ffcv", "onnx", "docs", "test"}
    assert [extra for extra in extras if f"extra `{extra}`" not in purposes] == []


def test_every_imported_package_is_declared(metadata):
    declared = {re.match(r"[\w-]+", line).group() for line in metadata.get_all("Requires-Dist")}
    # Of scikit-learn, nvidia-ml-py, jinja2, ffcv, torchvision, tomli-w.
    declared |= {"sklearn", "scipy", "pynvml", "markupsafe", "numba", "PIL", "tomli_w"}
    optional = {"robustbench", "tensorboard"}  # imported where they happen to be installed
    found = set()
    for file in [*(ROOT / "fastrd").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.split(".")[0])
    assert found - declared - optional - {"fastrd"} - set(sys.stdlib_module_names) == set()


def test_doctor_looks_for_every_requirement(metadata):
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    known = {module.distribution or module.name: module for module in doctor._MODULES}
    for line in required:
        name = re.match(r"[\w-]+", line).group()
        if (name == "tomli" and sys.version_info >= (3, 11)) or (name == "triton" and sys.platform != "linux"):
            continue
        minimum = re.search(r">=([\d.]+)", line.split(";")[0])
        assert known[name].minimum == (tuple(map(int, minimum[1].split("."))) if minimum else ())


def test_sdist_builds_the_same_wheel(tree, wheel, tmp_path):
    hook = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    name = run(sys.executable, "-c", hook, cwd=tree).stdout.strip().splitlines()[-1]
    with tarfile.open(tmp_path / name) as archive:
        archive.extractall(tmp_path, filter="data")
    again = build("wheel", tmp_path / name.removesuffix(".tar.gz"), tmp_path / "wheel")
    assert contents(again) == contents(wheel)


@pytest.mark.slow
def test_installed_package_trains_and_evaluates_without_the_repository(wheel, tmp_path):
    """In a Python that sees the unpacked wheel and the installed packages, but not this tree."""
    code = f"""
import sys
sys.path = [{str(wheel)!r}] + [path for path in sys.path if path not in ("", {str(ROOT)!r})]
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "") + repr(f)]
import fastrd
from fastrd.cli import main
assert fastrd.__file__.startswith({str(wheel)!r}), fastrd.__file__
small = ["--set", "data.train_limit=96", "--set", "data.holdout=32", "--set", "training.batch_size=32"]
sys.exit(main(["train", "mine.toml", "--out", "run", "--device", "cpu", *small])
    or main(["eval", "run", "--attacks", "clean", "--limit", "32", "--device", "cpu"])
    or main(["report", "run", "--out", "report.html"]))
"""
    recipe = """
name = "mine"
student = { arch = "cnn", options = { width = 4 } }
base.name = "pgd_at"
data = { name = "digits" }
attack = { epsilon = 0.15, step_size = 0.06, steps = 1 }
schedule = { epochs = 1, milestones = [] }
"""
    (tmp_path / "mine.toml").write_text(recipe)
    run(sys.executable, "-c", code, cwd=tmp_path, env={"OMP_NUM_THREADS": "1"})
    assert "mine" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_editable_install_maps_kernels_from_any_folder(tree, tmp_path):
    site = build("editable", tree, tmp_path)
    # -S keeps out the environment's own editable fastrd, and all else: `import fastrd` must need nothing.
    code = (
        f"import site; site.addsitedir({str(site)!r}); import importlib.util as u;"
        "print(u.find_spec('fastrd').origin); print(u.find_spec('fastrd.kernels').origin)"
    )
    expected = [str(tree / "fastrd" / "__init__.py"), str(tree / "kernels" / "__init__.py")]
    for folder in (tree, tmp_path):
        assert run(sys.executable, "-S", "-c", code, cwd=folder).stdout.splitlines() == expected


def test_this_environment_runs_this_tree(tmp_path):
    if "editable" not in (importlib.metadata.distribution("fastrd").read_text("direct_url.json") or ""):
        pytest.skip("fastrd is not installed in editable form here")
    code = "import fastrd, fastrd.kernels; print(fastrd.__file__); print(fastrd.kernels.__file__)"
    expected = [str(ROOT / "fastrd" / "__init__.py"), str(ROOT / "kernels" / "__init__.py")]
    for folder in (ROOT, tmp_path):
        assert run(sys.executable, "-c", code, cwd=folder).stdout.splitlines() == expected


@pytest.fixture
def sandbox(tmp_path) -> Path:
    """A tree in which `make` and .ci/run meet stand-ins: each logs its arguments and does nothing else."""
    if shutil.which("make") is None:
        pytest.skip("no make on this machine")
    copy_tree(tmp_path)
    (tmp_path / "stubs").mkdir()
    return tmp_path


def stub(sandbox: Path, name: str, body: str = "") -> Path:
    path = sandbox / name
    path.parent.mkdir(parents=True, exist_ok=True)
    log = f'echo "{path.name} $*" >> "{sandbox}/log"'
    path.write_text(f"#!/bin/sh\n{log}\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def log(sandbox: Path) -> list[str]:
    """What the stand-ins were called with since the last look."""
    path = sandbox / "log"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def make(sandbox: Path, *arguments: str, check: bool = True):
    path = f"{sandbox / 'stubs'}{os.pathsep}{os.environ['PATH']}"
    return run("make", *arguments, cwd=sandbox, env={"PATH": path}, check=check)


def stamps(sandbox: Path) -> list[Path]:
    return sorted((sandbox / ".venv").glob(".ready-*"))


def test_setup_installs_once_and_again_when_the_requirements_change(sandbox):
    stub(sandbox, ".venv/bin/python")
    make(sandbox, "setup")
    assert any("pip install" in line and ".[test]" in line for line in log(sandbox))
    make(sandbox, "setup")
    assert log(sandbox) == []
    stamp = stamps(sandbox)[0].stat().st_mtime
    os.utime(sandbox / "setup.py", (stamp + 10, stamp + 10))
    make(sandbox, "setup")
    assert any("pip install" in line for line in log(sandbox))


def test_failed_setup_leaves_no_stamp(sandbox):
    stub(
        sandbox,
        ".venv/bin/python",
        'case "$*" in *"pip install"*) echo "ERROR: no space left" >&2; exit 1;; esac',
    )
    done = make(sandbox, "setup", check=False)
    assert done.returncode != 0
    assert "no space left" in done.stderr
    assert stamps(sandbox) == []


def test_setup_whose_torch_does_not_import_leaves_no_stamp(sandbox):
    stub(sandbox, ".venv/bin/python", 'case "$*" in *"import torch"*) exit 1;; esac')
    assert make(sandbox, "setup", check=False).returncode != 0
    assert stamps(sandbox) == []


def test_moved_environment_is_set_up_again(sandbox, tmp_path_factory):
    stub(sandbox, ".venv/bin/python")
    make(sandbox, "setup")
    moved = tmp_path_factory.mktemp("moved")
    shutil.copytree(sandbox, moved, dirs_exist_ok=True)
    log(sandbox)
    make(moved, "setup")
    assert any("pip install" in line for line in log(sandbox))


def test_setup_makes_the_environment_with_the_named_python(sandbox):
    python = stub(sandbox, "stubs/mine")
    assert make(sandbox, "setup", f"PYTHON={python}", check=False).returncode != 0  # a stub makes no environment
    assert log(sandbox) == ["mine -c import ensurepip", "mine -m venv --clear .venv"]


NO_ENSUREPIP = 'case "$*" in *ensurepip*) exit 1;; *venv*version*) echo python3.11-venv;; esac'


def test_setup_without_ensurepip_tells_a_user_the_command(sandbox):
    python = stub(sandbox, "stubs/mine", NO_ENSUREPIP)
    stub(sandbox, "stubs/id", "echo 1000")
    stub(sandbox, "stubs/apt-get")
    done = make(sandbox, "setup", f"PYTHON={python}", check=False)
    assert done.returncode != 0
    assert "sudo apt-get install python3.11-venv" in done.stderr
    assert not any(line.startswith("apt-get") for line in log(sandbox))


def test_setup_without_ensurepip_installs_it_as_root(sandbox):
    python = stub(sandbox, "stubs/mine", NO_ENSUREPIP)
    stub(sandbox, "stubs/id", "echo 0")
    stub(sandbox, "stubs/apt-get")
    make(sandbox, "setup", f"PYTHON={python}", check=False)
    calls = log(sandbox)
    assert "apt-get install -y -qq --no-install-recommends python3.11-venv" in calls
    assert calls[-1] == "mine -m venv --clear .venv"


def test_setup_without_python_says_so(sandbox):
    done = make(sandbox, "setup", "PYTHON=", check=False)
    assert done.returncode != 0
    assert "no Python 3.10 or newer" in done.stderr


WITHOUT_FFCV = 'case "$*" in *"import ffcv"*) exit 1;; esac'


def test_setup_goes_on_without_ffcv_and_make_ffcv_does_not(sandbox):
    stub(sandbox, ".venv/bin/python", WITHOUT_FFCV)
    for name, body in (("g++", "exit 1"), ("id", "echo 1000"), ("apt-get", "exit 1"), ("apt-cache", "")):
        stub(sandbox, f"stubs/{name}", body)
    done = make(sandbox, "setup")
    assert "FFCV was not installed" in done.stderr and "make ffcv" in done.stderr
    assert len(stamps(sandbox)) == 1
    assert not any("pip" in line and "ffcv" in line for line in log(sandbox))
    done = make(sandbox, "ffcv", check=False)
    assert done.returncode != 0
    assert "sudo apt-get install -y g++ libturbojpeg0-dev" in done.stderr


def test_ffcv_as_root_installs_one_library_and_what_ffcv_imports(sandbox):
    # FFCV imports once pip installed it, and TurboJPEG compiles once apt-get did.
    mark = sandbox / "installed"
    python = f'case "$*" in *no-deps*ffcv) touch {mark};; *"import ffcv"*) test -e {mark};; esac'
    stub(sandbox, ".venv/bin/python", python)
    stub(sandbox, "stubs/g++", f'grep -q "^apt-get install" {sandbox}/log')
    stub(sandbox, "stubs/id", "echo 0")
    stub(sandbox, "stubs/apt-get")
    make(sandbox, "setup")
    calls = log(sandbox)
    assert "apt-get install -y -qq --no-install-recommends g++ libturbojpeg0-dev" in calls
    pip = [line for line in calls if "pip" in line and ("numba" in line or line.endswith(" ffcv"))]
    assert ["--no-deps" in line for line in pip] == [False, True]
    assert "opencv-python-headless" in pip[0]
    make(sandbox, "ffcv")
    assert not any("pip" in line for line in log(sandbox)), "it is there already"


@pytest.mark.parametrize(
    ("goal", "command"),
    [
        ("demo", "fastrd demo --out elsewhere"),
        ("test", "OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests -n 2"),
        ("bench", "-m pytest bench --benchmark-only"),
        ("lint", "ruff check"),
        ("gpu-report", "-m bench.gpu_report"),
    ],
)
def test_goals_set_up_first(sandbox, goal, command):
    planned = make(sandbox, "-n", goal, "DEMO_ARGS=--out elsewhere").stdout
    assert 0 < planned.index("pip install") < planned.index(command)


def test_ci_run_unpacks_real_data_between_setup_and_tests(sandbox):
    tree = sandbox / "tree"
    tree.mkdir()
    (sandbox / ".ci").rename(tree / ".ci")
    stub(sandbox, "shared/data/unpack.py")
    stub(sandbox, "tree/.venv/bin/python")
    for name in ("make", "python3", "gcc", "g++"):
        stub(sandbox, f"stubs/{name}", "echo 9 passed" if name == "make" else "")
    path = f"{sandbox / 'stubs'}{os.pathsep}{os.environ['PATH']}"
    done = run(tree / ".ci" / "run", cwd=sandbox, env={"PATH": path})
    calls = [line for line in log(sandbox) if not line.startswith("python3")]
    assert [line for line in calls if not line.startswith(("assert", "import"))] == [
        "make setup ffcv .triton36",
        "python ../shared/data/unpack.py .data",
        "make lint",
        "make test",
        "make test-matrix CELLS=oldest no-compiler",
    ]
    assert done.stdout.endswith("9 passed\n")


def test_gitignore_hides_data_and_keeps_code_and_results(sandbox):
    if shutil.which("git") is None:
        pytest.skip("no git on this machine")
    run("git", "init", "-q", cwd=sandbox)
    hidden = [
        ".venv/x",
        ".data/x",
        "data/cifar10.npz",
        "runs/demo/log.jsonl",
        "build/x",
        "a.pt",
        "a.beton",
        "bench/results/raw.txt",
    ]
    kept = [
        "fastrd/data/catalog.py",
        "fastrd/recipes/demo.toml",
        "bench/results/h200.json",
        "tests/vectors/a.npz",
    ]
    done = run("git", "check-ignore", *hidden, *kept, cwd=sandbox)
    assert done.stdout.split() == hidden
