"""The logits side of a distillation step in one launch: values, gradients and sample weights.

    base_i       = t^2 KL(softmax(T / t) || softmax(S / t))
    difference_i = D(S+ - S-, T+ - T-),  D one of KL(softmax dT || softmax dS), |dS - dT|_1, |dS - dT|_2^2
    total        = base_scale sum_i v_i base_i + difference_scale ramp sum_i v_i difference_i
    w_i          = weight_scale softmax(R_i)[y_i]

S is S+ where both terms are there. v_i is 1, w_i or a given weight; R are the teacher's logits at the image whose
confidence weighs the sample. At C = 10 to 1000 and B = 128 the arrays are small and launches are the cost: eager
PyTorch takes some twenty. Here a program takes many rows. The sums over programs are taken by whichever program ends
last, in a fixed order; small problems are one program. On a CPU the same is done in C++ (cpu/distillation.cpp).

Bytes: each of the logit arrays once in, two float32 gradients out: at C = 100, B = 128, float32 0.36 MB, 0.1 us at 4.3
TB/s on an H200, far below the launch itself.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .cpu import native
from .runtime.aot import SHORT_NAMES, Launch, recorded
from .runtime.jit import interpreted, kernel, tl
from .runtime.ops import call, in_cpp, loss_op, wants_gradient

MAX_CLASSES = 4096
"""A program holds whole rows in registers, four or eight numbers of each array a thread."""
ONE_PROGRAM = 4096
"""Up to so many numbers one program does everything and nothing has to be zeroed for the sums over programs."""


def fits(logits: Tensor) -> bool:
    """Whether the kernel takes logits (B, C): its offsets into the two gradients are 32 bits long."""
    return logits.shape[1] <= MAX_CLASSES and 2 * logits.numel() < 2**31


class Options(NamedTuple):
    """How the terms are computed, weighed and added up."""

    temperature: float = 1.0
    difference_coefficient: float = 1.0
    base_reduction: str = "batchmean"
    difference_reduction: str = "batchmean"
    divergence: str = "kl"
    weight_scale: float = 1.0
    weigh_base: bool = True
    weigh_difference: bool = True

    def scales(self, batch: int, classes: int) -> tuple[float, float]:
        """What the sums over samples are multiplied by: coefficient and reduction."""
        divisors = {"batchmean": batch, "mean": batch * classes, "sum": 1, "none": 1}
        return (
            1 / divisors[self.base_reduction],
            self.difference_coefficient / divisors[self.difference_reduction],
        )


@kernel
def _load(ptr, place, valid):
    return tl.load(ptr + place, valid, 0).to(tl.float32)


@kernel
def _log_softmax(x, real):
    x = tl.where(real, x, float("-inf"))
    x = x - tl.max(x, 1)[:, None]
    e = tl.exp(x)
    total = tl.sum(e, 1)[:, None]
    return tl.where(real, x - tl.log(total), 0), e / total


@kernel
def _kl(student, teacher, real):
    """KL(softmax teacher || softmax student) of each row, and its gradient in the student's logits."""
    log_q, q = _log_softmax(student, real)
    log_p, p = _log_softmax(teacher, real)
    return tl.sum(tl.where(p > 0, p * (log_p - log_q), 0), 1), q - p  # 0 log 0 = 0


