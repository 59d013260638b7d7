"""Files from strangers: nothing in them runs, names stay where they belong, claims cost neither time nor memory."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fastrd import Recipe
from fastrd.core import checkpoint
from fastrd.core.archives import check_npz, check_tensors, check_torch
from fastrd.core.files import read_json, read_jsonl
from fastrd.core.toml import read_toml
from fastrd.data import load_dataset
from fastrd.models import build_model, load_teacher
from fastrd.recipe import RecipeError

HUGE = 10**9


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def npy(array: np.ndarray, shape: tuple | None = None) -> bytes:
    """The .npy form of an array, its header claiming `shape`."""
    buffer = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False}
    np.lib.format.write_array_header_1_0(buffer, {**header, "shape": shape or array.shape})
    return buffer.getvalue() + array.tobytes()


def npz(path: Path, compression: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, blob in members.items():
            archive.writestr(f"{name}.npy", blob)
    return path


def arrays() -> dict[str, np.ndarray]:
    images, labels = np.zeros((8, 8, 8, 3), np.uint8), np.arange(8) % 4
    return {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}


def rewrite(
    source: Path,
    target: Path,
    replaced: tuple[bytes, bytes] = (b"", b""),
    compression: int = zipfile.ZIP_STORED,
) -> None:
    """The zip `source` as `target`, with bytes of its pickle replaced."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for member in old.infolist():
            blob = old.read(member)
            new.writestr(member.filename, blob.replace(*replaced) if member.filename.endswith("data.pkl") else blob)
    source.unlink()


def hostile_files(folder: Path) -> dict[str, Path]:
    """One file of each kind, by a name that says how it is read."""
    plain = {name: npy(array) for name, array in arrays().items()}
    files = {
        "data shape": npz(folder / "shape.npz", **{**plain, "x_train": npy(arrays()["x_train"], (HUGE, 32, 32, 3))}),
        "data labels": npz(folder / "labels.npz", **{**plain, "y_train": npy(arrays()["y_train"], (HUGE,))}),
        "data zeros": npz(
            folder / "zeros.npz",
            zipfile.ZIP_DEFLATED,
            **{**plain, "x_train": npy(np.zeros((3 << 14, 64, 64, 1), np.uint8))},
        ),
        "data garbage": npz(folder / "garbage.npz", **{**plain, "x_test": b"no array at all"}),
    }
    state = build_model("cnn", num_classes=4, image_size=8, width=2).state_dict()
    head = next(name for name in state if name.endswith("linear.weight"))
    files["teacher expanded"] = folder / "expanded.pt"
    torch.save({**state, head: torch.zeros(1, 1).expand(HUGE, 16)}, files["teacher expanded"])
    files["teacher deflated"] = folder / "deflated.pt"
    torch.save({"w": torch.zeros(64 << 20)}, folder / "large.pt")
    rewrite(folder / "large.pt", files["teacher deflated"], compression=zipfile.ZIP_DEFLATED)
    files["teacher claimed"] = folder / "claimed.pt"
    torch.save({"w": torch.zeros(1013)}, folder / "small.pt")
    # In the pickle, BININT2 1013, the elements of storage and shape, becomes BININT 10^9.
    numbers = b"M" + struct.pack("<H", 1013), b"J" + struct.pack("<i", HUGE)
    rewrite(folder / "small.pt", files["teacher claimed"], numbers)
    return files


READ = """
import json, resource, sys, time
from fastrd.data import load_dataset
from fastrd.models import load_teacher
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
found = {}
for name, path in json.loads(sys.argv[1]).items():
    before, began = peak(), time.perf_counter()
    try:
        load_dataset(path) if name.startswith("data") else load_teacher(path)
        said = "READ IT"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    found[name] = [said, peak() - before, time.perf_counter() - began]
print(json.dumps(found))
"""


