"""Checkpoints that are whole or refused.

A checkpoint is an ordinary `torch.save` file whose zip comment holds the SHA-256 of everything before it: plain
`torch.load` opens it, and `read` notices any torn or altered byte. Nothing in it is ever executed (weights_only).
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from .archives import check_torch
from .files import atomic_write

FORMAT = "fastrd-checkpoint"
VERSION = 1
_DIGEST = 64  # hex digits
_EOCD = b"PK\x05\x06"  # end of central directory, the last record of a zip without a comment, 22 bytes long


def write(path: str | os.PathLike, payload: dict[str, Any]) -> Path:
    """Write `payload` (tensors, numbers, strings and containers of them) atomically, digest included."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, **payload}, buffer)
    blob = buffer.getvalue()
    if blob[-22:-18] != _EOCD:
        raise RuntimeError(
            "torch.save no longer ends its file with a plain zip record; the digest has no place"
        )
    blob = blob[:-2] + _DIGEST.to_bytes(2, "little")
    return atomic_write(path, blob + hashlib.sha256(blob).hexdigest().encode())


def read(path: str | os.PathLike) -> dict[str, Any]:
    """The payload of a checkpoint, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a fastrd checkpoint, or one whose bytes are not those that were written.
    """
    check_torch(path)
    blob = Path(path).read_bytes()
    body, digest = blob[:-_DIGEST], blob[-_DIGEST:]
    if body[-22:-18] != _EOCD or body[-2:] != _DIGEST.to_bytes(2, "little"):
        raise ValueError(f"{path}: not a complete fastrd checkpoint (no digest at its end); it may be torn")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError(f"{path}: the checkpoint's bytes do not match its digest; it was altered or damaged")
    try:
        payload = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: refused by torch's weights-only loader: {error}") from None
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise ValueError(f"{path}: not a fastrd checkpoint")
    if payload["version"] > VERSION:
        raise ValueError(
            f"{path}: checkpoint version {payload['version']}; this fastrd reads up to {VERSION}"
        )
    return payload


def save_last(run: Path, payload: dict[str, Any]) -> None:
    """Write RUN/last.pt, keeping the one before as RUN/previous.pt: at every instant one of them is whole."""
    staged = write(run / "staged.pt", payload)
    last = run / "last.pt"
    if last.exists():
        os.replace(last, run / "previous.pt")
    os.replace(staged, last)


def load_last(run: Path) -> dict[str, Any] | None:
    """The newest good checkpoint of a run: last.pt, else previous.pt with a warning; None where there is none.

    Raises:
        ValueError: checkpoints exist but none can be trusted.
    """
    errors = []
    for name in ("last.pt", "previous.pt"):
        path = run / name
        if path.exists():
            try:
                payload = read(path)
            except ValueError as error:
                errors.append(str(error))
            else:
                for error in errors:
                    warnings.warn(f"{error}; going on from {name}", stacklevel=2)
                return payload
    if errors:
        raise ValueError("; ".join(errors) + ": no checkpoint of this run can be used")
    return None
