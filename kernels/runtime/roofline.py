"""What every shipped kernel takes on every target, and how fast it could possibly be: `fastrd doctor --kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from . import aot

SUSTAINED = {
    "A100": {"bytes": 1.83e12, "bf16": 250e12, "tf32": 125e12, "fp32": 15.6e12},
    "H100": {"bytes": 3.00e12, "bf16": 790e12, "tf32": 395e12, "fp32": 53e12},
    "H200": {"bytes": 4.30e12, "bf16": 790e12, "tf32": 395e12, "fp32": 53e12},
}
"""Bytes and operations per second: the makers' figures for the SXM boards times what was measured to be reachable on
an H200, 0.9 of its bandwidth and 0.8 of its dense matrix rate. "tf32x3": our kernels' exact float32, three products of
tf32."""
for _rates in SUSTAINED.values():
    _rates["tf32x3"] = _rates["tf32"] / 3


def floor(row: aot.Resources, gpu: str) -> float:
    """Seconds below which this launch cannot finish on `gpu`: its bytes or its operations, whichever takes longer."""
    rate = SUSTAINED[gpu]
    return max(row.bytes / rate["bytes"], row.flops / rate[row.flops_in])


MULTIPROCESSORS, CLOCK = 132, 790e12 / 132 / 4096
"""Of an H100 or H200, by which launches on sm_90 are predicted:
the clock (Hz) that makes the sustained rate of bf16."""
SCHEDULERS, REGISTERS, SHARED = 4, 65536, 227 << 10
"""Of a multiprocessor: warps that issue an instruction in a clock, registers, bytes of shared memory."""
TENSOR = {"bf16": 4096, "tf32": 2048, "tf32x3": 2048 / 3, "fp32": 256}
"""Operations of a multiprocessor in a clock."""


class Prediction(NamedTuple):
    """What a tile costs a multiprocessor, in clocks, and the whole launch on an H200."""

    issue: float  # of its instructions
    arithmetic: float  # of its operations
    seconds: float
    share_of_floor: float


def predicted(row: aot.Resources) -> Prediction | None:
    """From the machine code alone; None but for launches on sm_90 whose tiles are counted.

    Where two programs fit a multiprocessor one multiplies while the other issues; a single one does either in turn.
    """
    if row.target != "sm_90" or row.instructions is None:
        return None
    issue = row.instructions * row.threads / 32 / SCHEDULERS
    arithmetic = row.flops / row.tiles / TENSOR[row.flops_in]
    registers = -(-row.registers // 8) * 8 * row.threads
    resident = min(REGISTERS // registers, SHARED // (row.shared + 1024))
    clocks = max(issue, arithmetic) if resident > 1 else issue + arithmetic
    least = floor(row, "H200")
    seconds = max(least, row.tiles * clocks / MULTIPROCESSORS / CLOCK)
    return Prediction(issue, arithmetic, seconds, least / seconds)


def report(targets: Sequence[str] = aot.TARGETS, kernel: str = "") -> str:
    """A table: registers, spills, shared memory, traffic, operations and floor times of every shipped launch.

    Args:
        targets: of `aot.TARGETS`.
        kernel: part of "module.kernel problem".

    Compiles everything, which takes minutes the first time; Triton keeps the results. Needs no GPU.

    Raises:
        ModuleNotFoundError: Triton is not installed.
        RuntimeError: a kernel does not compile.
    """
    from .jit import AVAILABLE

    if not AVAILABLE:
        raise ModuleNotFoundError("Triton is not installed; `pip install triton` (Linux)")
    with ThreadPoolExecutor(2) as pool:
        rows = [row for found in pool.map(lambda target: aot.resources(target, kernel), targets) for row in found]
    header = ["kernel", "problem", "target", "regs", "spill", "shared", "matrix", "MB", "GFLOP", *SUSTAINED]
    header += ["instr", "issue", "tensor", "us", "%"]
    table = [
        header,
        *(_line(row) for row in sorted(rows, key=lambda row: (row.kernel, row.problem, row.target))),
    ]
    widths = [max(len(line[column]) for line in table) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    lines.insert(1, "-" * len(lines[0]))
    lines += [
        "",
        "Spill and shared memory in bytes a thread and KiB a program; below the names of GPUs floors in microseconds.",
        "Of sm_90's main loops: instructions of a warp for a tile, clocks of a multiprocessor to issue them and to "
        "multiply,",
        "and what follows for an H200: microseconds, and the share that the floor is of them. Not measured.",
    ]
    return "\n".join(lines)


def _line(row: aot.Resources) -> list[str]:
    return [
        row.kernel,
        row.problem,
        row.target,
        str(row.registers),
        str(row.stack),
        f"{row.shared / 1024:.0f}",
        ",".join(row.matrix) or "-",
        f"{row.bytes / 1e6:.1f}",
        f"{row.flops / 1e9:.1f}",
        *(f"{1e6 * floor(row, gpu):.1f}" for gpu in SUSTAINED),
        *_predicted(row),
    ]


def _predicted(row: aot.Resources) -> list[str]:
    found = predicted(row)
    if found is None:
        return ["-"] * 5
    return [
        str(row.instructions),
        f"{found.issue:.0f}",
        f"{found.arithmetic:.0f}",
        f"{1e6 * found.seconds:.1f}",
        f"{100 * found.share_of_floor:.0f}",
    ]
