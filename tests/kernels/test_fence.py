"""The fence around interpreted kernels stops what strays."""

from __future__ import annotations

import pytest
import torch
from checks import DEVICE, INTERPRETED
from fastrd.kernels.runtime.jit import kernel, tl

pytestmark = [pytest.mark.triton, pytest.mark.skipif(not INTERPRETED, reason="of Triton's interpreter")]


@kernel
def _copy(x_ptr, out_ptr, first, size, BLOCK: tl.constexpr):
    place = first + tl.arange(0, BLOCK)
    tl.store(out_ptr + place, tl.load(x_ptr + place, place < size, 0), place < size)


@pytest.mark.parametrize(("first", "size", "inside"), [(0, 5, True), (0, 6, False), (-1, 5, False), (5, 5, True)])
def test_reads_beyond_a_tensor_fail(first, size, inside):
    memory = torch.zeros(3, 5, device=DEVICE)
    run = lambda x: _copy[(1,)](x, memory[2], first, size, BLOCK=8)
    if inside:
        run(memory[1])
        return
    with pytest.raises(AssertionError, match="_copy reads outside of its tensors"):
        run(memory[0])


def test_writes_beyond_a_tensor_fail_and_leave_it_alone():
    memory = torch.zeros(3, 5, device=DEVICE)
    with pytest.raises(AssertionError, match="outside of its tensors"):
        _copy[(1,)](torch.ones(8, device=DEVICE), memory[1], 0, 8, BLOCK=8)
    assert torch.equal(memory[2], torch.zeros(5, device=DEVICE))