def test_claims_of_a_thousand_million_elements_cost_nothing(tmp_path):
    files = hostile_files(tmp_path)
    assert all(path.stat().st_size < 1 << 20 for path in files.values())
    command = [sys.executable, "-c", READ, json.dumps({name: str(path) for name, path in files.items()})]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, (said, megabytes, _) in found.items():
        assert said.startswith("ValueError") and str(files[name]) in said, (name, said)
        assert megabytes < 100, (name, megabytes)
    assert "claims (1000000000, 32, 32, 3) of uint8" in found["data shape"][0]
    assert "x_train.npy: unpacks from" in found["data zeros"][0]
    assert "x_test.npy: not an array" in found["data garbage"][0]
    assert f"{head_name()} claims (1000000000, 16)" in found["teacher expanded"][0]
    assert "would unpack to more than the file holds" in found["teacher deflated"][0]


def head_name() -> str:
    return next(name for name in build_model("cnn", num_classes=2).state_dict() if name.endswith("linear.weight"))


def test_honest_files_pass(tmp_path):
    for save in (np.savez, np.savez_compressed):
        path = tmp_path / f"{save.__name__}.npz"
        save(path, **arrays(), class_names=np.array(list("abcd")))
        check_npz(path)
        assert load_dataset(path).num_classes == 4
    model = build_model("cnn", num_classes=4, image_size=8, width=2)
    for legacy in (False, True):
        torch.save(model.state_dict(), tmp_path / "good.pt", _use_new_zipfile_serialization=not legacy)
        check_torch(tmp_path / "good.pt")
        assert load_teacher(tmp_path / "good.pt").num_classes == 4
    views = {
        "row": torch.arange(12.0).reshape(3, 4)[1],
        "empty": torch.zeros(0),
        "turned": torch.rand(3, 4).T,
    }
    check_tensors("here", views)


def test_pickled_objects_in_data_are_never_built(tmp_path):
    marker = tmp_path / "executed"
    path = tmp_path / "objects.npz"
    np.savez(path, **{**arrays(), "class_names": np.array([Bomb(marker)] * 4, dtype=object)})
    with pytest.raises(ValueError, match="objects.npz"):
        load_dataset(path)
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(ValueError, match="not an .npz file"):
        load_dataset(tmp_path / "pickle.npz")
    assert not marker.exists()
    with np.load(path, allow_pickle=True) as file:
        file["class_names"]
    assert marker.exists()


RECIPE = 'name = "x"\nstudent.arch = "cnn"\nbase.name = "pgd_at"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = " + "[" * 100_000, "not a TOML file"),
        ("a = " + "9" * 100_000, "not a TOML file|unknown key"),
        ("# " + "x" * (1 << 20), "accepted: a TOML file of at most"),
        (RECIPE.replace("cnn", "wrn-6000004-10"), "student: arch: got 'wrn-6000004-10'"),
        (RECIPE + "student.options.width = 1000000000000", "student.options: got .*; accepted: smaller numbers"),
        (
            'extends = "../../../etc/secret"\n',
            "extends: got '../../../etc/secret'; accepted: a shipped recipe",
        ),
        ('extends = "/etc/secret"\n', "extends: got '/etc/secret'"),
        (RECIPE + "__class__.x = 1", "__class__: unknown key"),
    ],
    ids=["nest", "digits", "long", "deep", "wide", "relative", "absolute", "dunder"],
)
def test_hostile_recipes_are_one_error(text, message, tmp_path):
    path = tmp_path / "hostile.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        Recipe.load(path)


def sealed(payload, path):
    """A checkpoint with a right digest, whatever is in it."""
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    body = buffer.getvalue()[:-2] + (64).to_bytes(2, "little")
    path.write_bytes(body + hashlib.sha256(body).hexdigest().encode())
    return path


