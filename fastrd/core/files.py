"""Files that a crash leaves whole, folders that one process at a time writes into, JSON checked when it is read."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import re
import socket
import stat
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .values import as_integer, as_number, shown

MAX_JSON_BYTES = 1 << 28
LARGEST_NUMBER = 1e100  # that is read: sums and squares of such numbers are finite


def check_path(**paths: Any) -> Path:
    """Returns the one named path; raises TypeError where it is no path, ValueError where it is empty or holds a NUL."""
    ((name, value),) = paths.items()
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name}: got {shown(value)}; accepted: a path")
    if not os.fspath(value) or "\0" in os.fspath(value):
        raise ValueError(f"{name}: got {shown(os.fspath(value))}; accepted: a path")
    return Path(value)


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields an empty file to write to that becomes `path` when the block ends, and is removed when the block raises.

    It is a hidden temporary file in the same folder, synced, then renamed. A killed process may leave it behind, for
    the next writer of `path`, or the next `locked`, to remove. Creates missing parent folders, which go again where the
    block raises. An OSError without a file name gets that of `path`.
    """
    path = _file_of(path)
    with naming(path), _made(path.parent):
        _remove_orphans(path.parent, glob.escape(path.name))
        handle, temporary = _temporary(path)
        try:
            yield temporary
            os.fsync(handle)
            # mkstemp makes private files; a run folder should be as readable as any other file the user creates.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)


def check_writable(*paths: str | os.PathLike) -> None:
    """Raises OSError where `atomic_path` would, for a caller whose work has yet to begin; leaves nothing behind.

    Raises ValueError for a device or a pipe, which a file would replace.
    """
    for path in map(_file_of, paths):
        if path.is_dir():
            raise IsADirectoryError(f"{path}: got a folder; accepted: the name of a file")
        if path.exists():
            check_regular(path)
        with naming(path), _made(path.parent):
            handle, temporary = _temporary(path)
            temporary.unlink()
            os.close(handle)


def _file_of(path: str | os.PathLike) -> Path:
    """Returns the file that `path` means, to which a link leads."""
    path = Path(path)
    return path.resolve() if path.is_symlink() else path


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Makes a folder and its missing parents; those of them that the block leaves empty go again."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        _make(folder)
        yield
    finally:
        with suppress(OSError):  # not empty, and so neither are its parents
            for each in missing:
                each.rmdir()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"{folder}: got a file; accepted: a folder, or a path where one can be made") from None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Makes errors of the block name `path`, which a full disk does not do and a temporary file does wrongly."""
    try:
        yield
    except OSError as error:
        if error.errno is None or not (error.filename is None or str(error.filename).endswith(".tmp")):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def _temporary(path: Path) -> tuple[int, Path]:
    """Returns (handle, path) of a new file, which is locked for as long as it is open: see `_remove_orphans`."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle, Path(name)
        os.close(handle)  # taken for an orphan between its making and its locking


