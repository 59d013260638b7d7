"""Data sets in the layouts they are published in, made small; folders of images; extra images."""

import io
import json
import os
import zipfile

import numpy as np
import pytest
import torch

from fastrd.cli import main
from fastrd.data import Augment, PackedFile, add_extra, dataset, load_dataset, make_loader

Image = pytest.importorskip("PIL.Image")


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


@pytest.fixture
def svhn(tmp_path):
    io_ = pytest.importorskip("scipy.io")
    images = pixels(14, 32, 32, 3)
    for name, part in (("train", slice(0, 10)), ("test", slice(10, 14))):
        labels = np.arange(14)[part] % 10 + 1
        contents = {"X": images[part].transpose(1, 2, 3, 0), "y": labels[:, None].astype(np.uint8)}
        io_.savemat(tmp_path / f"{name}_32x32.mat", contents, do_compression=True)
    return tmp_path, images


def test_svhn(svhn):
    root, images = svhn
    found = load_dataset("svhn", root=root)
    assert np.array_equal(found.x_train, images[:10]) and np.array_equal(found.x_test, images[10:])
    assert found.y_train.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]  # label 10 is the digit 0
    assert found.class_names == tuple("0123456789") and found.augmentation == Augment(padding=4, flip=False)
    below = root / "below" / "svhn"
    below.mkdir(parents=True)
    for name in ("train", "test"):
        (root / f"{name}_32x32.mat").rename(below / f"{name}_32x32.mat")
    assert load_dataset("svhn", root=below.parent).fingerprint == found.fingerprint


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"not a mat file", "not a readable .mat file"),
        ({"y": np.ones((2, 1), np.uint8)}, r"X: got none; accepted: uint8 \(32, 32, 3, N\)"),
        ({"X": np.zeros((32, 32, 3, 2)), "y": np.ones((2, 1), np.uint8)}, "X: got float64"),
        (
            {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.ones((3, 1), np.uint8)},
            "y: got uint8 .*accepted: 2",
        ),
        (
            {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.zeros((2, 1), np.uint8)},
            r"y: got 0\.\.0; .*1\.\.10",
        ),
    ],
)
def test_a_damaged_svhn_file_is_named(svhn, contents, message):
    path = svhn[0] / "train_32x32.mat"
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    else:
        pytest.importorskip("scipy.io").savemat(path, contents)
    with pytest.raises(ValueError, match=rf"train_32x32\.mat: {message}"):
        load_dataset("svhn", root=svhn[0])


def test_a_missing_half_of_svhn_is_named(svhn):
    (svhn[0] / "test_32x32.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"test_32x32\.mat is missing"):
        load_dataset("svhn", root=svhn[0])


def tiny_files():
    """Tiny-ImageNet's layout with three classes; one image is grey, as some of the published are."""
    classes = ["n02", "n01", "n03"]
    files = {
        "wnids.txt": "\n".join(classes),
        "words.txt": "n01\tgoldfish, Carassius auratus\nn02\tnewt\nn99\tunused\n",
        "val/val_annotations.txt": "val_0.JPEG\tn03\t0\t0\t63\t63\nval_1.JPEG\tn01\t0\t0\t63\t63\n",
    }
    images = {}
    for number, name in enumerate(classes):
        for k in range(2):
            shape = (64, 64) if (number, k) == (0, 1) else (64, 64, 3)
            images[f"train/{name}/images/{name}_{k}.JPEG"] = pixels(*shape, seed=2 * number + k)
    for k in range(2):
        images[f"val/images/val_{k}.JPEG"] = pixels(64, 64, 3, seed=10 + k)
    return {name: text.encode() for name, text in files.items()} | {
        name: encoded(image, "JPEG") for name, image in images.items()
    }


def write_files(root, files):
    for name, contents in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)


