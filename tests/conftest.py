"""Fixtures shared by all tests. Nothing here needs the network or a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from fastrd.core.process_environment import sleep_while_waiting

os.environ.setdefault("FASTRD_FORM", "chain")  # which form of a network is fastest is not for a test to measure
sleep_while_waiting()  # before torch is imported, so that a busy machine makes tests less slow

import torch
from fastrd.kernels.cpu.native import library
from torch import nn

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("inductor") is None:
        return
    if library() is None:
        pytest.skip("torch.compile needs a C++ compiler with OpenMP on a CPU")
    if os.environ.get("ATEN_CPU_CAPABILITY") == "default":
        pytest.skip("what torch.compile writes does not compile under ATEN_CPU_CAPABILITY=default (torch 2.14)")


@pytest.fixture(autouse=True, scope="session")
def _exact():
    """On a GPU float32 is float32: cuDNN's convolutions would be tf32, for which no tolerance here is meant."""
    if not torch.cuda.is_available():
        yield
        return
    from fastrd.engine.process import float32_precision

    with float32_precision("fp32", torch.device("cuda")):
        yield


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of the real data sets; tests that need them are skipped, with this reason, where it is absent."""
    for root in (os.environ.get("FASTRD_DATA"), ROOT / ".data", ROOT / "data"):
        if root and (Path(root) / "cifar-10-batches-py").is_dir():
            return Path(root)
    pytest.skip("no real CIFAR-10 found (FASTRD_DATA, ./.data, ./data)")


@pytest.fixture(scope="session")
def vectors() -> Path:
    """Numbers recorded from the published implementations."""
    return ROOT / "tests" / "vectors"


class TinyNet(nn.Module):
    """A small smooth network under the engine's contract, with batch normalisation."""

    def __init__(self, num_classes: int = 4, channels: int = 3, width: int = 6) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.Tanh(),
            nn.AdaptiveAvgPool2d(2),
        )
        self.feature_dim, self.num_classes = 4 * width, num_classes
        self.head = nn.Linear(self.feature_dim, num_classes)

    def forward(self, x: torch.Tensor, features: bool = False):
        phi = self.body(x).flatten(1)
        return (self.head(phi), phi) if features else self.head(phi)


@pytest.fixture
def tiny():
    """A factory of float64 TinyNets with non-trivial BN statistics: `tiny(seed)`."""

    def build(seed: int, **options) -> TinyNet:
        torch.manual_seed(seed)
        net = TinyNet(**options).double()
        with torch.no_grad():
            for _ in range(3):
                net(torch.rand(16, options.get("channels", 3), 6, 6, dtype=torch.float64))
            net.head.weight.mul_(6)
        return net

    return build


@pytest.fixture
def batch():
    """x (5, 3, 6, 6) float64 in [0, 1], y, sample indices."""
    generator = torch.Generator().manual_seed(7)
    x = torch.rand(5, 3, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0, 1, 2, 3, 1]), torch.tensor([4, 0, 2, 9, 7])


@pytest.fixture
def toy_arrays(tmp_path: Path) -> Path:
    """A learnable 4-class data set of 8x8 colour images as an .npz: class = which quadrant is bright."""
    rng = np.random.default_rng(0)

    def split(n: int):
        y = rng.integers(0, 4, n)
        x = rng.integers(0, 90, (n, 8, 8, 3))
        for i, c in enumerate(y):
            x[i, 4 * (c // 2) : 4 * (c // 2) + 4, 4 * (c % 2) : 4 * (c % 2) + 4] += 120
        return x.astype(np.uint8), y.astype(np.int64)

    (x_train, y_train), (x_test, y_test) = split(160), split(40)
    path = tmp_path / "toy.npz"
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path


@pytest.fixture
def stl10(tmp_path: Path, monkeypatch) -> np.ndarray:
    """Nine images of STL-10 (4 training, 2 test, 3 unlabelled ones), and `tmp_path` as a root that holds them.

    The real files are 2.6 GB; these are small ones in their format: channel planes, columns before rows.
    """
    datasets = pytest.importorskip("torchvision.datasets")
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    images = np.random.default_rng(0).integers(0, 256, (9, 96, 96, 3), dtype=np.uint8)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for name, part in (("train", slice(0, 4)), ("test", slice(4, 6)), ("unlabeled", slice(6, 9))):
        images[part].transpose(0, 3, 2, 1).tofile(folder / f"{name}_X.bin")
    for name, labels in (("train", [1, 10, 3, 4]), ("test", [5, 6])):
        np.array(labels, np.uint8).tofile(folder / f"{name}_y.bin")
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    return images


@pytest.fixture
def registry():
    """Forgets afterwards what a plugin or guide registers."""
    from fastrd.attacks import INNER
    from fastrd.core import plugins
    from fastrd.data.catalog import DATASETS
    from fastrd.evaluation.measures import MEASURES
    from fastrd.methods import ADDONS, BASES
    from fastrd.models.foreign import NETWORKS

    known = (ADDONS, BASES, DATASETS, INNER, MEASURES, NETWORKS, plugins._loaded)
    before, given = [dict(names) for names in known], list(plugins._given)
    yield
    for names, kept in zip(known, before, strict=True):
        names.clear()
        names.update(kept)
    plugins._given[:] = given
