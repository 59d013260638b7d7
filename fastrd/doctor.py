"""`fastrd doctor`: what this machine has, what each thing is for, and the command that fixes what is missing.

Everything is imported in a child process: a library that crashes, hangs or changes torch's settings when
imported (ffcv sets the number of threads to one) is a line of the answer, not the end of it. The module itself
needs only the standard library, so that it answers where torch does not.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from json import dumps, loads
from pathlib import Path
from typing import Any, Literal

from .core.process_environment import FEW_SPINS, SPINS, WAITING, sleep_while_waiting
from .core.version import __version__
from .kernels.cpu import machine
from .kernels.cpu.native import compiler, flags

_PYTHON = shlex.quote(sys.executable)
_PIP = f"{_PYTHON} -m pip install"
# torchvision is built for one release of torch: an upgrade of one alone breaks the other.
_TORCH = f"{_PIP} --upgrade torch torchvision"
_ROOT = Path(__file__).resolve().parent.parent
_FFCV_SCRIPT = _ROOT / "tools/ffcv/install.sh"
_FFCV = f"sh {shlex.quote(str(_FFCV_SCRIPT))} {_PYTHON}"
if not _FFCV_SCRIPT.is_file():
    _LIBRARIES = "libopencv-dev libturbojpeg0-dev pkg-config g++"
    _FFCV = f"apt-get install -y --no-install-recommends {_LIBRARIES} && {_PIP} ffcv pillow"
TIMEOUT_SECONDS = 120
MIN_FREE_BYTES = 2 * 2**30


def _extra(name: str) -> str:
    """Returns the command that installs an extra: from the source tree where this is one, else from the index."""
    editable = (_ROOT / "setup.py").is_file()
    return f"{_PIP} " + (f"-e {shlex.quote(f'{_ROOT}[{name}]')}" if editable else f"'fastrd[{name}]'")


Status = Literal["ok", "missing", "broken"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked for."""

    name: str  # e.g. "torch"
    status: Status  # "missing": not there; "broken": there, and unusable
    purpose: str  # what it is for
    detail: str  # version, size or place when ok; otherwise what is wrong
    remedy: str = ""  # the command that fixes it; empty when there is nothing to fix
    required: bool = False  # whether fastrd can do nothing without it


_Answer = tuple[bool, Any]  # whether the code ran; what it found, or why it did not run


@dataclass(frozen=True)
class _Module:
    """A Python module to import; `distribution` and `remedy` where they do not follow from its name."""

    name: str
    purpose: str
    distribution: str = ""
    minimum: tuple[int, ...] = ()
    remedy: str = ""
    required: bool = False

    def check(self, imported: _Answer) -> Check:
        """Returns what became of importing it."""
        distribution = self.distribution or self.name
        status, detail = self._judge(imported, distribution)
        remedy = "" if status == "ok" else self.remedy or f"{_PIP} --upgrade {distribution}"
        return Check(distribution, status, self.purpose, detail, remedy, self.required)

    def _judge(self, imported: _Answer, distribution: str) -> tuple[Status, str]:
        if importlib.util.find_spec(self.name) is None:
            return "missing", "not installed"
        worked, why = imported
        if not worked:
            return "broken", why
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return "ok", "version unknown"
        release = tuple(int(part) for part in re.findall(r"\d+", version)[: len(self.minimum)])
        if release < self.minimum:
            return "broken", f"{version} is older than {'.'.join(map(str, self.minimum))}"
        return "ok", version


_MODULES = (
    _Module("torch", "everything", minimum=(2, 11), remedy=_TORCH, required=True),
    _Module("numpy", "everything", required=True),
    _Module("tqdm", "progress bars", required=True),
    _Module("safetensors", "checkpoints of other projects", required=True),
    *([_Module("tomli", "recipes", required=True)] if sys.version_info < (3, 11) else []),
    _Module("tomli_w", "recipes", "tomli-w", required=True),
    _Module("torchvision", "CIFAR-10/100 and STL-10, their files and downloads", remedy=_TORCH),
    *([_Module("triton", "fused kernels on a GPU, torch.compile there")] if sys.platform == "linux" else []),
    _Module("sklearn", "the digits: data that need no download", "scikit-learn"),
    _Module("scipy", "intervals of the report"),
    _Module("pyautoattack", "AutoAttack: `fastrd eval --attacks aa`"),
    _Module("matplotlib", "figures of the report"),
    _Module("jinja2", "page of the report"),
    _Module("pynvml", "optional, extra `gpu`: energy of a run on a GPU", "nvidia-ml-py"),
    _Module("ffcv", "optional, extra `ffcv`: packed data files; built with a C++ compiler and TurboJPEG", remedy=_FFCV),
    _Module("onnx", "optional, extra `onnx`: `fastrd export --format onnx`", remedy=_extra("onnx")),
    _Module("mkdocs", "optional, extra `docs`: the documentation site", remedy=_extra("docs")),
    _Module("pytest", "optional, extra `test`: tests, lint, type checks", remedy=_extra("test")),
    _Module("robustbench", "optional: teachers by RobustBench id"),
    _Module("tensorboard", "optional: training curves in TensorBoard"),
)


