"""conv2d: Winograd's sums and the sums over taps, against PyTorch's convolution in float64."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import mutants
import pytest
import torch
import torch.nn.functional as F
from checks import value_and_gradients
from fastrd.kernels.cpu import conv2d as module
from fastrd.kernels.cpu import native
from fastrd.kernels.cpu.conv2d import conv2d
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

Maybe = Tensor | None

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler that takes the kernels")

SQUARE, HALVED = {"stride": 1, "padding": 1}, {"stride": 2, "padding": 1}
BOTH = pytest.mark.parametrize("geometry", [SQUARE, HALVED], ids=["square", "halved"])

# n, c, k, height, width, kernel, stride, padding
SIZES = [(2, 16, 16, 7, 9), (1, 16, 32, 1, 1), (5, 32, 48, 5, 4), (2, 3, 16, 32, 32), (2, 5, 32, 3, 6)]
CASES = [(*sizes, 3, 1, 1) for sizes in SIZES]
TAPS = product(((8, 8), (7, 4)), (1, 2, 3), (0, 1))
CASES += [(2, 16, 32, *sides, kernel, 2, padding) for sides, kernel, padding in TAPS]
CASES += [(5, 3, 16, 7, 9, 3, 2, 1), (1, 32, 48, 1, 3, 3, 2, 1)]


def plain(x: Tensor, weight: Tensor, bias: Maybe = None, add: Maybe = None, **options: int) -> Tensor:
    """The expression that conv2d stands for."""
    relu = options.pop("relu", False)
    y = F.conv2d(x, weight, bias, **options)
    y = y if add is None else y + add
    return y.relu() if relu else y


def ours(x: Tensor, weight: Tensor, bias: Maybe = None, add: Maybe = None, **options: int) -> Tensor:
    return conv2d(x, weight, bias, add=add, **options)


def images(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def operands(
    n: int, c: int, k: int, h: int, w: int, kernel: int = 3, stride: int = 1, padding: int = 1
) -> list[Tensor]:
    """x, weight, bias, add; what relu is taken of is nowhere within rounding of zero."""
    x, weight, bias = images(n, c, h, w), torch.randn(k, c, kernel, kernel) / 3 / c**0.5, torch.randn(k)
    y = plain(x, weight, bias, stride=stride, padding=padding)
    add = torch.randn(y.shape)  # not in the memory format of x
    return [x, weight, bias, torch.where((y + add).abs() < 1e-3, add + 0.01, add)]


def derivatives(f: Callable[..., Tensor], inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The value; its gradients, final and to be differentiated; the gradients of a sum over the latter."""
    torch.manual_seed(1)
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    value = f(*leaves)
    upstream = torch.randn(value.shape).to(dtype).requires_grad_()
    once = torch.autograd.grad(value, leaves, upstream.detach(), retain_graph=True)
    gradients = torch.autograd.grad(value, leaves, upstream, create_graph=True)
    total = sum((g * torch.randn(g.shape).to(dtype)).sum() for g in gradients)
    again = torch.autograd.grad(total, [*leaves, upstream], materialize_grads=True)
    return [value, *once, *gradients, *again]


