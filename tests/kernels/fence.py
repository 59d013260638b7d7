"""A fence around a kernel's tensors while Triton interprets it: what it reads or writes beyond them fails the test.

On a GPU such a read gives anything, or an error that no later launch of the process survives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from fastrd.kernels.runtime.jit import Kernel
from torch import Tensor


@contextmanager
def fenced() -> Iterator[None]:
    """Inside, a launch fails (AssertionError) where it touches an element outside of all tensors it was given."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    extents: list[tuple[int, int]] = []
    strays: list[str] = []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    atomic, launch = InterpreterBuilder.create_atomic_rmw, Kernel._launch

    def inside(pointers: TensorHandle, mask: TensorHandle, verb: str) -> TensorHandle:
        address, size = pointers.data.astype(np.int64), pointers.get_element_ty().primitive_bitwidth // 8
        known = np.zeros(address.shape, bool)
        for start, end in extents:
            known |= (address >= start) & (address + size <= end)
        if (mask.data & ~known).any():
            strays.append(verb)
        return TensorHandle(mask.data & known, mask.dtype)

    def checked(self: Kernel, grid: object, *arguments: object, **options: object) -> None:
        tensors = [x for x in (*arguments, *options.values()) if isinstance(x, Tensor) and x.numel()]
        extents[:] = [(x.data_ptr(), x.data_ptr() + _span(x) * x.element_size()) for x in tensors]
        launch(self, grid, *arguments, **options)
        assert not strays, f"{self.__name__} {strays[0]} outside of its tensors"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernel, "_launch", checked)
        for name, function, verb, pointers, mask in (
            ("create_masked_load", load, "reads", 0, 1),
            ("create_masked_store", store, "writes", 0, 2),
            ("create_atomic_rmw", atomic, "adds", 1, 3),
        ):

            def guarded(self, *given, function=function, verb=verb, pointers=pointers, mask=mask, **named):
                given = list(given)
                given[mask] = inside(given[pointers], given[mask], verb)
                return function(self, *given, **named)

            patch.setattr(InterpreterBuilder, name, guarded)
        yield


def _span(x: Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
