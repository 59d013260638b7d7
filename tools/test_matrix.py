"""The numerical tests on processors, compilers and releases of torch that this machine can play: `make test-matrix`.

python tools/test_matrix.py [--list] [--again] [CELL ...]

Each cell is a run of pytest under other settings. Slow tests, most of which compile for GPUs, and planted bugs, each of
which compiles C++ again, run for other releases of torch alone. A cell that has passed for the present sources is not
run again, so a run that was stopped goes on. Cells that are not named run all, but for other releases of torch: those
take a virtual environment of gigabytes each in build/, made when they are named.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "test-matrix"
STATE = BUILD / "results.json"
TESTS = ["losses", "methods", "attacks", "vectors", "folded", "chained", "fast_step", "capture", "alignment"]
TESTS += ["transfer", "evaluation", "process_environment"]
KERNEL_TESTS = ["chain", "conv2d", "native", "pgd_step", "distillation", "info_nce", "nce_bank", "cross_rank"]

OLD = "-march=x86-64-v2"
CELLS: dict[str, dict[str, str]] = {
    "native": {},
    **{f"aten-{name}": {"ATEN_CPU_CAPABILITY": name} for name in ("default", "avx2", "avx512")},
    **{f"onednn-{name}": {"ONEDNN_MAX_CPU_ISA": name} for name in ("SSE41", "AVX2", "AVX512_CORE", "AVX512_CORE_AMX")},
    **{f"threads-{number}": {"OMP_NUM_THREADS": number} for number in ("1", "2", "4")},
    **{f"c++-{name}": {"FASTRD_CXXFLAGS": f"-march=x86-64-{name}"} for name in ("v2", "v3")},
    "clang": {"CXX": "clang++"},
    "no-compiler": {"CXX": "no-such-compiler"},
    "oldest": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "FASTRD_CXXFLAGS": OLD},
    **{f"torch-{release}": {} for release in ("2.11", "2.14", "newest")},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cells", nargs="*", metavar="CELL", help=", ".join(CELLS))
    parser.add_argument("--list", action="store_true", help="only print what is known of the cells")
    parser.add_argument("--again", action="store_true", help="also run cells that have passed")
    options = parser.parse_args()
    unknown = set(options.cells) - CELLS.keys()
    if unknown:
        parser.error(f"CELL: got {', '.join(sorted(unknown))}; accepted: {', '.join(CELLS)}")
    cells = options.cells or [name for name in CELLS if not name.startswith("torch-")]
    state = json.loads(STATE.read_text()) if STATE.exists() else {}
    sources = digest()
    for name in cells:
        known = state.get(name, {})
        passed = known.get("sources") == sources and known.get("result") == "passed"
        if options.list or (passed and not options.again):
            continue
        print(f"{name}: running", flush=True)
        state[name] = {"sources": sources, **run(name)}
        BUILD.mkdir(parents=True, exist_ok=True)
        STATE.with_suffix(".new").write_text(json.dumps(state, indent=1))
        os.replace(STATE.with_suffix(".new"), STATE)
    print(f"\n{'cell':<24} {'result':<8} {'seconds':>7}  what pytest said")
    failed = False
    for name in cells:
        known = state.get(name, {"result": "not run"})
        if known.get("sources", sources) != sources:
            known = {"result": "not run", "said": "for these sources"}
        failed |= known["result"] == "failed"
        print(f"{name:<24} {known['result']:<8} {known.get('seconds', ''):>7}  {known.get('said', '')}")
    return int(failed)


def run(name: str) -> dict[str, object]:
    """Runs one cell; returns its result, seconds and pytest's last line, and leaves its output in build/."""
    settings = CELLS[name]
    reason = impossible(settings)
    if reason:
        return {"result": "skipped", "seconds": 0, "said": reason}
    BUILD.mkdir(parents=True, exist_ok=True)
    output = BUILD / f"{name}.txt"
    began = time.monotonic()
    with output.open("w") as log:
        try:
            python = interpreter(name, log)
        except subprocess.CalledProcessError as error:
            return {
                "result": "failed",
                "seconds": 0,
                "said": f"{error.cmd[:5]}: see {output.relative_to(ROOT)}",
            }
        # Its own compiled kernels; torch.compile's too, as it takes those made under another ATEN_CPU_CAPABILITY for
        # its own. One thread, where the cell says nothing, and as many processes as cores.
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(BUILD / "cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(BUILD / f"inductor-{name}"),
            **settings,
        }
        workers = max(1, (os.cpu_count() or 1) // int(environment["OMP_NUM_THREADS"]))
        command = [str(python), "-m", "pytest", "-q", "--tb=short", "-n", str(workers), "--dist", "worksteal"]
        if not name.startswith("torch-"):
            command += ["-m", "not slow", "-k", "not planted"]
        done = subprocess.run([*command, *tests()], cwd=ROOT, env=environment, stdout=log, stderr=log, check=False)
    said = [line for line in output.read_text(errors="replace").splitlines() if re.search(r" in \d", line)]
    return {
        "result": "failed" if done.returncode else "passed",
        "seconds": round(time.monotonic() - began),
        "said": said[-1].strip("= ") if said else f"status {done.returncode}, see {output.relative_to(ROOT)}",
    }


def impossible(settings: dict[str, str]) -> str:
    """Returns why this machine cannot play the cell; empty where it can."""
    if settings.get("CXX") == "clang++" and not shutil.which("clang++"):
        return "no clang++"
    if settings and platform.machine() != "x86_64" and not {"CXX", "OMP_NUM_THREADS"} & settings.keys():
        return "another processor than x86_64"
    asked = " ".join(settings.values()).lower()
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    for word, flag in (("amx", "amx_tile"), ("avx512", "avx512f"), ("avx2", "avx2"), ("v3", "avx2")):
        if word in asked and flag not in flags:
            return f"this processor has no {flag}"
    return ""


def interpreter(name: str, log) -> Path:
    """Returns the Python of the cell, in a virtual environment that is made here for another torch."""
    release = name.removeprefix("torch-")
    if release == name:
        return Path(sys.executable)
    folder = BUILD / name
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        torch = "torch" if release == "newest" else f"torch=={release}.*"
        pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        for command in (
            [sys.executable, "-m", "venv", "--clear", folder],
            [*pip, "--upgrade", torch, "torchvision"],
            [*pip, "-e", f"{ROOT}[test]"],
        ):
            subprocess.run([str(word) for word in command], stdout=log, stderr=log, check=True)
        (folder / "ready").touch()
    return python


def tests() -> list[str]:
    files = [ROOT / "tests" / f"test_{name}.py" for name in TESTS]
    return [str(file) for file in [*files, *(ROOT / "tests" / "kernels" / f"test_{name}.py" for name in KERNEL_TESTS)]]


def digest() -> str:
    key = hashlib.sha256()
    for file in sorted(sources()):
        key.update(file.read_bytes())
    return key.hexdigest()[:16]


def sources() -> Iterator[Path]:
    for folder in ("fastrd", "kernels", "tests", "bench"):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".cpp", ".h", ".toml", ".npz"):
                yield file


if __name__ == "__main__":
    sys.exit(main())
