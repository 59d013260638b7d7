"""Packed files: what is in them, that FFCV reads the same, and that damage of every kind is an error, not a crash."""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastrd.cli import main
from fastrd.data import Augment, PackedFile, PackedImages, load_dataset, make_loader
from fastrd.data import pack as pack_module
from fastrd.data.beton import file_hash
from fastrd.data.pack import check, pack

ROOT = Path(__file__).resolve().parent.parent


# numba complains when functions that it compiled are.
NEVER_COLLECTED = []


def smooth(n: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Images that survive JPEG: gradients in random directions."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    slope = random.uniform(-3, 3, (n, 2, 3))
    images = 128 + slope[:, None, None, 0] * (y - height / 2)[..., None] + slope[:, None, None, 1] * x[..., None]
    return np.clip(images, 0, 255).astype(np.uint8)


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "source.npz"
    np.savez(
        path,
        x_train=smooth(40, 24, 16),
        y_train=np.arange(40) % 4,
        x_test=smooth(12, 24, 16, seed=1),
        y_test=np.arange(12) % 4,
        class_names=np.array(["ant", "bee", "cat", "dog"]),
        flip=True,
    )
    return path


@pytest.fixture
def packed(source, tmp_path) -> PackedFile:
    return pack(source, tmp_path / "out.beton", progress=False)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "source.npz")


def test_a_packed_data_set_is_the_data_set(source, packed):
    original, dataset = load_dataset(source), load_dataset(packed.path)
    assert isinstance(dataset.x_train, PackedImages)
    assert dataset.x_train.shape == original.x_train.shape and dataset.x_train.dtype == np.uint8
    for name in ("x_train", "x_test", "y_train", "y_test"):
        assert np.array_equal(getattr(dataset, name), getattr(original, name)), name
    assert dataset.fingerprint == original.fingerprint
    assert (dataset.name, dataset.class_names) == (original.name, original.class_names)
    assert dataset.augmentation == original.augmentation == Augment(padding=2, flip=True)
    assert packed.labels("unlabelled").shape == (0,) and len(packed.images("unlabelled")) == 0
    assert packed.describe() == f"source: 40 train, 12 test images of 3x24x16, raw, at {packed.path}"
    limited = dataset.limit(train=8)
    assert isinstance(limited.x_train, PackedImages)
    assert limited.fingerprint == original.limit(train=8).fingerprint


def test_parts_of_packed_images_stay_in_the_file(source, packed):
    images, original = packed.images("train"), load_dataset(source).x_train
    rows = np.array([39, 0, 7, 7])
    for part in (rows, slice(3, 30, 5), np.arange(40) % 3 == 0, slice(0, 0)):
        assert isinstance(images[part], PackedImages) and len(images[part]) == len(original[part])
        assert np.array_equal(np.asarray(images[part]), original[part])
    assert np.array_equal(np.asarray(images[rows][np.array([2, 0])]), original[[7, 39]])
    assert np.asarray(images, dtype=np.float32).dtype == np.float32
    with pytest.raises(ValueError, match="split: got 'valid'; accepted: train, test, unlabelled"):
        packed.images("valid")


@pytest.mark.parametrize("quality", [None, 90])
def test_ffcv_reads_what_was_written(source, tmp_path, quality):
    """With FFCV's own loader and every field, not through ours."""
    pytest.importorskip("ffcv", exc_type=ImportError)
    importlib.import_module("fastrd.data.ffcv")  # which keeps the number of threads
    from ffcv.loader import Loader, OrderOption
    from ffcv.reader import Reader

    file = pack(source, tmp_path / "out.beton", quality=quality, progress=False)
    original = load_dataset(source)
    reader = Reader(str(file.path))
    assert list(reader.handlers) == ["image", "label", "index", "split"] and reader.num_samples == 52
    threads = torch.get_num_threads()
    loader = Loader(
        str(file.path),
        batch_size=7,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        os_cache=False,
    )
    image, label, index, split = (
        np.concatenate(parts)
        for parts in zip(*([part.clone().numpy() for part in batch] for batch in loader), strict=True)
    )
    torch.set_num_threads(threads)
    NEVER_COLLECTED.append(loader)
    assert np.array_equal(label[:, 0], np.concatenate([original.y_train, original.y_test]))
    assert np.array_equal(index[:, 0], [*range(40), *range(12)])
    assert np.array_equal(split[:, 0], np.repeat([0, 1], [40, 12]))
    assert np.array_equal(image[:40], np.asarray(file.images("train")))
    error = np.abs(image.astype(int) - np.concatenate([original.x_train, original.x_test]))
    assert error.max() == 0 if quality is None else 0 < error.mean() < 3


