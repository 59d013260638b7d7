"""The public losses: hand-derived values, gradients, published vectors, every option and every refusal."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastrd.kernels import reference

from fastrd.losses.contrastive import ContrastiveDistillation
from fastrd.losses.functional import (
    class_table,
    distillation_kl,
    feature_alignment,
    fused_objective,
    gradient_matching,
    info_nce,
    kl,
    nce_bank,
    sample_negatives,
    update_bank,
)
from fastrd.losses.modules import DistillationKL, FeatureAlignment, GradientMatching, InfoNCE
from fastrd.methods import ADDONS


def leaf(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape, dtype=torch.float64)).requires_grad_()


def double(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def close(actual, expected, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64).detach(),
        torch.as_tensor(expected, dtype=torch.float64).detach(),
        rtol=tolerance,
        atol=tolerance,
    )


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_info_nce_by_hand():
    anchor, candidates = double([1, 0], [0, 1]), double([1, 0], [0, 1], [1, 0])
    # Scores / t: anchor 0 -> (2, 0, 2), anchor 1 -> (0, 2, 0).
    first, second = math.log(2 * math.e**2 + 1) - 2, math.log(2 + math.e**2) - 2
    options = {"temperature": 0.5, "normalize": False}
    close(info_nce(anchor, candidates, **options, reduction="none"), [first, second])
    close(info_nce(anchor, candidates, **options), (first + second) / 2)
    close(info_nce(anchor, candidates, **options, reduction="sum"), first + second)
    weight = double(0.25, 3.0)
    close(info_nce(anchor, candidates, **options, weight=weight), (0.25 * first + 3 * second) / 2)
    swapped = info_nce(anchor, candidates, **options, positives=torch.tensor([1, 2]), reduction="none")
    close(swapped, [first + 2, second + 2])


def test_info_nce_hides_other_members_of_the_class_but_not_the_positive():
    anchor, candidates = double([1, 0], [0, 1]), double([1, 0], [0, 1], [1, 0])
    options = {"temperature": 0.5, "normalize": False, "reduction": "none"}
    loss = info_nce(
        anchor, candidates, **options, labels=torch.tensor([0, 1]), candidate_labels=torch.tensor([0, 1, 0])
    )
    close(loss, [softplus(-2.0), math.log(2 + math.e**2) - 2])
    one_class = info_nce(anchor, candidates[:2], **options, labels=torch.tensor([3, 3]))
    close(one_class, [0.0, 0.0])


def test_info_nce_normalises_rows():
    anchor, candidates = leaf(5, 4), leaf(7, 4)
    scaled = info_nce(anchor * torch.arange(1, 6)[:, None], candidates * 9)
    by_hand = info_nce(F.normalize(anchor, dim=1), F.normalize(candidates, dim=1), normalize=False)
    close(scaled, by_hand)


def test_nce_bank_by_hand():
    anchor, bank = double([1, 0]), double([1, 0], [0, 1], [-1, 0], [0, -1])
    positive, k, size, z, t = torch.tensor([0]), 2, 4, 3.0, 0.5
    table = torch.tensor([[1, 2]])

    def h(score: float) -> float:
        ratio = math.exp(score / t) / z
        return ratio / (ratio + k / size)

    expected = -(math.log(h(1)) + math.log(1 - h(0)) + math.log(1 - h(-1)))
    options = {"normalizer": z, "temperature": t}
    close(nce_bank(anchor, bank, positive, negatives=table, **options), expected)
    tensor_z = torch.tensor([z], dtype=torch.float64)
    close(nce_bank(anchor, bank, positive, negatives=table, normalizer=tensor_z, temperature=t), expected)
    # "all": the rows of class 1 are 1 and 2, so k = 2 again.
    labels = torch.tensor([0, 1, 1, 0])
    close(nce_bank(anchor, bank, positive, negatives="all", labels=labels, **options), expected)
    # A table may name a row twice.
    twice = nce_bank(anchor, bank, positive, negatives=torch.tensor([[1, 1]]), **options)
    close(twice, -(math.log(h(1)) + 2 * math.log(1 - h(0))))


def test_nce_bank_eps_is_added_to_both_denominators():
    anchor, bank = F.normalize(leaf(3, 5), dim=1), F.normalize(leaf(20, 5), dim=1)
    rows, table, z, eps = torch.tensor([2, 0, 9]), torch.randint(0, 20, (3, 6)), 40.0, 1e-2
    ratio = (anchor @ bank.T / 0.07).exp() / z
    noise = 6 / 20
    pos, neg = ratio.gather(1, rows[:, None]), ratio.gather(1, table)
    per_sample = -(pos / (pos + noise + eps)).log().sum(1) - (noise / (neg + noise + eps)).log().sum(1)
    loss = nce_bank(anchor, bank, rows, negatives=table, normalizer=z, eps=eps, reduction="none")
    close(loss, per_sample, 1e-10)


def test_nce_bank_drawn_negatives_are_those_of_sample_negatives():
    anchor, bank = F.normalize(leaf(4, 6), dim=1), F.normalize(leaf(50, 6), dim=1)
    labels, rows = torch.arange(50) % 5, torch.tensor([0, 7, 21, 49])
    drawn = nce_bank(anchor, bank, rows, negatives=9, normalizer=80.0, labels=labels, seed=3)
    table = sample_negatives(labels, rows, 9, seed=3)
    close(drawn, nce_bank(anchor, bank, rows, negatives=table, normalizer=80.0))
    assert drawn != nce_bank(anchor, bank, rows, negatives=9, normalizer=80.0, labels=labels, seed=4)


def test_sample_negatives_contract():
    labels, rows = torch.tensor([0, 0, 0, 1, 1, 2] * 4), torch.tensor([0, 3, 5])
    table = sample_negatives(labels, rows, 12, seed=1)
    assert table.dtype == torch.int64 and table.shape == (3, 12)
    assert (labels[table] != labels[rows][:, None]).all()
    assert all(len(set(row)) == 12 for row in table.tolist())
    assert torch.equal(table, sample_negatives(labels, rows, np.int64(12), seed=1))
    assert not torch.equal(table, sample_negatives(labels, rows, 12, seed=2))


def test_update_bank_with_duplicates():
    bank = F.normalize(leaf(6, 3), dim=1).detach()
    before, values = bank.clone(), torch.randn(4, 3, dtype=torch.float64)
    after = update_bank(bank, torch.tensor([2, 5, 2, 0]), values, 0.25)
    for row, value in ((2, 2), (5, 1), (0, 3)):
        close(after[row], F.normalize(0.25 * before[row] + 0.75 * values[value], dim=0))
    close(after[[1, 3, 4]], before[[1, 3, 4]])


def test_gradient_matching_by_hand():
    splus, sminus = double([1.0, 0.0]), double([0.0, 0.0])
    tplus, tminus = double([3.0, 1.0]), double([1.0, 1.0])
    p, q = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    close(gradient_matching(splus, sminus, tplus, tminus), kl)
    close(gradient_matching(splus, sminus, tplus, tminus, reduction="mean"), kl / 2)
    close(gradient_matching(splus + 2, sminus, tplus, tminus, divergence="l1"), 1.0 + 2.0)
    close(gradient_matching(splus + 2, sminus, tplus, tminus, divergence="l2"), 1.0 + 4.0)


def test_distillation_kl_by_hand_and_against_torch():
    student, teacher = double([2.0, 0.0]), double([0.0, 4.0])
    p, q = 1 / (1 + math.exp(2)), 1 / (1 + math.exp(-1))
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    close(distillation_kl(student, teacher, temperature=2.0), 4 * kl)
    s, t = leaf(6, 5), leaf(6, 5)
    total = F.kl_div(F.log_softmax(s / 3, 1), F.softmax(t / 3, 1), reduction="sum") * 9
    for reduction, divisor in (("batchmean", 6), ("mean", 30), ("sum", 1)):
        close(distillation_kl(s, t, temperature=3.0, reduction=reduction), total / divisor)
    weight = torch.rand(6, dtype=torch.float64)
    per_sample = distillation_kl(s, t, reduction="none")
    close(distillation_kl(s, t, weight=weight), (weight * per_sample).sum() / 6)
    close(distillation_kl(s, t, weight=weight, reduction="mean"), (weight * per_sample).sum() / 30)


def test_feature_alignment_by_hand():
    student, target = double([1.0, 0.0], [3.0, 0.0]), double([0.0, 1.0], [0.0, 0.0])
    close(feature_alignment(student, target, reduction="none"), [1.0, 4.5])
    close(feature_alignment(student, target), 2.75)
    close(feature_alignment(student, target, reduction="sum"), 5.5)
    close(feature_alignment(student, target, weight=double(2.0, 0.0)), 1.0)
    close(feature_alignment(student[:1], target[:1], distance="cosine"), 1.0)
    close(feature_alignment(student, target, distance="smooth_l1", reduction="none"), [0.5, 1.25])
    maps = feature_alignment(student.reshape(1, 2, 1, 2), target.reshape(1, 2, 1, 2))
    close(maps, 2.75)


CASES = {
    "info_nce": (lambda a, c: info_nce(a, c, temperature=0.5), (3, 4), (5, 4)),
    "info_nce raw": (
        lambda a, c: info_nce(a, c, temperature=0.5, normalize=False, reduction="none"),
        (3, 4),
        (5, 4),
    ),
    "info_nce masked": (
        lambda a, c: info_nce(
            a,
            c,
            positives=torch.tensor([4, 0, 1]),
            labels=torch.tensor([0, 1, 0]),
            candidate_labels=torch.tensor([1, 0, 0, 1, 0]),
            weight=torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64),
            temperature=0.5,
        ),
        (3, 4),
        (5, 4),
    ),
    "nce_bank table": (
        lambda a: nce_bank(
            a,
            torch.eye(4, dtype=torch.float64).repeat(2, 1),
            torch.tensor([0, 3, 7]),
            negatives=torch.tensor([[1, 2, 2], [0, 0, 1], [4, 5, 6]]),
            normalizer=30.0,
            temperature=0.5,
            eps=1e-3,
            weight=torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64),
        ),
        (3, 4),
    ),
    "nce_bank all": (
        lambda a: nce_bank(
            a,
            torch.eye(4, dtype=torch.float64).repeat(2, 1),
            torch.tensor([0, 3, 7]),
            negatives="all",
            normalizer=30.0,
            labels=torch.arange(8) % 3,
            temperature=0.5,
            reduction="none",
        ),
        (3, 4),
    ),
    "gradient_matching kl": (
        lambda a, b: gradient_matching(a, b, torch.eye(3, 4).double(), -torch.eye(3, 4).double()),
        (3, 4),
        (3, 4),
    ),
    "gradient_matching l1": (
        lambda a, b: gradient_matching(a, b, torch.eye(3, 4).double(), -torch.eye(3, 4).double(), divergence="l1"),
        (3, 4),
        (3, 4),
    ),
    "gradient_matching l2": (
        lambda a, b: gradient_matching(
            a, b, torch.eye(3, 4).double(), -torch.eye(3, 4).double(), divergence="l2", reduction="sum"
        ),
        (3, 4),
        (3, 4),
    ),
    "distillation_kl": (
        lambda a: distillation_kl(a, torch.eye(3, 4).double(), temperature=3.0, reduction="mean"),
        (3, 4),
    ),
    "feature_alignment mse": (lambda a: feature_alignment(a, torch.eye(3, 4).double()), (3, 4)),
    "feature_alignment cosine": (
        lambda a: feature_alignment(a, torch.eye(3, 4).double(), distance="cosine", reduction="none"),
        (3, 4),
    ),
    "feature_alignment smooth_l1": (
        lambda a: feature_alignment(a, torch.eye(3, 4).double(), distance="smooth_l1"),
        (3, 4),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_against_finite_differences(case):
    function, *shapes = CASES[case]
    assert torch.autograd.gradcheck(function, tuple(leaf(*shape) for shape in shapes))


def test_constants_get_no_gradient():
    student, teacher, weight = leaf(4, 3), leaf(4, 3), torch.rand(4).requires_grad_()
    loss = (
        distillation_kl(student, teacher, weight=weight)
        + gradient_matching(student, 2 * student, teacher, -teacher, weight=weight)
        + feature_alignment(student, teacher, weight=weight)
        + info_nce(student, 3 * student, weight=weight)
        + nce_bank(
            student,
            teacher,
            torch.arange(4),
            negatives=torch.ones(4, 2).long(),
            normalizer=9.0,
            weight=weight,
        )
    )
    loss.backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None and weight.grad is None


def test_a_bank_may_change_between_the_loss_and_its_backward():
    anchor, bank = leaf(3, 4), leaf(8, 4).detach()
    loss = nce_bank(anchor, bank, torch.arange(3), negatives=torch.ones(3, 2).long(), normalizer=9.0)
    expected = torch.autograd.grad(loss, anchor, retain_graph=True)[0]
    bank.zero_()
    close(torch.autograd.grad(loss, anchor)[0], expected)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits_stay_finite(scale):
    student = (scale * torch.eye(4)).requires_grad_()
    teacher = scale * torch.eye(4).flip(0)
    loss = distillation_kl(student, teacher) + gradient_matching(student, -student, teacher, -teacher)
    loss = loss + info_nce(student, teacher, normalize=False, temperature=1.0)
    loss = loss + nce_bank(student, teacher.sign(), torch.arange(4), negatives=torch.ones(4, 2).long(), normalizer=9.0)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    a, c, t = (torch.randn(6, 16).to(dtype) for _ in range(3))
    full = [x.float() for x in (a, c, t)]
    for function in (
        lambda a, c, t: info_nce(a, c),
        lambda a, c, t: distillation_kl(a, c),
        lambda a, c, t: gradient_matching(a, c, t, -t),
        lambda a, c, t: feature_alignment(a, c),
    ):
        low, high = function(a, c, t), function(*full)
        assert low.dtype == torch.float32
        torch.testing.assert_close(low, high, rtol=1e-6, atol=1e-6)
    x = a.clone().requires_grad_()
    info_nce(x, c).backward()
    assert x.grad.dtype == dtype


def test_modules_are_their_functions():
    a, b, c, d = (torch.randn(5, 4) for _ in range(4))
    weight, labels = torch.rand(5), torch.tensor([0, 1, 1, 2, 0])
    assert torch.equal(
        InfoNCE(temperature=0.3, normalize=False, reduction="sum")(a, b, labels=labels, weight=weight),
        info_nce(a, b, labels=labels, weight=weight, temperature=0.3, normalize=False, reduction="sum"),
    )
    assert torch.equal(
        GradientMatching(divergence="l1", reduction="mean")(a, b, c, d, weight=weight),
        gradient_matching(a, b, c, d, divergence="l1", reduction="mean", weight=weight),
    )
    assert torch.equal(
        DistillationKL(temperature=4.0, reduction="sum")(a, b, weight=weight),
        distillation_kl(a, b, temperature=4.0, reduction="sum", weight=weight),
    )
    assert torch.equal(
        FeatureAlignment(distance="cosine", reduction="none")(a, b, weight=weight),
        feature_alignment(a, b, distance="cosine", reduction="none", weight=weight),
    )


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_classes_masked_in_the_teacher_leave_the_divergence(temperature):
    s, t = leaf(3, 5), leaf(3, 5).detach()
    t[:, 2] = -math.inf
    expected = F.kl_div(F.log_softmax(s / temperature, 1), F.softmax(t / temperature, 1), reduction="batchmean")
    ours = distillation_kl(s, t, temperature=temperature)
    close(ours, temperature**2 * expected)
    close(*(torch.autograd.grad(x, s)[0] for x in (ours, temperature**2 * expected)))


def test_classes_masked_on_both_live_sides_give_finite_gradients():
    p, q = leaf(3, 5), leaf(3, 5)
    mask = torch.tensor([False, False, True, False, False])
    masked = kl(p.masked_fill(mask, -math.inf), q.masked_fill(mask, -math.inf))
    without = kl(p[:, ~mask], q[:, ~mask])
    close(masked, without)
    for ours, theirs in zip(*(torch.autograd.grad(x.sum(), (p, q)) for x in (masked, without)), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", ["infonce", "candidates", "reference", "cosine"])
def test_rows_without_direction_get_no_gradient(loss, dtype):
    x, other = torch.randn(3, 8).to(dtype), torch.randn(3, 8).to(dtype)
    x[1] = 0
    x.requires_grad_()
    value = {
        "infonce": lambda: info_nce(x, other),
        "candidates": lambda: info_nce(other, x),
        "reference": lambda: reference.info_nce(x, other),
        "cosine": lambda: feature_alignment(x, other, distance="cosine"),
    }[loss]()
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(x.grad).all()
    assert x.grad[1].count_nonzero() == 0 and x.grad[0].count_nonzero() > 0


def test_rows_above_the_threshold_are_normalised_as_by_torch():
    x = leaf(4, 6)
    scaled = x * torch.tensor([1.0, 1e-5, 1e6, 1e-2], dtype=torch.float64)[:, None]
    assert torch.equal(reference.unit(scaled), F.normalize(scaled, dim=1))


def test_a_bank_row_without_direction_stays_zero():
    bank = update_bank(torch.zeros(2, 3), torch.tensor([1]), torch.zeros(1, 3), 0.5)
    assert torch.equal(bank, torch.zeros(2, 3))


@pytest.mark.parametrize("row", [-6, -1, 6])
@pytest.mark.parametrize("form", ["drawn", "all", "table", "candidates", "sample", "update", "classes"])
def test_rows_that_are_not_there_are_refused(form, row):
    bank, rows = torch.randn(6, 4), torch.tensor([0, row, 1])
    name, call = {
        "drawn": ("positives", lambda: nce_bank(X, bank, rows, negatives=3, normalizer=1.0, labels=SIX)),
        "all": ("positives", lambda: nce_bank(X, bank, rows, negatives="all", normalizer=1.0, labels=SIX)),
        "table": ("negatives", lambda: nce_bank(X, bank, Y, negatives=rows[:, None], normalizer=1.0)),
        "candidates": ("positives", lambda: info_nce(X, bank, positives=rows)),
        "sample": ("positives", lambda: sample_negatives(SIX, rows, 2, seed=0)),
        "update": ("rows", lambda: update_bank(bank, rows, X, 0.5)),
        "classes": ("labels", lambda: fused_objective(*4 * [torch.randn(3, 6)], labels=rows, alpha=1.0)),
    }[form]
    if form == "table" and row == -1:
        assert torch.isfinite(call())  # an empty place
        return
    with pytest.raises(IndexError, match=f"^{name}: got .*accepted: "):
        call()


SIX = torch.tensor([0, 1, 1, 0, 1, 2])


def _damaged(*places, value=None):
    table = class_table(SIX)
    for row, column in places:
        table[row, column] = table[row, column] + 1 if value is None else value
    return table


@pytest.mark.parametrize("M", [1, 4, 6, 1000])
def test_a_class_table_is_accepted_in_place_of_its_labels(M):
    for labels in (torch.zeros(M), torch.arange(M) % 3, -torch.arange(M), torch.randint(-5, 5, (M,))):
        labels, positives = labels.int(), torch.arange(min(M, 3))
        table = class_table(labels).T.contiguous().T  # in any layout
        drawn = [sample_negatives(form, positives, 2, seed=1) for form in (labels, table)]
        assert torch.equal(*drawn)


@pytest.mark.parametrize(
    "table",
    [
        *(torch.full((4, 6), value, dtype=torch.int32) for value in (0, 1, -1, 10**6, 2**31 - 1, -(2**31))),
        torch.eye(4, 6, dtype=torch.int32),
        torch.zeros(4, 0, dtype=torch.int32),
        class_table(torch.arange(6)).flip(0),
        *(_damaged((row, 2), value=value) for row in range(4) for value in (-1, 6, 10**6, 2**31 - 1, -(2**31))),
        *(_damaged((row, 2)) for row in range(4)),
        _damaged((0, 0), (0, 3)),
        _damaged(*((3, column) for column in range(6))),
    ],
)
@pytest.mark.parametrize("form", ["sample", "drawn", "all", "again"])
def test_a_table_that_is_none_of_labels_is_refused(form, table):
    options = {"normalizer": 1.0, "labels": table}
    with pytest.raises(ValueError, match="^labels: got .*accepted: "):
        {
            "sample": lambda: sample_negatives(table, Y, 6, seed=1),
            "drawn": lambda: nce_bank(X, torch.ones(6, 4), Y, negatives=3, **options),
            "all": lambda: nce_bank(X, torch.ones(6, 4), Y, negatives="all", **options),
            "again": lambda: class_table(table),
        }[form]()


X, Y = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
BAD = {
    "temperature": lambda: info_nce(X, X, temperature=0.0),
    "temperature ": lambda: distillation_kl(X, X, temperature=math.inf),
    "temperature  ": lambda: distillation_kl(X, X, temperature=10**400),
    "alpha": lambda: fused_objective(X, X, X, X, labels=Y, alpha=math.nan),
    "candidates": lambda: info_nce(X, torch.zeros(3, 5)),
    "anchor": lambda: info_nce(torch.zeros(3), X),
    "positives": lambda: info_nce(X, X[:2]),
    "candidate_labels": lambda: info_nce(X, torch.zeros(5, 4), labels=Y),
    "labels": lambda: info_nce(X, X, labels=Y[:2]),
    "weight": lambda: info_nce(X, X, weight=torch.ones(2)),
    "reduction": lambda: info_nce(X, X, reduction="batchmean"),
    "backend": lambda: info_nce(X, X, backend="cuda"),
    "bank": lambda: nce_bank(X, torch.zeros(9, 5), Y, negatives=Y[:, None], normalizer=1.0),
    "negatives": lambda: nce_bank(X, X, Y, negatives="most", normalizer=1.0, labels=Y),
    "negatives ": lambda: nce_bank(X, X, Y, negatives=0, normalizer=1.0, labels=Y),
    "negatives  ": lambda: nce_bank(X, X, Y, negatives=Y[:2, None], normalizer=1.0),
    "labels ": lambda: nce_bank(X, X, Y, negatives=2, normalizer=1.0),
    "normalizer": lambda: nce_bank(X, X, Y, negatives=Y[:, None], normalizer=0.0),
    "normalizer ": lambda: nce_bank(X, X, Y, negatives=Y[:, None], normalizer=torch.ones(2)),
    "eps": lambda: nce_bank(X, X, Y, negatives=Y[:, None], normalizer=1.0, eps=-1.0),
    "k": lambda: sample_negatives(Y, Y, 0, seed=0),
    "momentum": lambda: update_bank(X, Y, X, 1.5),
    "values": lambda: update_bank(X, Y, X[:2], 0.5),
    "teacher_minus": lambda: gradient_matching(X, X, X, X[:2]),
    "divergence": lambda: gradient_matching(X, X, X, X, divergence="js"),
    "teacher": lambda: distillation_kl(X, torch.zeros(3, 5)),
    "distance": lambda: feature_alignment(X, X, distance="l7"),
    "target": lambda: feature_alignment(X, X[:2]),
    "student": lambda: feature_alignment(torch.zeros(3), torch.zeros(3)),
    "temperature   ": lambda: distillation_kl(X, X, temperature=1e6),  # would be 10^4 times too large in float32
    "temperature    ": lambda: info_nce(X, X, temperature=1e-40),
    "exchange": lambda: info_nce(X, X, exchange="gather"),
    "group": lambda: info_nce(X, X, group="all"),
    "normalizer  ": lambda: nce_bank(X, X, Y, negatives=Y[:, None], normalizer=torch.tensor(-1.0)),
    "normalizer   ": lambda: nce_bank(X, X, Y, negatives=Y[:, None], normalizer=1e300),
    "negatives   ": lambda: nce_bank(X, X, Y, negatives=2.5, normalizer=1.0, labels=Y),
    "negatives    ": lambda: nce_bank(X, X, Y, negatives=None, normalizer=1.0, labels=Y),
    "k ": lambda: sample_negatives(Y, Y, None, seed=0),
    "ramp": lambda: fused_objective(X, X, X, X, labels=Y, alpha=1.0, ramp=math.nan),
    "bank ": lambda: update_bank(X[0], Y, X, 0.5),
    "bank  ": lambda: update_bank(X[:1].expand(3, 4), Y, X, 0.5, inplace=True),
    "bank   ": lambda: update_bank(X[:, :1].expand(3, 4), Y, X, 0.5, inplace=True),
    "values ": lambda: update_bank(X, Y, torch.tensor(1.0), 0.5),
    "ramp ": lambda: fused_objective(X, X, X, X, labels=Y, alpha=1.0, ramp=torch.tensor([1.0, 2.0])),
    "contrast": lambda: fused_objective(X, X, X, X, labels=Y, alpha=1.0, contrast=lambda weight: weight),
    "negatives     ": lambda: nce_bank(X, X, Y, negatives=np.zeros(2), normalizer=1.0, labels=Y),
    "normalizer    ": lambda: nce_bank(X, X, Y, negatives=Y[:, None], normalizer=2**130),
}
BAD_TYPES = {
    "anchor": lambda: info_nce(Y[:, None], Y[:, None]),
    "positives": lambda: info_nce(X, X, positives=Y.int()),
    "labels": lambda: info_nce(X, X, labels=torch.zeros(3)),
    "negatives": lambda: nce_bank(X, X, Y, negatives=Y[:, None].int(), normalizer=1.0),
    "student": lambda: distillation_kl("logits", X),
    "labels ": lambda: info_nce(X, X, labels=[0, 1, 2]),
    "weight": lambda: info_nce(X, X, weight=[1.0, 1.0, 1.0]),
    "temperature": lambda: distillation_kl(X, X, temperature="4"),
    "momentum": lambda: update_bank(X, Y, X, "0.5"),
    "anchor ": lambda: info_nce(X.to(torch.float8_e4m3fn), X),
    "candidates": lambda: info_nce(X, X.to_sparse()),
    "labels  ": lambda: info_nce(X, X, labels=Y.to(torch.complex64)),
    "labels   ": lambda: nce_bank(X, X, Y, negatives=2, normalizer=1.0, labels=[0, 1, 2]),
    "labels    ": lambda: class_table([0, 1, 2]),
    "weight ": lambda: info_nce(X, X, weight=torch.ones(3, dtype=torch.complex64)),
    "rows": lambda: update_bank(X, Y.int(), X, 0.5),
    "positives ": lambda: sample_negatives(Y, [0, 1], 2, seed=0),
    "positives  ": lambda: sample_negatives(Y, Y.float(), 2, seed=0),
    "seed": lambda: sample_negatives(Y, Y, 2, seed=1.5),
    "seed ": lambda: nce_bank(X, X, Y, negatives=2, normalizer=1.0, labels=Y, seed=2**64),
    "seed  ": lambda: sample_negatives(Y, Y, 2, seed=torch.tensor(1.5)),
    "temperature ": lambda: info_nce(X, X, temperature=None),
    "temperature  ": lambda: info_nce(X, X, temperature=torch.nn.Parameter(torch.ones(2, 2))),
    "normalizer": lambda: nce_bank(X, X, Y, negatives=Y[:, None], normalizer=None),
    "eps": lambda: nce_bank(X, X, Y, negatives=Y[:, None], normalizer=1.0, eps=None),
    "momentum ": lambda: update_bank(X, Y, X, None),
    "positives   ": lambda: nce_bank(X, X, None, negatives=2, normalizer=1.0, labels=Y),
    "positives    ": lambda: nce_bank(X, X, None, negatives=Y[:, None], normalizer=1.0),
    "positives     ": lambda: sample_negatives(Y, None, 2, seed=0),
    "rows ": lambda: update_bank(X, None, X, 0.5),
    "rows  ": lambda: update_bank(X, None, torch.tensor(1.0), 0.5),
    "labels     ": lambda: fused_objective(X, X, X, X, labels=None, alpha=1.0),
    "labels      ": lambda: sample_negatives(None, Y, 2, seed=0),
    "normalizer ": lambda: nce_bank(X, X, Y, negatives=Y[:, None], normalizer=torch.tensor(1j)),
    "ramp": lambda: fused_objective(X, X, X, X, labels=Y, alpha=1.0, ramp=torch.tensor(1j)),
    "contrast": lambda: fused_objective(X, X, X, X, labels=Y, alpha=1.0, contrast=lambda weight: None),
    "contrast ": lambda: fused_objective(X, X, X, X, labels=Y, alpha=1.0, contrast=1.0),
    "positives      ": lambda: info_nce(X, X, positives=torch.arange(3).to_sparse()),
    "labels       ": lambda: info_nce(X, X, labels=Y.to_sparse()),
    "labels        ": lambda: class_table(Y.to_sparse()),
    "rows   ": lambda: update_bank(X, Y.to_sparse(), X, 0.5),
    "negatives ": lambda: nce_bank(X, X, Y, negatives=Y[:, None].to_sparse(), normalizer=1.0),
    "normalizer  ": lambda: nce_bank(X, X, Y, negatives=Y[:, None], normalizer=torch.tensor(1.0).to_sparse()),
    "weight  ": lambda: feature_alignment(X, X, weight=torch.ones(3).to_sparse()),
    "weight   ": lambda: nce_bank(
        X, X, Y, negatives=Y[:, None], normalizer=1.0, weight=X[:, 0].to(torch.float8_e4m3fn)
    ),
    "normalize": lambda: info_nce(X, X, normalize="no"),
    "normalize ": lambda: info_nce(X, X, normalize=None),
    "inplace": lambda: update_bank(X, Y, X, 0.5, inplace=torch.ones(2)),
    "reweight": lambda: fused_objective(X, X, X, X, labels=Y, alpha=1.0, reweight=torch.tensor(1.0)),
}


@pytest.mark.parametrize(("errors", "kind"), [(BAD, ValueError), (BAD_TYPES, TypeError)])
def test_refusals_name_the_argument_and_what_is_accepted(errors, kind):
    for name, call in errors.items():
        with pytest.raises(kind, match=rf"^{name.strip()}: got .*accepted: "):
            call()


@pytest.mark.parametrize(
    ("form", "options"),
    [
        *(
            (partial(ContrastiveDistillation, 4, 4, SIX, estimator=estimator), {name: value})
            for estimator in ("infonce", "crd", "strict")
            for name, value in (("negatives", 2**20 + 1), ("negatives", None), ("momentum", None), ("dim", None))
        ),
        *((form, {"reduction": "some"}) for form in (InfoNCE, DistillationKL, GradientMatching, FeatureAlignment)),
        *((form, {"backend": None}) for form in (InfoNCE, DistillationKL, GradientMatching)),
        *((form, {"temperature": "4"}) for form in (InfoNCE, DistillationKL)),
        (partial(ADDONS["gacd"], estimator="strict"), {"negatives": 2**20 + 1}),
        (InfoNCE, {"reduction": "batchmean"}),
        (GradientMatching, {"divergence": "mse"}),
        (FeatureAlignment, {"distance": "kl"}),
    ],
)
def test_options_that_the_first_call_would_refuse_are_refused_at_once(form, options):
    with pytest.raises((ValueError, TypeError), match=f"^{next(iter(options))}: got .*accepted: "):
        form(**options)


def test_what_only_looks_unusual_is_accepted():
    weight, rows = torch.ones(1, dtype=torch.int64).expand(3), torch.arange(3)
    plain = nce_bank(X, X, rows, negatives=2, normalizer=1.0, labels=SIX[:3])
    for normalizer in (1, np.float32(1), np.int64(1), torch.tensor([1]), torch.tensor(1.0, dtype=torch.float16)):
        options = {"normalizer": normalizer, "weight": weight, "eps": 0, "labels": SIX[:3]}
        assert torch.equal(nce_bank(X, X, rows, negatives=np.int64(2), **options), plain)
    for flag in (True, np.bool_(True), 1):
        assert info_nce(X, X, normalize=flag, labels=SIX[:1].expand(3)).isfinite()
    assert fused_objective(X, X, X, X, labels=rows, alpha=2**70, contrast_weight=2**70).total == 0


def test_mixed_precisions_are_computed_in_the_higher_one():
    anchor, candidates = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4)
    mixed, whole = info_nce(anchor, candidates), info_nce(anchor, candidates.double())
    assert mixed.dtype == torch.float64 and torch.equal(mixed, whole)
