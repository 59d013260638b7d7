"""Checkpoints with a digest: a damaged one is refused.

A checkpoint is an ordinary `torch.save` file whose zip comment holds the SHA-256 of everything before it: plain
`torch.load` opens it, and `read` notices any torn or altered byte. Nothing in it is ever executed (weights_only), and
every entry is of the type that the rest relies on.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .archives import load_torch
from .files import atomic_write, check_regular
from .values import one_line

FORMAT = "fastrd-checkpoint"
VERSION = 1
WRITTEN = ("staged.pt", "previous.pt", "best.pt", "failed.pt")
"""What a run writes beside last.pt."""
_DIGEST = 64  # hex digits
_EOCD = b"PK\x05\x06"  # end of central directory, the last record of a zip without a comment, 22 bytes long


def write(path: str | os.PathLike, payload: dict[str, Any]) -> Path:
    """Writes `payload` (tensors, numbers, strings and containers of them) atomically, digest included."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, **payload}, buffer)
    blob = buffer.getvalue()
    if blob[-22:-18] != _EOCD:
        raise RuntimeError("torch.save no longer ends its file with a plain zip record; the digest has no place")
    blob = blob[:-2] + _DIGEST.to_bytes(2, "little")
    return atomic_write(path, blob + hashlib.sha256(blob).hexdigest().encode())


def read(path: str | os.PathLike) -> dict[str, Any]:
    """Returns the payload of a checkpoint, on the CPU, with the path itself under "file".

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a fastrd checkpoint, one whose bytes are not those that were written, or one with an entry that
            is not what `train` writes; names the file and the entry.
    """
    check_regular(path)
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _DIGEST - 22))
        end = file.read(22)
        if end[:4] != _EOCD or end[-2:] != _DIGEST.to_bytes(2, "little"):
            raise ValueError(f"{path}: not a complete fastrd checkpoint (no digest at its end); it may be torn")
        file.seek(0)
        blob = file.read()
    body, digest = blob[:-_DIGEST], blob[-_DIGEST:]
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError(f"{path}: the checkpoint's bytes do not match its digest; it was altered or damaged")
    payload = load_torch(path, blob)
    if not is_payload(payload):
        raise ValueError(f"{path}: not a fastrd checkpoint")
    version = payload.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ValueError(f"{path}: version: got {version!r}; accepted: 1 to {VERSION}, what this fastrd reads")
    for entry, (accepted, holds) in _RULES.items():
        *above, key = entry.split(".")
        table = payload.get(above[0], {}) if above else payload
        if key in table and not holds(table[key]):
            if holds is _state and isinstance(table[key], dict):
                entry += "." + next(str(name)[:80] for name, value in table[key].items() if not _state({name: value}))
            raise ValueError(f"{path}: {entry}: not what `fastrd train` writes there; accepted: {accepted}")
    training = payload.get("recipe", {}).get("training", {})
    averaged = isinstance(training, dict) and training.get("ema") is not None
    if averaged and "position" in payload and "ema" not in payload:
        raise ValueError(f"{path}: ema: missing; accepted: averaged weights, which its recipe asks for")
    return {**payload, "file": str(path)}


def is_payload(payload: Any) -> bool:
    """Returns whether what `load_torch` gave is a checkpoint of ours."""
    if not isinstance(payload, Mapping):
        return False
    return isinstance(payload.get("format"), str) and payload["format"] == FORMAT


def save_last(run: Path, payload: dict[str, Any]) -> None:
    """Writes RUN/last.pt, keeping the one before as RUN/previous.pt: at every instant one of them is whole."""
    staged = write(run / "staged.pt", payload)
    last = run / "last.pt"
    if last.exists():
        os.replace(last, run / "previous.pt")
    os.replace(staged, last)


