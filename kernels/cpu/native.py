"""The C++ beside this file, compiled for the machine it runs on when first used, as torch.compile does.

The result is kept for the user, under a name made of everything it depends on. $CXX names another compiler;
$FASTRD_CXXFLAGS adds flags: "-march=x86-64-v3" builds for older processors. ($CXXFLAGS does not count: conda sets it
for processors of 2004.)
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import time
import warnings
from contextlib import suppress
from numbers import Integral
from pathlib import Path
from typing import Any

from . import machine

SOURCES = Path(__file__).parent
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    # Fused multiply-adds; but no -ffast-math, which would have the whole process flush denormal numbers.
    *("-ffp-contract=fast", "-fno-math-errno"),
)
ROOM = 4 << 20
"""Bytes that must be free where a library is built: some twenty times its size."""


@functools.cache
def library() -> Any:
    """The functions of the C++ beside this file, or None where no compiler is there that takes them."""
    command = compiler()
    try:
        asked = _run([*command, "--version"]) if command else None
    except OSError:  # not a program
        return None
    if asked is None or asked.returncode:
        return None
    files = sorted(path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".h"))
    parts = [path.read_bytes() for path in files]
    parts += [text.encode() for text in (*command, *flags(), asked.stdout, machine.identity())]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    command = [*command, *flags(), *(str(path) for path in files if path.suffix == ".cpp")]
    with suppress(OSError):  # there is no home, or no room in it
        return _built(command, machine.cache() / f"cpu-{key}.so")
    try:
        with tempfile.TemporaryDirectory() as temporary:
            return _built(command, Path(temporary) / "cpu.so")
    except OSError as error:
        _warn(f"fastrd's kernels cannot be kept anywhere ({error})")
        return None


def call(name: str, *arguments: Any) -> None:
    """Run a function of `library()` on as many threads as torch uses.

    Tensors are passed as the addresses of their numbers, None as no address, integers as int64_t, a bool as int and a
    float as float; what is of ctypes as it is.
    """
    import torch  # not at the top: `fastrd doctor` asks for the compiler where torch is broken

    getattr(library(), name)(*map(_passed, arguments), torch.get_num_threads())


def _passed(argument: Any) -> Any:
    kind = type(argument)  # the usual ones first: a kernel of a small loss takes as long as this
    if kind is int:
        return ctypes.c_int64(argument)
    if kind is float:
        return ctypes.c_float(argument)
    if hasattr(argument, "data_ptr"):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, Integral) and kind is not bool:
        return ctypes.c_int64(int(argument))
    return argument


def compiler() -> list[str]:
    """The command of the C++ compiler, $CXX or the first that is found; empty where there is none."""
    named = _words("CXX")
    found = named or [name for name in ("g++", "clang++") if shutil.which(name)][:1]
    return found if found and shutil.which(found[0]) else []


def flags() -> list[str]:
    """The options of the compiler, the user's last, so that they overrule."""
    return [*FLAGS, *_words("FASTRD_CXXFLAGS")]


def _words(variable: str) -> list[str]:
    """The words of an environment variable; none, with a warning, where it is not a shell's."""
    text = os.environ.get(variable, "")
    try:
        return shlex.split(text)
    except ValueError as error:
        warnings.warn(f"{variable}: got {text!r} ({error}); accepted: words as in a shell; ignored", stacklevel=3)
        return []


def _built(command: list[str], target: Path) -> ctypes.CDLL | None:
    """The library `target`, built where it is not there or cannot be loaded (cut off, or for its owner alone)."""
    mark = target.name.encode()  # at the end of a whole library; to load one that is cut off may kill the process
    with suppress(OSError):
        if target.read_bytes().endswith(mark):
            return ctypes.CDLL(str(target))
    _remove_abandoned(target)
    if shutil.disk_usage(target.parent).free < ROOM:  # which a linker does not say
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        done = _run([*command, "-o", temporary])
        if done.returncode:
            said = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
            _warn(f"{command[0]} cannot compile fastrd's kernels ({said.strip()})")
            return None
        with open(temporary, "ab") as file:
            file.write(mark)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o777 & ~umask)  # mkstemp's are for their owner alone
        os.replace(temporary, target)  # whole or not at all, whoever else is building it
    finally:
        Path(temporary).unlink(missing_ok=True)
    return ctypes.CDLL(str(target))


def _remove_abandoned(target: Path) -> None:
    """Remove what builders that were killed more than an hour ago have left beside `target`."""
    for path in target.parent.glob(f".{target.name}.*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink()


def _warn(problem: str) -> None:
    text = "PyTorch's run instead, which are slower; `fastrd doctor` says what is missing"
    warnings.warn(f"{problem}; {text}", stacklevel=4)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)
