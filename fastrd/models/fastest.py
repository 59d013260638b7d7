"""Which form of a network a CPU runs fastest: measured once for each machine, network and size, and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.files import atomic_write, read_json
from ..core.values import check_option
from ..core.version import __version__
from ..kernels.cpu import machine
from ..kernels.cpu.conv2d import fewest_pixels, takes_over
from .base import Conv2d

Form = Callable[..., Tensor | tuple[Tensor, Tensor]]

FORMS = {
    "chain": "a few images at a time through all layers",
    "compiled": "by torch.compile",
    "layers": "our convolutions, one after the other",
    "pytorch": "PyTorch's convolutions (oneDNN's)",
}
VARIABLE = "FASTRD_FORM"
"""Names the form that networks run in, where they have it, so that nothing is measured; else they run in the first of
`FORMS` that they have."""
ROUNDS, SECONDS = 5, 2.0
CHANGES = ("FASTRD_CXXFLAGS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")  # variables that change what code runs


def by_pytorch(network: nn.Module) -> Form:
    """Returns `network` with PyTorch's convolutions in the place of ours."""

    def run(x: Tensor, **options: bool) -> Tensor | tuple[Tensor, Tensor]:
        with fewest_pixels(sys.maxsize):
            return network(x, **options)

    return run


def has_ours(network: nn.Module) -> bool:
    """Whether one of its convolutions may be taken over from PyTorch."""
    return any(
        isinstance(module, Conv2d) and takes_over(module.weight, module.stride[0], cast(tuple, module.padding)[0])
        for module in network.modules()
    )


def trained(network: nn.Module, x: Tensor, images: int | None = None) -> Form:
    """Returns `network`, or `by_pytorch(network)` where that is faster with gradients for the weights, see `fastest`.

    Measured in eval mode, in which statistics stay as they are, and left in the modes that it was in.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or not has_ours(network):
        return network
    forms: dict[str, Form] = {"layers": network, "pytorch": by_pytorch(network)}
    modes = [(module, module.training) for module in network.modules()]
    try:
        with torch.enable_grad():
            return forms[fastest(network.eval(), forms, x, images)]
    finally:
        for module, training in modes:
            module.training = training


def fastest(network: nn.Module, forms: Mapping[str, Form], x: Tensor, images: int | None = None) -> str:
    """Returns the name of the form that takes the least time for `x`, with gradients for it and for parameters where
    they want them.

    Forms round differently, so that a run which resumes must take the form that it began with: where the times cannot
    be kept, it is the first; and where the run goes on at a batch of another size, it is that for `images`.

    Args:
        forms: of `network`, by names of `FORMS` and in that order; at least one.
        images: how many the form is chosen for, made of those of `x`; None: as many as `x` has.

    Raises:
        ValueError: the environment names a form that there is not.
    """
    first = next(iter(forms))
    if named := os.environ.get(VARIABLE):
        check_option(VARIABLE, named, FORMS)
        return named if named in forms else first
    if len(forms) == 1 or len(x) == 0:
        return first
    if (place := _place()) is None:
        return first
    if images is not None and images != len(x):
        x = _repeated(x, images)
    problem = _problem(network, forms, x)
    if (times := _kept(place, problem, forms)) is None:
        measured = {name: round(1e3 * seconds, 3) for name, seconds in _measured(network, forms, x).items()}
        logging.getLogger("fastrd").info("ms for %s: %s", problem, measured)
        times = _kept(place, problem, forms) or measured  # what another process has kept meanwhile stands
        try:
            atomic_write(place, json.dumps({**_read(place), problem: times}, indent=1) + "\n")
        except OSError:
            return first
    return min(forms, key=times.__getitem__)


def _repeated(x: Tensor, images: int) -> Tensor:
    """So many images, those of `x` in turns, in its memory format and wanting a gradient where it does."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    rows = x.detach()[torch.arange(images) % len(x)].contiguous(memory_format=memory_format)
    return rows.requires_grad_(x.requires_grad)


def _problem(network: nn.Module, forms: Mapping[str, Form], x: Tensor) -> str:
    """Names what was measured; of a network its class and layers, which its speed depends on.

    Of how many images only up to which power of two: an evaluation attacks as many as are still classified right.
    """
    layers = hashlib.sha256(f"{network} {[p.shape for p in network.parameters()]}".encode()).hexdigest()[:8]
    precision = "bf16" if torch.is_autocast_enabled("cpu") else str(x.dtype).removeprefix("torch.")
    images = f"up to {1 << (len(x) - 1).bit_length()} x {' x '.join(map(str, x.shape[1:]))}"
    strides = "channels_last" if x.is_contiguous(memory_format=torch.channels_last) else "contiguous"
    wanted = "weights' gradients" if _wanting(network) else "images' gradient" if _wanting(x) else "forward"
    return (
        f"{type(network).__name__} {layers}, {images}, {precision}, {strides}, {wanted}, "
        f"threads {torch.get_num_threads()}, {' or '.join(forms)}"
    )


def _place() -> Path | None:
    """The file of this processor and these versions; None where none can be kept."""
    told = [os.environ.get(name, "") for name in CHANGES]
    about = "\0".join((machine.identity(), torch.__version__, __version__, *told))
    try:
        return machine.cache() / f"forms-{hashlib.sha256(about.encode()).hexdigest()[:16]}.json"
    except OSError:
        return None


def _kept(place: Path, problem: str, forms: Mapping[str, Form]) -> dict[str, float] | None:
    """The milliseconds of each form that are kept there; None where there are none that can be read."""
    times = _read(place).get(problem)
    if not isinstance(times, dict) or times.keys() != forms.keys():
        return None
    return times if all(isinstance(time, (int, float)) for time in times.values()) else None


def _read(place: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return read_json(place) or {}
    return {}


def _wanting(owner: nn.Module | Tensor) -> list[Tensor]:
    """What of it wants a gradient."""
    tensors = [owner] if isinstance(owner, Tensor) else owner.parameters()
    return [tensor for tensor in tensors if torch.is_grad_enabled() and tensor.requires_grad]


def _measured(network: nn.Module, forms: Mapping[str, Form], x: Tensor) -> dict[str, float]:
    """The least seconds of each form, in turns, so that a busy moment meets them all."""
    least, end = dict.fromkeys(forms, inf), inf
    for number in range(1 + ROUNDS):
        for name, form in forms.items():
            z = x.detach().requires_grad_(bool(_wanting(x)))
            began = time.perf_counter()
            logits = cast(Tensor, form(z))
            if wanting := [*_wanting(z), *_wanting(network)]:
                torch.autograd.grad(logits.sum(), wanting, allow_unused=True)
            if number:  # the first compiles
                least[name] = min(least[name], time.perf_counter() - began)
        if number == 0:
            end = time.perf_counter() + SECONDS
        elif time.perf_counter() > end:
            break
    return least