def checks() -> list[Check]:
    """Looks for everything. Changes nothing on the machine and downloads nothing."""
    questions = [*(f"import {module.name}" for module in _MODULES), _LOOK_FOR_GPU, _LOOK_FOR_DATA]
    *imports, gpu, data = _ask(questions)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return [
        Check("Python", "ok", "everything", f"{platform.python_version()} at {sys.executable}", required=True),
        *(module.check(imported) for module, imported in zip(_MODULES, imports, strict=True)),
        _compiler(),
        _gpu(gpu),
        *_data(data),
        Check("machine", "ok", "everything", f"{cores} CPU cores, {memory:.0f} GiB of memory"),
        Check("processor", "ok", "speed of training on a CPU", machine.describe(machine.features())),
        _waiting(),
        _disk(),
    ]


def report(found: Sequence[Check]) -> tuple[str, bool]:
    """Returns (text for people, whether all that is required is ok) about what was found."""
    lacking = [check.name for check in found if check.required and check.status != "ok"]
    width = max(len(check.name) for check in found)
    lines = [f"fastrd {__version__}"]
    for check in found:
        lines.append(f"{check.status:<7}  {check.name:<{width}}  {check.detail} ({check.purpose})")
        if check.remedy:
            lines.append(f"{'':<{width + 9}}  -> {check.remedy}")
    lines.append(f"Required and not usable: {', '.join(lacking)}." if lacking else "All that is required is here.")
    return "\n".join(lines), not lacking


def main(*, json: bool = False, kernels: bool = False) -> int:
    """Prints what was found; returns the exit status: 1 when something required is not usable, else 0.

    Args:
        json: print {"fastrd": version, "ok": bool, "checks": [fields of each `Check`]} instead of the text.
        kernels: print the report of `fastrd.kernels.runtime.roofline` on the Triton kernels instead.
    """
    if kernels:
        from .kernels.runtime import roofline

        print(roofline.report())
        return 0
    found = checks()
    text, ok = report(found)
    if json:
        text = dumps({"fastrd": __version__, "ok": ok, "checks": [asdict(check) for check in found]}, indent=2)
    print(text)
    return 0 if ok else 1


_CHILD = """
import json, os, sys
sys.path[:], questions = json.loads(sys.argv[1]), json.loads(sys.argv[2])
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for question in questions:
    scope = {}
    try:
        exec(question, scope)
        answer = True, scope.get("answer")
    except BaseException as error:
        answer = False, f"{type(error).__name__}: {' '.join(str(error).split())}"
    print(json.dumps(answer), file=answers, flush=True)
"""


def _ask(questions: list[str]) -> list[_Answer]:
    """Runs pieces of code in a child that imports from where we do, each leaving what it found in `answer`.

    One child runs them all, because most import torch; after one that crashed or hung, a new child goes on.
    """
    answers: list[_Answer] = []
    while len(answers) < len(questions):
        command = [sys.executable, "-c", _CHILD, dumps(sys.path), dumps(questions[len(answers) :])]
        try:
            child = subprocess.run(command, capture_output=True, timeout=TIMEOUT_SECONDS, check=False)
        except subprocess.TimeoutExpired as late:
            output, end = late.stdout or b"", f"no answer in {TIMEOUT_SECONDS} seconds"
        else:
            output, status = child.stdout, child.returncode
            end = f"crashed with {signal.Signals(-status).name}" if status < 0 else f"ended Python ({status})"
        answers += [(ran, found) for ran, found in map(loads, output.splitlines())]
        if len(answers) < len(questions):
            answers.append((False, end))
    return answers


