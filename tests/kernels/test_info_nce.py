"""info_nce: the tiled path of a CPU here, in C++ and in PyTorch; the Triton kernels where the `triton` tests run."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any

import mutants
import pytest
import torch
from checks import BACKENDS, DEVICE, assert_as_accurate, assert_compiles, value_and_gradients
from fastrd.kernels import info_nce as module
from fastrd.kernels import info_nce_torch as tiles
from fastrd.kernels import info_nce_triton as kernels
from fastrd.kernels import reference
from fastrd.kernels.cpu import native
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrd.losses.functional import info_nce


def problem(
    n: int,
    m: int,
    d: int,
    dtype: torch.dtype = torch.float32,
    *,
    labels: int = 0,
    scale: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> tuple[list[torch.Tensor], dict[str, Any], torch.Tensor]:
    """Inputs, keyword arguments and an upstream gradient that is not 1; `labels` classes, 0: none."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [(scale * torch.randn(rows, d, generator=generator)).to(DEVICE, dtype) for rows in (n, m)]
    options = {"temperature": 0.2, "reduction": "none", **options}
    options["positives"] = torch.randint(0, m, (n,), generator=generator).to(DEVICE)
    if labels:
        options["labels"] = torch.randint(0, labels, (n,), generator=generator).to(DEVICE)
        options["candidate_labels"] = torch.randint(0, labels, (m,), generator=generator).to(DEVICE)
    weight = 2 * torch.rand(n, generator=generator)
    weight[:: max(2, n // 3)] = 0
    options["weight"] = weight.to(DEVICE)
    return inputs, options, torch.randn(n, generator=generator).to(DEVICE)


def check(backend: str, inputs: list[torch.Tensor], options: dict[str, Any], upstream: torch.Tensor) -> None:
    a, c = (x.double() for x in inputs)
    score = 1.0 if options.get("normalize", True) else float((a.abs() @ c.T.abs()).max())
    score /= options["temperature"]
    checked = [(options, upstream)]
    if backend == "torch" and options["reduction"] == "none":  # a sum has its gradients computed with it
        checked.append(({**options, "reduction": "sum"}, torch.tensor(-2.5)))
    for options, upstream in checked:
        assert_as_accurate(
            partial(info_nce, backend=backend, **options),
            partial(reference.info_nce, **options),
            inputs,
            upstream=upstream,
            reach=score,
            score=score,
        )


def cut_small(patch: pytest.MonkeyPatch, target: ModuleType, tiles: ModuleType = tiles) -> None:
    """Tiles so small that small problems have many, with ragged ends, and several splits."""
    patch.setattr(tiles, "TILE", 0)
    patch.setattr(tiles, "WIDTH", 32)
    patch.setattr(tiles, "ROWS", 16)
    patch.setattr(target, "score_blocks", lambda *_: target.Blocks(16, 16, 16, 4, 1))
    patch.setattr(
        target,
        "gradient_blocks",
        lambda dtype, D, _: None if D > 64 else target.Blocks(16, 16, max(16, target._power_of_two(D)), 4, 1),
    )


@pytest.fixture
def small_tiles(monkeypatch):
    cut_small(monkeypatch, kernels)


SMALL = [
    # One tile, one row; many tiles; several splits of the candidates; of the anchors; slabs of P.
    (1, 1, 3, torch.float32, 0, True),
    (7, 41, 5, torch.float32, 3, True),
    (41, 50, 33, torch.float32, 3, True),
    (5, 150, 20, torch.float32, 0, False),
    (70, 9, 16, torch.float32, 4, False),
    (20, 37, 70, torch.float32, 3, True),
    (18, 33, 19, torch.bfloat16, 3, True),
    (18, 33, 19, torch.float16, 0, True),
    (9, 20, 70, torch.bfloat16, 0, True),
]


def small_problems() -> Iterator[tuple]:
    """Those of SMALL, and one whose temperature is so low that sums need a running maximum."""
    for *shape, labels, normalize in SMALL:
        yield problem(*shape, labels=labels, normalize=normalize)
    yield problem(20, 37, 12, temperature=0.002)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "m", "d", "dtype", "labels", "normalize"), SMALL)
