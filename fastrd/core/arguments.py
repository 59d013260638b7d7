"""Checks of tensors, devices and options. Each error names the argument, what came and what is accepted."""

from __future__ import annotations

import re
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .fingerprint import tensors_of
from .values import as_integer, check_number, shown


def check_device(device: Any = None) -> torch.device:
    """Returns the device called `device`, by default the first CUDA device where there is one, else the CPU.

    Raises ValueError: another kind of device, or one that this machine does not have.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None:
        return torch.device("cuda" if count else "cpu")
    # By its name: torch takes "cuda:256" for "cuda:0".
    name = re.fullmatch(r"cpu|cuda(?::(\d{1,6}))?", str(device))
    if name is None:
        raise ValueError(f"device: got {shown(device)}; accepted: cpu, cuda, cuda:N")
    if name[0] != "cpu" and int(name[1] or 0) >= count:
        there = f"has {count} CUDA device{'s' if count > 1 else ''}" if count else "has no CUDA device"
        accepted = "cpu, cuda:N" if count else "cpu"
        raise ValueError(f"device: got {name[0]!r}, but this machine {there}; accepted: {accepted}")
    return torch.device(name[0])


def check_flags(**values: Any) -> None:
    """Raises TypeError unless each is true or false; a string such as "no" would count as true."""
    for name, value in values.items():
        if not isinstance(value, (bool, np.bool_, Integral)) or value not in (0, 1):
            raise TypeError(f"{name}: got {shown(value)}; accepted: true or false")


def check_callable(**values: Any) -> None:
    for name, value in values.items():
        if not callable(value):
            raise TypeError(f"{name}: got {shown(value)}; accepted: a function")


LARGEST_TEMPERATURE = 1000  # beyond, t^2 times a rounding error of float32 is no longer small beside t^2 KL


def check_temperature(temperature: Any) -> None:
    check_number(least=1e-6, most=LARGEST_TEMPERATURE, temperature=temperature)


def check_seed(seed: Any, name: str = "seed") -> None:
    """Raises unless `seed` is an integer of 64 bits, or an int64 scalar tensor."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(f"{name}: got {seed.dtype} {tuple(seed.shape)}; accepted: an int64 scalar")
    elif as_integer(seed) is None:
        raise TypeError(f"{name}: got {shown(seed)}; accepted: an integer of 64 bits, or an int64 scalar tensor")


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MIN_FLOAT32, MAX_FLOAT32 = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
REALS = (*FLOATS, *INTEGERS, torch.bool)


def check_tensor(**tensors: Any) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}; accepted: a tensor")