def test_jpegs_are_the_same_for_every_loader(source, tmp_path):
    pytest.importorskip("ffcv", exc_type=ImportError)
    file = pack(source, tmp_path / "out.beton", quality=80, progress=False)
    assert check(file.path, progress=False).encoding == "jpeg"
    batches = [
        list(
            make_loader(
                kind,
                file.images("train"),
                file.labels("train"),
                batch_size=16,
                augment=Augment(2),
                drop_last=False,
            ).epoch(1)
        )
        for kind in ("resident", "torch", "ffcv")
    ]
    for same in zip(*batches, strict=True):
        assert all(torch.equal(same[0].x, other.x) for other in same[1:])


def test_a_jpeg_that_cannot_be_decoded_is_named(source, tmp_path):
    pytest.importorskip("ffcv", exc_type=ImportError)
    path = pack(source, tmp_path / "out.beton", quality=80, progress=False).path
    contents = bytearray(path.read_bytes())
    start = contents.index(b"\xff\xd8\xff")
    contents[start : start + 2] = b"no"
    forge(path, bytes(contents))
    with pytest.raises(ValueError, match="no JPEG of 24x16"):
        check(path, progress=False)


def test_stl10_with_its_unlabelled_images(tmp_path, stl10):
    out = str(tmp_path / "stl.beton")
    assert main(["pack", "stl10", out, "--unlabelled", "--data", str(tmp_path), "--quiet"]) == 0
    file = PackedFile(tmp_path / "stl.beton")
    assert file.splits == {"train": 4, "test": 2, "unlabelled": 3}
    assert np.array_equal(np.asarray(file.images("unlabelled")), stl10[6:])
    assert file.labels("unlabelled").tolist() == [-1] * 3 and file.labels("train").tolist() == [0, 9, 2, 3]
    dataset = load_dataset(file.path)
    assert len(dataset.x_train) == 4 and dataset.augmentation == Augment(padding=12)
    batch = next(make_loader("torch", file.images("unlabelled"), file.labels("unlabelled"), batch_size=3).epoch(1))
    assert batch.y.tolist() == [-1] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": "out.npz"}, r"out: got '.*out.npz'; accepted: a file name that ends in .beton"),
        ({"quality": 0}, r"quality: got 0; accepted: an integer >= 1 and <= 100"),
        ({"unlabelled": True}, "unlabelled: got True for source .* accepted: only for stl10"),
        ({"name": "digits"}, "images: got 1 channels; accepted: 3"),
    ],
)
def test_refusals_write_nothing(source, tmp_path, change, message):
    change = {"name": source, "out": "out.beton", **change}
    out = tmp_path / change.pop("out")
    with pytest.raises(ValueError, match=message):
        pack(change.pop("name"), out, progress=False, **change)
    assert leftovers(tmp_path) == []