def test_accuracy_over_many_small_tiles(small_tiles, backend, n, m, d, dtype, labels, normalize):
    check(backend, *problem(n, m, d, dtype, labels=labels, normalize=normalize))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accuracy_at_shipped_block_sizes(backend, dtype):
    check(backend, *problem(41, 130, 40, dtype, labels=5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "m", "d"), [(1, 7, 1), (41, 401, 33), (401, 1271, 64), (1271, 1271, 8)])
def test_torch_path_at_odd_shapes(n, m, d, dtype):
    check("torch", *problem(n, m, d, dtype, labels=10))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("labels", [0, 3])
def test_extreme_logits(small_tiles, backend, labels):
    inputs, options, upstream = problem(20, 37, 12, labels=labels, scale=30.0, normalize=False, temperature=0.1)
    with torch.no_grad():
        assert reference.info_nce(*inputs, **{**options, "reduction": "sum"}) > 1e4
    check(backend, inputs, options, upstream)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("labels", [0, 3])
def test_scores_far_below_zero(small_tiles, backend, labels):
    """Beyond the data a score would be 0, and its share infinite."""
    inputs, options, upstream = problem(20, 37, 12, labels=labels, normalize=False, temperature=0.1)
    inputs = [-5 - inputs[0].abs(), 5 + inputs[1].abs()]
    check(backend, inputs, options, upstream)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("labels", [0, 3])
@pytest.mark.parametrize("temperature", [0.03, 0.002])
def test_low_temperatures(small_tiles, backend, labels, temperature):
    """Sums of normalised rows have no running maximum where they cannot underflow: at the first, not at the second."""
    check(backend, *problem(20, 37, 12, labels=labels, temperature=temperature))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_class_leaves_only_the_positive(small_tiles, backend):
    inputs, options, upstream = problem(20, 37, 12, labels=1)
    value, *gradients = value_and_gradients(lambda a, c: info_nce(a, c, backend=backend, **options), inputs, upstream)
    for tensor in (value, *gradients):
        assert torch.equal(tensor, torch.zeros_like(tensor))


