"""What every kernel's tests share: where kernels run, and the accuracy rule."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import rounding
import torch
from fastrd.kernels.runtime import aot
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CAN_LAUNCH = INTERPRETED or torch.cuda.is_available()
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.triton)]
HERE = Path(__file__).parent

OTHER_TRITONS = sorted(HERE.parents[1].glob(".triton*/"))
"""Other versions of Triton, to be put in front of the installed one: `make .triton36` makes one."""

# Of the largest element, beside what float32 kernels may lack (rounding.py). Half precision rounds its gradients once
# and multiplies rounded probabilities; the interpreter truncates where a GPU rounds.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 0.0, torch.bfloat16: 1e-2, torch.float16: 4e-3}


def interpret(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
    """Run pytest with these arguments on the `triton` tests, in a process that interprets kernels."""
    switches = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "triton"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        check=False,
        cwd=HERE.parents[1],
        env={**os.environ, **switches, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def value_and_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor | float = 1.0
) -> list[Tensor]:
    """[value, gradient of each input] of `function(*inputs)`, for the gradient `upstream` of its value."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = function(*leaves)
    upstream = torch.as_tensor(upstream, dtype=value.dtype, device=value.device).expand_as(value)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


def assert_as_accurate(
    kernel: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    *,
    upstream: Tensor | float = 1.0,
    reach: float | None = None,
    score: float = 0.0,
) -> None:
    """|kernel - gold| <= |reference - gold| + tolerance, in value and every gradient; gold: the reference in float64.

    Errors are largest absolute ones; the tolerance is a fraction of gold's largest element (at least 1e-3 of 1).
    reach, score: see `rounding.kernel_tolerance`; the default is for logits as inputs, or their differences.
    """
    reach = 2 * sum(float(x.abs().max()) for x in inputs) if reach is None else reach
    tolerance = TOLERANCE[inputs[0].dtype]
    if inputs[0].dtype != torch.float64:
        tolerance += rounding.kernel_tolerance(reach, score)
    gold = value_and_gradients(reference, [x.double() for x in inputs], upstream)
    ours = value_and_gradients(kernel, inputs, upstream)
    theirs = value_and_gradients(reference, inputs, upstream)
    for name, exact, our, their in zip(["value", *map(str, range(len(inputs)))], gold, ours, theirs, strict=True):
        assert our.shape == their.shape and our.dtype == their.dtype, name
        assert torch.isfinite(our).all(), f"{name}: not finite"
        allowed = _error(their, exact) + tolerance * max(float(exact.abs().max()), 1e-3)
        assert _error(our, exact) <= allowed, f"{name}: error {_error(our, exact):.2e} > {allowed:.2e}"


def _error(x: Tensor, gold: Tensor) -> float:
    return float((x.double() - gold).abs().max())


def assert_compiles(target: str, kernel: str = "", *, module: str | None = None, pythonpath: str | None = None) -> None:
    """The shipped launches of `module` whose name contains `kernel`: no spills, shared memory within the limit.

    Those that multiply matrices do it with the target's own instruction.
    """
    rows = aot.resources(target, kernel, module=module, pythonpath=pythonpath)
    assert rows
    for row in rows:
        assert row.stack == 0, f"{row.kernel} ({row.problem}) spills {row.stack} bytes on {target}"
        assert row.shared <= aot.SHARED_LIMIT[target], row
        if row.flops_in != "fp32" and row.flops:
            assert aot.MATRIX_INSTRUCTIONS[target] in row.matrix, row