def assert_rounded(results: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """Errors are relative to the root of the exact result's mean square."""
    for number, (x, gold) in enumerate(zip(results, exact, strict=True)):
        assert x.dtype == torch.float32 and x.shape == gold.shape, number
        error, scale = (x.double() - gold).abs(), gold.square().mean().sqrt()
        assert error.square().mean().sqrt() <= 3e-6 * scale, number
        assert error.max() <= 5e-5 * scale, number


def assert_derivatives_are_exact(case: tuple[int, ...], fused: bool = True) -> None:
    inputs = operands(*case) if fused else operands(*case)[:2]
    options = {"stride": case[6], "padding": case[7], "relu": fused}
    exact = derivatives(partial(plain, **options), inputs, torch.float64)
    assert_rounded(derivatives(partial(ours, **options), inputs, torch.float32), exact)


def assert_nan_stays(geometry: dict[str, int]) -> None:
    x, weight, *_ = operands(2, 16, 16, 8, 8)
    x[0, 3, 2, 2] = float("nan")
    y = conv2d(x, weight, **geometry, relu=True)
    assert y[plain(x, weight, **geometry).isnan()].isnan().all() and y[1].isfinite().all()


SHIPPED = module.FEWEST_PIXELS.get()


@pytest.fixture(autouse=True)
def every_size():
    """However few pixels a convolution makes, it is taken over: small ones are quick to check."""
    with module.fewest_pixels(1):
        yield


@pytest.mark.parametrize(("side", "taken"), [(7, True), (6, False)])
def test_convolutions_that_make_few_pixels_are_left_to_pytorch(side, taken, launched):
    x, weight, *_ = operands(2, 16, 16, side, side, 3, 2, 1)
    with module.fewest_pixels(SHIPPED):
        conv2d(x, weight, **HALVED)
    assert bool(launched) == taken


def test_how_few_pixels_is_for_the_thread_that_said_it(launched):
    """Two runs in one process, whose blocks overlap, leave each other and what comes after them alone."""
    x, weight, *_ = operands(2, 16, 16, 8, 8, 3, 2, 1)
    entered, left = threading.Event(), threading.Event()

    def another():
        with module.fewest_pixels(sys.maxsize):
            entered.set()
            left.wait()

    thread = threading.Thread(target=another)
    with module.fewest_pixels(1):
        thread.start()
        entered.wait()
        conv2d(x, weight, **HALVED)
    left.set()
    thread.join()
    conv2d(x, weight, **HALVED)
    assert len(launched) == 2


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The names of the compiled functions that have run."""
    names: list[str] = []
    launch = module._launch
    monkeypatch.setattr(module, "_launch", lambda name, *rest: (names.append(name), launch(name, *rest)))
    return names


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_both_derivatives_are_exact_to_rounding(case, fused, launched):
    assert_derivatives_are_exact(case, fused)
    assert launched


@BOTH
@pytest.mark.parametrize("given", ["bias", "add", "relu", "bias relu", "add relu"])
def test_each_option_without_the_others(geometry, given):
    x, weight, bias, add = operands(2, 16, 32, 7, 9, **geometry)
    inputs = x, weight, bias if "bias" in given else None, add if "add" in given else None
    options = geometry | {"relu": "relu" in given}
    y = ours(*inputs, **options)
    assert_rounded([y], [plain(*(t if t is None else t.double() for t in inputs), **options)])
    assert y.is_contiguous(memory_format=torch.channels_last)


@BOTH
@pytest.mark.parametrize(
    "moved",
    [
        lambda w: w.contiguous(memory_format=torch.channels_last),
        lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
        lambda w: w.transpose(2, 3).contiguous().transpose(2, 3),
        lambda w: w.repeat_interleave(2, 3)[..., ::2],
    ],
    ids=["channels_last", "channels swapped", "taps swapped", "every other number"],
)
def test_a_weight_may_lie_in_memory_in_any_order(geometry, moved):
    x, weight, *_ = operands(2, 16, 32, 7, 9)
    x.requires_grad_()
    y, y_moved = (conv2d(x, w, **geometry) for w in (weight, moved(weight)))
    assert moved(weight).stride() != weight.stride() and torch.equal(y, y_moved)
    # The gradient of a sum is one number, expanded.
    assert torch.equal(*(torch.autograd.grad(total.sum(), x)[0] for total in (y, y_moved)))


@BOTH
def test_a_bias_may_be_a_view(geometry):
    x, weight, bias, _ = operands(2, 16, 32, 7, 9)
    view = bias.repeat_interleave(2)[::2]
    assert torch.equal(conv2d(x, weight, view, **geometry), conv2d(x, weight, bias, **geometry))


def test_the_gradient_of_a_large_weight_is_left_to_pytorch(launched, monkeypatch):
    for large in (16 * 16, 16 * 16 - 1):
        monkeypatch.setattr(module, "LARGE", large)
        assert_derivatives_are_exact(CASES[0])
        assert ("conv2d_winograd_weight" in launched) == (large == 16 * 16)
        launched.clear()


def there_and_back(geometry: dict[str, int], x: Tensor, add: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """What is computed of each image, as a function of tensors alone."""
    generator = torch.Generator().manual_seed(2)
    k, c = g.shape[1], x.shape[1]
    weight, bias = (torch.randn(*shape, generator=generator) for shape in ((k, c, 3, 3), (k,)))
    y = module.forward(x, weight, bias, add, *geometry.values(), True)
    return y, *module.input_gradient(g, weight, y, *geometry.values(), *x.shape[2:], True)


@BOTH
def test_an_image_is_the_same_in_any_batch_and_on_any_number_of_threads(geometry, set_threads, launched):
    x, *_, add = operands(5, 32, 16, 7, 9, **geometry)
    tensors = x, add, torch.randn(add.shape)
    whole = there_and_back(geometry, *tensors)
    for threads in (1, 2):
        set_threads(threads)
        for part in (slice(0, 5), slice(0, 1), slice(3, 4), slice(1, 4)):
            results = there_and_back(geometry, *(t[part] for t in tensors))
            assert all(torch.equal(a[part], b) for a, b in zip(whole, results, strict=True)), (threads, part)
    assert len(launched) == 2 * 9


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_more_threads_than_tiles_share_the_sums_of_a_weight_gradient(case, set_threads):
    set_threads(5)
    assert_derivatives_are_exact(case)


@pytest.mark.parametrize(("geometry", "side"), [(SQUARE, 32), (HALVED, 63)], ids=["square", "halved"])
def test_results_written_past_the_caches_are_the_same(geometry, side):
    x, *_, add = operands(70, 16, 16, side, side, **geometry)
    tensors = x, add, torch.randn(add.shape)
    assert add.numel() > 2**20 > add[:35].numel()
    whole = there_and_back(geometry, *tensors)
    halves = [there_and_back(geometry, *(t[part] for t in tensors)) for part in (slice(35), slice(35, 70))]
    assert all(map(torch.equal, whole, map(torch.cat, zip(*halves, strict=True))))


def assert_pytorch_does_it(geometry: dict[str, int], inputs: Sequence[Tensor]) -> None:
    results = (value_and_gradients(partial(f, **geometry, relu=True), inputs) for f in (ours, plain))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    ("k", "kernel", "stride", "padding", "change"),
    [
        pytest.param(16, 3, 1, 1, Tensor.double, id="float64"),
        pytest.param(16, 3, 1, 1, Tensor.contiguous, id="contiguous"),
        pytest.param(10, 3, 1, 1, Tensor.clone, id="10 channels"),
        pytest.param(10, 3, 2, 1, Tensor.clone, id="10 channels, halved"),
        pytest.param(16, 1, 1, 0, Tensor.clone, id="1x1"),
        pytest.param(16, 3, 1, 0, Tensor.clone, id="no padding"),
        pytest.param(16, 5, 1, 2, Tensor.clone, id="5x5"),
        pytest.param(16, 4, 2, 1, Tensor.clone, id="16 taps, halved"),
        pytest.param(16, 3, 3, 1, Tensor.clone, id="a third"),
    ],
)
def test_the_rest_is_left_to_pytorch(k, kernel, stride, padding, change, launched):
    geometry = {"stride": stride, "padding": padding}
    assert_pytorch_does_it(geometry, [change(t) for t in operands(2, 16, k, 8, 8, kernel, **geometry)])
    assert not launched


def test_autocast_is_left_to_pytorch(launched):
    *inputs, add = operands(2, 16, 32, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = (f(*inputs, add.bfloat16(), **SQUARE, relu=True) for f in (ours, plain))
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected) and not launched


@BOTH
@pytest.mark.parametrize(
    "other",
    [
        lambda add: add[:1, :, :1, :1],  # is broadcast
        lambda add: add.bfloat16(),
        lambda add: add.double(),
    ],
    ids=["broadcast", "bfloat16", "float64"],
)
def test_an_addend_of_another_shape_or_type_is_left_to_pytorch(geometry, other, launched):
    *inputs, add = operands(2, 16, 32, 8, 8, **geometry)
    assert torch.equal(*(f(*inputs, other(add), **geometry, relu=True) for f in (ours, plain)))
    assert not launched


@pytest.mark.parametrize(
    ("shape", "bias", "padding"), [((2, 16, 2, 2), 16, 0), ((2, 16, 8, 8), 15, 1), ((2, 16, 8, 8), 16, -1)]
)
def test_what_pytorch_refuses_is_refused(shape, bias, padding):
    with pytest.raises(RuntimeError, match="Kernel size|bias|negative padding"):
        conv2d(images(*shape), torch.randn(16, 16, 3, 3), torch.randn(bias), stride=2, padding=padding)


@BOTH
def test_transforms_without_rules_here_go_through_pytorch(geometry, launched):
    x, weight, *_ = operands(2, 16, 32, 8, 8)
    for transform in (
        lambda f: torch.func.vmap(f)(x[None]),
        lambda f: torch.func.vmap(torch.func.grad(lambda a: f(a).sum()))(x[None]),
        lambda f: torch.func.jvp(f, (x,), (x,))[1],
    ):
        assert torch.equal(*(transform(partial(f, weight=weight, **geometry)) for f in (ours, plain)))
    assert not launched


@BOTH
def test_without_a_compiler_everything_is(geometry, launched, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    assert_pytorch_does_it(geometry, operands(2, 16, 32, 8, 8, **geometry))
    assert not launched


@BOTH
def test_nan_stays_nan_through_relu(geometry):
    assert_nan_stays(geometry)


@BOTH
def test_relu_has_no_slope_at_zero(geometry):
    x, weight, bias, add = operands(2, 16, 32, 8, 8, **geometry)
    inputs = torch.zeros_like(x), weight, torch.zeros_like(bias), torch.zeros_like(add)
    assert not any(t.any() for t in derivatives(partial(ours, **geometry, relu=True), inputs, torch.float32))


@BOTH
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.inductor])]
)
def test_compiles_to_one_graph_also_under_func_grad(geometry, backend, launched):
    inputs = operands(2, 16, 32, 8, 8, **geometry)

    def loss(*leaves: Tensor) -> Tensor:
        return ours(*leaves, **geometry, relu=True).square().sum()

    compiled = partial(torch.compile, fullgraph=True, backend=backend)
    _, *expected = value_and_gradients(loss, inputs)
    launched.clear()
    _, *found = value_and_gradients(compiled(loss), inputs)
    assert launched
    for_all, for_images = (torch.func.grad(loss, which) for which in ((0, 1, 2, 3), (0,)))
    for gradients in (found, for_all(*inputs), compiled(for_all)(*inputs), compiled(for_images)(*inputs)):
        for gradient, eager in zip(gradients, expected, strict=False):
            assert (gradient - eager).norm() <= 1e-5 * eager.norm()


@BOTH
@pytest.mark.parametrize("channels", [16, 3])
def test_the_ops_satisfy_their_contracts(geometry, channels):
    x, weight, bias, add = operands(2, channels, 16, 6, 5, **geometry)
    numbers = tuple(geometry.values())
    for op, arguments in (
        (module._conv2d, (x, weight, bias, add, *numbers, True)),
        (module._conv2d_input, (add, weight, add, *numbers, 6, 5, True)),
        (module._conv2d_input, (add, weight, None, *numbers, 6, 5, False)),
        (module._conv2d_weight, (add, x, 3, 3, *numbers)),
    ):
        torch.library.opcheck(op, arguments)


@BOTH
def test_operations_are_counted_as_pytorch_counts_them(geometry):
    inputs = operands(2, 16, 32, 7, 9, **geometry)
    counts = []
    for function in (ours, plain):
        with FlopCounterMode(display=False) as counter:
            value_and_gradients(partial(function, **geometry), inputs)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@BOTH
def test_an_empty_batch(geometry):
    assert_pytorch_does_it(geometry, operands(0, 16, 32, 8, 8, **geometry))


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("winograd.h", "o[1] = P * b + Q * f;", "o[1] = P * b - Q * f;"),
        ("winograd.h", "AT_P * (w[0] + P2 * w[2])", "AT_P * (w[0] + Q2 * w[2])"),
        ("winograd.h", "place.left + j <= tiles.w", "place.left + j < tiles.w"),
        ("winograd.h", "j > 0 && j < 5 && masked_row[i]", "j > 0 && j < 4 && masked_row[i]"),
        ("winograd.cpp", "place.top + i < tiles.h && ", ""),
        ("strided.h", "dh % s.stride == 0 && dw", "dw"),
        ("strided.h", "at >= 0 && at < w ?", "at >= 0 && at <= w ?"),
        ("vectors.h", "if (relu) a", "if (relu && !add) a"),
        ("vectors.h", "a < 0 ? vec{} : a;", "a > 0 ? a : vec{};"),
    ],
)
def test_planted_bugs_are_caught(file, old, new, plant):
    plant(file, old, new, "strided.cpp", "winograd.cpp")
    checks = [partial(assert_derivatives_are_exact, case) for case in (CASES[0], (2, 16, 32, 7, 9, 3, 2, 1))]
    mutants.assert_caught([*checks, partial(assert_nan_stays, SQUARE)])


def test_the_weight_gradient_of_a_narrow_1x1_convolution_leaves_the_memory_whole():
    """In a process of its own: where PyTorch computes it, the allocator may find its memory overwritten and abort."""
    code = """
import torch
import fastrd.kernels.cpu.conv2d
for _ in range(100):
    x, g = (torch.randn(2, c, n, n).to(memory_format=torch.channels_last) for c, n in ((4, 8), (8, 4)))
    dw = torch.ops.fastrd.conv2d_weight_gradient(g, x, 1, 1, 2, 0)
expected = torch.einsum("nkij,ncij->kc", g.double(), x[..., ::2, ::2].double())
torch.testing.assert_close(dw[..., 0, 0].double(), expected, rtol=1e-5, atol=1e-5)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