@pytest.mark.parametrize("entry", ["model.spec", "model.state.w", "recipe", "ema", "identity", "position", "extra"])
def test_a_tensor_that_claims_more_than_its_file_is_refused_wherever_it_is(tmp_path, entry):
    model = build_model("cnn", num_classes=4, image_size=8, width=2)
    payload = {
        "format": "fastrd-checkpoint",
        "version": 1,
        "model": {"spec": model.spec, "state": dict(model.state_dict())},
    }
    *above, key = entry.split(".")
    table = payload
    for name in above:
        table = table[name]
    table[key] = torch.zeros(1).expand(HUGE)
    with pytest.raises(ValueError, match=rf"x\.pt: {re.escape(entry)} claims \(1000000000,\)"):
        load_teacher(sealed(payload, tmp_path / "x.pt"))


def test_containers_that_hold_themselves_often_are_refused(tmp_path):
    shared = [0]
    for _ in range(40):
        shared = [shared, shared]
    torch.save({"state_dict": {"w": torch.zeros(1)}, "args": shared}, tmp_path / "shared.pt")
    with pytest.raises(ValueError, match=r"shared\.pt: args.*entries"):
        load_teacher(tmp_path / "shared.pt")


def test_what_a_file_is_and_holds_is_named(tmp_path):
    state = build_model("cnn", num_classes=4, image_size=8, width=2).state_dict()
    path = tmp_path / "x.pt"
    torch.save({"state_dict": state, "best": np.float64(71.3), "curve": np.arange(3)}, path)
    assert load_teacher(path).num_classes == 4  # numpy's numbers are harmless
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=0.1)}, path)
    with pytest.raises(ValueError, match=r"a Python object, argparse\.Namespace") as error:
        load_teacher(path)
    assert str(error.value).isprintable()
    path.write_text('name = "recipe"\n')
    with pytest.raises(ValueError, match="not a checkpoint, it begins with"):
        load_teacher(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/constants.pkl", b"")
    with pytest.raises(ValueError, match="a TorchScript archive"):
        load_teacher(path)
    torch.save({"state_dict": {**state, "conv1.weight": state["conv1.weight"] * math.nan}}, path)
    with pytest.raises(ValueError, match=r"conv1\.weight: holds NaN"):
        load_teacher(path)


def test_tensors_that_torch_does_not_compute_with_are_refused(tmp_path):
    state = build_model("cnn", num_classes=4, image_size=8, width=2).state_dict()
    torch.save({**state, "conv1.weight": state["conv1.weight"].to(torch.float8_e4m3fn)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: .*conv1\.weight.*float8"):
        load_teacher(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "header",
    [
        b"[",
        b"-" * 9000 + b"1",
        b" x\n  y",
        b"{'descr':'|u1','fortran_order':False,'shape':(True,)}",
        b"\xff" * 20,
    ],
)
def test_damaged_npz_headers_are_one_error(tmp_path, header):
    plain = {name: npy(array) for name, array in arrays().items()}
    plain["y_test"] = b"\x93NUMPY\1\0" + struct.pack("<H", len(header) + 1) + header + b"\n\0"
    with pytest.raises(ValueError, match=r"x\.npz: .*y_test\.npy: not an array"):
        load_dataset(npz(tmp_path / "x.npz", **plain))


@pytest.mark.parametrize(
    ("name", "read", "message"),
    [
        ("teacher.pt", load_teacher, "not a checkpoint, it begins with"),
        ("last.pt", checkpoint.read, "not a complete fastrd checkpoint"),
        ("result.json", read_json, "accepted: a JSON file of at most"),
        ("log.jsonl", lambda path: read_jsonl(path, lambda value, where: value), "accepted: a JSON file of at most"),
        ("facts.toml", read_toml, "accepted: a TOML file of at most"),
        ("arrays.npz", load_dataset, "not an .npz file"),
    ],
)
def test_a_large_file_of_something_else_is_not_read_into_memory(name, read, message, tmp_path):
    path = tmp_path / name
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a terabyte of zeros that takes no place on the disk
    with pytest.raises(ValueError, match=message):
        read(path)