@contextmanager
def atomic_writer(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Yields a binary file that becomes `path` when the block ends; removed when it raises; see `atomic_path`."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        yield file


def atomic_write(path: str | os.PathLike, data: bytes | str) -> Path:
    """Writes `data` as the contents of `path`, through `atomic_writer`; text as UTF-8. Returns the path.

    What cannot be written in UTF-8, as the bytes of a file's name may be, is shown as it is in Python's source.
    """
    with atomic_writer(path) as file:
        file.write(data.encode(errors="backslashreplace") if isinstance(data, str) else data)
    return Path(path)


def check_regular(path: str | os.PathLike) -> None:
    """Raises ValueError where `path` is a device or a pipe: to read one may never end."""
    if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
        raise ValueError(f"{path}: a device or a pipe; accepted: a file")


def _json_bytes(path: Path) -> bytes | None:
    """Returns the contents of a JSON file, None where there is no file."""
    if not path.exists() or path.is_dir():
        return None
    check_regular(path)
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{path}: {size} bytes; accepted: a JSON file of at most {MAX_JSON_BYTES}")
    return path.read_bytes()


class InUse(OSError):
    """Another process writes into the folder."""


@contextmanager
def locked(folder: str | os.PathLike, *, wait: bool = False) -> Iterator[None]:
    """Keeps other processes, and other threads, from writing into `folder` during the block. Blocks may be nested.

    The lock is the kernel's, on the file `.lock` in the folder, so it ends with its process however that ends. Makes
    the folder and its parents where there are none (empty ones go again), and removes the temporary files that killed
    processes left in it.

    Args:
        wait: wait for the other process instead of raising.

    Raises:
        InUse: names the process that holds the lock.
        OSError: the folder cannot be made or written to.
    """
    folder = Path(folder)
    path = folder.resolve() / ".lock"
    if path in _held and _held[path][1] == threading.get_ident():
        yield
        return
    with _made(folder):
        handle = _acquire(path, folder, wait)
        _held[path] = handle, threading.get_ident()
        try:
            for place in (folder, folder / ".evaluation"):
                _remove_orphans(place)
            yield
        finally:
            if _held.pop(path, None) is not None:
                path.unlink(missing_ok=True)  # while it is locked: a process that waits sees the removal
                os.close(handle)


_held: dict[Path, tuple[int, int]] = {}  # lock file -> its handle, the thread that holds it


def _forget_locks() -> None:
    for handle, _ in _held.values():
        os.close(handle)
    _held.clear()


# A forked child has a copy of each handle, with which it would keep the lock when its parent is killed.
os.register_at_fork(after_in_child=_forget_locks)


def _acquire(path: Path, folder: Path, wait: bool) -> int:
    while True:
        _make(folder)  # the process that this one waited for may have removed it
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.fstat(handle).st_nlink:
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return handle
        except BlockingIOError:
            holder = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
            os.close(handle)
            raise InUse(f"{folder} is in use by {holder}; wait until it ends, or name another folder") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                os.close(handle)
                raise OSError(error.errno, error.strerror, str(path)) from None
            problem = "this file system has no locks; let one process at a time write there"
            warnings.warn(f"{folder}: {problem}", stacklevel=4)
            return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # removed by the process that held it, as this one opened it


def _remove_orphans(folder: Path, name: str = "*") -> None:
    """Removes the temporary files of `atomic_path` for the file `name` that no process holds open any more."""
    for path in folder.glob(f".{name}.*.tmp"):
        with suppress(OSError), open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if re.fullmatch(r"\..+\.[a-z0-9_]{8}\.tmp", path.name):
                path.unlink()


def _parse_json(text: bytes) -> Any:
    """Returns the value of a JSON text, NaN and infinity as None; raises ValueError for a number out of range too."""
    try:
        return json.loads(text.decode(), parse_int=_integer, parse_float=_float, parse_constant=lambda name: None)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _integer(digits: str) -> int:
    number = as_integer(int(digits)) if len(digits) < 30 else None
    if number is None:
        raise ValueError(f"got an integer of {len(digits)} digits; accepted: at most 64 bits")
    return number


def _float(digits: str) -> float:
    number = as_number(digits)
    if number is None or abs(number) > LARGEST_NUMBER:
        raise ValueError(f"got {digits[:40]}; accepted: a number within +-{LARGEST_NUMBER:g}")
    return number


def read_json(path: str | os.PathLike) -> dict[str, Any] | None:
    """Returns the JSON object in the file `path`, and None where there is no such file.

    Raises ValueError that names the file, and the place in it where it is known.
    """
    path = Path(path)
    if (blob := _json_bytes(path)) is None:
        return None
    try:
        document = _parse_json(blob)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}, column {error.colno}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if type(document) is not dict:
        raise ValueError(f"{path}:1: got a {type(document).__name__}; accepted: a JSON object")
    return document


def read_jsonl(path: str | os.PathLike, check: Callable[[Any, str], Any]) -> tuple[list[Any], bool]:
    """Returns (the values in a file with one on each line, whether its last line was cut off); none without a file.

    `check` turns each value and its place, "FILE:LINE", into what is returned, or raises ValueError. So does a line
    that is not JSON, but for a last one without its end, which a killed process was writing.
    """
    found: list[dict[str, Any]] = []
    path = Path(path)
    for number, line in enumerate((_json_bytes(path) or b"").splitlines(keepends=True), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = _parse_json(line)
        except ValueError as error:
            if not line.endswith(b"\n"):
                return found, True
            raise ValueError(f"{where}: not JSON: {error}") from None
        found.append(check(value, where))
    return found, False