def load_last(run: Path) -> dict[str, Any] | None:
    """Returns the newest good checkpoint of a run: last.pt, else previous.pt with a warning; None where there is none.

    Raises ValueError: checkpoints exist but none can be trusted.
    """
    errors = []
    for name in ("last.pt", "previous.pt"):
        path = run / name
        if path.exists():
            try:
                payload = read(path)
            except (ValueError, OSError) as error:
                errors.append(str(error))
            else:
                for why in errors:
                    warnings.warn(f"{why}; going on from {name}", stacklevel=2)
                return payload
    if errors:
        raise ValueError("; ".join(errors) + ": no checkpoint of this run can be used")
    return None


@contextmanager
def restoring(payload: Mapping[str, Any], *entries: str) -> Iterator[None]:
    """Makes errors of the block, or a missing entry, a ValueError that names the file and the entries."""
    for entry in entries:
        if entry not in payload:
            raise ValueError(f"{payload['file']}: {entry}: missing; accepted: a checkpoint of this recipe's run")
    try:
        yield
    except (ValueError, RuntimeError, TypeError, KeyError, IndexError, AttributeError) as error:
        where = f"{payload['file']}: {', '.join(entries)}"
        raise ValueError(f"{where}: does not fit this run: {one_line(error)[:300]}") from None


def _table(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and holds(v) for k, v in value.items())


def _plain(value: Any) -> bool:
    """Whether it is made of what TOML and JSON know."""
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, str)) or _table(value, _plain)


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < 2**62


def finite(tensor: Tensor) -> bool:
    """Returns whether a dense tensor has neither NaN nor infinity."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _dense(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return False
    return not value.is_quantized and value.device.type == "cpu"


def _state(value: Any) -> bool:
    return _table(value, lambda tensor: _dense(tensor) and finite(tensor))


def _optimizer(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("param_groups"), list):
        return False
    state = value.get("state")
    return isinstance(state, dict) and all(
        _count(place) and isinstance(entry, dict) and all(b is None or _state({"": b}) for b in entry.values())
        for place, entry in state.items()
    )


def _bytes(value: Any) -> bool:
    return _dense(value) and value.dtype == torch.uint8 and value.ndim == 1


_TENSORS = "finite, dense tensors by name"
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "recipe": ("a table, as of recipe.toml", lambda v: isinstance(v, dict) and _plain(v)),
    "model": ("a table of spec and state", lambda v: isinstance(v, dict)),
    "model.spec": ("what build_model takes", lambda v: v is None or (isinstance(v, dict) and _plain(v))),
    "model.state": (_TENSORS, _state),
    "ema": (_TENSORS, _state),
    "ema_updates": ("an integer from 0 on", lambda v: _count(int(v) if _dense(v) and v.numel() == 1 else v)),
    "method": (_TENSORS, _state),
    "optimizer": ("state and param_groups of the optimiser, its momentum finite", _optimizer),
    "position": (
        "epoch, an integer from 1 on, and batch, one from 0 on",
        lambda v: _table(v, _count) and _count(v.get("epoch"), 1),
    ),
    "sums": ("numbers by name", lambda v: _table(v, _number)),
    "spent": ("two numbers", lambda v: isinstance(v, list) and len(v) == 2 and all(map(_number, v))),
    "best": ("numbers by name", lambda v: _table(v, _number)),
    "scores": ("numbers by name", lambda v: _table(v, _number)),
    "epoch": ("an integer from 0 on", _count),
    "identity": ("fingerprints by name", lambda v: _table(v, lambda x: isinstance(x, str))),
    "rng": (
        "the states of the generators, bytes",
        lambda v: (
            isinstance(v, dict) and isinstance(v.get("cuda"), list) and all(map(_bytes, (v.get("cpu"), *v["cuda"])))
        ),
    ),
    "threads": ("an integer from 1 on", lambda v: _count(v, 1)),
    "versions": ("strings by name", lambda v: _table(v, lambda x: isinstance(x, str))),
}
"""What each entry of a checkpoint must be: in words, and as a check. Entries of other names are ignored."""