def check_dense(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.layout is not torch.strided:
            raise TypeError(f"{name}: got a tensor in layout {x.layout}; accepted: a dense tensor")


def check_floats(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}; accepted: a floating point tensor")
        if x.dtype not in FLOATS or x.layout is not torch.strided:
            layout = "" if x.layout is torch.strided else f" in layout {x.layout}"
            accepted = "a floating point tensor, dense, of 16, 32 or 64 bits"
            raise TypeError(f"{name}: got {x.dtype}{layout}; accepted: {accepted}")
    check_same_device(next(iter(tensors.values())), **tensors)


def check_same_device(first: Tensor, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.device != first.device:
            raise ValueError(f"{name}: got a tensor on {x.device}; accepted: the device of the inputs, {first.device}")


def check_matrices(**tensors: Tensor) -> None:
    check_tensor(**tensors)
    for name, x in tensors.items():
        if x.ndim != 2 or x.numel() == 0:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}; accepted: two dimensions, neither empty")


def check_same_shape(**tensors: Tensor) -> None:
    (first_name, first), *_ = tensors.items()
    for name, x in tensors.items():
        if x.shape != first.shape:
            accepted = f"that of {first_name}, {tuple(first.shape)}"
            raise ValueError(f"{name}: got shape {tuple(x.shape)}; accepted: {accepted}")


def check_same_logits(**tensors: Tensor) -> None:
    """Raises unless all are floating point (N, C), N, C >= 1, of one shape on one device."""
    check_floats(**tensors)
    (first_name, first), *_ = tensors.items()
    check_matrices(**{first_name: first})
    check_same_shape(**tensors)


def check_features(**tensors: Tensor) -> None:
    """Raises unless all are floating point rows (n, D), n, D >= 1, of one width on one device."""
    check_floats(**tensors)
    check_matrices(**tensors)
    (first_name, first), *_ = tensors.items()
    for name, x in tensors.items():
        if x.shape[1] != first.shape[1]:
            raise ValueError(f"{name}: got {x.shape[1]} features; accepted: those of {first_name}, {first.shape[1]}")


def check_indices(first: Tensor, length: int, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        _check_vector(first, length, name, x, "an integer tensor")
        is_rows = name in ("positives", "rows", "index")  # what tensors are indexed with
        if x.dtype not in INTEGERS or (is_rows and x.dtype != torch.int64):
            raise TypeError(f"{name}: got {x.dtype}; accepted: {'int64' if is_rows else 'integers, signed or uint8'}")


def check_scalar(first: Tensor, **tensors: Tensor) -> None:
    """Raises unless each is a tensor of one real number on the device of `first`."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {shown(x)}; accepted: a scalar tensor")
        if x.numel() != 1:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}; accepted: a scalar tensor")
        if x.dtype not in REALS:
            raise TypeError(f"{name}: got {x.dtype}; accepted: a real number")
        check_dense(**{name: x})
        check_same_device(first, **{name: x})


def check_normalizer(first: Tensor, normalizer: Any) -> None:
    """Raises unless Z is a number above 0, or a scalar tensor that on the CPU is one."""
    if not isinstance(normalizer, Tensor):
        check_number(least=MIN_FLOAT32, most=MAX_FLOAT32, normalizer=normalizer)
        return
    check_scalar(first, normalizer=normalizer)
    if normalizer.device.type == "cpu" and not torch.compiler.is_compiling() and not 0 < normalizer.item() < torch.inf:
        raise ValueError(f"normalizer: got {normalizer.item()}; accepted: a number > 0")


def check_rows(rows: int, least: int = 0, /, **tensors: Tensor) -> None:
    """Raises IndexError where an index on the CPU is outside least..rows - 1; a look at a GPU's would wait for it."""
    for name, x in tensors.items():
        if x.device.type == "cpu" and x.numel() and not torch.compiler.is_compiling():
            low, high = (int(bound) for bound in x.aminmax())
            if low < least or high >= rows:
                raise IndexError(f"{name}: got {low}..{high}; accepted: {least}..{rows - 1}")


def check_table(first: Tensor, rows: int, width: int | None = None, /, **tables: Tensor) -> None:
    """Raises unless each holds int64 rows (B, k) of a bank, B that of `first`, k any or `width`; -1: an empty place."""
    for name, table in tables.items():
        if table.ndim != 2 or len(table) != len(first) or table.shape[1] == 0 or width not in (None, table.shape[1]):
            accepted = f"(B, k), B = {len(first)}, k {'>= 1' if width is None else f'= {width}'}"
            raise ValueError(f"{name}: got a table of shape {tuple(table.shape)}; accepted: {accepted}")
        if table.dtype != torch.int64:
            raise TypeError(f"{name}: got {table.dtype}; accepted: int64 rows of the bank")
        check_dense(**{name: table})
        check_same_device(first, **{name: table})
        check_rows(rows, -1, **{name: table})


def check_weight(weight: Tensor | None, first: Tensor) -> None:
    if weight is not None:
        _check_vector(first, len(first), "weight", weight, "a tensor")
        if weight.dtype not in REALS:
            raise TypeError(f"weight: got {weight.dtype}; accepted: real numbers")


def _check_vector(first: Tensor, length: int, name: str, x: Any, kind: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}; accepted: {kind} ({length},)")
    if x.shape != (length,):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}; accepted: ({length},)")
    check_dense(**{name: x})
    check_same_device(first, **{name: x})


INFERENCE = (
    "was made inside torch.inference_mode(), which no gradient passes; accepted: what was made outside of it, or a copy"
)


def check_module(name: str, module: Any, accepted: str) -> None:
    """Raises TypeError unless `module` is an nn.Module, ValueError unless its weights are float32 and let gradients
    pass."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name}: got {type(module).__name__}; accepted: {accepted}")
    for key, tensor in tensors_of(module):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(f"{name}: {key} is {tensor.dtype}; accepted: float32 weights, as in {name}.float()")
        if tensor.is_inference():
            raise ValueError(f"{name}: {key} {INFERENCE}")


def check_logits(logits: Any, images: int, name: str = "model") -> None:
    """Raises ValueError unless the network `name` gave logits (images, classes), floating point."""
    if not isinstance(logits, Tensor):
        accepted = "logits (N, classes), a tensor. A module that returns more needs a wrapper that returns these alone"
        raise ValueError(f"{name}: returned {type(logits).__name__}; accepted: {accepted}")
    if logits.ndim != 2 or len(logits) != images or not logits.is_floating_point():
        got = f"{logits.dtype} {tuple(logits.shape)} for {images} images"
        raise ValueError(f"{name}: returned {got}; accepted: floating point logits ({images}, classes)")


def check_generator(generator: Any, x: Tensor) -> None:
    """Raises unless `generator` is None or draws on the kind of device that x is on."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: got {shown(generator)}; accepted: a torch.Generator on {x.device.type}, or None")
    if generator.device.type != x.device.type:
        raise ValueError(f"generator: got one on {generator.device}; accepted: the device of x, {x.device}")


def check_classes(y: Any, logits: Tensor | None = None) -> None:
    """Raises unless y holds class numbers (N,), int64 and, on the CPU, those of `logits` (N, classes), one for each."""
    if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.ndim != 1:
        got = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"y: got {got}; accepted: class numbers, an int64 tensor (N,)")
    check_dense(y=y)
    if logits is not None:
        check_same_device(logits, y=y)
        if len(y) != len(logits):
            raise ValueError(f"y: got {len(y)} class numbers for {len(logits)} images; accepted: one for each")
        check_rows(logits.shape[1], y=y)
