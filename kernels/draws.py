"""Which rows of a memory bank an anchor is contrasted with: drawn by counter, so that nothing has to be stored.

An anchor's n rows of other classes are taken in class-sorted order, going round from the end of its own class, rotated
by a random offset, and cut into k strata of floor or ceil(n / k) neighbours; each stratum gives one row. Hence every
row has probability k/n, no row comes twice while k <= n, each class gets its share, and whether a given row was drawn
is a closed formula of its rank (nce_bank.py). Where k > n every row comes k // n times and k mod n of them once more.

The random bits are a hash of (seed, anchor, stratum), in 32-bit arithmetic: the same on every device.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from .cpu import native
from .runtime.ops import scalar

BITS = 29
"""Of a hash are used: times a number of rows, up to 2**24, they still fit into float64."""
MIX_1, MIX_2, GOLDEN, SILVER = 0x21F0AAAD, 0xD35A2D97, 0x9E3779B9, 0x85EBCA6B


def class_table(labels: Tensor) -> Tensor:
    """What the draws need to know about labels (M,): int32 (4, M).

    Rows: order, the bank's rows sorted by class; place, each row's position in that order; and, of each row's class,
    the first place and the number of rows. Computing it sorts: do it once for a bank whose labels do not change.
    """
    order = labels.argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    ordered = labels[order]
    first = torch.searchsorted(ordered, labels)
    size = torch.searchsorted(ordered, labels, right=True) - first
    return torch.stack([order, place, first, size]).to(torch.int32)


def is_class_table(table: Tensor) -> bool:
    """Whether int32 (4, M), M >= 1, is a `class_table` of some labels: its values are looked at, nothing is sorted."""
    order, place, first, size = table
    rows = table.shape[1]
    low, high = table[:3].aminmax()
    rising = torch.arange(rows, dtype=place.dtype, device=place.device)
    if low < 0 or high >= rows or not torch.equal(place[order], rising):
        return False
    # As many rows name a first place as there are places from it on, and each lies on one of them.
    inside = (place >= first) & (place - first < size)
    return bool(inside.all()) and torch.equal(first.bincount(minlength=rows)[first], size.long())


def sample_negatives(classes: Tensor, positives: Tensor, k: int, seed: int | Tensor) -> Tensor:
    """The k rows drawn for each anchor, int64 (B, k), in an order whose prefixes are spread evenly too.

    classes: of `class_table`; positives (B,) int64 rows; seed: 64 bits. -1 where there is no row of another class.
    """
    # A column's stratum is (column + offset) step mod k.
    step = next(step for step in range(max(1, round(k * 0.618)), k + 2) if gcd(step, k) == 1)
    key, _ = _keys(0, len(positives), seed, classes.device)
    offset = _offset(key, k)
    if _native(classes):
        return _in_cpp(classes, positives, k, seed, 0, place=-offset % k, stride=pow(step, -1, k))
    rows = _in_torch(classes, positives, k, seed, 0)
    return rows.gather(1, (torch.arange(k, device=rows.device) + offset) * step % k)


def draw(classes: Tensor, positives: Tensor, k: int, seed: int | Tensor, start: int) -> Tensor:
    """The rows (B, k), by stratum, of the anchors number `start` and up."""
    if _native(classes):
        return _in_cpp(classes, positives, k, seed, start)
    return _in_torch(classes, positives, k, seed, start)


def _plan(classes: Tensor, positives: Tensor, k: int, seed: int | Tensor, start: int) -> tuple[Tensor, ...]:
    """Of each anchor, (B, 1): its keys, the end of its class, rows of other classes, at least 1 and as they are, how
    often each comes, the strata of those that come once more, and how far ranks are turned."""
    _, _, first, size = classes
    size = size[positives, None].long()
    end = first[positives, None] + size
    others = classes.shape[1] - size
    n = others.clamp(min=1)
    every = k // n
    strata = (k - every * n).clamp(min=1)
    key_1, key_2 = _keys(start, len(positives), seed, classes.device)
    return key_1, key_2, end, n, others, every, strata, _offset(key_2, n)


def _native(classes: Tensor) -> bool:
    return classes.device.type == "cpu" and not torch.compiler.is_compiling() and native.library() is not None


def _in_cpp(
    classes: Tensor,
    positives: Tensor,
    k: int,
    seed: int | Tensor,
    start: int,
    place: int | Tensor = 0,
    stride: int = 1,
) -> Tensor:
    """By stratum; or the first at column `place` (B, 1) and each further one `stride` on, going round."""
    anchors = positives.new_empty(len(positives), 9)  # on the CPU, whatever device is the default
    for column, value in enumerate((*_plan(classes, positives, k, seed, start), place)):
        anchors[:, column : column + 1] = value
    order, rows = classes[0].contiguous(), positives.new_empty(len(positives), k)
    native.call("draws", order, len(order), anchors, len(positives), k, stride, rows)
    return rows


def _in_torch(classes: Tensor, positives: Tensor, k: int, seed: int | Tensor, start: int) -> Tensor:
    key_1, key_2, end, n, others, every, strata, turn = _plan(classes, positives, k, seed, start)
    device = classes.device
    # In float64, which is exact here and faster than int64: all products stay below 2**53, and a quotient below 2**52
    # cannot be rounded past the next integer.
    end, n, every, strata, turn = (x.double() for x in (end, n, every, strata, turn))
    column = torch.arange(k + 1, device=device, dtype=torch.float64)
    stratum = column - every * n
    x = stratum[:, :-1].to(torch.int32) + key_1
    x ^= (x >> 16) & 0xFFFF
    x *= _signed(MIX_1)
    x ^= key_2
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(MIX_2)
    x ^= (x >> 15) & 0x1FFFF
    bound = (stratum * n).div_(strata).floor_()
    rank = _bits(x).double().mul_(bound.diff(dim=1)).mul_(0.5**BITS).floor_().add_(bound[:, :-1])
    # Looking at values would be a sync on a GPU, and is free elsewhere.
    if device.type != "cpu" or every.any():
        rank = torch.where(stratum[:, :-1] < 0, column[:-1] % n, rank)
    rank -= turn
    rank += (rank < 0) * n
    rows = classes[0].long().repeat(2).take(rank.add_(end).long())
    return rows.masked_fill_(others == 0, -1)


def _keys(start: int, count: int, seed: int | Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two 32-bit keys (B, 1) of each anchor."""
    anchor = torch.arange(start, start + count, device=device, dtype=torch.int32)[:, None]
    seed = scalar(seed, torch.int64, device)
    key = _mix(anchor * _signed(GOLDEN) + _low(seed)) ^ _low(seed >> 32)
    key_1 = _mix(key)
    return key_1, _mix(key_1 + _signed(GOLDEN))


def _offset(key: Tensor, n: int | Tensor) -> Tensor:
    """A rotation, uniform below n."""
    return _bits(_mix(key + _signed(SILVER))).long() * n >> BITS


def _signed(constant: int) -> int:
    return constant - (constant >> 31 << 32)


def _low(x: Tensor) -> Tensor:
    """The low 32 bits as an int32."""
    return ((x & 0xFFFFFFFF) - ((x >> 31 & 1) << 32)).to(torch.int32)


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finaliser on int32 with wrapping products."""
    x = (x ^ (x >> 16 & 0xFFFF)) * _signed(MIX_1)
    x = (x ^ (x >> 15 & 0x1FFFF)) * _signed(MIX_2)
    return x ^ (x >> 15 & 0x1FFFF)


def _bits(x: Tensor) -> Tensor:
    """The upper BITS bits."""
    return x >> (32 - BITS) & (1 << BITS) - 1
