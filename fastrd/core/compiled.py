"""`torch.compile`, each time with programs of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def compiled(function: Callable, **options: Any) -> Callable:
    """Returns `torch.compile(function, **options)` that shares no programs with other functions or networks.

    Dynamo keeps 8 programs for one code object, which all networks of a class and all closures of a function have in
    common. Beyond those it runs uncompiled or, under `fullgraph`, fails.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__code__ = call.__code__.replace()  # an equal one, but another object
    return torch.compile(call, **options)