@kernel
def _sum_of(ptr, size, BLOCK: tl.constexpr):
    """Of numbers that other programs have just written, hence past the first cache."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(ptr + i, i < size, 0, cache_modifier=".cg")
    return tl.sum(total, 0)


@kernel
def _distillation_kernel(
    plus_ptr,  # S = S+ (B, C)
    minus_ptr,  # S- (B, C); DIVERGENCE only
    teacher_ptr,  # T (B, C); BASE only
    teacher_plus_ptr,  # T+ (B, C); DIVERGENCE only
    teacher_minus_ptr,  # T- (B, C); DIVERGENCE only
    confidence_ptr,  # R (B, C); CONFIDENCE only
    labels_ptr,  # (B,) int64; CONFIDENCE only
    weight_ptr,  # (B,), the given one; WEIGHTED only
    ramp_ptr,  # () float32; RAMP only
    total_ptr,  # () or (B,) float32
    terms_ptr,  # (2,) or (2, B) float32
    weights_ptr,  # (B,) float32; CONFIDENCE only
    gradient_ptr,  # (2, B, C) float32: of S+ and S-, or (1, B, C) without DIVERGENCE; GRADIENT only
    partial_ptr,  # (2, programs) float32
    ended_ptr,  # () int32 zero: programs that have ended; more than one program only
    B,
    C,
    temperature,
    base_scale,
    difference_scale,
    weight_scale,
    tiles,
    BASE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WEIGH_BASE: tl.constexpr,
    WEIGH_DIFFERENCE: tl.constexpr,
    RAMP: tl.constexpr,
    REDUCE: tl.constexpr,
    GRADIENT: tl.constexpr,
    ONE_PROGRAM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    program = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    real = (c < C)[None, :]
    if RAMP:
        difference_scale *= tl.load(ramp_ptr)
    base_sum = tl.zeros((ROWS,), tl.float32)
    difference_sum = tl.zeros((ROWS,), tl.float32)
    for tile in range(program * tiles, program * tiles + tiles):
        b = tile * ROWS + tl.arange(0, ROWS)
        valid = (b < B)[:, None] & real
        place = b[:, None] * C + c[None, :]
        plus = _load(plus_ptr, place, valid)
        weight = tl.full((ROWS,), 1.0, tl.float32)
        if CONFIDENCE:
            _, confidence = _log_softmax(_load(confidence_ptr, place, valid), real)
            label = tl.load(labels_ptr + b, b < B, 0)
            weight = tl.sum(tl.where(c[None, :] == label[:, None], confidence, 0), 1)
            tl.store(weights_ptr + b, weight * weight_scale, b < B)
        if WEIGHTED:
            weight = tl.load(weight_ptr + b, b < B, 0).to(tl.float32)
        base = tl.zeros((ROWS,), tl.float32)
        difference = tl.zeros((ROWS,), tl.float32)
        plus_slope = tl.zeros((ROWS, BLOCK_C), tl.float32)
        if BASE:
            teacher = _load(teacher_ptr, place, valid)
            base, slope = _kl(plus / temperature, teacher / temperature, real)
            scale = tl.full((ROWS,), base_scale, tl.float32)
            if WEIGH_BASE:
                scale *= weight
            base *= scale * temperature * temperature
            plus_slope += slope * (scale * temperature)[:, None]
        if DIVERGENCE != "":
            student = plus - _load(minus_ptr, place, valid)
            teacher = _load(teacher_plus_ptr, place, valid) - _load(teacher_minus_ptr, place, valid)
            if DIVERGENCE == "kl":
                difference, slope = _kl(student, teacher, real)
            else:
                gap = student - teacher
                if DIVERGENCE == "l1":
                    difference = tl.sum(tl.abs(gap), 1)
                    slope = tl.where(gap > 0, 1.0, 0.0) - tl.where(gap < 0, 1.0, 0.0)
                else:
                    difference = tl.sum(gap * gap, 1)
                    slope = 2 * gap
            scale = tl.full((ROWS,), 1.0, tl.float32) * difference_scale
            if WEIGH_DIFFERENCE:
                scale *= weight
            difference *= scale
            slope *= scale[:, None]
            plus_slope += slope
            if GRADIENT:
                tl.store(gradient_ptr + B * C + place, -slope, valid)
        if GRADIENT:
            tl.store(gradient_ptr + place, plus_slope, valid)
        if REDUCE:
            # Rows beyond B are zeros in all arrays, whose divergences are 0.
            base_sum += base
            difference_sum += difference
        else:
            tl.store(total_ptr + b, base + difference, b < B)
            tl.store(terms_ptr + b, base, b < B)
            tl.store(terms_ptr + B + b, difference, b < B)

    if REDUCE:
        base = tl.sum(base_sum, 0)
        difference = tl.sum(difference_sum, 0)
        if ONE_PROGRAM:
            tl.store(terms_ptr, base)
            tl.store(terms_ptr + 1, difference)
            tl.store(total_ptr, base + difference)
        else:
            programs = tl.num_programs(0)
            tl.store(partial_ptr + program, base)
            tl.store(partial_ptr + programs + program, difference)
            tl.debug_barrier()
            if tl.atomic_add(ended_ptr, 1, sem="acq_rel") == programs - 1:
                base = _sum_of(partial_ptr, programs, BLOCK_P)
                difference = _sum_of(partial_ptr + programs, programs, BLOCK_P)
                tl.store(terms_ptr, base)
                tl.store(terms_ptr + 1, difference)
                tl.store(total_ptr, base + difference)


def launch_plan(batch: int, classes: int) -> tuple[dict[str, int], int, int]:
    """Block sizes, programs and tiles per program: from the shapes alone, so that results repeat."""
    block_c = max(4, 1 << (classes - 1).bit_length())
    one = batch * block_c <= ONE_PROGRAM
    rows = min(max(1, (2048 if one else 1024) // block_c), 1 << (batch - 1).bit_length())
    tiles = -(-batch // rows)
    numbers_a_warp = 128 if one else 256
    blocks = {
        "ROWS": rows,
        "BLOCK_C": block_c,
        "num_warps": max(1, min(16, rows * block_c // numbers_a_warp)),
    }
    return (blocks, 1, tiles) if one else (blocks, tiles, 1)


class Operands(NamedTuple):
    """The kernel's tensors, see there; a term whose tensors are None is left out."""

    plus: Tensor
    minus: Tensor | None
    teacher: Tensor | None
    teacher_plus: Tensor | None
    teacher_minus: Tensor | None
    confidence: Tensor | None
    labels: Tensor | None
    weight: Tensor | None
    ramp: Tensor | None


