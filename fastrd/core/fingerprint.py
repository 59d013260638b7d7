"""Identities of weights and data: SHA-256 of what they hold, the same on any device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


def fingerprint(model: nn.Module) -> str:
    """Returns the SHA-256, in hex, of every parameter and buffer by name; the same on any device, compiled or not."""
    return _digest((f"{name} ", tensor) for name, tensor in tensors_of(getattr(model, "_orig_mod", model)))


def data_digest(x: Tensor, y: Tensor) -> str:
    """Returns the SHA-256, in hex, of images and labels."""
    return _digest([("", x), ("", y)])


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


def device_of(model: nn.Module) -> torch.device:
    """Returns where the first tensor of a network is, the CPU where it has none."""
    return next((tensor.device for _, tensor in tensors_of(model)), torch.device("cpu"))


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}{tensor.dtype} {tuple(tensor.shape)}".encode())
        contents: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(contents)
    return digest.hexdigest()
