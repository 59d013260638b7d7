"""The logits side in one launch: the PyTorch form and the kernel against the oracle in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mutants
import pytest
import torch
import torch.nn.functional as F
from checks import BACKENDS as FORMS
from checks import DEVICE, INTERPRETED, assert_as_accurate, assert_compiles, value_and_gradients
from fastrd.kernels import distillation as module
from fastrd.kernels import reference
from fastrd.kernels.cpu import native
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fastrd.losses.functional import (
    class_table,
    distillation_kl,
    fused_objective,
    gradient_matching,
    info_nce,
    nce_bank,
)

BACKENDS = ["auto", *FORMS]  # "auto" is C++ on a CPU that has a compiler


def logits(
    batch: int, classes: int, dtype: torch.dtype = torch.float32, *, scale: float = 3.0, seed: int = 0
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student logits S+, S-; teacher logits T+, T-, T, R; labels; weights, some 0;
    an upstream gradient that is not 1."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [(scale * torch.randn(batch, classes, generator=generator)).to(DEVICE, dtype) for _ in range(6)]
    labels = torch.randint(0, classes, (batch,), generator=generator).to(DEVICE)
    weight = 2 * torch.rand(batch, generator=generator)
    weight[:: max(2, batch // 3)] = 0
    return drawn[:2], drawn[2:], labels, weight.to(DEVICE), torch.randn(batch, generator=generator).to(DEVICE)


SHAPES = [
    # One number; one program with one and with several tiles; several programs; rows longer than a tile.
    (1, 1, torch.float32),
    (7, 10, torch.float32),
    (41, 7, torch.float32),
    (41, 60, torch.float32),
    (128, 100, torch.float32),
    (401, 41, torch.float32),
    (41, 401, torch.float32),
    (3, 1271, torch.float32),
    (2, 3000, torch.bfloat16),
    (41, 100, torch.bfloat16),
    (41, 10, torch.float16),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize(("batch", "classes", "dtype"), SHAPES)
def test_distillation_kl_over_shapes(backend, batch, classes, dtype, reduction):
    (student, _), (teacher, *_), _, weight, upstream = logits(batch, classes, dtype)
    options = {"temperature": 2.5, "weight": weight, "reduction": reduction}
    assert_as_accurate(
        lambda s: distillation_kl(s, teacher, backend=backend, **options),
        lambda s: reference.distillation_kl(s, teacher.to(s.dtype), **options),
        [student],
        upstream=upstream if reduction == "none" else -2.5,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_masked_in_the_teacher_leave_the_divergence(backend):
    (student, _), (teacher, *_), *_ = logits(7, 10)
    teacher[::2, 3] = float("-inf")
    assert_as_accurate(
        lambda s: distillation_kl(s, teacher, backend=backend),
        lambda s: F.kl_div(s.log_softmax(1), teacher.to(s.dtype).softmax(1), reduction="batchmean"),
        [student],
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ["kl", "l1", "l2"])
@pytest.mark.parametrize(("batch", "classes", "dtype"), SHAPES)
def test_gradient_matching_over_shapes(backend, batch, classes, dtype, divergence):
    students, (plus, minus, *_), _, weight, _ = logits(batch, classes, dtype)
    options = {"weight": weight, "reduction": "mean", "divergence": divergence}
    assert_as_accurate(
        lambda s, m: gradient_matching(s, m, plus, minus, backend=backend, **options),
        lambda s, m: reference.gradient_matching(s, m, plus.to(s.dtype), minus.to(s.dtype), **options),
        students,
        upstream=3.0,
    )


def objective(
    students: list[torch.Tensor],
    teachers: list[torch.Tensor],
    labels: torch.Tensor,
    *,
    alpha: float,
    ramp: float,
    temperature: float,
    divergence: str,
    reductions: tuple[str, str],
    reweight: tuple[str, ...],
) -> torch.Tensor:
    """Base and difference as their equations read."""
    dtype = students[0].dtype
    plus, minus, teacher, confidence = (x.to(dtype) for x in teachers)
    w = reference.upcast(confidence).softmax(dim=1).gather(1, labels[:, None]).squeeze(1)
    base = reference.distillation_kl(
        students[0],
        teacher,
        temperature=temperature,
        weight=w if "base" in reweight else None,
        reduction=reductions[0],
    )
    difference = reference.gradient_matching(
        *students,
        plus,
        minus,
        weight=w if "difference" in reweight else None,
        divergence=divergence,
        reduction=reductions[1],
    )
    return base + alpha * ramp * difference


OBJECTIVES = [
    (41, 60, torch.float32, "l2", ("mean", "sum"), ("base", "difference")),
    (128, 10, torch.float32, "kl", ("batchmean", "batchmean"), ("contrast",)),
    (401, 41, torch.float32, "kl", ("sum", "mean"), ("difference",)),
    (130, 200, torch.bfloat16, "l1", ("mean", "batchmean"), ("base",)),
]


def check_objective(
    backend: str,
    on_device: bool,
    batch: int,
    classes: int,
    dtype: torch.dtype,
    divergence: str,
    reductions: tuple[str, str],
    reweight: tuple[str, ...],
    scale: float = 3.0,
) -> None:
    students, teachers, labels, _, _ = logits(batch, classes, dtype, scale=scale)
    plus, minus, teacher, confidence = teachers
    options = {"alpha": 3.0, "temperature": 1.7, "divergence": divergence}

    def ours(s: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        outcome = fused_objective(
            s,
            m,
            plus,
            minus,
            teacher=teacher,
            confidence=confidence,
            labels=labels,
            ramp=torch.tensor(0.4, device=DEVICE) if on_device else 0.4,
            reduction=reductions[0],
            difference_reduction=reductions[1],
            reweight=reweight,
            backend=backend,
            **options,
        )
        assert not outcome.base.requires_grad and not outcome.weight.requires_grad
        torch.testing.assert_close(outcome.base + outcome.difference, outcome.total.detach())
        w = confidence.float().softmax(dim=1).gather(1, labels[:, None]).squeeze(1)
        expected = 0.8 * w if "contrast" in reweight else torch.full_like(w, 0.8)
        torch.testing.assert_close(outcome.weight, expected)
        return outcome.total

    assert_as_accurate(
        ours,
        lambda s, m: objective([s, m], teachers, labels, ramp=0.4, reductions=reductions, reweight=reweight, **options),
        students,
        upstream=-1.5,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("case", OBJECTIVES)
def test_the_objective(backend, on_device, case):
    check_objective(backend, on_device, *case)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["info_nce", "nce_bank"])
def test_the_objective_with_a_contrastive_term(backend, form):
    students, (plus, minus, *_), labels, _, _ = logits(12, 10)
    generator = torch.Generator().manual_seed(1)
    t, s = (F.normalize(torch.randn(12, 8, generator=generator), dim=1).to(DEVICE) for _ in range(2))
    bank = F.normalize(torch.randn(50, 8, generator=generator), dim=1).to(DEVICE)
    classes = class_table((torch.arange(50) % 10).to(DEVICE))
    rows = torch.arange(12, device=DEVICE)

    def contrast(features: torch.Tensor, **options: Any) -> torch.Tensor:
        if form == "info_nce":
            return info_nce(t, features, labels=labels, **options)
        return nce_bank(features, bank, rows, negatives=9, normalizer=60.0, labels=classes, **options)

    def ours(s_plus: torch.Tensor, s_minus: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        outcome = fused_objective(
            s_plus,
            s_minus,
            plus,
            minus,
            labels=labels,
            alpha=2.0,
            contrast=partial(contrast, features, backend=backend),
            contrast_weight=0.5,
            backend=backend,
        )
        parts = outcome.base + outcome.difference + outcome.contrast
        torch.testing.assert_close(parts, outcome.total.detach())
        return outcome.total

    def apart(s_plus: torch.Tensor, s_minus: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        w = plus.softmax(dim=1).gather(1, labels[:, None]).squeeze(1)
        total = distillation_kl(s_plus, plus) + 2 * gradient_matching(s_plus, s_minus, plus, minus)
        return total + 0.5 * contrast(features, weight=w)

    actual, expected = (value_and_gradients(f, [*students, s], 3.0) for f in (ours, apart))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits(backend, scale):
    check_objective(backend, False, 17, 10, torch.float32, "kl", ("batchmean", "batchmean"), ("base",), scale)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    students, teachers, _, weight, upstream = logits(9, 12)
    expected = value_and_gradients(
        lambda s, m: gradient_matching(s, m, *teachers[:2], weight=weight, reduction="none"),
        students,
        upstream,
    )
    turned = [x.t().contiguous().t() for x in teachers[:2]]
    actual = value_and_gradients(
        lambda s, m: gradient_matching(
            s.t().contiguous().t(),
            torch.cat([m, m], dim=1)[:, :12],
            *turned,
            weight=weight.repeat_interleave(2)[::2],
            reduction="none",
            backend=backend,
        ),
        students,
        upstream.repeat_interleave(3)[::3],
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_types_meet_in_the_wider(backend):
    (student, other), (plus, minus, *_), _, _, _ = logits(9, 12)
    low = [x.to(torch.bfloat16) for x in (student, plus)]
    loss = partial(gradient_matching, backend=backend)
    value, *slopes = value_and_gradients(lambda s, m: loss(s, m, low[1], minus), [low[0], other])
    expected = gradient_matching(low[0].float(), other, low[1].float(), minus)
    torch.testing.assert_close(value, expected)
    assert [x.dtype for x in slopes] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_one_branch_may_need_a_gradient(backend):
    (student, other), (plus, minus, *_), _, _, _ = logits(9, 12)
    expected = value_and_gradients(lambda s, m: gradient_matching(s, m, plus, minus), [student, other])
    _, slope = value_and_gradients(lambda m: gradient_matching(student, m, plus, minus, backend=backend), [other])
    torch.testing.assert_close(slope, expected[2])
    assert not gradient_matching(student, other, plus, minus, backend=backend).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bit_for_bit(backend):
    students, teachers, _, _, _ = logits(700, 40)
    loss = partial(gradient_matching, teacher_plus=teachers[0], teacher_minus=teachers[1], backend=backend)
    once, again = (value_and_gradients(loss, students) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def check_any_order(classes: int) -> None:
    """Whichever program ends last adds up the others' sums, always in the same order."""
    from triton.runtime.interpreter import InterpreterBuilder

    students, teachers, labels, _, _ = logits(128, classes)
    choose = InterpreterBuilder.set_grid_idx

    def total(order: Callable[[int, int], int]) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                InterpreterBuilder,
                "set_grid_idx",
                lambda self, x, y, z: choose(self, order(x, self.grid_dim[0]), y, z),
            )
            return fused_objective(*students, *teachers[:2], labels=labels, alpha=3.0, backend="triton").total

    one_by_one = total(lambda program, programs: program)
    apart = objective(
        students, [*teachers[:2], teachers[0], teachers[0]], labels, alpha=3.0, ramp=1.0, temperature=1.0,
        divergence="kl", reductions=("batchmean", "batchmean"), reweight=(),
    )  # fmt: skip
    torch.testing.assert_close(one_by_one, apart, rtol=1e-4, atol=0)
    for order in (lambda program, programs: programs - 1 - program, lambda program, programs: program ^ 1):
        assert torch.equal(total(order), one_by_one)


