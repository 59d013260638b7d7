"""Images per second of the three loaders and of torchvision behind a DataLoader, with the same augmentation.

CIFAR-10 in full (the real one where it is found, else noise of its shape) and a data set of the shape of STL-10's
labelled part. Every variant yields shuffled float32 batches of 128 on the device, cropped and flipped per image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.sizes import CUDA, DEVICE, TINY, seconds
from fastrd.data import Dataset, load_dataset, make_loader
from fastrd.data.pack import pack

BATCH = 128
SHAPES = {"tiny": (256, 32)} if TINY else {"cifar10": (50_000, 32), "stl10": (5_000, 96)}
TEXTBOOK = "torchvision + DataLoader"


@pytest.fixture(scope="module", params=SHAPES)
def data(request, tmp_path_factory) -> tuple[str, Dataset, Path]:
    """What it is, the data set, and a file it is packed in."""
    folder = tmp_path_factory.mktemp("packed")
    count, side = SHAPES[request.param]
    place, title = request.param, "real CIFAR-10"
    try:
        if request.param != "cifar10":
            raise FileNotFoundError
        dataset = load_dataset(place)
    except FileNotFoundError:
        random = np.random.default_rng(0)
        shape = (count, side, side, 3)
        place, title = folder / f"{request.param}.npz", f"noise of the shape of {request.param}"
        pixels, labels = random.integers(0, 256, shape, dtype=np.uint8), np.arange(count) % 10
        np.savez(place, x_train=pixels, y_train=labels, x_test=pixels[:10], y_test=labels[:10], flip=True)
        dataset = load_dataset(place)
    return (
        f"{title}, {count} x 3 x {side} x {side}",
        dataset,
        pack(place, folder / "packed.beton", progress=False).path,
    )


def textbook(dataset: Dataset, workers: int) -> Callable[[], Iterator[torch.Tensor]]:
    """As the literature's trainers read CIFAR-10: images as PIL, transformed one by one in worker processes."""
    from PIL import Image
    from torchvision import transforms

    side, padding = dataset.image_shape[1], dataset.augmentation.padding
    steps = [transforms.RandomCrop(side, padding), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    change = transforms.Compose(steps)

    class Images(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(dataset.x_train)

        def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
            return change(Image.fromarray(dataset.x_train[number])), int(dataset.y_train[number])

    loader = torch.utils.data.DataLoader(
        Images(),
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=CUDA,
        persistent_workers=True,
    )
    return lambda: (x.to(DEVICE, non_blocking=True) for x, _ in loader)


def ours(kind: str, dataset: Dataset, file: Path, workers: int) -> Callable[[], Iterator[torch.Tensor]]:
    source = dataset if kind == "resident" else load_dataset(file)
    loader = make_loader(
        kind,
        source.x_train,
        source.y_train,
        batch_size=BATCH,
        device=DEVICE,
        augment=source.augmentation,
        workers=workers,
    )
    return lambda: (batch.x for batch in loader.epoch(1))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("variant", ["resident", "ffcv", "torch", TEXTBOOK])
def test_loaders(benchmark, data, variant, workers):
    """Workers are torch's threads for the resident loader, of its own for FFCV, and processes for the DataLoaders."""
    title, dataset, file = data
    if variant == "ffcv":
        pytest.importorskip("ffcv", exc_type=ImportError)
    if variant == "resident" and CUDA and workers > 1:
        pytest.skip("the resident loader has no workers on a GPU")
    torch.set_num_threads(workers)
    make = partial(textbook, dataset) if variant == TEXTBOOK else partial(ours, variant, dataset, file)
    batches = make(workers=workers)
    images = len(dataset.x_train) // BATCH * BATCH

    def epoch() -> None:
        for _ in batches():
            pass

    first = seconds(epoch)
    benchmark.pedantic(lambda: seconds(epoch), rounds=5 if first < 2 else 3)
    # The fastest round: threads that wait for each other lose a hundredfold when anything else runs, and say nothing
    # about the loader.
    fastest = benchmark.stats.stats.min
    problem = f"{title}, {workers} worker{'s' * (workers > 1)}"
    benchmark.extra_info.update(
        problem=problem,
        variant=variant,
        workers=workers,
        images_per_s=images / fastest,
        first_epoch_seconds=first,
    )
    benchmark.group = problem
