"""State dicts as the field publishes them: from what a file holds to an architecture and our names."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ..core.checkpoint import is_dense
from .resnet import BLOCKS

State = dict[str, Tensor]

WRAPPERS = (
    *("state_dict", "model_state_dict", "model", "net", "network"),
    *("ema", "ema_state_dict", "state_dict_ema", "model_ema", "last", "best"),
)
"""Keys under which files keep their state dict, in order of preference: RobustBench's own choice first."""

_NORMALIZER = re.compile(r"(?:.*\.)?(mean|mu|std|sigma|new_mean|new_std)")
_COUNTERS = re.compile(r"(?:.*\.)?(total_ops|total_params|n_averaged)")  # of thop, and of torch's averaged models
_BOTTLENECK = re.compile(r"layer\d\.\d+\.conv3\.weight$")
_DEPTHS = {blocks: depth for depth, blocks in BLOCKS.items()}
_DEEPMIND = (
    (r"init_conv\.", "conv1."),
    (r"layer\.0\.block\.", "block1.layer."),
    (r"layer\.1\.block\.", "block2.layer."),
    (r"layer\.2\.block\.", "block3.layer."),
    (r"batchnorm\.", "bn1."),
    (r"logits\.", "fc."),
    (r"(block\d\.layer\.\d+\.)batchnorm_0\.", r"\1bn1."),
    (r"(block\d\.layer\.\d+\.)conv_0\.", r"\1conv1."),
    (r"(block\d\.layer\.\d+\.)batchnorm_1\.", r"\1bn2."),
    (r"(block\d\.layer\.\d+\.)conv_1\.", r"\1conv2."),
    (r"(block\d\.layer\.\d+\.)shortcut\.", r"\1convShortcut."),
)


def unwrap(payload: Any) -> State:
    """Returns the state dict inside a loaded file. Raises ValueError when there is none."""
    level = payload
    for _ in range(4):
        if not isinstance(level, Mapping):
            break
        if level and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in level.items()):
            return dict(level)
        level = next((level[key] for key in WRAPPERS if isinstance(level.get(key), Mapping)), None)
    content = f"a dict of {list(payload)[:8]}" if isinstance(payload, Mapping) else type(payload).__name__
    raise ValueError(f"holds no state dict: got {content}; accepted: tensors by name, or those under one of {WRAPPERS}")


class Canonical(NamedTuple):
    """A published state dict under our names."""

    state: State
    deepmind: bool  # of the DeepMind family of wide ResNets
    normalization: tuple[list[float], list[float]] | None  # (mean, std) that the file holds
    prefix: str  # of the network's keys in the file, as "module.1."
    beside: State  # what the file holds beside the network and its normalisation


def canonical(state: State, prefix: str | None = None) -> Canonical:
    """Renames published names to ours.

    Takes the normalisation out, whatever it is called and wherever it sits. Finds the network by its first convolution
    and its head, below any prefix ("module.", "model.", "_orig_mod.", the "1." of a Sequential); what an attack or an
    average kept as copies of it is dropped. Renames the DeepMind family and torchvision's ResNets; drops the
    `sub_block1` that some TRADES wide ResNets carry and never run.

    prefix: of the network to take, where a file holds several.

    Raises ValueError: several networks, bottleneck blocks, half a normalisation or two.
    """
    state = {key: value for key, value in state.items() if not _COUNTERS.fullmatch(key)}
    state, normalization = without_normalization(state)
    if any(_BOTTLENECK.search(key) for key in state):
        raise ValueError("bottleneck blocks (ResNet-50 and deeper) are not supported; wrap the module (with_features)")
    place, copies = _network(state, prefix)
    inside = {k[len(place) :]: v for k, v in state.items() if k.startswith(place) and not k.startswith(copies)}
    beside = {k: v for k, v in state.items() if not k.startswith((place, *copies))}
    deepmind = "init_conv.weight" in inside
    for pattern, name in _DEEPMIND if deepmind else ():
        inside = {re.sub(f"^{pattern}", name, key): value for key, value in inside.items()}
    if "layer1.0.conv1.weight" in inside:  # a ResNet; torchvision and others call two of its parts differently
        inside = {re.sub(r"\.downsample\.", ".shortcut.", re.sub(r"^fc\.", "linear.", k)): v for k, v in inside.items()}
    if "block1.layer.0.conv1.weight" in inside:
        inside = {key: value for key, value in inside.items() if not key.startswith("sub_block1.")}
    return Canonical(inside, deepmind, normalization, place, beside)


