"""What every evaluation takes: images and labels, checked once, and a model that is left as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks import IN_PLACE, frozen
from ..core.arguments import check_device, check_logits, check_module
from ..core.capture import compiled
from ..core.defaults import ordinary_torch
from ..core.fingerprint import device_of
from ..core.images import pixels
from ..core.values import check_integer
from ..models import Folded

Logits = Callable[[Tensor], Tensor]
PAIR = ("student", "teacher")  # names of two models in a message


def batches(count: int, batch_size: int) -> Iterator[slice]:
    check_integer(least=1, batch_size=batch_size)
    return (slice(start, start + batch_size) for start in range(0, count, batch_size))


@contextmanager
def evaluating(*models: nn.Module, device: torch.device | str | None = None) -> Iterator[torch.device]:
    """Models in eval mode and float32, without parameter gradients, on `device` (None: that of the first).

    Yields the device. On leaving, every submodule is in the mode and on the device it was in before.
    """
    for name, model in zip(("model",) if len(models) == 1 else PAIR, models, strict=True):
        check_module(name, model, "a torch.nn.Module that maps x to logits")
    homes = [device_of(model) for model in models]
    modes = [(module, module.training) for model in models for module in model.modules()]
    target = homes[0] if device is None else check_device(device)
    try:
        for model, home in zip(models, homes, strict=True):
            model.eval()
            if home != target:
                model.to(target)
        with ordinary_torch(), frozen(*models):
            yield target
    finally:
        for model, home in zip(models, homes, strict=True):
            if home != target:
                model.to(home)
        for module, training in modes:
            module.training = training


@torch.no_grad()
def count_classes(
    model: nn.Module, images: Tensor, labels: Tensor | None, device: torch.device, name: str = "model"
) -> int:
    """Returns the classes that `model` tells apart on the images of `as_images`.

    Raises ValueError, by `name`: it fails on the first image, gives no logits, changes the image, or has not a class
    for each of the labels.
    """
    image = pixels(images[:1], device).clone()
    before = image.clone()
    try:
        output = model(image)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason, shape = str(error).partition("\n")[0], tuple(image.shape[1:])
        raise ValueError(f"{name}: fails on an image {shape}: {reason}; accepted: a network of such images") from error
    check_logits(output, 1, name)
    if not torch.equal(image, before):
        raise ValueError(IN_PLACE.replace("model", name, 1))
    classes = output.shape[1]
    if labels is not None and labels.max() >= classes:
        accepted = f"0 to {classes - 1}, the outputs of the {name}"
        raise ValueError(f"y: got label {labels.max().item()}; accepted: {accepted}")
    return classes


def optimized(model: nn.Module, example: Tensor, *, compile: bool = False) -> Logits:
    """Returns x -> logits, differentiable, in the form that runs fastest: folded, channels_last, compiled on request.

    example: a few images on the device of the model, which is in eval mode.
    """
    network: Any
    try:
        network = Folded(model, example)
        network.network.to(memory_format=torch.channels_last)
    except (TypeError, RuntimeError):
        network = model  # it cannot be copied: it holds a lock, say, or a tensor that is part of a graph
    if compile:
        plain = network.network if isinstance(network, Folded) else network
        network = compiled(plain, dynamic=True)  # fewer images are left from stage to stage
    return lambda x: network(x.contiguous(memory_format=torch.channels_last))


def describe(device: torch.device) -> str:
    """Returns one line for a record: the kind of device, and what float32 means on it."""
    if device.type != "cuda":
        return f"{device.type} ({torch.get_num_threads()} threads)"
    cudnn: Any = torch.backends.cudnn  # `conv` is not declared
    precision = "tf32" if cudnn.conv.fp32_precision == "tf32" else "float32"
    return f"cuda ({torch.cuda.get_device_name(device)}, {precision} convolutions)"
