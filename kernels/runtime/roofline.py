"""What every shipped kernel takes on every target, and how fast it could possibly be: `fastrd doctor --kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

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
    table = [
        header,
        *(_line(row) for row in sorted(rows, key=lambda row: (row.kernel, row.problem, row.target))),
    ]
    widths = [max(len(line[column]) for line in table) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    lines.insert(1, "-" * len(lines[0]))
    lines += [
        "",
        "Spill and shared memory in bytes a thread and KiB a program; the last columns are floors in microseconds.",
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
    ]