_LOOK_FOR_GPU = """
import torch, warnings
with warnings.catch_warnings(record=True) as complaints:
    warnings.simplefilter("always")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
devices = []
for i in range(count):
    gpu = torch.cuda.get_device_properties(i)
    devices.append(f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
why = " ".join(" ".join(str(complaint.message).split()) for complaint in complaints)
built_for = torch.version.cuda and f"CUDA {torch.version.cuda}"
answer = f"ROCm {torch.version.hip}" if torch.version.hip else built_for, devices, why
"""


def _gpu(answer: _Answer) -> Check:
    name, purpose = "GPU", "optional: training at full size, fused kernels"
    ran, found = answer
    if not ran:
        return Check(name, "broken", purpose, f"torch could not be asked: {found}", _TORCH)
    built_for, devices, why = found
    if devices:
        return Check(name, "ok", purpose, f"{'; '.join(devices)}; {built_for}")
    if built_for is None:
        return Check(name, "missing", purpose, "this torch is built for the CPU only", _TORCH)
    detail = f"torch, built for {built_for}, sees none" + (f": {why}" if why else "")
    remedy = "nvidia-smi  # lists the GPU once there is one and its driver is installed"
    return Check(name, "missing", purpose, detail, remedy)


_LOOK_FOR_DATA = """
from fastrd.data import load_dataset
answer = []
for name in ("cifar10", "cifar100", "stl10", "digits"):
    try:
        answer.append((name, "ok", load_dataset(name).describe()))
    except FileNotFoundError as error:
        answer.append((name, "missing", str(error)))
    except (ImportError, ValueError) as error:
        answer.append((name, "broken", str(error)))
"""


def _data(answer: _Answer) -> list[Check]:
    purpose = "images to train on"
    ran, found = answer
    if not ran:
        return [Check("data", "broken", purpose, f"could not be looked for: {found}")]
    data = []
    for name, status, detail in found:
        download = f"from fastrd.data import load_dataset; load_dataset('{name}', download=True)"
        remedy = f'{_PYTHON} -c "{download}"' if status == "missing" else ""
        data.append(Check(name, status, purpose, detail.removeprefix(f"{name}: "), remedy))
    return data


def _compiler() -> Check:
    """Builds a library against the headers of Python and OpenMP, with the options that our kernels are built with."""
    name, purpose = "C++ compiler", "convolutions on a CPU, torch.compile, Triton"
    remedy = f"apt-get install -y g++ python{sys.version_info.major}.{sys.version_info.minor}-dev"
    if not (command := compiler()):
        named = os.environ.get("CXX")
        remedy = "unset CXX" if named and (shutil.which("g++") or shutil.which("clang++")) else remedy
        return Check(name, "missing", purpose, f"no {named or 'g++ or clang++'} on PATH", remedy)
    program = "#include <Python.h>\n#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n"
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": TIMEOUT_SECONDS, "check": False}
    with tempfile.TemporaryDirectory() as folder:
        built = [*command, *flags(), f"-I{sysconfig.get_path('include')}", "-o", f"{folder}/library.so"]
        try:
            child = subprocess.run([*built, "-x", "c++", "-"], input=program, **options)
        except OSError as error:
            return Check(name, "broken", purpose, f"{command[0]}: {error.strerror}", "unset CXX")
    if child.returncode:
        message = (child.stderr.strip().splitlines() or ["no message"])[0]
        if "omp.h" in message:  # GCC brings its own
            remedy = "apt-get install -y libomp-dev"
        return Check(name, "broken", purpose, f"{command[0]}: {message}", remedy)
    return Check(name, "ok", purpose, shutil.which(command[0]) or command[0])


def _waiting() -> Check:
    """Says how OpenMP's threads wait: as the user has set, else as every command sets."""
    sleep_while_waiting()
    settings = ", ".join(f"{name}={os.environ[name]}" for name in WAITING if name in os.environ)
    why = "from your environment"
    if os.environ.get(SPINS) == FEW_SPINS and WAITING[1] not in os.environ:
        why = "as fastrd sets it where neither it nor OMP_WAIT_POLICY is: threads that wait sleep soon"
    return Check("waiting threads", "ok", "speed beside other busy processes", f"{settings}, {why}")


def _disk() -> Check:
    free = shutil.disk_usage(".").free
    name, purpose, detail = "disk", "runs and checkpoints", f"{free / 2**30:.1f} GiB free here"
    if free < MIN_FREE_BYTES:
        return Check(name, "broken", purpose, f"{detail}, a large network's checkpoints want more", "df -h .")
    return Check(name, "ok", purpose, detail)