def test_command_line(source, tmp_path, capsys):
    out = tmp_path / "new" / "out.beton"
    assert main(["pack", str(source), str(out), "--quiet"]) == 0
    assert "40 train, 12 test images" in capsys.readouterr().out
    assert main(["pack", "--check", str(out), "--quiet"]) == 0
    assert "as it was written" in capsys.readouterr().out
    assert main(["pack", "cifar10"]) == 2 and "OUT.beton" in capsys.readouterr().err
    contents = bytearray(out.read_bytes())
    contents[len(contents) // 2] ^= 1
    out.write_bytes(contents)
    assert main(["pack", "--check", str(out), "--quiet"]) == 2
    assert "another hash" in capsys.readouterr().err
    assert main(["pack", "--check", str(tmp_path / "gone.beton")]) == 2
    assert "gone.beton" in capsys.readouterr().err


def forge(path: Path, contents: bytes, **changes) -> None:
    """New contents, and a sidecar that vouches for them: what a hostile file looks like."""
    path.write_bytes(contents)
    described = path.with_name(f"{path.name}.json")
    said = json.loads(described.read_text())
    described.write_text(json.dumps({**said, "bytes": len(contents), "sha256": file_hash(path), **changes}))


def test_damaged_files_are_refused(packed):
    path, whole = packed.path, packed.path.read_bytes()
    for contents, message in (
        (whole[: len(whole) // 2], f"got {len(whole) // 2} bytes, where {len(whole)} were written"),
        (b"", "got 0 bytes"),
        (whole[:-1] + b"x", ".*another hash"),
        (whole + b"x", f"got {len(whole) + 1} bytes"),
    ):
        path.write_bytes(contents)
        with pytest.raises(ValueError, match=f"out.beton: {message}.*accepted: a file as `fastrd pack` left it"):
            PackedFile(path)
        with pytest.raises(ValueError, match="out.beton"):
            load_dataset(path)


def test_a_lone_file_is_refused(packed):
    packed.path.with_name("out.beton.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"out.beton.json: no such file; it is written .* `fastrd pack`"):
        PackedFile(packed.path)


def patched(contents: bytes, offset: int, value: int, size: int) -> bytes:
    return contents[:offset] + value.to_bytes(size, "little") + contents[offset + size :]


FIELDS = 24  # bytes of the header before the four descriptions of fields
SAMPLES = FIELDS + 4 * 1041
SAMPLE, IMAGE = 40, 13  # bytes of a record, and of the image in it


@pytest.mark.parametrize(
    ("offset", "value", "size", "message"),
    [
        (0, 3, 2, "got version 3"),
        (2, 5, 2, "with the fields"),
        (4, 3 << 20, 4, "got pages of 3145728 bytes"),
        (8, 53, 8, "53 samples"),
        (8, 10**9, 8, "1000000000 samples"),
        (16, 2**63, 8, "got a table at byte"),
        (16, 4096, 8, "got a table at byte 4096"),
        (FIELDS, 4, 1, "got fields of types"),
        (FIELDS + 1, 0x58, 1, "with the fields"),
        (SAMPLES, 0, 1, "an image that is not raw"),
        (SAMPLES + 1, 999, 2, "an image that is not 24x16"),
        (SAMPLES + SAMPLE + 3, 65535, 2, r"an image that is not 24x16 \(sample 1\)"),
        (SAMPLES + 5, 2**62, 8, "pixels somewhere else than allocated"),
        (SAMPLES + 16, 4, 8, "labels out of range"),
        (SAMPLES + 24, 1, 8, "samples out of order"),
        (SAMPLES + 32, 1, 8, "samples out of order"),
    ],
)
def test_hostile_files_are_refused(packed, offset, value, size, message):
    forge(packed.path, patched(packed.path.read_bytes(), offset, value, size))
    with pytest.raises(ValueError, match=f"out.beton: .*{message}"):
        PackedFile(packed.path)


@pytest.mark.parametrize(
    ("ptr", "size", "message"),
    [
        (None, 2**40, "pixels outside of the file"),
        (None, 2**64 - 1, "pixels outside of the file"),
        (None, 1151, "an image that is not 1152 bytes"),
        (2**40, None, "pixels outside of the file"),
        (2**63 + 5, None, "pixels outside of the file"),
        (0, None, "pixels outside of the file"),
    ],
)
def test_hostile_allocations_are_refused(packed, ptr, size, message):
    """Of sample 5; a pointer is changed in its record too."""
    contents = packed.path.read_bytes()
    entry = int.from_bytes(contents[16:24], "little") + 5 * 24
    if ptr is not None:
        contents = patched(contents, entry + 8, ptr, 8)
        contents = patched(contents, SAMPLES + 5 * SAMPLE + 5, ptr, 8)
    if size is not None:
        contents = patched(contents, entry + 16, size, 8)
    forge(packed.path, contents)
    with pytest.raises(ValueError, match=f"out.beton: got {message}"):
        PackedFile(packed.path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "not of format 1"),
        ({"image_shape": [24, 16, 1]}, "image_shape: got"),
        ({"image_shape": [10**9, 10**9, 3]}, "image_shape: got"),
        ({"image_shape": [24, True, 3]}, "image_shape: got"),
        ({"image_shape": [48, 8, 3]}, "an image that is not 48x8"),
        ({"splits": {"train": 52}}, "splits: got"),
        ({"splits": {"train": 10**9, "test": 0, "unlabelled": 0}}, "52 samples"),
        ({"splits": {"train": 12, "test": 40, "unlabelled": 0}}, "samples out of order"),
        ({"class_names": ["a", "b"]}, "labels out of range"),
        ({"class_names": 3}, "class_names: got 3"),
        ({"augmentation": {"padding": -1, "flip": True}}, "augmentation: got"),
        ({"encoding": "png"}, "encoding: got 'png'"),
        ({"bytes": "many"}, "bytes: got 'many'"),
        ({"sha256": None}, "sha256: got"),
    ],
)
def test_hostile_sidecars_are_refused(packed, changes, message):
    forge(packed.path, packed.path.read_bytes(), **changes)
    with pytest.raises(ValueError, match=f"out.beton: .*{message}"):
        PackedFile(packed.path)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, "\x00"])
