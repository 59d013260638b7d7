"""`nce_bank`, its draws and the bank's update: the PyTorch form and the kernels against the oracle in float64."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import mutants
import pytest
import torch
import torch.nn.functional as F
from checks import BACKENDS, DEVICE, INTERPRETED, assert_as_accurate, assert_compiles, value_and_gradients
from fastrd.kernels import draws, nce_bank_torch, nce_bank_triton, reference
from fastrd.kernels import nce_bank as module
from fastrd.kernels.cpu.native import library
from fastrd.kernels.runtime.jit import kernel, tl
from fastrd.kernels.runtime.ops import scale_gradient
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrd.losses.functional import class_table, nce_bank, sample_negatives, update_bank

ESTIMATORS = ("table", "sample", "all")


def problem(
    estimator: str,
    batch: int,
    rows: int,
    depth: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    *,
    classes: int = 5,
    scale: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any], torch.Tensor]:
    """Anchors, bank, keyword arguments and an upstream gradient that is not 1; some weights are 0."""
    generator = torch.Generator().manual_seed(seed)

    def unit(n: int) -> torch.Tensor:
        return F.normalize(torch.randn(n, depth, generator=generator), dim=1)

    anchor, bank = (scale * unit(batch)).to(DEVICE, dtype), unit(rows).to(DEVICE, dtype)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    weight = 2 * torch.rand(batch, generator=generator)
    weight[:: max(2, batch // 3)] = 0
    options = {"temperature": 0.1, "reduction": "none", "normalizer": 1.5 * rows, **options}
    options["positives"] = torch.randint(0, rows, (batch,), generator=generator).to(DEVICE)
    options["weight"] = weight.to(DEVICE)
    if estimator == "table":
        options["negatives"] = torch.randint(-1, rows, (batch, k), generator=generator).to(DEVICE)
    else:
        options["labels"] = labels.to(DEVICE)
        options["negatives"] = "all" if estimator == "all" else k
    upstream = torch.randn(() if options["reduction"] != "none" else batch, generator=generator)
    return anchor, bank, options, upstream.to(DEVICE)


def check(
    backend: str, anchor: torch.Tensor, bank: torch.Tensor, options: dict[str, Any], upstream: torch.Tensor
) -> None:
    score = float((anchor.double().abs() @ bank.double().abs().T).max()) / options["temperature"]
    assert_as_accurate(
        lambda a: nce_bank(a, bank, backend=backend, **options),
        lambda a: reference.nce_bank(a, bank.to(a.dtype), **options),
        [anchor],
        upstream=upstream,
        reach=score,
        score=score,
    )


SHAPES = [
    # One row; several anchor blocks, splits and slices of the depth; more draws than rows.
    (1, 1, 1, 1, torch.float32),
    (7, 41, 5, 9, torch.float32),
    (70, 401, 16, 97, torch.float32),
    (5, 401, 130, 41, torch.float32),
    (3, 41, 33, 300, torch.float32),
    (17, 401, 20, 60, torch.bfloat16),
    (9, 41, 140, 12, torch.bfloat16),
    (9, 41, 20, 12, torch.float16),
]


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("batch", "rows", "depth", "k", "dtype"), SHAPES)
def test_accuracy_over_shapes(backend, estimator, batch, rows, depth, k, dtype):
    check(backend, *problem(estimator, batch, rows, depth, k, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_accuracy_of_reductions_with_eps(backend, estimator, reduction):
    check(backend, *problem(estimator, 20, 90, 16, 11, reduction=reduction, eps=3e-2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_pieces_of_the_torch_form(monkeypatch, estimator, dtype):
    """Several products, pieces of anchors within a product, and casts of parts of the bank."""
    monkeypatch.setattr(nce_bank_torch, "SCORES", 1271 * 17)
    monkeypatch.setattr(nce_bank_torch, "PICKED", 400)
    monkeypatch.setattr(nce_bank_torch, "CAST_ROWS", 300)
    check("torch", *problem(estimator, 41, 1271, 24, 130, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_scores(backend, estimator, scale):
    check(backend, *problem(estimator, 9, 41, 8, 12, scale=scale, temperature=1.0))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_class_leaves_only_the_positive(backend):
    anchor, bank, options, _ = problem("sample", 4, 30, 8, 6, classes=1)
    positives, options["reduction"], options["weight"] = options["positives"], "none", None
    assert (sample_negatives(options["labels"], positives, 6, seed=0) == -1).all()
    drawn = nce_bank(anchor, bank, backend=backend, **options)
    score = (anchor * bank[positives]).sum(dim=1) / options["temperature"]
    odds = score.exp() / options["normalizer"] / (6 / 30)
    torch.testing.assert_close(drawn, (1 + 1 / odds).log())
    anchor.requires_grad_()
    everything = nce_bank(anchor, bank, backend=backend, **{**options, "negatives": "all"})
    everything.sum().backward()
    assert (everything == 0).all() and (anchor.grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table_may_come_without_positives(backend):
    anchor, bank, options, upstream = problem("table", 9, 41, 8, 12)
    with_positive = value_and_gradients(lambda a: reference.nce_bank(a, bank, **options), [anchor], upstream)
    positives, options["positives"] = options["positives"], options["positives"].clone()
    options["positives"][::2] = -1
    check(backend, anchor, bank, options, upstream)
    actual = value_and_gradients(lambda a: nce_bank(a, bank, backend=backend, **options), [anchor], upstream)
    odds = ((anchor * bank[positives]).sum(dim=1) / 0.1).exp() / options["normalizer"] / (12 / 41)
    gained = options["weight"] * (1 + 1 / odds).log()
    gained[1::2] = 0
    torch.testing.assert_close(actual[0], with_positive[0] - gained)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    anchor, bank, options, upstream = problem("table", 9, 41, 8, 12)
    expected = value_and_gradients(lambda a: nce_bank(a, bank, **options), [anchor], upstream)
    wide = torch.zeros(41, 19, device=DEVICE)
    wide[:, 3:11] = bank
    table = options.pop("negatives").t().contiguous().t()
    positives = options.pop("positives").repeat_interleave(2)[::2]
    weight = options.pop("weight").repeat_interleave(3)[::3]
    for rows in (wide[:, 3:11], bank.t().contiguous().t()):
        strided = value_and_gradients(
            lambda a, rows=rows: nce_bank(
                a.t().contiguous().t(),
                rows,
                positives,
                negatives=table,
                weight=weight,
                backend=backend,
                **options,
            ),
            [anchor],
            upstream.repeat_interleave(2)[::2],
        )
        torch.testing.assert_close(strided, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_types_are_multiplied_in_float32(backend):
    anchor, bank, options, upstream = problem("sample", 9, 41, 8, 12)
    low = bank.to(torch.bfloat16)
    expected = value_and_gradients(lambda a: nce_bank(a, low.float(), **options), [anchor], upstream)
    actual = value_and_gradients(lambda a: nce_bank(a, low, backend=backend, **options), [anchor], upstream)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_seed_normalizer_and_labels_may_live_on_the_device(backend):
    anchor, bank, options, _ = problem("sample", 6, 50, 8, 9, backend=backend)
    expected = nce_bank(anchor, bank, seed=2**62 + 5, **options)
    options["labels"] = class_table(options["labels"])
    options["normalizer"] = torch.tensor([options["normalizer"]], device=DEVICE)
    seed = torch.tensor(2**62 + 5, device=DEVICE)
    torch.testing.assert_close(nce_bank(anchor, bank, seed=seed, **options), expected)
    assert not torch.equal(nce_bank(anchor, bank, seed=seed + 2**40, **options), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bit_for_bit(backend):
    anchor, bank, options, upstream = problem("sample", 20, 900, 16, 300, backend=backend)
    once, again = (value_and_gradients(lambda a: nce_bank(a, bank, **options), [anchor], upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_gradient_the_value_is_the_same(backend):
    anchor, bank, options, _ = problem("all", 9, 41, 8, 12, backend=backend)
    value = nce_bank(anchor, bank, **options)
    assert not value.requires_grad
    torch.testing.assert_close(nce_bank(anchor.requires_grad_(), bank, **options).detach(), value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_is_refused(backend):
    anchor, bank, options, upstream = problem("table", 9, 41, 8, 12, backend=backend)
    anchor.requires_grad_()
    (slope,) = torch.autograd.grad(nce_bank(anchor, bank, **options), anchor, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        slope.sum().backward()


def _properties(backend: str, batch: int, rows: int, k: int, classes: int, seed: int) -> None:
    """The drawn form is the table form of the rows `sample_negatives` names, each of another class."""
    anchor, bank, options, upstream = problem("sample", batch, rows, 6, k, classes=classes, seed=seed)
    labels, positives = options["labels"], options["positives"]
    table = sample_negatives(labels, positives, k, seed=seed)
    assert ((table == -1) | (labels[table] != labels[positives, None])).all()
    drawn, named = (
        value_and_gradients(lambda a, o=o: nce_bank(a, bank, seed=seed, **o), [anchor], upstream)
        for o in ({**options, "backend": backend}, {**options, "negatives": table})
    )
    torch.testing.assert_close(drawn, named, rtol=1e-5, atol=1e-5)


SIZES = (
    st.integers(1, 5),
    st.integers(1, 60),
    st.integers(1, 90),
    st.integers(1, 6),
    st.integers(0, 2**63 - 1),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(*SIZES)
def test_properties_of_the_torch_form(batch, rows, k, classes, seed):
    _properties("torch", batch, rows, k, classes, seed)


@pytest.mark.triton
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@settings(max_examples=15, deadline=None, derandomize=True)
@given(*SIZES)
def test_properties_of_the_kernels(batch, rows, k, classes, seed):
    _properties("triton", batch, rows, k, classes, seed)


@kernel
def _count_draws(out_ptr, key_ptr, numbers_ptr, BLOCK: tl.constexpr):
    rank = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key_1, key_2 = tl.load(key_ptr).to(tl.uint32), tl.load(key_ptr + 1).to(tl.uint32)
    # Loaded as the kernel has them: as an argument a 1 would be a constant, which has no methods.
    n, every = tl.load(numbers_ptr), tl.load(numbers_ptr + 1)
    extra, offset = tl.load(numbers_ptr + 2), tl.load(numbers_ptr + 3)
    shortest = n // tl.maximum(extra, 1)
    tl.store(out_ptr + rank, _times_drawn(rank, n, every, extra, shortest, offset, key_1, key_2), rank < n)


_times_drawn = nce_bank_triton._times_drawn


@pytest.mark.triton
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize(
    ("n", "k"),
    [(1, 1), (3, 2), (45_000, 16_384), (999_983, 3), (2**24 - 1, 2**20), (2**20 + 1, 2**20), (7, 9001), (9000, 9001)],
)
def test_the_closed_formula_at_sizes_that_wrap(n, k):
    """Row 0 is a class of its own, so that the ranks are the rows 1 to n."""
    classes = torch.ones(4, n + 1, dtype=torch.int32)
    classes[0] = classes[1] = torch.arange(n + 1)
    classes[2, 0], classes[3] = 0, 1
    keys = draws._keys(0, 1, 11, torch.device("cpu"))
    rows = draws.draw(classes, torch.zeros(1, dtype=torch.int64), k, 11, 0)
    offset = int(draws._offset(keys[1], n))
    out = torch.empty(n, dtype=torch.int32, device=DEVICE)
    keys = torch.cat(keys).flatten().to(DEVICE)
    block = 2**20 if INTERPRETED else 1024
    numbers = torch.tensor([n, k // n, k % n, offset], dtype=torch.int32, device=DEVICE)
    _count_draws[(-(-n // block),)](out, keys, numbers, BLOCK=block)
    assert torch.equal(out.cpu(), torch.bincount(rows[0] - 1, minlength=n).int())


def test_draws_are_pinned():
    """The same numbers on every device and in every version: a seed in a paper stays worth something."""
    labels = torch.arange(20) % 3
    expected = [[14, 8, 2, 13, 10, 1], [18, 9, 3, 0, 11, 8]]
    assert sample_negatives(labels, torch.tensor([0, 1]), 6, seed=2).tolist() == expected


def assert_same_draws(batch: int, rows: int, k: int, classes: int, seed: int, start: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed % 2**31)
    table = class_table(torch.randint(0, classes, (rows,), generator=generator))
    positives = torch.randint(0, rows, (batch,), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        found = []
        for native in (True, False):
            patch.setattr(draws, "_native", lambda classes, native=native: native)
            found += [
                draws.draw(table, positives, k, seed, start),
                sample_negatives(table, positives, k, seed=seed),
            ]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


CPP = pytest.mark.skipif(library() is None, reason="needs a C++ compiler")


@CPP
@settings(max_examples=150, deadline=None, derandomize=True)
@given(*SIZES)
def test_cpp_draws_what_torch_draws(batch, rows, k, classes, seed):
    assert_same_draws(batch, rows, k, classes, seed)


@CPP
@pytest.mark.parametrize(("rows", "k"), [(50_000, 16_384), (999_983, 3), (2**24 - 1, 2**20), (8, 9001)])
def test_cpp_draws_what_torch_draws_at_sizes_that_wrap(rows, k):
    assert_same_draws(2, rows, k, 3, 2**62 + 5)


@CPP
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x ^ x >> 16", "x ^ x >> 15"),
        (
            "const uint32_t key_1 = a.key_1, key_2 = a.key_2;",
            "const uint32_t key_1 = a.key_1, key_2 = a.key_1;",
        ),
        ("(s + 1) * n / strata", "(s + 1) * (n - 1) / strata"),
        ("x >> 3", "x >> 4"),
        ("rank[j] = j % a.n", "rank[j] = j % a.strata"),
        ("(at < 0 ? a.n : 0)", "(at <= 0 ? a.n : 0)"),
        ("at < rows ? at : at - rows", "at < rows ? at : at - rows + 1"),
        ("a.others ? ", "true ? "),
        ("place += stride", "place += 1"),
    ],
)
def test_bugs_planted_in_cpp_are_caught(old, new, plant):
    plant("draws.cpp", old, new)
    problems = [(4, 50, 30, 3, 1), (3, 9, 60, 4, 2), (2, 6, 5, 1, 3)]
    mutants.assert_caught([partial(assert_same_draws, *one) for one in problems])


def test_draws_are_uniform_balanced_and_distinct():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 40 + [1] * 25 + [2] * 35)[torch.randperm(100, generator=generator)]
    positives = (labels == 0).nonzero().flatten()[:1].expand(4000)
    table = sample_negatives(labels, positives, 24, seed=9)
    assert all(len(set(row)) == 24 for row in table[:200].tolist())
    share = (labels[table] == 1).sum(dim=1)
    assert share.min() >= 8 and share.max() <= 12  # 10 = 24 * 25 / 60
    for prefix in (1, 5, 24):
        counts = torch.bincount(table[:, :prefix].flatten(), minlength=100)[labels != 0].double()
        mean = 4000 * prefix / 60
        assert ((counts - mean).abs() < 5 * mean**0.5).all()
        assert (labels[table[:, :prefix]] != 0).all()
    drawn = torch.zeros(4000, 100).scatter_(1, table, 1)[:, labels != 0]
    assert (drawn.t() @ drawn > 0).all()  # any two rows come together sometimes
    many = sample_negatives(labels, positives[:3], 150, seed=9)
    assert set(torch.stack([row.bincount(minlength=100)[labels != 0] for row in many]).flatten().tolist()) == {2, 3}


def check_update(backend: str, dtype: torch.dtype) -> None:
    """Rows beside each other in memory and not; most rows several times, some never."""
    generator = torch.Generator().manual_seed(0)
    bank = F.normalize(torch.randn(50, 33, generator=generator), dim=1).to(DEVICE, dtype)
    values = torch.randn(300, 66, generator=generator).to(DEVICE)[:, ::2]
    rows = torch.randint(0, 40, (300,), generator=generator).to(DEVICE)
    before = bank.clone()
    expected = reference.update_bank(bank, rows, values, 0.3)
    # The interpreter truncates to bfloat16 where everything else rounds.
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if dtype == torch.bfloat16 else {}
    fresh = update_bank(bank, rows, values, 0.3, backend=backend)
    torch.testing.assert_close(fresh, expected, **tolerance)
    assert torch.equal(bank, before)
    assert update_bank(bank, rows, values, 0.3, inplace=True, backend=backend) is bank
    assert torch.equal(bank, fresh)
    assert torch.equal(bank[40:], before[40:])


UPDATES = ["auto", *BACKENDS]  # "auto" is C++ on a CPU that has a compiler


@pytest.mark.parametrize("backend", UPDATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_bank(backend, dtype):
    check_update(backend, dtype)


@pytest.mark.parametrize("backend", UPDATES)
def test_an_update_from_the_bank_itself(backend):
    """A value is read before a row is written; rows without a direction, and those that are not finite, as in torch."""
    bank = torch.randn(8, 5, device=DEVICE)
    bank[5], bank[6, 0] = 0, float("nan")
    rows = torch.tensor([5, 1, 2, 3, 4, 6, 1], device=DEVICE)
    expected = reference.update_bank(bank, rows, bank[1:], 0.0)
    version = bank._version
    update_bank(bank, rows, bank[1:], 0.0, inplace=True, backend=backend)
    torch.testing.assert_close(bank, expected, equal_nan=True)
    assert bank._version > version


@pytest.mark.parametrize("backend", UPDATES)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_bank_may_lie_in_memory_in_any_order(backend, inplace):
    bank, values = torch.randn(8, 50, device=DEVICE).t(), torch.randn(6, 8, device=DEVICE)
    rows = torch.tensor([3, 0, 7, 3, 49, 20], device=DEVICE)
    expected = update_bank(bank.contiguous(), rows, values, 0.5, backend="torch")
    wide = torch.randn(50, 16, device=DEVICE)
    wide[:, ::2] = bank
    kept = wide[:, 1::2].clone()
    aside = torch.zeros(50, 16, device=DEVICE)[:, 3:11].copy_(bank)
    for strided in (bank.clone(memory_format=torch.preserve_format), wide[:, ::2], aside):
        found = update_bank(strided, rows, values, 0.5, inplace=inplace, backend=backend)
        torch.testing.assert_close(found, expected)
    assert torch.equal(wide[:, 1::2], kept)


def test_compiles_to_one_graph_and_satisfies_the_op_contract():
    anchor, bank, options, upstream = problem("sample", 6, 50, 8, 9)

    def loss(a, bank, seed):
        new = update_bank(bank, options["positives"], a, 0.5)
        return (nce_bank(a.tanh(), new, seed=seed, **options) * upstream).sum() + nce_bank(
            a, bank, **{**options, "negatives": "all", "reduction": "mean"}
        )

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        expected, actual = (
            value_and_gradients(lambda a, f=f, seed=seed: f(a, bank, seed), [anchor], 3.0) for f in (loss, compiled)
        )
        torch.testing.assert_close(actual, expected)
    classes = class_table(options["labels"])
    seed, normalizer = torch.tensor(3, device=DEVICE), torch.tensor(60.0, device=DEVICE)
    table = sample_negatives(classes, options["positives"], 9, seed=3)
    fixed = (normalizer, options["weight"], 0.1, 1e-3)
    for negatives in ((table, 9, None, None), (None, 9, classes, seed), (None, 0, classes, None)):
        for reduction in ("mean", "none"):
            torch.library.opcheck(
                module.nce_bank_op,
                (
                    anchor.requires_grad_(),
                    bank,
                    options["positives"],
                    *negatives,
                    *fixed,
                    reduction,
                    True,
                    False,
                ),
            )
    torch.library.opcheck(
        scale_gradient,
        (torch.tensor(2.0, device=DEVICE), torch.randn(2, 3, 4, device=DEVICE), torch.bfloat16),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_what_backward_does_not_read_is_not_kept():
    """A table of negatives is the largest argument; the gradient was computed with the value."""
    anchor, bank = (F.normalize(torch.randn(n, 8, device=DEVICE), dim=1) for n in (6, 50))
    table = torch.randint(0, 50, (6, 9), device=DEVICE)
    gone = weakref.ref(table)
    loss = nce_bank(anchor.requires_grad_(), bank, table[:, 0].clone(), negatives=table, normalizer=60.0)
    del table
    assert gone() is None and loss.requires_grad


@pytest.mark.triton
def test_the_update_satisfies_the_op_contract():
    anchor, bank, options, _ = problem("table", 6, 50, 8, 9)
    torch.library.opcheck(module.update_bank_op, (bank, options["positives"], anchor, 0.5))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_autocast_does_not_lower_the_precision(estimator):
    anchor, bank, options, upstream = problem(estimator, 6, 50, 8, 9)
    plain = value_and_gradients(lambda a: nce_bank(a, bank, **options), [anchor], upstream)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        under = value_and_gradients(lambda a: nce_bank(a, bank, **options), [anchor], upstream)
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_torch_form_reads_no_value_back(estimator):
    """On fake CUDA tensors whatever would wait for the device raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    anchor, bank, options, _ = problem(estimator, 6, 50, 8, 9)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode, torch.no_grad():
        moved = {
            name: torch.empty_like(mode.from_tensor(x), device="cuda") if isinstance(x, torch.Tensor) else x
            for name, x in {"anchor": anchor, "bank": bank, **options}.items()
        }
        k = 0 if estimator == "all" else 9
        negatives = moved["negatives"] if estimator == "table" else None
        classes = None if estimator == "table" else draws.class_table(moved["labels"])
        seed, normalizer = (torch.zeros((), dtype=d, device="cuda") for d in (torch.int64, torch.float32))
        given = {name: moved[name] for name in ("anchor", "bank", "positives", "weight")}
        loss, gradient = nce_bank_torch.run(
            nce_bank_torch.Problem(
                **given,
                table=negatives,
                k=k,
                classes=classes,
                seed=seed,
                normalizer=normalizer,
                temperature=0.1,
                eps=0.0,
                reduction="mean",
                gradient=True,
            )
        )
        assert loss.device.type == "cuda" and gradient.shape == (1, *anchor.shape)
        nce_bank_torch.update_in_torch(moved["bank"], moved["positives"], moved["anchor"], 0.5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_torch_form_never_holds_the_gathered_rows(estimator):
    batch, rows, depth, k = 64, 3000, 64, 2000
    anchor, bank, options, upstream = problem(estimator, batch, rows, depth, k)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        value_and_gradients(lambda a: nce_bank(a, bank, backend="torch", **options), [anchor], upstream)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= 8 * batch * rows < 4 * batch * k * depth / 16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "launches"), [("sm_80", "sample"), ("sm_90", ""), ("sm_100", "sample"), ("gfx942", "sample")]
)
def test_shipped_blocks_compile_without_spills(target, launches):
    assert_compiles(target, launches, module="nce_bank")


