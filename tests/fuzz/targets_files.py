"""Mutated files for every reader: checkpoints, state dicts, safetensors, .npz, packed files.

What may be read is used once. What is refused is refused in one line that names the file.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import io
import json
import struct
import warnings
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from fastrd import Recipe
from fastrd.core import checkpoint
from fastrd.data import Batch, Dataset, load_dataset
from fastrd.data.pack import pack
from fastrd.engine.distributed import ALONE
from fastrd.engine.trainer import Trainer
from fastrd.models import build_model, load_teacher

from .runner import file_target, mutate_tree

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
HOSTILE: tuple[Any, ...] = (*SCALARS, *CONTAINERS, *TENSORS)


def mutate_entries(value: Any, random: Random) -> Any:
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
                if isinstance(container[key], (dict, list)) and not any(container[key] is h for h in HOSTILE)
            ]
        if not places:
            return random.choice(HOSTILE)
        container, key = random.choice(places)
        kind = random.random()
        if kind < 0.7:
            container[key] = random.choice(HOSTILE)
        elif kind < 0.8 and isinstance(container, dict):
            del container[key]
        elif kind < 0.9 and isinstance(container, dict):
            container[random.choice(("x", "", "conv1.weight", 7))] = container[key]
        elif isinstance(container, list):
            container.append(container[key])
    return value


def mutate_file(blob: bytes, random: Random) -> bytes:
    """`blob` with some bytes flipped, cut out, doubled or set; half of the time near its ends,
    where directories lie."""
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


MODEL = build_model("cnn", num_classes=4, width=2, normalize=([0.5] * 3, [0.25] * 3))
STATE = dict(MODEL.state_dict())
WRAPPED = {"state_dict": {f"module.{key}": value for key, value in STATE.items()}, "epoch": 3}
IMAGES = {
    "x_train": np.zeros((8, 8, 8, 3), np.uint8),
    "y_train": np.arange(8) % 4,
    "x_test": np.ones((4, 8, 8, 3), np.uint8),
    "y_test": np.arange(4),
}


def _npz(path: Path) -> Path:
    np.savez(path, **IMAGES, class_names=np.array(list("abcd")))
    return path


def _packed(folder: Path) -> Path:
    pack(_npz(folder / "images.npz"), folder / "images.beton", progress=False)
    return folder / "images.beton"


def _written(path: Path, blob: bytes) -> Path:
    path.write_bytes(blob)
    return path


def _one_line(reader: Callable[[Path], object]) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        try:
            reader(path)
        except (ValueError, OSError) as error:
            lines = str(error).splitlines()
            if (
                len(lines) != 1
                or not (path.stem in lines[0] or lines[0].startswith("resume: "))
                or len(lines[0]) > 3000
            ):
                raise AssertionError(f"not one line that names the file: {str(error)[:500]!r}") from error

    return read


@_one_line
def use_teacher(path: Path) -> None:
    load_teacher(path)(torch.zeros(1, 3, 32, 32))


@_one_line
def use_checkpoint(path: Path) -> None:
    checkpoint.load_last(path.parent)
    load_teacher(path)(torch.zeros(1, 3, 32, 32))


@_one_line
def use_data(path: Path) -> None:
    load_dataset(path)


def use_packed(path: Path) -> None:
    """The sidecar tells the hash of the damaged file, so that what is in it is looked at."""
    blob, sidecar = path.read_bytes(), path.with_name(f"{path.name}.json")
    described = json.loads(sidecar.read_text())
    described |= {"bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}
    sidecar.write_text(json.dumps(described))
    use_data(path)


def use_sidecar(path: Path) -> None:
    use_data(path.with_suffix(""))


def mutate_headers(_: bytes, random: Random) -> bytes:
    """An .npz with some array headers damaged, in archives of any compression."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", random.choice((0, 8, 12))) as archive:
        for key, value in IMAGES.items():
            member = io.BytesIO()
            np.save(member, value)
            raw = member.getvalue()
            if random.random() < 0.4:
                size = struct.unpack("<H", raw[8:10])[0]
                header = mutate_file(raw[10 : 10 + size], random)
                raw = raw[:8] + struct.pack("<H", len(header)) + header + raw[10 + size :]
            archive.writestr(f"{key}.npy", raw)
    return buffer.getvalue()


