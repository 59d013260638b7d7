"""pgd_step: PyTorch path here; the Triton kernel where the `triton` tests run."""

from __future__ import annotations

import mutants
import pytest
import torch
from checks import BACKENDS, DEVICE, assert_compiles
from fastrd.kernels import pgd_step as module
from fastrd.kernels import reference
from fastrd.kernels.pgd_step import pgd_step

STEP = {"step_size": 2 / 255, "epsilon": 8 / 255}


def images(shape: tuple[int, ...] = (3, 3, 41, 17), dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """x_adv, gradient, x: near the faces of the ball and of the cube, gradients of both signs and zero."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(shape, generator=generator).mul_(1.2).sub_(0.1).clamp_(0, 1)
    x_adv = (x + 0.05 * torch.randn(shape, generator=generator)).clamp_(0, 1)
    gradient = torch.randn(shape, generator=generator) * 1e-6
    gradient[gradient.abs() < 3e-7] = 0
    return [tensor.to(DEVICE, dtype) for tensor in (x_adv, gradient, x)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    x = torch.tensor([0.5, 0.5, 0.5, 0.0, 1.0, 0.5], device=DEVICE)
    x_adv = torch.tensor([0.5, 0.57, 0.5, 0.05, 0.95, 0.2], device=DEVICE)
    gradient = torch.tensor([1e-9, 3.0, 0.0, -2.0, 7.0, float("nan")], device=DEVICE)
    out = pgd_step(x_adv, gradient, x, step_size=0.06, epsilon=0.1, backend=backend)
    torch.testing.assert_close(out, torch.tensor([0.56, 0.6, 0.5, 0.0, 1.0, 0.4], device=DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (7, 3), (3, 3, 41, 17)])
def test_equals_the_reference_in_every_pixel(backend, dtype, shape):
    inputs = images(shape, dtype)
    expected = reference.pgd_step(*inputs, **STEP)
    out = pgd_step(*inputs, **STEP, backend=backend)
    assert out.dtype == dtype and torch.equal(out, expected)
    assert out.data_ptr() != inputs[0].data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_rounds_once(backend):
    inputs = images(dtype=torch.bfloat16)
    exact = reference.pgd_step(*(tensor.float() for tensor in inputs), **STEP)
    out = pgd_step(*inputs, **STEP, backend=backend)
    # The interpreter truncates: a whole unit in the last place of numbers below 1.
    assert (out.float() - exact).abs().max() <= 2**-8


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_and_memory_formats(backend):
    inputs = [tensor.to(memory_format=torch.channels_last) for tensor in images()]
    expected = reference.pgd_step(*inputs, **STEP)
    out = pgd_step(*inputs, **STEP, backend=backend)
    assert out.is_contiguous(memory_format=torch.channels_last) and torch.equal(out, expected)
    mixed = pgd_step(inputs[0], inputs[1].contiguous(), inputs[2].contiguous().half().float(), **STEP, backend=backend)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-3)
    address = inputs[0].data_ptr()
    written = pgd_step(*inputs, **STEP, inplace=True, backend=backend)
    assert written is not expected and written.data_ptr() == address and torch.equal(inputs[0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_on_a_slice_leaves_the_rest_alone(backend):
    x_adv, gradient, x = images((4, 3, 9, 9))
    whole = x_adv.repeat(2, 1, 1, 1)
    view = whole[::2]
    other = whole[1::2].clone()
    expected = reference.pgd_step(view, gradient, x, **STEP)
    pgd_step(view, gradient, x, **STEP, inplace=True, backend=backend)
    assert torch.equal(whole[::2], expected) and torch.equal(whole[1::2], other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_may_be_of_another_type(backend):
    x_adv, gradient, x = images()
    gradient = gradient.sign()
    expected = reference.pgd_step(x_adv, gradient, x, **STEP)
    assert torch.equal(pgd_step(x_adv, gradient.half(), x, **STEP, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph(backend):
    x_adv, gradient, x = images((2, 3, 8, 8))
    expected = reference.pgd_step(x_adv, gradient, x, **STEP)

    def step(*tensors: torch.Tensor) -> torch.Tensor:
        return pgd_step(*tensors, **STEP, inplace=True, backend=backend) + 0

    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(x_adv, gradient, x), expected)
    assert torch.equal(x_adv, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    inputs = images()
    expected = pgd_step(*inputs, **STEP, backend=backend)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        under = pgd_step(*inputs, **STEP, backend=backend)
    assert under.dtype == torch.float32 and torch.equal(under, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_clean_images_may_be_where_it_starts(backend):
    x, gradient, _ = images()
    expected = reference.pgd_step(x, gradient, x, **STEP)
    assert torch.equal(pgd_step(x, gradient, x, **STEP, inplace=True, backend=backend), expected)


@pytest.mark.triton
def test_the_op_satisfies_its_contract():
    x_adv, gradient, x = images((2, 3, 4, 4))
    torch.library.opcheck(module.pgd_step_op, (x_adv, gradient, x, 0.1, 0.2, 0.0, 1.0, torch.empty_like(x)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch(backend):
    assert pgd_step(*images((0, 3, 8, 8)), **STEP, backend=backend).shape == (0, 3, 8, 8)


def test_refusals_name_the_argument():
    x = torch.zeros(2, 3, device=DEVICE)
    for name, call in {
        "gradient": lambda: pgd_step(x, x[:1], x, **STEP),
        "x": lambda: pgd_step(x, x, x[:, :1], **STEP),
        "backend": lambda: pgd_step(x, x, x, **STEP, backend="cuda"),
        "backend ": lambda: pgd_step(x.double(), x, x, **STEP, backend="triton"),
    }.items():
        with pytest.raises(ValueError, match=f"^{name.strip()}: got .*accepted: "):
            call()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_shipped_block_compiles_without_spills(target):
    assert_compiles(target, module="pgd_step")


@pytest.mark.triton
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x - epsilon, propagate", "x, propagate"),
        ("gradient < 0", "gradient <= 0"),
        ("tl.program_id(0).to(tl.int64) * BLOCK", "tl.program_id(0).to(tl.int64) * (BLOCK - 1)"),
        ("grid = (-(-size // BLOCK),)", "grid = (size // BLOCK,)"),
    ],
)
def test_planted_bugs_are_caught(old, new, tmp_path, monkeypatch):
    mutants.plant(module, old, new, tmp_path, monkeypatch)
    x_adv, gradient, x = images()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            pgd_step(x_adv, gradient, x, **STEP, inplace=True, backend="triton"),
            reference.pgd_step(*images(), **STEP),
        )