def test_sidecars_that_are_none_are_refused(packed, text):
    packed.path.with_name("out.beton.json").write_text(text)
    with pytest.raises(ValueError, match=r"out\.beton: .*out\.beton\.json:.*(not JSON|a JSON object)"):
        PackedFile(packed.path)


def test_what_was_not_written_right_gets_no_name(source, packed, tmp_path, monkeypatch):
    before = packed.path.read_bytes()
    write = pack_module.write

    def misprint(file, images, *arguments, **options):
        images = [bytes(len(image)) if number == 3 else image for number, image in enumerate(images)]
        write(file, images, *arguments, **options)

    monkeypatch.setattr(pack_module, "write", misprint)
    with pytest.raises(ValueError, match="train image 3 was not written as it is"):
        pack(source, packed.path, progress=False)
    assert packed.path.read_bytes() == before
    assert leftovers(tmp_path) == ["out.beton", "out.beton.json"]
    assert PackedFile(packed.path).splits["train"] == 40


def test_no_space_is_said_before_anything_is_written(source, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(pack_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"out.beton: it will take 0 MiB and 0 MiB are free"):
        pack(source, tmp_path / "out.beton", progress=False)
    assert leftovers(tmp_path) == []


def test_a_disk_that_fills_up_leaves_the_old_file(source, packed, tmp_path):
    """A limit on the size of files stands for the disk: the same write fails, with another number."""
    before = packed.path.read_bytes()
    done = subprocess.run(
        [sys.executable, "-m", "fastrd.cli", "pack", source, packed.path, "--quiet"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 2 and "File too large" in done.stderr and "Traceback" not in done.stderr
    assert packed.path.read_bytes() == before
    assert leftovers(tmp_path) == ["out.beton", "out.beton.json"]


KILLED = """
import sys, time
from fastrd.data import pack as module
def slowly(file, images, *arguments, write=module.write, **options):
    def dawdle():
        for number, image in enumerate(images):
            if number == 20:
                file.flush()
                print("writing", flush=True)
                time.sleep(60)
            yield image
    write(file, dawdle(), *arguments, **options)
module.write = slowly
module.pack(sys.argv[1], sys.argv[2], progress=False)
"""


def test_a_killed_process_leaves_no_half_file(source, packed, tmp_path):
    before = packed.path.read_bytes()
    fresh = tmp_path / "fresh.beton"
    for out in (fresh, packed.path):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, source, out],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert not fresh.exists() and not fresh.with_name("fresh.beton.json").exists()
    assert packed.path.read_bytes() == before
    assert PackedFile(packed.path).splits["train"] == 40
    assert pack(source, fresh, progress=False).splits["train"] == 40


def test_images_do_not_cross_pages(tmp_path):
    """FFCV may read a file page by page."""
    images = np.random.default_rng(0).integers(0, 256, (30, 300, 257, 3), dtype=np.uint8)
    labels = np.arange(30) % 2
    np.savez(tmp_path / "big.npz", x_train=images, y_train=labels, x_test=images[:2], y_test=labels[:2])
    file = pack(tmp_path / "big.npz", tmp_path / "big.beton", progress=False)
    size, page = 300 * 257 * 3, 1 << 21
    places = file._places
    assert np.array_equal(places // page, (places + size - 1) // page) and len(np.unique(places // page)) > 2
    assert np.array_equal(np.asarray(file.images("train")), images)


@pytest.mark.parametrize(
    ("size", "part", "target"),
    [
        ((96, 80), (3, 90, 5, 77), (33, 41)),
        ((20, 30), (2, 19, 1, 30), (40, 50)),
        ((50, 30), (0, 50, 0, 30), (20, 40)),
        ((9, 9), (4, 5, 4, 5), (3, 3)),
        ((500, 400), (0, 500, 10, 400), (224, 224)),
    ],
)
def test_ffcv_resizes_as_opencv_does(size, part, target):
    """Nothing here resizes; other users of this FFCV do, and it was built without OpenCV."""
    pytest.importorskip("ffcv", exc_type=ImportError)
    importlib.import_module("fastrd.data.ffcv")
    import cv2
    from ffcv.libffcv import resize_crop

    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    top, bottom, left, right = part
    out = np.zeros((*target, 3), np.uint8)
    resize_crop(image, top, bottom, left, right, out)
    expected = cv2.resize(image[top:bottom, left:right], target[::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(out.astype(int) - expected).max() <= 1


@pytest.mark.slow
def test_real_cifar10(data_root, tmp_path):
    original = load_dataset("cifar10", root=data_root)
    file = pack("cifar10", tmp_path / "cifar10.beton", root=data_root, progress=False)
    assert file.splits == {"train": 50_000, "test": 10_000, "unlabelled": 0}
    assert load_dataset(file.path).fingerprint == original.fingerprint


def test_a_process_killed_between_the_two_renames_leaves_a_pack_that_can_be_read(tmp_path, monkeypatch):
    out, replace = tmp_path / "out.beton", os.replace
    for name, value in (("old", 1), ("new", 2)):
        x, y = np.full((8, 8, 8, 3), value, np.uint8), np.arange(8) % 2
        np.savez(tmp_path / f"{name}.npz", x_train=x, y_train=y, x_test=x[:4], y_test=y[:4])
    pack(tmp_path / "old.npz", out, progress=False)
    for kill_at in (1, 2):
        renamed = []

        def killed(source, target, kill_at=kill_at, renamed=renamed):
            if len(renamed) == kill_at:
                raise KeyboardInterrupt
            replace(source, target)
            renamed.append(target)

        monkeypatch.setattr(os, "replace", killed)
        if kill_at == 1:
            with pytest.raises(KeyboardInterrupt):
                pack(tmp_path / "new.npz", out, progress=False)
        else:
            pack(tmp_path / "new.npz", out, progress=False)
        monkeypatch.setattr(os, "replace", replace)
        assert load_dataset(out).x_test.max() == kill_at