def mutate_safetensors(_: bytes, random: Random) -> bytes:
    from safetensors.torch import save

    spec = json.dumps(mutate_tree(MODEL.spec, random) if random.random() < 0.5 else MODEL.spec)
    metadata = {"fastrd_spec": spec if random.random() < 0.95 else "[" * 10_000}
    blob = save({key: value.contiguous() for key, value in STATE.items()}, metadata=metadata)
    return blob if random.random() < 0.4 else mutate_file(blob, random)


@functools.cache
def _trainer() -> Trainer:
    data = Dataset("toy", *IMAGES.values(), tuple("abcd"), "memory")
    recipe = Recipe.from_dict(
        {
            "name": "toy",
            "student": {"arch": "cnn", "options": {"width": 2}},
            "base": {"name": "pgd_at"},
            "data": {"holdout": 4},
            "schedule": {"epochs": 1, "milestones": []},
            "training": {"batch_size": 2, "ema": 0.9},
        }
    )
    return Trainer(recipe, Path("toy"), data, {}, torch.device("cpu"), ALONE, profile=False)


def _make_resumable(folder: Path) -> Path:
    trainer = _trainer()
    x, y = torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])
    trainer.step(Batch(x, y, y))
    trainer.batch = 1
    return checkpoint.write(folder / "last.pt", trainer._payload())


@_one_line
def resume(path: Path) -> None:
    state = checkpoint.load_last(path.parent)
    assert state is not None
    _trainer().restore(state)


PAYLOAD = _checkpoint(MODEL)
OLD = {"_use_new_zipfile_serialization": False}
FILES: dict[str, tuple[Callable[[Path], Path], Callable[[Path], None], Callable[[bytes, Random], bytes]]] = {
    "checkpoint-entries": (
        lambda folder: _written(folder / "last.pt", sealed(saved(PAYLOAD))),
        use_checkpoint,
        lambda _, random: sealed(saved(mutate_entries(PAYLOAD, random))),
    ),
    "checkpoint-bytes": (
        lambda folder: _written(folder / "last.pt", sealed(saved(PAYLOAD))),
        use_checkpoint,
        lambda _, random: sealed(mutate_file(saved(PAYLOAD), random)),
    ),
    "resume": (
        _make_resumable,
        resume,
        lambda blob, random: sealed(saved(mutate_entries(torch.load(io.BytesIO(blob)), random))),
    ),
    "state-dict-entries": (
        lambda folder: _written(folder / "net.pt", saved(WRAPPED)),
        use_teacher,
        lambda _, random: saved(mutate_entries(WRAPPED, random)),
    ),
    "state-dict-bytes": (lambda folder: _written(folder / "net.pt", saved(STATE)), use_teacher, mutate_file),
    "old-state-dict-bytes": (
        lambda folder: _written(folder / "net.pth", saved(STATE, **OLD)),
        use_teacher,
        mutate_file,
    ),
    "npz-bytes": (lambda folder: _npz(folder / "images.npz"), use_data, mutate_file),
    "npz-headers": (lambda folder: _npz(folder / "images.npz"), use_data, mutate_headers),
    "packed-bytes": (_packed, use_packed, mutate_file),
    "packed-sidecar": (
        lambda folder: _packed(folder).with_name("images.beton.json"),
        use_sidecar,
        lambda blob, random: json.dumps(mutate_tree(json.loads(blob), random)).encode(),
    ),
}
if find_spec("safetensors"):
    FILES["safetensors"] = (
        lambda folder: _written(folder / "net.safetensors", mutate_safetensors(b"", Random(12))),
        use_teacher,
        mutate_safetensors,
    )
for name, (make, read, mutate) in FILES.items():
    file_target(name, make, read, mutate)