def _launch(tensors: Operands, options: Options, gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plus = tensors.plus
    batch, classes = plus.shape
    blocks, programs, tiles = launch_plan(batch, classes)
    outputs = _outputs(tensors, options, gradient)
    reduce = options.base_reduction != "none"
    alone = programs == 1 or not reduce
    _distillation_kernel[(programs,)](
        *[x if x is None else x.contiguous() for x in tensors],
        *outputs,
        None if alone else plus.new_empty(2, programs, dtype=torch.float32),
        None if alone else torch.zeros((), dtype=torch.int32, device=plus.device),
        batch,
        classes,
        options.temperature,
        *options.scales(batch, classes),
        options.weight_scale,
        tiles,
        BASE=tensors.teacher is not None,
        DIVERGENCE="" if tensors.minus is None else options.divergence,
        CONFIDENCE=tensors.confidence is not None,
        WEIGHTED=tensors.weight is not None,
        WEIGH_BASE=options.weigh_base,
        WEIGH_DIFFERENCE=options.weigh_difference,
        RAMP=tensors.ramp is not None,
        REDUCE=reduce,
        GRADIENT=gradient,
        ONE_PROGRAM=programs == 1,
        BLOCK_P=128,
        **blocks,
    )
    return outputs


def _outputs(tensors: Operands, options: Options, gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plus = tensors.plus
    batch, classes = plus.shape
    kept = () if options.base_reduction != "none" else (batch,)
    sides = 0 if not gradient else 1 if tensors.minus is None else 2
    return (
        plus.new_empty(kept, dtype=torch.float32),
        plus.new_empty((2, *kept), dtype=torch.float32),
        plus.new_empty(0 if tensors.confidence is None else batch, dtype=torch.float32),
        plus.new_empty((sides, batch, classes), dtype=torch.float32),
    )


def _run(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors, options, gradient = _parts(arguments)
    run = _in_cpp if tensors.plus.is_cpu and not interpreted() else _launch
    return run(tensors, options, gradient)


def _empty(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs(*_parts(arguments))


def _parts(arguments: tuple) -> tuple[Operands, Options, bool]:
    count = len(Operands._fields)
    return Operands._make(arguments[:count]), Options._make(arguments[count:-1]), arguments[-1]


_CPP_DTYPES = [torch.int64 if name == "labels" else torch.float32 for name in Operands._fields]


def _dense(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """x as the C++ reads it; to ask first takes a fifth of the time."""
    return x if x is None or (x.dtype == dtype and x.is_contiguous()) else x.to(dtype).contiguous()


def _in_cpp(tensors: Operands, options: Options, gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _outputs(tensors, options, gradient)
    native.call(
        "distillation",
        *map(_dense, tensors, _CPP_DTYPES),
        *outputs[:3],
        outputs[3] if gradient else None,
        *tensors.plus.shape,
        float(options.temperature),
        *options.scales(*tensors.plus.shape),
        float(options.weight_scale),
        ("kl", "l1", "l2").index(options.divergence),
        int(options.weigh_base),
        int(options.weigh_difference),
        int(options.base_reduction != "none"),
    )
    return outputs


def in_torch(tensors: Operands, options: Options) -> Distilled:
    """The same in PyTorch's operators, which can be differentiated twice."""
    plus, minus, teacher, teacher_plus, teacher_minus, confidence, labels, weight, ramp = tensors
    weights = plus.new_empty(0)
    if confidence is not None and labels is not None:
        w = reference.upcast(confidence).softmax(dim=1).gather(1, labels[:, None].long()).squeeze(1)
        weights, weight = options.weight_scale * w, w if weight is None else weight
    base = difference = torch.zeros_like(plus[:, 0] if options.base_reduction == "none" else plus[0, 0])
    if teacher is not None:
        base = reference.distillation_kl(
            plus,
            teacher,
            temperature=options.temperature,
            weight=weight if options.weigh_base else None,
            reduction=options.base_reduction,
        )
    if minus is not None and teacher_plus is not None and teacher_minus is not None:
        difference = reference.gradient_matching(
            plus,
            minus,
            teacher_plus,
            teacher_minus,
            weight=weight if options.weigh_difference else None,
            divergence=options.divergence,
            reduction=options.difference_reduction,
        )
        difference = difference if ramp is None else ramp * difference
        if options.difference_coefficient != 1:  # a scalar's tangent would become one of float64
            difference = options.difference_coefficient * difference
    total = difference if teacher is None else base if minus is None else base + difference
    return Distilled(total, torch.stack([base.detach(), difference.detach()]), weights)


def _again(*arguments) -> Tensor:
    tensors, options, _ = _parts(arguments)
    return in_torch(tensors, options).total


distillation_op = loss_op(
    "distillation",
    "(Tensor plus, Tensor? minus, Tensor? teacher, Tensor? teacher_plus, Tensor? teacher_minus, Tensor? confidence, "
    "Tensor? labels, Tensor? weight, Tensor? ramp, float temperature, "
    "float difference_coefficient, str base_reduction, str difference_reduction, str divergence, float weight_scale, "
    "bool weigh_base, bool weigh_difference, bool gradient) "
    "-> (Tensor total, Tensor terms, Tensor weights, Tensor gradient)",
    _run,
    _empty,
    inputs=2,
    again=_again,
)
DEFAULTS = Options()


class Distilled(NamedTuple):
    """What one launch gives."""

    total: Tensor
    """The loss, () or (B,); the only output with a gradient."""
    terms: Tensor
    """(2,) or (2, B): base and difference as they enter the total."""
    weights: Tensor
    """(B,) weight_scale softmax(confidence)[labels]; (0,) without confidence."""


def distillation(
    plus: Tensor,
    minus: Tensor | None = None,
    *,
    teacher: Tensor | None = None,
    teacher_plus: Tensor | None = None,
    teacher_minus: Tensor | None = None,
    confidence: Tensor | None = None,
    labels: Tensor | None = None,
    weight: Tensor | None = None,
    ramp: Tensor | None = None,
    options: Options = DEFAULTS,
    backend: str,
) -> Distilled:
    """The module's equations; a term whose tensors are None is left out. Arguments are not checked.

    Logits (B, C), labels and weight (B,), ramp (); `weight`, where given, is v_i in place of the confidence. Either
    both reductions are "none" or neither is. backend: "triton", which must be able to; "auto", C++ where it can;
    "torch".
    """
    if minus is not None and minus.dtype != plus.dtype:
        dtype = torch.promote_types(plus.dtype, minus.dtype)
        plus, minus = plus.to(dtype), minus.to(dtype)
    constants = (teacher, teacher_plus, teacher_minus, confidence, labels, weight, ramp)
    gradient = wants_gradient(plus) or (minus is not None and wants_gradient(minus))
    detached = [x.detach() if x is not None and x.requires_grad else x for x in constants]
    if backend == "torch" or (backend == "auto" and not _native(plus, minus, *detached)):
        return in_torch(Operands(plus, minus, *detached), options)
    total, terms, weights, _ = call(distillation_op, plus, minus, *detached, *options, gradient)
    return Distilled(total, terms, weights)


def _native(*tensors: Tensor | None) -> bool:
    """Whether these go to the C++. Compiled, PyTorch fuses as much by itself; transforms need its operators."""
    return in_cpp(tensors) and all(x is None or (x.is_cpu and x.dtype != torch.float64) for x in tensors)


def launches(target: str) -> list[Launch]:
    """What the whole objective launches at B = 128."""
    batch, found = 128, []
    for classes, dtype in ((10, torch.float32), (100, torch.float32), (200, torch.bfloat16), (1000, torch.bfloat16)):
        work = {"distillation_kernel": (batch * classes * (6 * dtype.itemsize + 8), 60 * batch * classes, "fp32")}
        logits = [torch.empty(batch, classes, dtype=dtype, device="meta") for _ in range(6)]
        labels = torch.empty(batch, dtype=torch.int64, device="meta")
        options = Options(4.0, difference_coefficient=3.0, weight_scale=0.8)
        ramp = torch.empty((), device="meta")
        run = partial(_launch, Operands._make([*logits, labels, None, ramp]), options, True)
        found += recorded(run, target, f"B = {batch}, C = {classes}, {SHORT_NAMES[dtype]}", work)
    return found