MUTATIONS = {
    "rows beyond the split are scored": ("row_valid = row < stop", "row_valid = row < stop + BLOCK_M"),
    "the last tile is left out": (
        "range(split * rows_per_split, stop, BLOCK_M)",
        "range(split * rows_per_split, stop - BLOCK_M, BLOCK_M)",
    ),
    "a temperature is missing": ("mean / temperature,", "mean,"),
    "the class is off by one": ("rank < n[:, None]", "rank <= n[:, None]"),
    "draws are not rotated": ("n - 1 - offset - rank", "n - 1 - rank"),
    "a quotient is not corrected": ("(stratum + (rest >> 31))", "stratum"),
    "a rest is not corrected": ("rest = _wrapped(rest, n)", "rest += 0"),
    "all strata have the length of the shorter ones": ("(shortest + 1)", "shortest"),
    "half of a tile is not looked through for its positive": ("start + BLOCK_M)).to", "start + BLOCK_M // 2)).to"),
    "the positive gets no gradient": ("slope -= tl.where(is_positive,", "slope -= tl.where(False,"),
    "eps is missing from the noise": ("tl.log2(noise + eps)", "tl.log2(noise)"),
    "weights are left out of the gradient": (
        "scale *= tl.load(weight_ptr + b).to(tl.float32)",
        "scale *= 1.0",
    ),
    "the last split is not summed": (
        "valid = (split < splits)[:, None] & (d < D)",
        "valid = (split < splits - 1)[:, None] & (d < D)",
    ),
    "a value counts as its own duplicate": (
        "for start in range(own + 1, B, BLOCK)",
        "for start in range(B, B, BLOCK)",
    ),
}


@pytest.mark.triton
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_planted_bugs_are_caught(mutation, tmp_path, monkeypatch):
    checks = [partial(check, "triton", *problem(e, 20, 401, 16, 60, reduction="mean", eps=3e-2)) for e in ESTIMATORS]
    checks.append(partial(check_update, "triton", torch.float32))
    mutants.plant(nce_bank_triton, *MUTATIONS[mutation], tmp_path, monkeypatch)
    mutants.assert_caught(checks)