@pytest.mark.triton
@pytest.mark.skipif(not INTERPRETED, reason="a GPU chooses the order itself: test_cuda.py replays there")
def test_programs_may_end_in_any_order():
    assert module.launch_plan(128, 100)[1] > 2
    check_any_order(100)


def test_offsets_stay_below_31_bits():
    """Of the second gradient too, which lies behind the first; longer ones are left to PyTorch."""
    rows, classes = 2**20, 2**10
    assert module.fits(torch.empty(rows - 1, classes, device="meta"))
    assert not module.fits(torch.empty(rows, classes, device="meta"))


class Operators(TorchDispatchMode):
    """Names of the operators that run inside."""

    def __enter__(self):
        self.names: list[str] = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.triton
def test_backward_only_scales_and_may_run_again():
    """Outputs that are not used cost no launch; the gradient that was computed with the value stays as it is."""
    students, (plus, minus, teacher, _), *_ = logits(9, 12)
    leaves = [x.requires_grad_() for x in students]
    outputs = module.distillation(*leaves, teacher=teacher, teacher_plus=plus, teacher_minus=minus, backend="triton")
    upstream = torch.tensor(3.0, device=DEVICE)
    once = torch.autograd.grad(outputs.total, leaves, upstream, retain_graph=True)
    with Operators() as seen:
        again = torch.autograd.grad(outputs.total, leaves, upstream)
    assert [name for name in seen.names if name != "detach"] == ["mul", "unbind"]
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.triton
def test_a_loss_that_gets_no_gradient_gives_none():
    class Stops(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())
        backward = staticmethod(lambda ctx, upstream: None)

    (student, _), (teacher, *_), _, _, _ = logits(9, 12)
    for loss in (distillation_kl, info_nce):
        value = Stops.apply(loss(student.requires_grad_(), teacher, backend="triton"))
        assert torch.autograd.grad(value, student, allow_unused=True) == (None,)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives(backend, reduction):
    """They are taken of the equations, for the fused forms compute a gradient with the value."""
    students, (plus, minus, *_), _, weight, upstream = logits(9, 12)
    upstream = upstream if reduction == "none" else upstream[0]

    def curvature(loss: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        s, m, p, n, w, u = (x.detach().to(dtype) for x in (*students, plus, minus, weight, upstream))
        leaves = [s.requires_grad_(), m.requires_grad_(), u.requires_grad_()]
        value = loss(s.tanh(), m, p, n, weight=w, reduction=reduction)
        slopes = torch.autograd.grad(value, leaves[:2], u, create_graph=True)
        return [*torch.autograd.grad(sum((slope**2).sum() for slope in slopes), leaves)]

    found = curvature(partial(gradient_matching, backend=backend), torch.float32)
    expected = curvature(reference.gradient_matching, torch.float64)
    torch.testing.assert_close(found, [x.float() for x in expected], rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("loss", [distillation_kl, gradient_matching])
def test_transforms_and_traces_see_the_operators(loss):
    (student, tangent), (teacher, other, *_), *_ = logits(9, 12)
    student, tangent, teacher, other = (x.cpu() for x in (student, tangent, teacher, other))
    rest = (teacher,) if loss is distillation_kl else (other, teacher, other)

    def of(student: torch.Tensor) -> torch.Tensor:
        return loss(student, *rest)

    value, slope = value_and_gradients(of, [student])
    torch.testing.assert_close(torch.func.grad(of)(student), slope)
    torch.testing.assert_close(torch.func.jvp(of, (student,), (tangent,)), (value, (slope * tangent).sum()))
    torch.testing.assert_close(torch.func.vmap(of)(torch.stack([student, student])), torch.stack([value, value]))
    traced = torch.jit.trace(of, tangent)
    torch.testing.assert_close(traced(student), value)


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler that takes the kernels")
class TestInCpp:
    """What only the form of a CPU has."""

    def test_is_what_auto_takes(self, monkeypatch):
        (student, _), (teacher, *_), *_ = logits(9, 12)
        called = []
        call = native.call
        monkeypatch.setattr(native, "call", lambda name, *arguments: (called.append(name), call(name, *arguments)))
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            distillation_kl(student.cpu().to(dtype), teacher.cpu().to(dtype))
        assert called == ["distillation"] * 2, "float64 is left to PyTorch"

    def test_does_without_a_compiler(self, monkeypatch):
        (student, _), (teacher, *_), *_ = logits(9, 12)
        monkeypatch.setattr(native, "library", lambda: None)
        expected = reference.distillation_kl(student, teacher)
        torch.testing.assert_close(distillation_kl(student, teacher), expected, rtol=0, atol=0)

    @pytest.mark.parametrize("classes", [1, 7, 16, 40])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("place", ["student", "teacher"])
    @pytest.mark.parametrize("all_classes", [False, True])
    def test_values_that_are_not_finite_stay_visible(self, classes, bad, place, all_classes):
        (student, _), (teacher, *_), *_ = logits(5, classes)
        (student if place == "student" else teacher)[2, : classes if all_classes else classes // 2 + 1] = bad
        options = {"reduction": "none", "temperature": 2.0}
        ours, theirs = (
            value_and_gradients(partial(loss, **options), [student.cpu()])
            for loss in (
                lambda s, **rest: distillation_kl(s, teacher.cpu(), **rest),
                lambda s, **rest: reference.distillation_kl(s, teacher.cpu(), **rest),
            )
        )
        torch.testing.assert_close(ours[0], theirs[0], equal_nan=True)
        others = torch.arange(5) != 2
        torch.testing.assert_close(ours[1][others], theirs[1][others])

    def test_sums_do_not_depend_on_the_threads(self):
        students, teachers, labels, *_ = logits(401, 60)
        students, teachers = ([x.cpu() for x in group] for group in (students, teachers))
        loss = partial(fused_objective, labels=labels.cpu(), alpha=2.0)
        found, before = [], torch.get_num_threads()
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(value_and_gradients(lambda s, m: loss(s, m, *teachers[:2]).total, students))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_more_classes_than_a_program_holds():
    student, teacher = torch.randn(2, 3, module.MAX_CLASSES + 1, device=DEVICE)
    torch.testing.assert_close(distillation_kl(student, teacher), reference.distillation_kl(student, teacher))
    with pytest.raises(ValueError, match="backend"):
        distillation_kl(student, teacher, backend="triton")


@pytest.mark.parametrize(
    "wrong",
    [
        {"labels": torch.zeros(4, dtype=torch.int64)},
        {"reduction": "none"},
        {"reweight": ("everything",)},
        {"divergence": "js"},
        {"teacher": torch.zeros(5, 4)},
        {"temperature": 0.0},
        {"difference_reduction": "max"},
    ],
)
def test_errors_name_the_argument(wrong):
    students, (plus, minus, *_), labels, _, _ = logits(5, 3)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        fused_objective(*students, plus, minus, **{"labels": labels, "alpha": 1.0, **wrong})


def _properties(backend: str, batch: int, classes: int, seed: int, scale: float, divergence: str) -> None:
    """Zero at the teacher; the slopes of the two branches are opposite and, for KL, sum to 0; never negative."""
    (plus, minus), teachers, _, _, _ = logits(batch, classes, seed=seed, scale=scale)
    options = {"divergence": divergence, "backend": backend, "reduction": "sum"}
    value, a, b = value_and_gradients(lambda s, m: gradient_matching(s, m, *teachers[:2], **options), [plus, minus])
    assert value >= -1e-5 * classes * batch
    torch.testing.assert_close(a, -b)
    if divergence == "kl":
        torch.testing.assert_close(a.sum(dim=1), torch.zeros_like(a[:, 0]), atol=1e-5, rtol=0)
    at_teacher = gradient_matching(*teachers[:2], *teachers[:2], **options)
    torch.testing.assert_close(at_teacher, torch.zeros_like(at_teacher), atol=1e-5, rtol=0)


SIZES = (
    st.integers(1, 40),
    st.integers(1, 70),
    st.integers(0, 2**31),
    st.floats(0.0, 30.0),
    st.sampled_from(["kl", "l1", "l2"]),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(*SIZES)
def test_properties_of_the_torch_form(batch, classes, seed, scale, divergence):
    _properties("torch", batch, classes, seed, scale, divergence)


@pytest.mark.triton
@settings(max_examples=15, deadline=None, derandomize=True)
@given(*SIZES)
def test_properties_of_the_kernel(batch, classes, seed, scale, divergence):
    _properties("triton", batch, classes, seed, scale, divergence)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph(backend):
    students, teachers, labels, _, _ = logits(6, 5)

    def loss(s, m, ramp):
        outcome = fused_objective(s.tanh(), m, *teachers[:2], labels=labels, alpha=2.0, ramp=ramp, backend=backend)
        single = distillation_kl(s, teachers[2], temperature=2.0, reduction="none", backend=backend)
        return outcome.total + single.max()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ramp in (0.5, 0.7):
        ramp = torch.tensor(ramp, device=DEVICE)
        expected, actual = (value_and_gradients(partial(f, ramp=ramp), students, 3.0) for f in (loss, compiled))
        torch.testing.assert_close(actual, expected)


@pytest.mark.triton
def test_the_op_satisfies_its_contract():
    students, teachers, labels, _, _ = logits(6, 5)
    ramp = torch.tensor(0.5, device=DEVICE)
    tensors = [x.requires_grad_() for x in students]
    for reduction in ("mean", "none"):
        options = module.Options(base_reduction=reduction, difference_reduction=reduction)
        plus, minus, teacher, confidence = teachers
        torch.library.opcheck(
            module.distillation_op,
            (*tensors, teacher, plus, minus, confidence, labels, None, ramp, *options, True),
        )


@pytest.mark.slow
@pytest.mark.inductor
def test_compiles_with_inductor_under_autocast():
    students, teachers, labels, _, _ = logits(6, 5)
    anchor, bank = (F.normalize(torch.randn(n, 8), dim=1).to(DEVICE) for n in (6, 50))
    classes = class_table(torch.arange(50, device=DEVICE) % 5)
    scored = partial(nce_bank, bank=bank, positives=labels, negatives=7, normalizer=60.0, labels=classes)

    def loss(s, m, a):
        with torch.autocast(s.device.type, dtype=torch.bfloat16):
            term = partial(scored, a.tanh())
            return fused_objective(s.tanh(), m, *teachers[:2], labels=labels, alpha=2.0, contrast=term).total

    inputs = [*students, anchor]
    expected, actual = (value_and_gradients(f, inputs) for f in (loss, torch.compile(loss, fullgraph=True)))
    torch.testing.assert_close(actual, expected)


def test_the_torch_form_reads_no_value_back():
    """On fake CUDA tensors whatever would wait for the device raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        tensors = [torch.empty(6, 5, device="cuda") for _ in range(4)]
        labels = torch.empty(6, dtype=torch.int64, device="cuda")
        ramp = torch.empty((), device="cuda")
        outputs = fused_objective(*tensors, labels=labels, alpha=2.0, ramp=ramp, backend="torch")
    assert all(x.device.type == "cuda" for x in outputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "launches"),
    [("sm_80", "C = 100,"), ("sm_90", ""), ("sm_100", "C = 100,"), ("gfx942", "C = 100,")],
)
def test_shipped_blocks_compile_without_spills(target, launches):
    assert_compiles(target, launches, module="distillation")


MUTATIONS = {
    "columns beyond C count": ('x = tl.where(real, x, float("-inf"))', "x = x"),
    "a temperature is missing": ("base *= scale * temperature * temperature", "base *= scale * temperature"),
    "the gradient's temperature is missing": (
        "slope * (scale * temperature)[:, None]",
        "slope * scale[:, None]",
    ),
    "the gradient of S- has the sign of that of S+": (
        "tl.store(gradient_ptr + B * C + place, -slope",
        "tl.store(gradient_ptr + B * C + place, slope",
    ),
    "the last program is not summed": (
        "base = _sum_of(partial_ptr, programs,",
        "base = _sum_of(partial_ptr, programs - 1,",
    ),
    "the program of the highest number adds up": (
        'tl.atomic_add(ended_ptr, 1, sem="acq_rel") == programs - 1',
        "program == programs - 1",
    ),
    "the ramp is missing": ("difference_scale *= tl.load(ramp_ptr)", "difference_scale *= 1.0"),
    "the weight is missing": (
        "if WEIGH_BASE:\n                scale *= weight",
        "if WEIGH_BASE:\n                scale *= 1.0",
    ),
    "the last tile is left out": ("program * tiles + tiles)", "program * tiles + tiles - (tiles > 1))"),
}


@pytest.mark.triton
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_planted_bugs_are_caught(mutation, tmp_path, monkeypatch):
    mutants.plant(module, *MUTATIONS[mutation], tmp_path, monkeypatch)
    checks = [partial(check_objective, "triton", True, *case) for case in OBJECTIVES]
    checks.append(partial(check_any_order, 100))
    mutants.assert_caught(checks)
