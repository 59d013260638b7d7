"""augment: PyTorch and compiled C++ here; the Triton kernel where the `triton` tests run."""

from __future__ import annotations

import mutants
import pytest
import torch
from checks import DEVICE, assert_compiles
from fastrd.kernels import augment as module
from fastrd.kernels import reference

BACKENDS = [pytest.param("torch"), pytest.param("auto"), pytest.param("triton", marks=pytest.mark.triton)]


def inputs(shape: tuple[int, ...] = (9, 13, 11, 3)) -> list[torch.Tensor]:
    """images, 7 rows (one of them twice) and draws for a padding of 3, with the extreme offsets among them."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    rows = torch.randint(0, shape[0], (7,), generator=generator)
    rows[-1] = rows[0]
    bounds = (7, 7, 2)
    draws = torch.stack([torch.randint(n, (7,), generator=generator) for n in bounds], 1)
    draws[0] = 0
    draws[1] = torch.tensor(bounds) - 1
    return [tensor.to(DEVICE) for tensor in (images, rows, draws)]


SWITCHES = [
    {"padding": 3, "flip": True},
    {"padding": 3, "flip": False},
    {"padding": 0, "flip": True},
    {"padding": 0, "flip": False},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@pytest.mark.parametrize("shape", [(9, 13, 11, 3), (3, 1, 1, 1), (2, 7, 41, 2)], ids=str)
def test_equals_the_reference_in_every_bit(backend, switches, shape):
    images, rows, draws = inputs(shape)
    before = images.clone()
    expected = reference.augment(images, rows, draws, **switches)
    out = module.augment(images, rows, draws, **switches, backend=backend)
    assert out.shape == expected.shape and torch.equal(out, expected) and torch.equal(images, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_formats(backend, channels_last):
    images, rows, draws = inputs()
    out = module.augment(images, rows, draws, **SWITCHES[0], channels_last=channels_last, backend=backend)
    assert torch.equal(out, reference.augment(images, rows, draws, **SWITCHES[0]))
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    assert out.is_contiguous(memory_format=wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_rows_and_draws(backend):
    images, rows, draws = inputs()
    plain = module.augment(images, backend=backend)
    assert torch.equal(plain, images.permute(0, 3, 1, 2).float() / torch.tensor(255.0, device=DEVICE))
    assert torch.equal(module.augment(images, rows, backend=backend), plain[rows])
    everyone = torch.arange(7, device=DEVICE)
    assert torch.equal(
        module.augment(images[:7], None, draws, **SWITCHES[0], backend=backend),
        reference.augment(images, everyone, draws, **SWITCHES[0]),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_value_is_rounded_once(backend):
    images = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(1, 16, 16, 1)
    exact = images.view(-1).double() / 255
    for dtype in (torch.float32, torch.float16):
        out = module.augment(images, dtype=dtype, backend=backend)
        assert out.dtype == dtype and torch.equal(out.view(-1), exact.to(dtype))
    out = module.augment(images, dtype=torch.bfloat16, backend=backend)
    # The interpreter truncates: a whole unit in the last place of numbers below 1.
    assert (out.view(-1).double() - exact).abs().max() <= 2**-8


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    images, rows, draws = inputs((18, 13, 11, 3))
    expected = reference.augment(images[::2], rows // 2, draws, **SWITCHES[0])
    wide = torch.zeros(7, 5, dtype=torch.int64, device=DEVICE)
    wide[:, ::2] = draws
    out = module.augment(images[::2], rows // 2, wide[:, ::2], **SWITCHES[0], backend=backend)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch(backend):
    images, rows, draws = inputs()
    out = module.augment(images, rows[:0], draws[:0], **SWITCHES[0], backend=backend)
    assert out.shape == (0, 3, 13, 11)
    assert module.augment(images[:0], None, draws[:0], **SWITCHES[0], backend=backend).shape == (0, 3, 13, 11)


def test_refusals_name_the_argument():
    images, rows, draws = inputs()
    for name, call in {
        "images": lambda: module.augment(images.float(), rows),
        "images ": lambda: module.augment(images[0], rows),
        "rows": lambda: module.augment(images, rows.int()),
        "draws": lambda: module.augment(images, rows, draws[:3]),
        "draws ": lambda: module.augment(images, rows, draws.float()),
        "dtype": lambda: module.augment(images, rows, dtype=torch.uint8),
        "backend": lambda: module.augment(images, rows, backend="cuda"),
        "backend ": lambda: module.augment(images, rows, dtype=torch.float64, backend="triton"),
    }.items():
        with pytest.raises(ValueError, match=f"^{name.strip()}: got .*accepted: "):
            call()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_shipped_block_compiles_without_spills(target):
    assert_compiles(target, module="augment")


@pytest.mark.triton
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("line += tl.load(draw_ptr)", "line += tl.load(draw_ptr + 1)"),
        ("inside &= (line >= 0) & (line < HEIGHT)", "inside &= (line < HEIGHT)"),
        ("& (column < WIDTH)", "& (column <= WIDTH)"),
        ("WIDTH - 1 - column", "WIDTH - column"),
        ("if PICK else image", "if not PICK else image"),
        ("% BLOCKS * BLOCK", "% BLOCKS * (BLOCK + 1)"),
        ("255.0), mask=valid", "256.0), mask=valid"),
        ("LAST=out.is_contiguous(memory_format=torch.channels_last)", "LAST=True"),
    ],
)
def test_planted_bugs_are_caught(old, new, tmp_path, monkeypatch):
    mutants.plant(module, old, new, tmp_path, monkeypatch)
    images, rows, draws = inputs((4, 21, 19, 3))
    expected = reference.augment(images, rows, draws, **SWITCHES[0])
    with pytest.raises(AssertionError):
        for last in (True, False):
            out = module.augment(images, rows, draws, **SWITCHES[0], channels_last=last, backend="triton")
            torch.testing.assert_close(out, expected)
