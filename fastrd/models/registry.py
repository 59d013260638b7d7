"""Architectures by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from ..core.kinds import check_kinds
from ..core.schema import nearest, suggest
from ..core.values import check_option
from .base import PER_IMAGE, Network, Normalization
from .cnn import CNN
from .foreign import NETWORKS, Factory, Foreign, build_foreign, is_foreign
from .mobilenet_v2 import MobileNetV2
from .preact_resnet import PreActResNet
from .resnet import BLOCKS, ResNet
from .wide_resnet import WideResNet

_NAMED: dict[str, Callable[..., Network]] = {
    "cnn": CNN,
    **{f"resnet{n}": partial(ResNet, BLOCKS[n], width=64 if n in (18, 34) else 16) for n in sorted(BLOCKS)},
    "preact_resnet18": partial(PreActResNet, BLOCKS[18]),
    "preact_resnet34": partial(PreActResNet, BLOCKS[34]),
    "mobilenet_v2": MobileNetV2,
}
_WIDE = re.compile(r"(dm[-_])?(?:wrn|wide[-_]?resnet)[-_]?(\d{1,3})[-_x](\d{1,3})")

ARCHITECTURES: tuple[str, ...] = (*_NAMED, "wrn-28-10", "wrn-34-10", "wrn-34-20", "dm-wrn-28-10", "dm-wrn-70-16")
"""Known names. The wide ResNets are examples: any wrn-D-W or dm-wrn-D-W with D = 6n + 4 is accepted."""

STEMS = ("cifar", "stl10")

NORMALIZATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""(mean, std) by name: of CIFAR as RobustBench's models apply them, of ImageNet, and 2 x - 1."""


@check_kinds
def build_model(
    arch: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    image_size: int = 32,
    normalize: Normalization | None = None,
    **options: Any,
) -> Network | Foreign:
    """Returns a network with weights from the global torch generator; `build_model(**net.spec)` builds another.

    Args:
        arch: one of `ARCHITECTURES`, any "wrn-D-W" (TRADES family) or "dm-wrn-D-W" (DeepMind family, SiLU);
            "timm:NAME", "torchvision:NAME" or a name that a plugin registered, see `build_foreign`.
        image_size: side in pixels. Above 64 the stem divides the resolution by 4 (`stem="stl10"`), else it is
            the usual one for small images (`stem="cifar"`); `stem` overrides.
        normalize: per-channel (mean, std) of pixels in [0, 1], kept inside as buffers; a name in `NORMALIZATION`;
            "per-image": each image by its own mean and standard deviation; None or "none": not normalised.
        options: what the architecture takes: `stem`, `width` (cnn and the plain ResNets), `activation` (wide
            ones), `final_bn` and `shortcut` (pre-activation ones).

    Raises ValueError: an unknown name or a bad value. TypeError: an option that the architecture does not have.
    """
    name, channels = arch, in_channels
    make: Callable[..., Network | Foreign]
    shape: dict[str, Any] = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    foreign = isinstance(arch, str) and is_foreign(arch)
    if foreign:
        make = partial(build_foreign, arch, image_size=image_size)
        options = {"repeat_grey": False, **options}
        channels = 3 if options["repeat_grey"] else in_channels
    else:
        name, make = _resolve(arch)
        parameters, common = inspect.signature(make).parameters.values(), (*shape, "normalize")
        defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in common}
        for option in options.keys() - defaults.keys():
            raise TypeError(f"{option}: not an option of {name}; {suggest(option, defaults)}")
        for argument, value in {**shape, "width": options.get("width", 1)}.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{argument}: got {value!r}; accepted: an int from 1 on")
        options = {**defaults, "stem": "stl10" if image_size > 64 else "cifar", **options}
        check_option("stem", options["stem"], STEMS)
    checked: Any = _checked_normalization(normalize, channels, () if foreign else (PER_IMAGE,))
    model = make(num_classes=num_classes, in_channels=in_channels, normalize=checked, **options)
    model.spec = {"arch": name, **shape, "normalize": checked, **options}
    return model


def canonical_name(arch: str) -> str:
    """Returns the spelling `spec` uses: "WRN-28-10" -> "wrn-28-10", "PreActResNet18" -> "preact_resnet18"."""
    return arch if isinstance(arch, str) and is_foreign(arch) else _resolve(arch)[0]


def is_known(name: str) -> bool:
    """Returns whether `build_model` builds something by this name."""
    try:
        canonical_name(name)
    except ValueError:
        return False
    return True


def network(name: str) -> Callable[[Factory], Factory]:
    """Registers a network: `student.arch = NAME` is what the function or class returns.

    It is called with the keywords num_classes, in_channels, image_size and those of `student.options`, and returns any
    module that maps (N, C, H, W) in [0, 1] to logits (N, num_classes).

    Raises ValueError: the name is taken, or holds a colon.
    """
    if not name or ":" in name or is_known(name):
        raise ValueError(f"network: got {name!r}; accepted: a name that is not taken, without a colon")

    def register(factory: Factory) -> Factory:
        NETWORKS[name] = factory
        return factory

    return register


def _resolve(arch: str) -> tuple[str, Callable[..., Network]]:
    if not isinstance(arch, str):
        raise TypeError(f"arch: got {type(arch).__name__}; accepted: a name, one of {', '.join(ARCHITECTURES)}")
    if wide := _WIDE.fullmatch(arch.lower()):
        family, depth, widen = wide[1], int(wide[2]), int(wide[3])
        if depth < 10 or (depth - 4) % 6 or widen < 1:
            possible = max(10, 6 * round((depth - 4) / 6) + 4)
            raise ValueError(f"arch: got {arch!r}; accepted: depth 6n + 4 >= 10 (nearest: {possible}), width from 1 on")
        dm = family is not None
        make = partial(WideResNet, depth, widen, dm, activation="silu" if dm else "relu")
        return f"{'dm-' if dm else ''}wrn-{depth}-{widen}", make
    plain = re.sub("[-_]", "", arch.lower())
    for name, constructor in _NAMED.items():
        if plain == name.replace("_", ""):
            return name, constructor
    raise ValueError(
        f"arch: got {arch!r}; accepted: {', '.join((*ARCHITECTURES, *NETWORKS))}, any wrn-D-W or dm-wrn-D-W with "
        f"D = 6n + 4, timm:NAME, torchvision:NAME{nearest(arch.lower(), (*ARCHITECTURES, *NETWORKS))}"
    )


def _checked_normalization(normalize: Any, channels: int, rules: tuple[str, ...]) -> list[list[float]] | str | None:
    """(mean, std) or None; a name in `rules` as it is."""
    if normalize is None or normalize == "none":
        return None
    if isinstance(normalize, str):
        if normalize in rules:
            return normalize
        check_option("normalize", normalize, ("(mean, std)", "none", *rules, *NORMALIZATION))
        normalize = NORMALIZATION[normalize]
        if normalize == NORMALIZATION["half"]:
            normalize = tuple(values[:1] * channels for values in normalize)
    accepted = (
        f"accepted: None or (mean, std), each {channels} finite numbers for pixels in [0, 1], "
        "mean in [0, 1] and std in (0, 1] (those for pixels 0..255: divide by 255)"
    )
    try:
        mean, std = ([float(value) for value in values] for values in normalize)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"normalize: got {normalize!r}; {accepted}") from error
    in_range = all(0 <= value <= 1 for value in mean) and all(0 < value <= 1 for value in std)
    if not in_range or not len(mean) == len(std) == channels:
        raise ValueError(f"normalize: got mean {mean} and std {std}; {accepted}")
    return [mean, std]
