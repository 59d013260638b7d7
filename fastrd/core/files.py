"""Writing files so that a crash leaves the old file or the new one, never half of one."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """An empty file to write to that becomes `path` when the block ends, and vanishes when it raises.

    It is a hidden temporary file in the same folder, synced, then renamed; a killed process may leave it behind. Creates
    missing parent folders.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
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


@contextmanager
def atomic_writer(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends, and vanishes when it raises; see `atomic_path`."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        yield file


def atomic_write(path: str | os.PathLike, data: bytes | str) -> Path:
    """`data` as the contents of `path`, through `atomic_writer`; text as UTF-8. Returns the path."""
    with atomic_writer(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)
    return Path(path)


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The objects in a file with one on each line; none where there is no file.

    The line that a killed process was writing ends the reading: nothing follows it.
    """
    path = Path(path)
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:  # half a line, or half a character
            break
    return found