def without_normalization(state: State) -> tuple[State, tuple[list[float], list[float]] | None]:
    """Returns the state without the (mean, std) of the images, and these, None where it holds none."""
    found: dict[str, dict[tuple[float, ...], str]] = {"mean": {}, "std": {}}
    rest = {}
    for key, value in state.items():
        match = _NORMALIZER.fullmatch(key)
        if match is None or value.numel() > 4 or value.is_complex() or not is_dense(value):
            rest[key] = value
            continue
        side = "mean" if match[1] in ("mean", "mu", "new_mean") else "std"
        found[side].setdefault(tuple(value.double().flatten().tolist()), key)
    mean, std = ([*side.items()] for side in found.values())
    if len(mean) > 1 or len(std) > 1:
        raise ValueError(f"holds several normalisations: {', '.join(key for _, key in (*mean, *std))}")
    if bool(mean) != bool(std):
        raise ValueError(f"holds half a normalisation: {(mean or std)[0][1]!r} without its counterpart")
    return rest, (list(mean[0][0]), list(std[0][0])) if mean else None


def shared_prefix(keys: Iterable[str]) -> str:
    """Returns the parts that all keys begin with, as "module.1."; the last part of a key is none of them."""
    columns = zip(*(key.split(".")[:-1] for key in keys), strict=False)
    return "".join(f"{parts[0]}." for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, columns))


def _network(state: State, wanted: str | None) -> tuple[str, tuple[str, ...]]:
    """The prefix of the network's keys, and those of its copies."""
    places = []
    for key in state:
        place = re.sub(r"(init_conv|conv1)\.weight$", "", key)
        headed = any(f"{place}{head}.weight" in state for head in ("fc", "linear", "logits"))
        if place != key and headed and (not place or place.endswith(".")):
            places.append(place)
    if wanted is not None:
        places = [place for place in places if place.rstrip(".") == wanted.rstrip(".")]
        if not places:
            raise ValueError(f"prefix: got {wanted!r}; no network's keys begin with it")
    if not places:  # of an unknown layout
        return shared_prefix(state), ()
    first, *others = sorted(dict.fromkeys(places), key=len)
    if wanted is not None:
        return first, ()
    for other in others:
        tensors = {key[len(other) :]: value for key, value in state.items() if key.startswith(other)}
        if not all(
            (mine := state.get(first + key)) is not None and mine.shape == value.shape and bool((mine == value).all())
            for key, value in tensors.items()
        ):
            raise ValueError(
                f"holds several networks: {', '.join(repr(place) for place in (first, *others))}; give the prefix of "
                f"the one to take, as prefix={first!r}"
            )
    return first, tuple(others)


def recognise(state: State, *, deepmind: bool = False) -> dict[str, Any] | None:
    """Returns what `build_model` needs to hold `state` (canonical names), off keys and shapes; None if unknown."""
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    first = shapes.get("conv1.weight", ())
    head = shapes.get("fc.weight" if "fc.weight" in shapes else "linear.weight", ())
    if len(first) != 4 or len(head) != 2:
        return None
    width, in_channels, kernel, _ = first
    common: dict[str, Any] = {
        "num_classes": head[0],
        "in_channels": in_channels,
        "stem": "stl10" if kernel == 7 else "cifar",
    }
    if "block1.layer.0.conv1.weight" in shapes:
        depth = 6 * _count(shapes, "block1.layer.") + 4
        widen = next(iter(shapes["block1.layer.0.conv1.weight"]), 0) // 16
        return {"arch": f"{'dm-' if deepmind else ''}wrn-{depth}-{widen}", **common}
    if "layers.0.conv1.weight" in shapes:
        return {"arch": "mobilenet_v2", **common}
    if "conv4.weight" in shapes:
        return {"arch": "cnn", "width": width, **common}
    stages = [_count(shapes, f"layer{stage}.") for stage in range(1, 5)]
    known_depth = _DEPTHS.get(tuple(filter(None, stages)))
    if known_depth is None:
        return None
    if "bn1.weight" in shapes:
        return {"arch": f"resnet{known_depth}", "width": width, **common}
    return {"arch": f"preact_resnet{known_depth}", "width": width, "final_bn": "bn.weight" in shapes, **common}


def _count(shapes: Mapping[str, Any], prefix: str) -> int:
    return len({key[len(prefix) :].partition(".")[0] for key in shapes if key.startswith(prefix)})