def test_tiny_imagenet_from_the_folder_and_from_the_zip(tmp_path):
    files = tiny_files()
    write_files(tmp_path / "a" / "tiny-imagenet-200", files)
    (tmp_path / "b").mkdir()
    with zipfile.ZipFile(tmp_path / "b" / "tiny-imagenet-200.zip", "w") as archive:
        for name, contents in files.items():
            archive.writestr(f"tiny-imagenet-200/{name}", contents)
    folder, archive = (load_dataset("tiny-imagenet", root=tmp_path / name) for name in "ab")
    assert folder.fingerprint == archive.fingerprint
    assert folder.class_names == ("goldfish", "newt", "n03")  # in the order of the identifiers
    assert folder.y_train.tolist() == [0, 0, 1, 1, 2, 2] and folder.y_test.tolist() == [2, 0]
    assert folder.image_shape == (3, 64, 64) and folder.augmentation == Augment(padding=8)
    grey = folder.x_train[3]
    assert (grey == grey[..., :1]).all()
    expected = np.asarray(Image.open(io.BytesIO(files["val/images/val_1.JPEG"])))
    assert np.array_equal(folder.x_test[1], expected)


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("train/n01/images/n01_0.JPEG", b"torn", "n01_0.JPEG: not a usable image"),
        ("train/n01/images/n01_1.JPEG", encoded(pixels(32, 32, 3)), "n01_1.JPEG is 32x32, the first image 64x64"),
        ("val/val_annotations.txt", b"val_0.JPEG\tn77\n", "a class that is not in wnids.txt"),
        ("val/val_annotations.txt", b"val_7.JPEG\tn01\n", "no file val/images/val_7.JPEG"),
        ("wnids.txt", None, "no file wnids.txt"),
    ],
)  # fmt: skip
def test_a_damaged_tiny_imagenet_is_named(tmp_path, name, contents, message):
    files = {k: v for k, v in (tiny_files() | {name: contents}).items() if v is not None}
    write_files(tmp_path / "tiny-imagenet-200", files)
    with pytest.raises(ValueError, match=message):
        load_dataset("tiny-imagenet", root=tmp_path)


@pytest.fixture
def folder(tmp_path):
    """Two classes, images of several sizes, a grey one and one with transparency."""
    shapes = {"train/cat/0.png": (10, 14, 3), "train/cat/1.PNG": (9, 9), "train/dog/2.png": (12, 8, 4),
              "train/dog/x.txt": None, "val/cat/3.png": (8, 8, 3), "val/dog/4.png": (16, 8, 3)}  # fmt: skip
    files = {k: b"not an image" if s is None else encoded(pixels(*s)) for k, s in shapes.items()}
    write_files(tmp_path / "animals", files)
    return tmp_path / "animals"


def test_a_folder_of_images_stays_there(folder):
    found = load_dataset(folder, image_size=8)
    assert found.name == "animals" and found.class_names == ("cat", "dog")
    assert found.y_train.tolist() == [0, 0, 1] and found.y_test.tolist() == [0, 1]
    assert found.x_train.shape == (3, 8, 8, 3) and not isinstance(found.x_train, np.ndarray)
    assert np.array_equal(found.x_test[0], pixels(8, 8, 3))  # of the size that is asked for: as it is
    assert np.array_equal(found.x_test[1], pixels(16, 8, 3)[4:12])  # the middle
    batches = [next(make_loader(kind, found.x_train, found.y_train, batch_size=3).epoch(1)) for kind in
               ("torch", "resident", "auto")]  # fmt: skip
    assert all((batch.x == batches[0].x).all() for batch in batches)
    with pytest.raises(ValueError, match="got 'ffcv' for images in a folder"):
        make_loader("ffcv", found.x_train, found.y_train, batch_size=3)


def test_a_folder_is_packed(folder, tmp_path, capsys):
    out = tmp_path / "animals.beton"
    assert main(["pack", str(folder), str(out), "--quiet"]) == 2
    assert "data.image_size" in capsys.readouterr().err and not out.exists()
    assert main(["pack", str(folder), str(out), "--size", "8", "--quiet"]) == 0
    file, found = PackedFile(out), load_dataset(folder, image_size=8)
    assert np.array_equal(np.asarray(file.images("train")), np.asarray(found.x_train))
    assert load_dataset(out).fingerprint == found.fingerprint


def test_bad_folders_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="image_size: got 8 for 'digits'; accepted: only for a folder"):
        load_dataset("digits", image_size=8)
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="got 0 training and 0 test images; accepted: .*train/CLASS/IMAGE"):
        load_dataset(tmp_path / "empty")
    write_files(folder, {"val/bird/5.png": encoded(pixels(8, 8, 3))})
    with pytest.raises(ValueError, match="class 'bird' has test images and no training images"):
        load_dataset(folder, image_size=8)


