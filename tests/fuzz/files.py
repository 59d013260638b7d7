"""Mutated files for every reader: checkpoints, state dicts, safetensors, .npz, packed files.

`targets(folder)` gives functions by name; each takes a `random.Random`, mutates a good file and reads it. A file is read,
or refused with ValueError or OSError that names it; any other exception is a fault of the reader.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from fastrd.core import checkpoint
from fastrd.data import load_dataset
from fastrd.data.pack import pack
from fastrd.models import build_model, load_teacher

Target = Callable[[Random], None]

SCALARS = (
    None,
    True,
    -1,
    0,
    3,
    2**70,
    10**400,
    0.5,
    -0.0,
    float("nan"),
    float("inf"),
    "",
    "x",
    "x" * 999,
    b"x",
    1j,
)
SHARED: list[Any] = [0]
for _ in range(30):
    SHARED = [SHARED, SHARED]  # 2**30 entries, of which 60 take memory
NESTED: list[Any] = []
for _ in range(300):
    NESTED = [NESTED]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    TENSORS = (
        torch.zeros(1).expand(10**10),
        torch.zeros(0),
        torch.zeros(3, 3),
        torch.full((2,), float("nan")),
        torch.zeros((), dtype=torch.int64),
        torch.tensor([10**15]),
        torch.zeros(4, dtype=torch.complex64),
        torch.zeros(4, dtype=torch.bool),
        torch.zeros(8, dtype=torch.uint8),
        torch.zeros(4, dtype=torch.bfloat16),
        torch.zeros(10**6, device="meta"),
        torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.int64), torch.ones(1), (10**9, 10**9)),
    )
CONTAINERS = ([], {}, (1, 2), {"a": 1}, {1: 2}, {None: torch.zeros(1)}, [[1, 2], [3]], SHARED, NESTED, {"x"})
PLAIN = (*(v for v in SCALARS if not isinstance(v, (bytes, complex))), [], {}, {"a": 1}, [[1, 2], [3]])


def mutated(random: Random, value: Any, hostile: tuple[Any, ...]) -> Any:
    """`value` with one to three of its entries, at any depth, replaced, removed, renamed or doubled."""
    value = copy.deepcopy(value)
    for _ in range(random.randint(1, 3)):
        places: list[tuple[Any, Any]] = []
        waiting = [value]
        while waiting:
            container = waiting.pop()
            keys = list(container) if isinstance(container, dict) else range(len(container))
            places += [(container, key) for key in keys]
            waiting += [
                container[key]
                for key in keys
                if isinstance(container[key], (dict, list)) and not any(container[key] is h for h in hostile)
            ]
        if not places:
            return random.choice(hostile)
        container, key = random.choice(places)
        kind = random.random()
        if kind < 0.7:
            container[key] = random.choice(hostile)
        elif kind < 0.8 and isinstance(container, dict):
            del container[key]
        elif kind < 0.9 and isinstance(container, dict):
            container[random.choice(("x", "", "conv1.weight", 7))] = container[key]
        elif isinstance(container, list):
            container.append(container[key])
    return value


def mutated_bytes(random: Random, blob: bytes) -> bytes:
    """`blob` with some bytes flipped, cut out, doubled or set; half of the time near its ends, where directories lie."""
    data = bytearray(blob)
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        if not data:
            break
        near = random.random()
        place = random.randrange(len(data))
        if near < 0.25:
            place = random.randrange(min(300, len(data)))
        elif near < 0.5:
            place = len(data) - 1 - random.randrange(min(300, len(data)))
        kind = random.random()
        if kind < 0.5:
            data[place] ^= 1 << random.randrange(8)
        elif kind < 0.7:
            data[place : place + 4] = random.choice((b"\xff\xff\xff\xff", bytes(4), b"\x7f\xff\xff\xff"))
        elif kind < 0.8:
            del data[place : place + random.randint(1, 50)]
        elif kind < 0.9:
            data[place:place] = data[place : place + random.randint(1, 50)]
        else:
            del data[place:]
    return bytes(data)


def sealed(blob: bytes) -> bytes:
    """A torch.save file as a checkpoint whose digest is right."""
    body = blob[:-2] + (64).to_bytes(2, "little")
    return body + hashlib.sha256(body).hexdigest().encode()


def saved(payload: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(payload, buffer, **options)
    return buffer.getvalue()


def targets(folder: Path) -> dict[str, Target]:
    folder.mkdir(parents=True, exist_ok=True)
    model = build_model("cnn", num_classes=4, width=2, normalize=([0.5] * 3, [0.25] * 3))
    state = dict(model.state_dict())
    payload = _checkpoint(model)
    wrapped = {"state_dict": {"module." + key: value for key, value in state.items()}, "epoch": 3}
    images = {
        "x_train": np.zeros((8, 8, 8, 3), np.uint8),
        "y_train": np.arange(8) % 4,
        "x_test": np.ones((4, 8, 8, 3), np.uint8),
        "y_test": np.arange(4),
    }
    np.savez(folder / "good.npz", **images, class_names=np.array(list("abcd")))
    pack(folder / "good.npz", folder / "good.beton", progress=False)
    npz, beton = (folder / "good.npz").read_bytes(), (folder / "good.beton").read_bytes()
    sidecar = json.loads((folder / "good.beton.json").read_text())
    hostile = (*SCALARS, *CONTAINERS, *TENSORS)

    def teacher(name: str, blob: bytes) -> None:
        path = folder / name
        path.write_bytes(blob)
        _read(path, lambda: load_teacher(path)(torch.zeros(1, 3, 32, 32)))

    def run(blob: bytes) -> None:
        path = folder / "run" / "last.pt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(blob)
        _read(path, lambda: checkpoint.load_last(path.parent))
        teacher("last.pt", blob)

    def data(name: str, blob: bytes) -> None:
        path = folder / name
        path.write_bytes(blob)
        _read(path, lambda: load_dataset(path))

    def npz_header(random: Random) -> None:
        path = folder / "header.npz"
        with zipfile.ZipFile(path, "w", random.choice((0, 8, 12))) as archive:
            for key, value in images.items():
                buffer = io.BytesIO()
                np.save(buffer, value)
                raw = buffer.getvalue()
                if random.random() < 0.4:
                    size = struct.unpack("<H", raw[8:10])[0]
                    header = mutated_bytes(random, raw[10 : 10 + size])
                    raw = raw[:8] + struct.pack("<H", len(header)) + header + raw[10 + size :]
                archive.writestr(f"{key}.npy", raw)
        _read(path, lambda: load_dataset(path))

    def packed(random: Random) -> None:
        blob, described = beton, dict(sidecar)
        if random.random() < 0.5:
            blob = mutated_bytes(random, beton)
            described |= {"bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}
        else:
            described = mutated(random, described, PLAIN)
        text = json.dumps(described) if random.random() < 0.95 else "[" * 10_000
        (folder / "mutated.beton.json").write_text(text)
        data("mutated.beton", blob)

    def safetensors(random: Random) -> None:
        from safetensors.torch import save

        spec = json.dumps(mutated(random, model.spec, PLAIN) if random.random() < 0.5 else model.spec)
        metadata = {"fastrd_spec": spec if random.random() < 0.95 else "[" * 10_000}
        blob = save({key: value.contiguous() for key, value in state.items()}, metadata=metadata)
        teacher("mutated.safetensors", blob if random.random() < 0.4 else mutated_bytes(random, blob))

    return {
        "checkpoint entries": lambda random: run(sealed(saved(mutated(random, payload, hostile)))),
        "checkpoint bytes": lambda random: run(sealed(mutated_bytes(random, saved(payload)))),
        "state dict entries": lambda random: teacher("mutated.pt", saved(mutated(random, wrapped, hostile))),
        "state dict bytes": lambda random: teacher("mutated.pt", mutated_bytes(random, saved(state))),
        "old state dict bytes": lambda random: teacher(
            "mutated.pth", mutated_bytes(random, saved(state, _use_new_zipfile_serialization=False))
        ),
        "safetensors": safetensors,
        "npz bytes": lambda random: data("mutated.npz", mutated_bytes(random, npz)),
        "npz headers": npz_header,
        "packed file": packed,
    }


def _checkpoint(model: torch.nn.Module) -> dict[str, Any]:
    state = dict(model.state_dict())
    return {
        "format": checkpoint.FORMAT,
        "version": checkpoint.VERSION,
        "recipe": {
            "name": "x",
            "student": {"arch": "cnn", "options": {"width": 2}},
            "base": {"name": "pgd_at"},
        },
        "model": {"spec": dict(model.spec), "state": state},
        "ema": dict(state),
        "ema_updates": torch.tensor(3),
        "method": {"bank": torch.zeros(4, 2)},
        "optimizer": {
            "state": {0: {"momentum_buffer": torch.zeros(2)}},
            "param_groups": [{"lr": 0.1, "params": [0]}],
        },
        "position": {"epoch": 2, "batch": 1},
        "sums": {"loss": 1.0},
        "best": {"epoch": 1, "val_pgd": 0.5},
        "identity": {"data": "0" * 64},
        "rng": {"cpu": torch.get_rng_state(), "cuda": []},
        "threads": 1,
        "versions": {"torch": "2"},
    }


def _read(path: Path, reader: Callable[[], Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            reader()
        except (ValueError, OSError) as error:
            lines = str(error).splitlines()
            if len(lines) != 1 or path.name not in lines[0] or len(lines[0]) > 3000:
                raise AssertionError(f"not one line that names {path.name}: {str(error)[:500]!r}") from error
