"""Triton, on first launch: importing a module full of kernels costs nothing and works where Triton is not installed."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import Any, cast

import torch

AVAILABLE = importlib.util.find_spec("triton") is not None

OPTIONS = {"enable_fp_fusion": True}
"""Compiler options of every launch. Triton's default for fused multiply-adds changes in 3.10."""

tl: Any = None
"""Stands for `triton.language` in the text of kernels; Triton gets the real one."""


class Kernel:
    """A function in Triton's language, not yet handed to Triton. `kernel[grid](tensor, ...)` launches it.

    The function's module must say `from __future__ import annotations` (`tl.constexpr` in a signature is then a
    string) and take `tl` from here. It may call other kernels of its module.
    """

    __name__: str

    def __init__(self, function: Any) -> None:
        self.function = function
        functools.update_wrapper(cast(Any, self), function)

    def __getitem__(self, grid: Any) -> Callable:
        if _recording is not None:
            return functools.partial(_recording.take, self)
        return functools.partial(self._launch, grid)

    def _launch(self, grid: Any, first: torch.Tensor, *arguments: Any, **options: Any) -> None:
        # Triton launches on the current device, which need not be that of the tensors; to change it takes a while.
        elsewhere = first.is_cuda and first.get_device() != torch.cuda.current_device()
        with torch.cuda.device(first.device) if elsewhere else nullcontext():
            self.jit[grid](first, *arguments, **options, **OPTIONS)

    @functools.cached_property
    def jit(self) -> Any:
        """The `triton.jit` function."""
        import triton
        import triton.language

        # Triton resolves names in a function's globals: it gets a copy, in which they mean what it expects.
        names = {**self.function.__globals__, "tl": triton.language}
        names.update({name: value.jit for name, value in names.items() if _callee(value, self)})
        original = self.function
        function: Any = FunctionType(original.__code__, names, original.__name__, original.__defaults__)
        functools.update_wrapper(function, original)
        del function.__wrapped__
        return triton.jit(function)


def _callee(value: Any, kernel: Kernel) -> bool:
    return isinstance(value, Kernel) and value.__name__ in kernel.function.__code__.co_names


def kernel(function: Callable) -> Any:
    """Decorator: a Triton kernel or a helper of one, handed to Triton on first launch."""
    return Kernel(function)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1 before Triton is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def launches_kernels(backend: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a result of `dtype` on `device` comes from the Triton kernel; "auto" takes it on CUDA.

    Raises ValueError: an unknown backend, or "triton" where it cannot run.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend: got {backend!r}; accepted: 'auto', 'torch', 'triton'")
    if backend == "torch":
        return False
    able = AVAILABLE and dtype != torch.float64
    if backend == "triton" and not (able and (device.type == "cuda" or interpreted())):
        raise ValueError(f"backend: got 'triton' with {dtype} on {device}; accepted: 'auto' or 'torch' here")
    return able and (backend == "triton" or device.type == "cuda")


class Recording:
    """Launches that were not run: (kernel, arguments by name) each."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.calls: list[tuple[Kernel, dict[str, Any]]] = []

    def take(self, kernel: Kernel, *positional: Any, **named: Any) -> None:
        names = kernel.function.__code__.co_varnames
        self.calls.append((kernel, {**dict(zip(names, positional, strict=False)), **named}))


_recording: Recording | None = None


@contextmanager
def recording(target: str) -> Iterator[Recording]:
    """Inside the block kernels are not launched but recorded, with what launchers would do on `target` (see aot.py)."""
    global _recording
    _recording = Recording(target)
    try:
        yield _recording
    finally:
        _recording = None


def target_of(device: torch.device) -> str:
    """The ahead-of-time target (see aot.py) whose block sizes suit this device."""
    if _recording is not None:
        return _recording.target
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


def wave(device: torch.device) -> int:
    """How many programs keep the device busy: two for each multiprocessor."""
    if _recording is not None:
        return 264
    if device.type != "cuda":
        return 4
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count
