import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fastrd.kernels.augment import augment as augment_kernel

from fastrd.core.files import InUse, locked
from fastrd.data import (
    Augment,
    Dataset,
    ResidentLoader,
    derive_seed,
    find_dataset,
    load_dataset,
    split_holdout,
)
from fastrd.data.catalog import DATASETS, Source

REPOSITORY = Path(__file__).resolve().parents[1]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def make_arrays(train=60, test=20, classes=4, size=8, channels=3, seed=0):
    random = np.random.default_rng(seed)
    return {
        "x_train": random.integers(0, 256, (train, size, size, channels), dtype=np.uint8),
        "y_train": np.arange(train) % classes,
        "x_test": random.integers(0, 256, (test, size, size, channels), dtype=np.uint8),
        "y_test": np.arange(test) % classes,
    }


def make_dataset(classes=4, **changes):
    values = {"name": "made", "class_names": tuple("abcdefgh"[:classes]), "source": "a test"}
    return Dataset(**(values | make_arrays(classes=classes) | changes))


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.fixture
def no_data(monkeypatch, tmp_path):
    """A working folder and environment in which no data set can be found."""
    monkeypatch.delenv("FASTRD_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def real(name):
    root = os.environ.get("FASTRD_DATA") or REPOSITORY / ".data"
    try:
        return load_dataset(name, root=root)
    except FileNotFoundError as error:
        pytest.skip(f"real {name} is absent: {error}")


class TestSeeds:
    def test_values_are_fixed(self):
        # First eight bytes of sha256('[0, "order", 1]') without the lowest bit, computed with sha256sum.
        assert derive_seed(0, "order", 1) == 0xF0D7C85AFF179BD5 >> 1
        assert derive_seed(np.int64(0), "order", np.int32(1)) == derive_seed(0, "order", 1)

    def test_places_are_distinct_and_in_range(self):
        places = [
            (0,),
            (1,),
            (0, 1),
            (0, "1"),
            (0, 1, 1),
            (0, "a"),
            (0, "a", 1),
            (0, -1),
            (1, 0),
            (0, "a,1"),
            (10**30, 1),
        ]
        seeds = [derive_seed(*place) for place in places]
        assert len(set(seeds)) == len(places)
        assert all(0 <= seed < 2**63 for seed in seeds)
        assert torch.Generator().manual_seed(max(seeds)).initial_seed() == max(seeds)

    @pytest.mark.parametrize("place", [("0",), (0.0,), (True,), (0, 1.5), (0, None)])
    def test_refuses_other_types(self, place):
        with pytest.raises(TypeError, match=r"(seed|path): got .* accepted: .*integer"):
            derive_seed(*place)


class TestDataset:
    def test_contract(self):
        dataset = make_dataset(class_names=list("abcd"))
        assert dataset.num_classes == 4 and dataset.class_names == ("a", "b", "c", "d")
        assert dataset.image_shape == (3, 8, 8)
        assert dataset.y_train.dtype == dataset.y_test.dtype == np.int64
        assert dataset.describe() == "made: 60 training and 20 test images of 3x8x8, 4 classes, from a test"

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"x_train": np.zeros((60, 8, 8, 3), np.float32)}, "x_train: got dtype float32; accepted: uint8"),
            ({"x_test": np.zeros((20, 8, 8), np.uint8)}, r"x_test: got shape \(20, 8, 8\)"),
            ({"x_train": np.zeros((0, 8, 8, 3), np.uint8)}, r"x_train: got shape \(0, 8, 8, 3\)"),
            ({"x_train": np.zeros((60, 3, 8, 8), np.uint8)}, "x_train: .* channels first"),
            (
                {"x_test": np.zeros((20, 8, 9, 3), np.uint8)},
                r"x_test: got images \(8, 9, 3\); accepted: .*\(8, 8, 3\)",
            ),
            ({"y_train": np.zeros(59, int)}, r"y_train: got shape \(59,\); accepted: \(60,\)"),
            ({"y_train": np.zeros((60, 4), int)}, r"y_train: got shape \(60, 4\)"),
            ({"y_test": np.zeros(20)}, "y_test: got dtype float64"),
            ({"y_test": np.full(20, 4)}, r"y_test: got labels 4\.\.4; accepted: 0\.\.3 for 4 classes"),
            ({"y_train": np.full(60, -1)}, r"y_train: got labels -1\.\.-1"),
        ],
    )
    def test_refuses_invalid_arrays(self, changes, message):
        with pytest.raises(ValueError, match="^a test: " + message):
            make_dataset(**changes)

    def test_fingerprint_sees_every_array(self):
        dataset = make_dataset()
        assert dataset.fingerprint == make_dataset(name="other", source="elsewhere").fingerprint
        seen = {dataset.fingerprint}
        for name in ("x_train", "y_train", "x_test", "y_test"):
            changed = getattr(dataset, name).copy()
            changed.flat[-1] ^= 1
            seen.add(replace(dataset, **{name: changed}).fingerprint)
        swapped = dataset.x_train[::-1], dataset.y_train[::-1]
        seen.add(replace(dataset, x_train=swapped[0], y_train=swapped[1]).fingerprint)
        seen.add(dataset.limit(train=59).fingerprint)
        wide = {name: getattr(dataset, name).reshape(-1, 4, 16, 3) for name in ("x_train", "x_test")}
        seen.add(replace(dataset, **wide).fingerprint)
        assert len(seen) == 8

    def test_limit_keeps_class_shares_and_takes_the_first(self):
        labels = np.repeat([0, 1, 2, 3], [30, 15, 10, 5])
        dataset = make_dataset(y_train=labels).limit(train=14)
        # Shares of 14: 7, 3.5, 2.33, 1.17; the largest remainder is class 1's.
        expected = [*range(7), *range(30, 34), *range(45, 47), *range(55, 56)]
        assert np.array_equal(dataset.x_train, make_dataset().x_train[expected])
        assert np.array_equal(dataset.y_train, labels[expected])
        assert len(dataset.x_test) == 20

    def test_limit_breaks_ties_to_the_lower_class(self):
        dataset = make_dataset(y_train=np.arange(60) % 20, class_names="abcdefghijklmnopqrst")
        assert np.bincount(dataset.limit(train=30).y_train).tolist() == [2] * 10 + [1] * 10

    def test_limit_above_the_size_keeps_all(self):
        dataset = make_dataset()
        assert dataset.limit(train=61, test=20) is dataset

    @pytest.mark.parametrize("name", ["train", "test"])
    def test_refuses_a_limit_below_one(self, name):
        with pytest.raises(ValueError, match=f"{name}_limit: got 0"):
            make_dataset().limit(**{name: 0})