def test_no_more_of_a_folder_is_looked_at_than_holds_images(folder, monkeypatch):
    before = load_dataset(folder, image_size=8).fingerprint
    for name in ("loop", "loop2"):
        (folder / "train/cat" / name).symlink_to("../.." if name == "loop" else "../../..")
    (folder / "train/dog").rename(folder / "dogs")
    (folder / "train/dog").symlink_to("../dogs")
    (folder / "beside").symlink_to("/")
    looked, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda place: looked.append(str(place)) or scandir(place))
    assert load_dataset(folder, image_size=8).fingerprint == before
    places = ("", "/train", "/train/cat", "/train/dog", "/val", "/val/cat", "/val/dog")
    assert sorted(looked) == [f"{folder}{place}" for place in places]


def test_a_class_that_cannot_be_read_is_not_left_out(folder, monkeypatch):
    scandir = os.scandir

    def locked(place):
        if str(place).endswith("cat"):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", locked)
        with pytest.raises(ValueError, match="/cat: Permission denied; accepted: what can be read"):
            load_dataset(folder, image_size=8)
    for name, target in (("train/owl", "nowhere"), ("val/owl", "owl")):
        (folder / name).symlink_to(target)
        with pytest.raises(ValueError, match=f"{name}: (No such file|Too many levels).*; accepted: what can be read"):
            load_dataset(folder, image_size=8)
        (folder / name).unlink()


def test_an_archive_that_is_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "tiny-imagenet-200.zip")
    with pytest.raises(ValueError, match="tiny-imagenet-200.zip: a device or a pipe; accepted: a file"):
        load_dataset("tiny-imagenet", root=tmp_path)


@pytest.mark.parametrize("name", ["train/cat/0.png", "val/dog/4.png"])
def test_an_image_that_is_a_pipe_or_a_device_is_refused_at_once(folder, name):
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (folder / name).unlink()
        make(folder / name)
        with pytest.raises(ValueError, match=f"{name}: not a usable image .*a device or a pipe; accepted: a file"):
            np.asarray(load_dataset(folder, image_size=8).x_train)


def test_images_of_more_than_8_bits_are_refused(folder):
    file = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(file, "PNG")
    write_files(folder, {"train/cat/0.png": file.getvalue()})
    with pytest.raises(ValueError, match=r"train/cat/0.png: .*mode I.*, of more than 8 bits"):
        np.asarray(load_dataset(folder, image_size=8).x_train)


def test_grey_arrays_without_a_channel(tmp_path):
    """As MNIST is published with Keras."""
    path = tmp_path / "mnist.npz"
    labels = np.arange(20) % 10
    np.savez(path, x_train=pixels(20, 28, 28), y_train=labels, x_test=pixels(20, 28, 28), y_test=labels)
    found = load_dataset(path)
    assert found.image_shape == (1, 28, 28) and found.num_classes == 10


def test_a_data_set_of_ones_own(tmp_path, registry):
    name = "rings-of-a-test"

    @dataset(name, places=["rings.bin"])
    def read(root):
        return load_dataset("digits").limit(20, 20)

    with pytest.raises(FileNotFoundError, match=r"rings\.bin"):
        load_dataset(name, root=tmp_path)
    (tmp_path / "rings.bin").touch()
    assert len(load_dataset(name, root=tmp_path).x_train) == 20
    with pytest.raises(ValueError, match="dataset: got 'rings-of-a-test'; accepted: a name that is not taken"):
        dataset(name)


@pytest.fixture
def with_extra(toy_arrays, tmp_path):
    """Labels of the extra images tell them apart: all of class 3, and one without a label."""
    path = tmp_path / "extra.npz"
    np.savez(path, image=pixels(30, 8, 8, 3), label=np.r_[np.full(29, 3), -1])
    return add_extra(load_dataset(toy_arrays), path)


def test_extra_images_have_their_share_of_each_batch(with_extra):
    kept = np.arange(100)
    images, labels = with_extra.training_images(kept)
    loader = make_loader("resident", images, labels, batch_size=20, extra=30, extra_fraction=0.7)
    assert len(loader) == 5  # an epoch is as long as without them
    seen = [batch.index for batch in loader.epoch(1)]
    assert all((index >= 100).sum() == 14 for index in seen)
    own = np.concatenate([index[index < 100] for index in seen])
    assert len(set(own.tolist())) == 30
    counts = np.bincount(np.concatenate([i[i >= 100] - 100 for i in seen]), minlength=30)
    assert set(counts.tolist()) == {2, 3}  # 70 draws of 30 images: each as often as the others
    assert (next(loader.epoch(2)).index != seen[0]).any()
    resumed = list(loader.epoch(1, start=3))
    assert [b.index.tolist() for b in resumed] == [i.tolist() for i in seen[3:]]
    ranks = [make_loader("resident", images, labels, batch_size=20, extra=30, extra_fraction=0.7, rank=r, world_size=2)
             for r in range(2)]  # fmt: skip
    parts = [next(loader.epoch(1)).index for loader in ranks]
    assert sorted([*parts[0].tolist(), *parts[1].tolist()]) == sorted(seen[0].tolist())