@pytest.mark.parametrize("backend", BACKENDS)
def test_normalised_rows_without_direction_get_no_gradient(small_tiles, backend):
    inputs, options, upstream = problem(20, 37, 12)
    inputs[0][3], inputs[1][5] = 0, 0
    check(backend, inputs, options, upstream)
    _, anchor, candidates = value_and_gradients(
        lambda a, c: info_nce(a, c, backend=backend, **options), inputs, upstream
    )
    assert anchor[3].count_nonzero() == candidates[5].count_nonzero() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_rows_and_zero_weights(small_tiles, backend):
    inputs, options, upstream = problem(20, 37, 12, normalize=False)
    inputs[0][3], inputs[1][5] = 0, 0
    check(backend, inputs, options, upstream)
    options["weight"] = torch.zeros_like(options["weight"])
    for gradient in value_and_gradients(lambda a, c: info_nce(a, c, backend=backend, **options), inputs, upstream):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(small_tiles, backend):
    inputs, options, upstream = problem(20, 37, 24, labels=3)
    a, c = inputs
    check(backend, [a[:, ::2], c[:, 5:17]], options, upstream)
    check(backend, [a.T.contiguous().T, c], options, upstream)
    check(
        backend,
        [a[::2], c],
        {**options, **{k: options[k][::2] for k in ("positives", "labels", "weight")}},
        upstream[::2],
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_reductions_broadcast_upstream(small_tiles, backend):
    """A scalar loss sends a stride-0 gradient back."""
    inputs, options, _ = problem(20, 37, 12, labels=3)
    for reduction in ("mean", "sum"):
        check(backend, inputs, {**options, "reduction": reduction}, torch.tensor(-2.5, device=DEVICE))


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bit_for_bit(small_tiles, backend, reduction):
    inputs, options, upstream = problem(20, 37, 12, labels=3, reduction=reduction)
    upstream = upstream if reduction == "none" else upstream[0]
    options["positives"] = options["positives"] % 3  # candidates with several anchors
    runs = [
        value_and_gradients(lambda a, c: info_nce(a, c, backend=backend, **options), inputs, upstream) for _ in range(2)
    ]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_side_that_needs_it_gets_a_gradient(small_tiles, backend, reduction):
    (a, c), options, upstream = problem(20, 37, 12, labels=3, reduction=reduction)
    upstream = upstream if reduction == "none" else upstream[0]
    options["backend"] = backend
    a.requires_grad_()
    c.requires_grad_()
    both = torch.autograd.grad(info_nce(a, c, **options), (a, c), upstream)
    (anchors,) = torch.autograd.grad(info_nce(a, c.detach(), **options), a, upstream)
    (candidates,) = torch.autograd.grad(info_nce(a.detach(), c, **options), c, upstream)
    assert torch.equal(anchors, both[0]) and torch.equal(candidates, both[1])


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_is_refused(small_tiles, backend, reduction):
    (a, c), options, upstream = problem(4, 6, 3, reduction=reduction)
    upstream = upstream if reduction == "none" else upstream[0]
    a.requires_grad_()
    (gradient,) = torch.autograd.grad(info_nce(a, c, backend=backend, **options), a, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward through .*fastrd\.kernels\.reference"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_types_meet_in_the_wider(backend):
    (a, c), options, _ = problem(6, 9, 5)
    mixed = info_nce(a, c.bfloat16(), backend=backend, **options)
    torch.testing.assert_close(mixed, info_nce(a, c.bfloat16().float(), backend=backend, **options))


@pytest.mark.triton
def test_a_positive_out_of_range_shows_as_nan():
    (a, c), options, _ = problem(4, 6, 3)
    options["positives"][1] = 6
    options = {"positives": options["positives"], "temperature": 0.2, "normalize": True, "fused": True}
    loss = module.info_nce(a, c, labels=None, candidate_labels=None, **options)  # unchecked, as on a GPU
    assert loss.isnan().tolist() == [False, True, False, False]


SHAPES = st.tuples(st.integers(1, 24), st.integers(1, 40), st.integers(1, 18))


def _properties(backend: str, shape: tuple[int, int, int], seed: int, labels: int, normalize: bool) -> None:
    inputs, options, upstream = problem(*shape, labels=labels, seed=seed, normalize=normalize)
    check(backend, inputs, options, upstream)
    a, c = inputs
    options = {**options, "backend": backend}
    loss = info_nce(a, c, **options)
    if normalize:
        torch.testing.assert_close(info_nce(3 * a, 5 * c, **options), loss, rtol=1e-4, atol=1e-5)
    order = torch.randperm(len(c), generator=torch.Generator().manual_seed(seed)).to(c.device)
    moved = {**options, "positives": order.argsort()[options["positives"]]}
    if labels:
        moved["candidate_labels"] = options["candidate_labels"][order]
    torch.testing.assert_close(info_nce(a, c[order], **moved), loss, rtol=1e-4, atol=1e-5)
    own_class = True if not labels else options["labels"] == options["candidate_labels"][options["positives"]]
    assert ((loss >= 0) | ~torch.as_tensor(own_class, device=loss.device)).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SHAPES, st.integers(0, 1000), st.integers(0, 4), st.booleans())
def test_properties_of_the_torch_path(shape, seed, labels, normalize):
    _properties("torch", shape, seed, labels, normalize)


@pytest.mark.triton
@settings(max_examples=10, deadline=None, derandomize=True)
@given(SHAPES, st.integers(0, 1000), st.integers(0, 4), st.booleans())
def test_properties_of_the_kernels(shape, seed, labels, normalize):
    _properties("triton", shape, seed, labels, normalize)


def test_one_tile_of_scores_is_left_to_autograd():
    (a, c), options, upstream = problem(6, 9, 5, labels=3, dtype=torch.float64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        info_nce(a, c, backend="torch", **options)
    assert "fastrd::info_nce" not in {event.key for event in profile.key_averages()}
    options["backend"] = "torch"
    a.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda a: info_nce(a, c, **options), (a,), upstream.double())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tile", [0, tiles.TILE])
@pytest.mark.parametrize("depth", [12, 70])
def test_autocast_does_not_lower_the_precision(small_tiles, monkeypatch, backend, tile, depth):
    monkeypatch.setattr(tiles, "TILE", tile)
    inputs, options, upstream = problem(20, 37, depth, labels=3, backend=backend)

    def loss(a: torch.Tensor, c: torch.Tensor, autocast: bool) -> torch.Tensor:
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
            return info_nce(a, c, **options)

    plain, under = (value_and_gradients(partial(loss, autocast=on), inputs, upstream) for on in (False, True))
    assert all(torch.equal(x, y) for x, y in zip(plain, under, strict=True))
    if tile == 0:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            inside = value_and_gradients(partial(loss, autocast=True), inputs, upstream)
        assert all(torch.equal(x, y) for x, y in zip(plain, inside, strict=True))


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("tile", [0, tiles.TILE])
def test_compiles_to_one_graph_and_satisfies_the_op_contract(monkeypatch, tile, reduction):
    monkeypatch.setattr(tiles, "TILE", tile)
    (a, c), options, upstream = problem(9, 14, 6, labels=3, reduction=reduction)

    def loss(a, c):
        return (info_nce(2 * a, c, **options) * upstream).sum()

    eager = value_and_gradients(loss, [a, c])
    compiled = value_and_gradients(torch.compile(loss, fullgraph=True, backend="aot_eager"), [a, c])
    torch.testing.assert_close(compiled, eager)
    inputs = (a.requires_grad_(), c.requires_grad_(), options["positives"], options["labels"])
    keys = *inputs[2:], options["candidate_labels"]
    torch.library.opcheck(module.info_nce_sum_op, (*inputs[:2], options["weight"], *keys, 0.2, True, [True, True]))
    torch.library.opcheck(module.info_nce_op, (*inputs, options["candidate_labels"], 0.2, True, False))
    saved = [x.detach() for x in module.info_nce_op(*inputs, options["candidate_labels"], 0.2, True, False)]
    torch.library.opcheck(
        module.info_nce_backward_op,
        (
            upstream,
            a.detach(),
            c.detach(),
            *inputs[2:],
            options["candidate_labels"],
            *saved,
            0.2,
            True,
            False,
            [True, False],
        ),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("tile", [0, tiles.TILE])
@pytest.mark.inductor
def test_compiles_with_inductor_under_autocast(monkeypatch, tile):
    monkeypatch.setattr(tiles, "TILE", tile)
    (a, c), options, upstream = problem(9, 14, 6, labels=3)

    @torch.compile(fullgraph=True)
    def loss(a, c):
        with torch.autocast(a.device.type, dtype=torch.bfloat16):
            return (info_nce(a.tanh(), c, **options) * upstream).sum()

    eager = value_and_gradients(lambda a, c: (info_nce(a.tanh(), c, **options) * upstream).sum(), [a, c])
    torch.testing.assert_close(value_and_gradients(loss, [a, c]), eager)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_torch_path_never_holds_the_score_matrix(reduction):
    inputs, options, upstream = problem(1500, 1700, 16, reduction=reduction)
    upstream = upstream if reduction == "none" else upstream[0]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        value_and_gradients(lambda a, c: info_nce(a, c, backend="torch", **options), inputs, upstream)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= tiles.TILE * 4 * 1.1 < 1500 * 1700 * 4


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_shipped_blocks_compile_without_spills(target):
    assert_compiles(target, "D = 128, bf16", module="info_nce")


MUTATIONS = {
    "columns beyond M are scored": (
        'score = tl.where((column < M)[None, :], score, float("-inf"))',
        "score = score",
    ),
    "the temperature is missing": ("LOG2_E / pair.temperature", "LOG2_E"),
    "the last tile of a split is left out": (
        "stop = end if RAGGED else end - (end - first) % BLOCK_M",
        "stop = end - (end - first) % BLOCK_M",
    ),
    "the running sum is not rescaled": ("tl.exp2(peak - new_peak)", "tl.exp2(0 * peak)"),
    "same-class candidates are not hidden": (
        "if LABELLED:\n                y_label",
        "if False:\n                y_label",
    ),
    "the candidates' gradient misses the norms": (
        "(factor * y_norm if NORMALIZE else factor)",
        "factor",
    ),
    "the projection is missing": ("gradient - tl.sum(gradient * unit, 1)[:, None] * unit", "gradient"),
    "the positive's slope is missing": ("share = tl.where(chosen, positive_slope, share)", "share = share"),
    "a tile with a positive is not looked through": (
        "(start <= most) & (start + BLOCK_M > least)",
        "(start <= most) & (start > least)",
    ),
    "the last of a tile's positives is overlooked": ("(own < BLOCK_X)", "(own < BLOCK_X // 4)"),
    "sums of any temperature have no running maximum": ("LOG2_E / pair.temperature < 60", "True"),
    "slabs start one row late": ("row = first + local", "row = first + local + 1"),
}


@pytest.mark.triton
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_planted_bugs_are_caught(mutation, tmp_path, monkeypatch):
    cut_small(monkeypatch, mutants.plant(kernels, *MUTATIONS[mutation], tmp_path, monkeypatch))
    mutants.assert_caught(partial(check, "triton", *case) for case in small_problems())


def test_the_tiles_do_without_a_compiler(small_tiles, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    for case in small_problems():
        check("torch", *case)


TILE_MUTATIONS = {
    "the first columns of a tile are the last": (
        "left in range(0, m, width)",
        "left in range(width, m, width)",
    ),
    "the running sum starts anew": (
        "out[0, rows] = torch.logaddexp(out[0, rows], total)",
        "out[0, rows] = total",
    ),
    "the positive's slope is missing": ("torch.expm1(-loss[rows, None])", "0 * loss[rows, None]"),
    "same-class candidates are not hidden": ("share.masked_fill_(masked, 0)", "pass"),
    "a positive of another class counts twice": ("torch.where(counted, gap, loss)", "loss"),
    "the projection is missing": ("along, unit, value=-1", "along, unit, value=0"),
    "the anchors' norms are missing": ("(pair.a_norm * factor)[:, None]", "factor[:, None]"),
    "of a sum, the positive's slope is missing": ("torch.expm1(-losses) * total", "0 * total"),
    "of a sum, the positive counts twice": ("score.scatter_(1, place, 0)", "pass"),
    "of a sum, same-class candidates are not hidden": (
        "score.masked_fill_(labels[:, None] == others[None, :], 0)",
        "pass",
    ),
    "of a sum, the weights are missing": (
        "torch.div(weight, total",
        "torch.div(torch.ones_like(weight), total",
    ),
    "of a sum, one block of candidates' gradients counts": ("c_sums.addmm_(", "c_sums.zero_().addmm_("),
    "sums without a maximum overflow": ("<= LARGEST_SCORE * pair.temperature", "> 0"),
}


@pytest.mark.parametrize("mutation", TILE_MUTATIONS)
def test_bugs_planted_in_the_tiles_are_caught(mutation, small_tiles, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)  # the C++ does not have the bug
    mutant = mutants.plant(tiles, *TILE_MUTATIONS[mutation], tmp_path, monkeypatch)
    cut_small(monkeypatch, kernels, mutant)
    mutants.assert_caught(partial(check, "torch", *case) for case in small_problems())