class TestHoldout:
    def test_is_a_stratified_partition_of_the_training_set(self):
        dataset = make_dataset(y_train=np.repeat([0, 1, 2, 3], [30, 15, 10, 5]))
        train, holdout = split_holdout(dataset, 12, seed=3)
        assert train.dtype == holdout.dtype == np.int64
        assert np.array_equal(np.sort(np.concatenate([train, holdout])), np.arange(60))
        assert np.bincount(dataset.y_train[holdout]).tolist() == [6, 3, 2, 1]
        assert np.all(np.diff(train) > 0) and np.all(np.diff(holdout) > 0)

    def test_depends_on_the_seed_alone(self):
        dataset = make_dataset()
        torch.manual_seed(1), np.random.seed(1)
        first = split_holdout(dataset, 20, seed=0)[1]
        torch.manual_seed(2), np.random.seed(2)
        other_pixels = make_dataset(x_train=dataset.x_train // 2, x_test=dataset.x_test[:4], y_test=dataset.y_test[:4])
        assert np.array_equal(first, split_holdout(other_pixels, 20, seed=0)[1])
        assert not np.array_equal(first, split_holdout(dataset, 20, seed=1)[1])

    def test_none(self):
        train, holdout = split_holdout(make_dataset(), 0, seed=0)
        assert len(holdout) == 0 and holdout.dtype == np.int64 and np.array_equal(train, np.arange(60))

    @pytest.mark.parametrize("n", [-1, 60])
    def test_refuses_to_leave_nothing(self, n):
        with pytest.raises(ValueError, match=rf"n: got {n}; accepted: 0\.\.59"):
            split_holdout(make_dataset(), n, seed=0)


class TestCatalog:
    def test_digits(self):
        dataset = load_dataset("digits")
        assert dataset.x_train.shape == (1442, 8, 8, 1) and dataset.x_test.shape == (355, 8, 8, 1)
        assert dataset.image_shape == (1, 8, 8) and dataset.num_classes == 10
        assert dataset.augmentation == Augment(padding=1, flip=False)
        assert np.bincount(dataset.y_test).tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]

        from sklearn.datasets import load_digits

        raw = load_digits()
        zeros = np.flatnonzero(raw.target == 0)
        scaled = np.round(raw.images[zeros] / 16 * 255)
        assert scaled.max() == 255
        assert np.array_equal(dataset.x_test[dataset.y_test == 0][0, ..., 0], scaled[4])
        assert np.array_equal(dataset.x_train[dataset.y_train == 0][4, ..., 0], scaled[5])

    def test_limits_apply(self):
        dataset = load_dataset("digits", train_limit=100, test_limit=30)
        assert len(dataset.x_train) == len(dataset.y_train) == 100
        assert np.bincount(dataset.y_test).tolist() == [3] * 10

    def test_own_arrays_by_path(self, tmp_path):
        arrays = make_arrays()
        path = save(tmp_path / "mine.npz", **arrays, label_names=np.array(["ant", "bee", "cat", "dog"]))
        dataset = load_dataset(path)
        assert dataset.name == "mine" and dataset.source == str(path)
        assert dataset.class_names == ("ant", "bee", "cat", "dog") and type(dataset.class_names[0]) is str
        assert all(np.array_equal(getattr(dataset, key), value) for key, value in arrays.items())
        assert dataset.augmentation == Augment(padding=1, flip=False)

    def test_own_arrays_by_root(self, tmp_path):
        path = save(tmp_path / "arrays.npz", **make_arrays(), flip=True)
        for root in (tmp_path, path):
            dataset = load_dataset("arrays", root=root)
            assert dataset.name == "arrays" and dataset.class_names == ("0", "1", "2", "3")
            assert dataset.augmentation == Augment(padding=1, flip=True)

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"x_test": None}, "x_test: missing; it holds x_train, y_train, y_test"),
            ({"x_train": np.zeros((60, 8, 8, 3))}, "x_train: got dtype float64"),
            ({"y_train": np.array([{}] * 60)}, "Object arrays cannot be loaded"),
            ({"y_train": np.repeat([0, 3], 30)}, "y_train: got labels up to 3 but none of class 1"),
            ({"y_train": np.full(60, 10**12)}, "y_train: got labels up to 1000000000000 but none of class 0"),
            ({"y_test": np.full(20, 9)}, r"y_test: got labels 9\.\.9; accepted: 0\.\.3"),
            (
                {"class_names": np.array(["a", "b"])},
                r"y_train: got labels 0\.\.3; accepted: 0\.\.1 for 2 classes",
            ),
            ({"class_names": np.arange(4)}, "class_names: got int64 of shape"),
            ({"flip": np.array([True, False])}, "flip: got bool of shape"),
        ],
    )
    def test_refuses_invalid_files(self, tmp_path, changes, message):
        arrays = {k: v for k, v in (make_arrays() | changes).items() if v is not None}
        path = save(tmp_path / "bad.npz", **arrays)
        with pytest.raises(ValueError, match=f"bad.npz: {message}"):
            load_dataset(path)

    def test_refuses_torn_and_foreign_files(self, tmp_path):
        whole = save(tmp_path / "whole.npz", **make_arrays()).read_bytes()
        flipped = bytearray(whole)
        flipped[1000] ^= 255
        for blob in (whole[: len(whole) // 2], b"", b"not a zip", pickle.dumps([1]), bytes(flipped)):
            (tmp_path / "bad.npz").write_bytes(blob)
            with pytest.raises(ValueError, match="bad.npz: "):
                load_dataset(tmp_path / "bad.npz")

    def test_unknown_name(self):
        with pytest.raises(ValueError, match=r"name: got 'cifar11'; accepted: cifar10, .* did you mean 'cifar10'"):
            load_dataset("cifar11")

    def test_no_download_of_what_is_not_public(self):
        with pytest.raises(ValueError, match="download: got True for 'digits'; accepted: only for cifar10"):
            load_dataset("digits", download=True)

    def test_absent_data_says_where_it_looked_and_the_remedy(self, no_data):
        with pytest.raises(FileNotFoundError) as error:
            load_dataset("cifar100")
        for place in ("data", ".data"):
            assert f"{Path(place, 'cifar-100-python')}, {Path(place, 'cifar100.npz')}" in str(error.value)
        for remedy in ("--data DIR", "FASTRD_DATA", "--download"):
            assert remedy in str(error.value)
        with pytest.raises(FileNotFoundError, match="arrays.npz") as error:
            load_dataset("arrays")
        assert "--download" not in str(error.value)
        with pytest.raises(FileNotFoundError, match="gone.npz: no such file"):
            load_dataset("gone.npz")

    def test_root_comes_before_environment_before_working_folder(self, no_data, monkeypatch):
        places = {place: no_data / place for place in (".data", "data", "environment", "argument")}
        for shade, folder in enumerate(places.values()):
            folder.mkdir()
            save(folder / "cifar100.npz", **make_arrays() | {"x_test": np.full((20, 8, 8, 3), shade, np.uint8)})
        (no_data / "data" / "cifar100.npz").rename(no_data / "set_aside.npz")

        def shade(**arguments):
            return load_dataset("cifar100", **arguments).x_test[0, 0, 0, 0]

        assert shade() == 0
        (no_data / "set_aside.npz").rename(no_data / "data" / "cifar100.npz")
        assert shade() == 1
        monkeypatch.setenv("FASTRD_DATA", str(places["environment"]))
        assert shade() == 2
        assert shade(root=places["argument"]) == 3
        with pytest.raises(FileNotFoundError):
            load_dataset("cifar100", root=no_data / "nowhere")

    def test_damaged_folder_is_named(self, no_data):
        pytest.importorskip("torchvision")
        folder = no_data / "cifar-10-batches-py"
        folder.mkdir()
        (folder / "data_batch_1").write_bytes(b"torn")
        with pytest.raises(FileNotFoundError, match=r"cifar-10-batches-py cannot be used: .*corrupted.*--download"):
            load_dataset("cifar10", root=no_data)

    def test_stl10_layout(self, tmp_path, stl10):
        dataset = load_dataset("stl10", root=tmp_path)
        assert np.array_equal(dataset.x_train, stl10[:4]) and np.array_equal(dataset.x_test, stl10[4:6])
        assert dataset.y_train.tolist() == [0, 9, 2, 3] and dataset.class_names == tuple("abcdefghij")
        assert dataset.image_shape == (3, 96, 96) and dataset.augmentation == Augment(padding=12, flip=True)

    def test_download_goes_to_the_root(self, no_data, monkeypatch):
        datasets = pytest.importorskip("torchvision.datasets")
        asked = []

        def refuse(self):
            asked.append(Path(self.root))
            raise OSError("no network")

        monkeypatch.setattr(datasets.CIFAR10, "download", refuse)
        with pytest.raises(FileNotFoundError, match="no network"):
            load_dataset("cifar10", root=no_data / "there", download=True)
        with pytest.raises(FileNotFoundError, match="no network"):
            load_dataset("cifar10", download=True)
        assert asked == [no_data / "there", Path("data")]

    def test_one_process_at_a_time_downloads(self, no_data, monkeypatch):
        """The jobs of a reproduction start together; a read-only folder that has the files is only checked."""
        refused = []

        def download(root):
            with ThreadPoolExecutor() as pool:
                refused.append(pool.submit(enter_and_leave, root).exception())
            save(root / "made.npz", **make_arrays())

        def enter_and_leave(root):
            with locked(root):
                pass

        made = Source(lambda root: load_dataset(root / "made.npz"), places=("made.npz",), download=download)
        monkeypatch.setitem(DATASETS, "made", made)
        for _ in range(2):
            load_dataset("made", root=no_data / "there", download=True)
        assert all(isinstance(error, InUse) for error in refused) and len(refused) == 2
        monkeypatch.setattr(os, "access", lambda *_: False)
        load_dataset("made", root=no_data / "there", download=True)
        assert refused[2] is None

    def test_find_dataset(self, no_data):
        dataset, reason = find_dataset()
        assert dataset.name == "digits"
        assert reason.startswith("using digits") and "cifar10: not found" in reason and "FASTRD_DATA" in reason
        save(no_data / "cifar10.npz", **make_arrays())
        dataset, reason = find_dataset(root=no_data)
        assert dataset.name == "cifar10" and dataset.augmentation.flip
        assert reason == f"using cifar10, found in {no_data / 'cifar10.npz'}"

    def test_import_brings_no_optional_package(self):
        names = ("torchvision", "sklearn", "matplotlib", "ffcv", "numba", "cv2")
        code = f"import sys, fastrd.data; print([m for m in {names} if m in sys.modules])"
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
        )
        assert result.stdout.strip() == "[]"


class TestReal:
    def test_cifar10(self):
        dataset = real("cifar10")
        assert dataset.x_train.shape == (50_000, 32, 32, 3) and dataset.x_test.shape == (10_000, 32, 32, 3)
        assert (
            np.bincount(dataset.y_train).tolist() == [5000] * 10 and np.bincount(dataset.y_test).tolist() == [1000] * 10
        )
        # The official order begins with a frog and, in the test set, a cat.
        assert dataset.class_names[dataset.y_train[0]] == "frog" and dataset.class_names[dataset.y_test[0]] == "cat"
        assert dataset.x_train[0, 0, 0].tolist() == [59, 62, 63]
        assert dataset.augmentation == Augment(padding=4, flip=True)
        _, holdout = split_holdout(dataset, 1000, seed=0)
        assert np.bincount(dataset.y_train[holdout]).tolist() == [100] * 10

    def test_cifar100(self):
        dataset = real("cifar100")
        assert dataset.x_train.shape == (50_000, 32, 32, 3) and dataset.x_test.shape == (10_000, 32, 32, 3)
        assert np.bincount(dataset.y_train).tolist() == [500] * 100
        assert np.bincount(dataset.y_test).tolist() == [100] * 100
        assert (
            len(dataset.class_names) == 100 and dataset.class_names[0] == "apple" and dataset.class_names[99] == "worm"
        )
        # The official files begin with cattle; an .npz may hold another order.
        assert dataset.source.endswith(".npz") or dataset.class_names[dataset.y_train[0]] == "cattle"
        assert dataset.augmentation == Augment(padding=4, flip=True)


def coordinates(n, height, width):
    """Images whose every pixel says where it is: channels (row + 1, column + 1, 0)."""
    row, column = np.mgrid[1 : height + 1, 1 : width + 1].astype(np.uint8)
    return torch.from_numpy(np.broadcast_to(np.stack([row, column, 0 * row], -1), (n, height, width, 3)).copy())


def sliced(images, draws, padding):
    """Crop and flip by plain slicing, one image at a time."""
    padded = np.pad(images.numpy(), ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    _, height, width, _ = images.shape
    out = []
    for image, (top, left, flipped, *_) in zip(padded, draws.tolist(), strict=True):
        crop = image[top : top + height, left : left + width]
        out.append(crop[:, ::-1] if flipped else crop)
    return torch.from_numpy(np.stack(out))


def changed(augment, images, draws):
    """What the kernel makes of images, as uint8 (N, H, W, C) again."""
    batch = augment_kernel(images, None, draws, **augment.switches)
    return batch.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)


class TestAugment:
    @pytest.mark.parametrize("shape, padding", [((8, 8, 1), 1), ((32, 32, 3), 4), ((7, 13, 2), 3), ((1, 1, 1), 2)])
    def test_equals_slicing(self, shape, padding):
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (200, *shape), dtype=torch.uint8, generator=generator)
        before = images.clone()
        augment = Augment(padding=padding)
        draws = augment.draw(200, generator)
        assert torch.equal(changed(augment, images, draws), sliced(images, draws, padding))
        assert torch.equal(images, before)

    def test_extreme_offsets(self):
        draws = torch.tensor([[t, o, f] for t in (0, 6) for o in (0, 6) for f in (0, 1)])
        images = coordinates(len(draws), 5, 9)
        assert torch.equal(changed(Augment(padding=3), images, draws), sliced(images, draws, 3))

    def test_switches(self):
        images = coordinates(300, 8, 8)

        def run(**options):
            augment = Augment(**options)
            return changed(augment, images, augment.draw(300, torch.Generator().manual_seed(0)))

        assert torch.equal(run(padding=0, flip=False), images)
        flipped = run(padding=0) != images
        mirrored = flipped.flatten(1).any(1)
        assert 100 < mirrored.sum() < 200
        assert torch.equal(run(padding=0)[mirrored], images[mirrored].flip(2))
        # Without the flip the same crops are taken.
        crops, both = run(padding=2, flip=False), run(padding=2)
        assert torch.equal(both, torch.where(mirrored[:, None, None, None], crops.flip(2), crops))

    def test_one_draw_for_each_image_is_independent_of_the_batch(self):
        augment = Augment(padding=2)
        images = torch.randint(0, 256, (20, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        draws = augment.draw(20, torch.Generator().manual_seed(2))
        order = torch.tensor([7, 3, 19, 0])
        assert torch.equal(changed(augment, images, draws)[order], changed(augment, images[order], draws[order]))

    def test_draws_are_uniform(self):
        n, augment = 81_000, Augment(padding=4)
        top, left, flipped = augment.draw(n, torch.Generator().manual_seed(5)).unbind(1)
        for values, cells in ((top * 9 + left, 81), (flipped * 81 + top * 9 + left, 162)):
            counts = torch.bincount(values, minlength=cells).double()
            assert len(counts) == cells
            chi_square = ((counts - n / cells) ** 2 / (n / cells)).sum()
            # Mean cells - 1 and variance twice that: six standard deviations.
            assert chi_square < cells - 1 + 6 * (2 * (cells - 1)) ** 0.5

    def test_equals_torchvision_in_distribution(self):
        transforms = pytest.importorskip("torchvision.transforms")
        n, cells = 4000, 18
        image = coordinates(1, 8, 8)
        augment = Augment(padding=1)
        ours = changed(augment, image.expand(n, -1, -1, -1), augment.draw(n, torch.Generator().manual_seed(0)))
        textbook = transforms.Compose([transforms.RandomCrop(8, padding=1), transforms.RandomHorizontalFlip()])
        planes = image[0].permute(2, 0, 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            theirs = torch.stack([textbook(planes) for _ in range(n)]).permute(0, 2, 3, 1)

        kinds = [torch.unique(images.reshape(n, -1), dim=0, return_counts=True) for images in (ours, theirs)]
        assert torch.equal(kinds[0][0], kinds[1][0]) and len(kinds[0][0]) == cells
        a, b = (counts.double() for _, counts in kinds)
        assert ((a - b) ** 2 / (a + b)).sum() < cells - 1 + 6 * (2 * (cells - 1)) ** 0.5

    @pytest.mark.parametrize("size, padding", [((32, 32), 4), ((96, 96), 12), ((8, 8), 1), ((64, 32), 4), ((7, 7), 0)])
    def test_padding_for_size(self, size, padding):
        assert Augment.for_size(*size) == Augment(padding=padding, flip=True)

    def test_errors(self):
        with pytest.raises(ValueError, match="padding: got -1"):
            Augment(padding=-1)


def make_loader(dataset=None, **options):
    dataset = dataset or make_dataset()
    options = {"batch_size": 16, "augment": Augment(padding=1)} | options
    return ResidentLoader(dataset.x_train, dataset.y_train, **options)


def assert_equal(left, right):
    left, right = list(left), list(right)
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


class TestResidentLoader:
    def test_plain_batches(self):
        dataset = make_dataset()
        loader = make_loader(dataset, augment=None, shuffle=False, drop_last=False)
        batches = list(loader.epoch(1))
        assert len(batches) == len(loader) == 4 and [len(b.y) for b in batches] == [16, 16, 16, 12]
        x, y, index = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert x.dtype == torch.float32 and y.dtype == index.dtype == torch.int64
        assert np.array_equal(x.numpy(), dataset.x_train.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255))
        assert np.array_equal(y.numpy(), dataset.y_train) and torch.equal(index, torch.arange(60))
        assert x.min() >= 0 and x.max() == 1

    def test_every_image_once_in_a_new_order_each_epoch(self):
        loader = make_loader(drop_last=False)
        orders = [torch.cat([b.index for b in loader.epoch(e)]) for e in (1, 2)]
        for order in orders:
            assert torch.equal(order.sort().values, torch.arange(60))
        assert not torch.equal(*orders) and not torch.equal(orders[0], torch.arange(60))

    def test_drop_last(self):
        loader = make_loader()
        assert len(loader) == 3 and [len(b.y) for b in loader.epoch(1)] == [16, 16, 16]
        assert len(make_loader(batch_size=60)) == len(make_loader(batch_size=60, drop_last=False)) == 1

    def test_two_epochs_may_run_at_once(self):
        loader = make_loader()
        one, two = list(loader.epoch(1)), list(loader.epoch(2))
        pairs = list(zip(loader.epoch(1), loader.epoch(2), strict=True))
        assert_equal([a for a, _ in pairs], one)
        assert_equal([b for _, b in pairs], two)

    def test_seed_and_epoch_change_order_and_augmentation(self):
        x = {}
        for seed, epoch in ((0, 1), (0, 2), (1, 1)):
            ordered = make_loader(seed=seed, shuffle=False, batch_size=60)
            x[seed, epoch] = next(ordered.epoch(epoch)).x
        assert not torch.equal(x[0, 1], x[0, 2]) and not torch.equal(x[0, 1], x[1, 1])
        orders = [next(make_loader(seed=seed).epoch(1)).index for seed in (0, 1)]
        assert not torch.equal(*orders)

    def test_augmentation_belongs_to_the_image_not_the_batch(self):
        def by_index(**options):
            return {
                int(i): x
                for b in make_loader(drop_last=False, **options).epoch(3)
                for i, x in zip(b.index, b.x, strict=True)
            }

        one, other = by_index(batch_size=16), by_index(batch_size=60, shuffle=False)
        assert one.keys() == other.keys() and all(torch.equal(one[i], other[i]) for i in one)

    def test_index_space_is_the_given_images(self):
        dataset = make_dataset()
        loader = make_loader(dataset, augment=None, batch_size=8, drop_last=False)
        assert loader.num_samples == 60 and len(loader) == 8
        assert loader.labels.dtype == torch.int64 and np.array_equal(loader.labels.numpy(), dataset.y_train)
        served = []
        for x, y, index in loader.epoch(1):
            assert torch.equal(y, loader.labels[index])
            assert np.array_equal((x * 255).round().byte().permute(0, 2, 3, 1).numpy(), dataset.x_train[index.numpy()])
            served += index.tolist()
        assert sorted(served) == list(range(60))

    def test_index_may_be_written_to(self):
        loader = make_loader(shuffle=False)
        next(loader.epoch(1)).index.zero_()
        assert torch.equal(next(loader.epoch(1)).index, torch.arange(16))

    @pytest.mark.filterwarnings("error")
    def test_numpy_and_torch_alike(self):
        dataset = make_dataset()
        tensors = ResidentLoader(
            torch.from_numpy(dataset.x_train),
            torch.from_numpy(dataset.y_train).to(torch.int32),
            batch_size=16,
        )
        frozen = dataset.x_train.copy()
        frozen.flags.writeable = False
        arrays = ResidentLoader(frozen, dataset.y_train, batch_size=16)
        assert_equal(tensors.epoch(1), arrays.epoch(1))

    def test_memory_format(self):
        last, first = (next(make_loader(channels_last=flag).epoch(1)).x for flag in (True, False))
        assert last.is_contiguous(memory_format=torch.channels_last) and not last.is_contiguous()
        assert first.is_contiguous() and torch.equal(last, first)

    @needs_cuda
    def test_every_device_serves_the_same_batches(self):
        dataset = load_dataset("digits")
        for augment in (None, Augment(padding=2)):
            cpu, cuda = (make_loader(dataset, augment=augment, device=device).epoch(1) for device in ("cpu", "cuda"))
            assert_equal(cpu, ([part.cpu() for part in batch] for batch in cuda))

    def test_refuses_invalid_data(self):
        images, labels = torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
        with pytest.raises(ValueError, match="images: got dtype float32"):
            ResidentLoader(images.float(), labels, batch_size=2)
        with pytest.raises(ValueError, match="images: .* channels first"):
            ResidentLoader(images.permute(0, 3, 1, 2), labels, batch_size=2)
        with pytest.raises(ValueError, match=r"labels: got shape \(3,\); accepted: \(4,\)"):
            ResidentLoader(images, labels[:3], batch_size=2)
        with pytest.raises(ValueError, match=r"labels: got labels -2\.\.-2; accepted: numbers >= -1"):
            ResidentLoader(images, labels - 2, batch_size=2)

    @pytest.mark.parametrize("start", [-1, 4])
    def test_refuses_a_start_outside_the_epoch(self, start):
        with pytest.raises(ValueError, match=rf"start: got {start}; accepted: a batch number in 0\.\.3"):
            make_loader().epoch(1, start=start)