@pytest.mark.parametrize(("own", "extra", "size", "fraction"), [(9, 7, 8, 0.125), (64, 33, 32, 0.5), (50, 9, 16, 0.3)])
@pytest.mark.parametrize("drop_last", [False, True])
def test_the_loader_knows_its_last_batch(own, extra, size, fraction, drop_last):
    images, labels = pixels(own + extra, 4, 4, 3), np.zeros(own + extra, int)
    for further in ({}, {"extra": extra, "extra_fraction": fraction}):
        loader = make_loader("resident", images, labels, batch_size=size, drop_last=drop_last, **further)
        sizes = [len(batch.x) for batch in loader.epoch(1)]
        assert loader.last_batch == sizes[-1]
        places = range(len(sizes) + 1)
        assert all(loader.images_in(a, b) == sum(sizes[a:b]) for b in places for a in range(b + 1))


def test_a_share_of_extra_images_that_rounds_to_none_is_refused():
    images, labels = pixels(20, 4, 4, 3), np.zeros(20, int)
    with pytest.raises(ValueError, match=r"extra_fraction: got 0.01, 0 of 8 images of a batch; accepted"):
        make_loader("resident", images, labels, batch_size=8, extra=4, extra_fraction=0.01)


def test_extra_images_change_the_fingerprint(with_extra, toy_arrays):
    assert with_extra.fingerprint != load_dataset(toy_arrays).fingerprint


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": pixels(3, 8, 8, 3)}, "got image; accepted: image and label, or x_train and y_train"),
        ({"image": pixels(3, 9, 9, 3), "label": np.zeros(3, int)}, r"x_extra: got images \(9, 9, 3\)"),
        (
            {"image": pixels(3, 8, 8, 3), "label": np.full(3, 4)},
            r"y_extra: got labels 4\.\.4; accepted: -1\.\.3",
        ),
    ],
)
def test_bad_extra_images_are_named(toy_arrays, tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        add_extra(load_dataset(toy_arrays), tmp_path / "bad.npz")


def test_unlabelled_images_only_where_there_are_some(toy_arrays):
    with pytest.raises(ValueError, match="which has none; accepted: only for stl10"):
        add_extra(load_dataset(toy_arrays), "unlabelled")
    with pytest.raises(FileNotFoundError, match="extra: no file nowhere.npz"):
        add_extra(load_dataset(toy_arrays), "nowhere.npz")


@pytest.mark.parametrize("estimator", ["infonce", "crd", "strict"])
def test_gacd_trains_on_images_without_labels(estimator, toy_arrays, tmp_path):
    from fastrd import Recipe, train
    from fastrd.models import build_model

    np.savez(tmp_path / "extra.npz", image=pixels(40, 8, 8, 3), label=np.full(40, -1))
    table = {
        "name": "unlabelled",
        "student": {"arch": "cnn", "options": {"width": 2}},
        "base": {"name": "pgd_at"},
        "gacd": {"estimator": estimator, "negatives": 20, "dim": 4},
        "data": {"name": str(toy_arrays), "holdout": 20, "extra": str(tmp_path / "extra.npz")},
        "attack": {"steps": 1},
        "schedule": {"epochs": 1, "milestones": []},
        "training": {"batch_size": 32},
        "validation": {"steps": 0},
    }
    recipe = Recipe.from_dict(table)
    torch.manual_seed(1)
    teacher = build_model("cnn", num_classes=4, image_size=8, width=2)
    trained = train(recipe, out=tmp_path / "run", teacher=teacher, progress=False, device="cpu")
    assert trained.best["val_clean"] >= 0
    line = [json.loads(text) for text in (tmp_path / "run/log.jsonl").read_text().splitlines()][-1]
    assert line["gacd"] > 0 and line["ce"] > 0
    alone = {key: value for key, value in table.items() if key != "gacd"}
    with pytest.raises(ValueError, match="teacher: some training images have no label"):
        train(Recipe.from_dict(alone), out=tmp_path / "other", progress=False, device="cpu")
    assert not (tmp_path / "other/last.pt").exists()
