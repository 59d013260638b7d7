"""Every kernel's numerics, run by Triton's interpreter on the CPU."""

from __future__ import annotations

import pytest
from checks import HERE, INTERPRETED, interpret

FILES = sorted(
    path.name for path in HERE.glob("test_*.py") if "mark.triton" in path.read_text(encoding="utf-8")
)


@pytest.mark.skipif(INTERPRETED, reason="already in the interpreter")
@pytest.mark.slow
@pytest.mark.parametrize("file", [name for name in FILES if name != "test_interpreter.py"])
def test_kernels_in_the_interpreter(file):
    pytest.importorskip("triton")
    done = interpret(HERE / file)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
