"""Every kernel's numerics, run by Triton's interpreter on the CPU."""

from __future__ import annotations

import pytest
from checks import HERE, INTERPRETED, OTHER_TRITONS, interpret

FILES = sorted(path.name for path in HERE.glob("test_*.py") if "mark.triton" in path.read_text(encoding="utf-8"))


@pytest.mark.skipif(INTERPRETED, reason="already in the interpreter")
@pytest.mark.slow
@pytest.mark.parametrize("file", [name for name in FILES if name != "test_interpreter.py"])
def test_kernels_in_the_interpreter(file):
    pytest.importorskip("triton")
    done = interpret(HERE / file)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.skipif(INTERPRETED, reason="already in the interpreter")
@pytest.mark.slow
@pytest.mark.parametrize("folder", OTHER_TRITONS, ids=lambda path: path.name)
def test_other_versions_of_triton_compute_the_same(folder):
    some = "accuracy_at_shipped or reductions_with_eps or the_objective or equals_the_reference"
    done = interpret(HERE, "-k", some, PYTHONPATH=str(folder))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
