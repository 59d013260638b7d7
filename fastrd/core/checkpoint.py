"""Checkpoints with a digest: a damaged one is refused.

A checkpoint is an ordinary `torch.save` file whose zip comment holds the SHA-256 of everything before it: plain
`torch.load` opens it, and `read` notices any torn or altered byte. Nothing in it is ever executed (weights_only), and
every entry is of the type that the rest relies on.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .archives import load_torch
from .files import atomic_write, check_regular
from .values import one_line

FORMAT = "fastrd-checkpoint"
VERSION = 1
WRITTEN = ("staged.pt", "previous.pt", "best.pt", "failed.pt")  # by a run, beside last.pt
_DIGEST = 64  # hex digits
_LARGEST_IMAGE = 1 << 16  # pixels of a side
_DTYPES = {  # those that torch compares, copies and computes with
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32),
    *(torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
}
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
    return isinstance(payload, Mapping) and isinstance(payload.get("format"), str) and payload["format"] == FORMAT


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


def check_like(name: object, stored: Tensor, own: Tensor) -> None:
    """Raises ValueError unless a stored tensor has the shape and dtype of the one that it is for."""
    got, accepted = (f"{tuple(each.shape)} of {each.dtype}" for each in (stored, own))
    if got != accepted:
        raise ValueError(f"{str(name)[:80]}: got {got}; accepted: {accepted}")


def load(module: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Loads a state dict strictly, dtypes included: torch would round numbers to another one without a word."""
    own = module.state_dict()
    for name in own.keys() & stored.keys():
        check_like(name, stored[name], own[name])
    module.load_state_dict(stored)


def _table(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and holds(v) for k, v in value.items())


def _plain(value: Any) -> bool:
    """Whether it is made of what TOML and JSON know."""
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, str)) or _table(value, _plain)


def _number(value: Any) -> bool:
    return type(value) is float or _count(value, -(2**62))


def _count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < 2**62


def finite(tensor: Tensor) -> bool:
    """Returns whether a dense tensor has neither NaN nor infinity."""
    return not (tensor.is_floating_point() or tensor.is_complex()) or bool(torch.isfinite(tensor).all())


def is_dense(tensor: Tensor) -> bool:
    """Returns whether a tensor is an ordinary one: dense, of numbers that torch computes with."""
    return tensor.layout is torch.strided and tensor.dtype in _DTYPES


def _dense(value: Any) -> bool:
    return isinstance(value, Tensor) and is_dense(value) and value.device.type == "cpu"


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


def _spec(value: Any) -> bool:
    if not _table(value, _plain) or not isinstance(value.get("arch"), str):
        return False
    # A network of another maker need not know the shape of its images.
    sizes = [value.get(name) for name in ("num_classes", "in_channels", "image_size")]
    return all(size is None or _count(size, 1) for size in sizes) and (sizes[2] or 0) <= _LARGEST_IMAGE


def _scores(value: Any) -> bool:
    return _table(value, _number) and all(0 <= v <= 1 for k, v in value.items() if k.startswith("val_"))


def _bytes(value: Any) -> bool:
    return _dense(value) and value.dtype == torch.uint8 and value.ndim == 1


_TENSORS = "finite, dense tensors of ordinary numbers by name"
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "recipe": ("a table, as of recipe.toml", lambda v: _table(v, _plain)),
    "model": ("a table of spec and state", lambda v: isinstance(v, dict) and {"spec", "state"} <= v.keys()),
    "model.spec": (
        f"what build_model takes: arch, num_classes, in_channels, image_size of at most {_LARGEST_IMAGE}, options",
        _spec,
    ),
    "model.class_names": (
        "a list of strings",
        lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v),
    ),
    "model.state": (_TENSORS, _state),
    "ema": (_TENSORS, _state),
    "ema_updates": ("an integer from 0 on", lambda v: _count(v.item() if _dense(v) and v.numel() == 1 else v)),
    "method": (_TENSORS, _state),
    "optimizer": ("state and param_groups of the optimiser, its momentum finite", _optimizer),
    "position": (
        "epoch, an integer from 1 on, and batch, one from 0 on",
        lambda v: _table(v, _count) and _count(v.get("epoch"), 1),
    ),
    "sums": ("numbers by name", lambda v: _table(v, _number)),
    "spent": (
        "two numbers of seconds",
        lambda v: isinstance(v, list) and len(v) == 2 and all(_number(x) and 0 <= x < math.inf for x in v),
    ),
    "best": (
        "numbers by name: epoch from 1 on, accuracies in [0, 1]",
        lambda v: _scores(v) and (not v or _count(v.get("epoch"), 1)),
    ),
    "scores": ("numbers by name, accuracies in [0, 1]", _scores),
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
