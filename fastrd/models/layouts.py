"""State dicts as the field publishes them: from what a file holds to an architecture and our names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .resnet import BLOCKS

State = dict[str, Tensor]

WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "ema",
    "ema_state_dict",
    "state_dict_ema",
    "model_ema",
    "last",
    "best",
)
"""Keys under which files keep their state dict, in order of preference: RobustBench's own choice first."""

_NORMALIZER = re.compile(r"(?:.*\.)?(mean|mu|std|sigma)")
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
    """The state dict inside a loaded file. Raises ValueError when there is none."""
    level = payload
    for _ in range(4):
        if not isinstance(level, Mapping):
            break
        if level and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in level.items()):
            return dict(level)
        level = next((level[key] for key in WRAPPERS if isinstance(level.get(key), Mapping)), None)
    content = f"a dict of {list(payload)[:8]}" if isinstance(payload, Mapping) else type(payload).__name__
    raise ValueError(f"holds no state dict: got {content}; accepted: tensors by name, or those under one of {WRAPPERS}")


def canonical(state: State) -> tuple[State, bool, tuple[list[float], list[float]] | None]:
    """Published names to ours: (state, whether it is a DeepMind wide ResNet, (mean, std) or None).

    Takes the normalisation out, whatever it is called and wherever it sits; strips every prefix that all
    other keys share ("module.", "model.", "_orig_mod.", the "1." of a Sequential); renames the DeepMind
    family; drops the `sub_block1` that some TRADES wide ResNets carry and never run.
    """
    found = {match[1]: key for key in state if (match := _NORMALIZER.fullmatch(key)) and state[key].numel() <= 4}
    mean, std = found.get("mean", found.get("mu")), found.get("std", found.get("sigma"))
    if (mean is None) != (std is None):
        raise ValueError(f"holds half a normalisation: {mean or std!r} without its counterpart")
    normalization = None
    if mean is not None and std is not None:
        normalization = state[mean].double().flatten().tolist(), state[std].double().flatten().tolist()
    state = {key: value for key, value in state.items() if key not in (mean, std)}
    while len({key.partition(".")[0] for key in state}) == 1 and all("." in key for key in state):
        state = {key.partition(".")[2]: value for key, value in state.items()}
    deepmind = "init_conv.weight" in state
    if deepmind:
        state = {_deepmind_name(key): value for key, value in state.items()}
    if "block1.layer.0.conv1.weight" in state:
        state = {key: value for key, value in state.items() if not key.startswith("sub_block1.")}
    return state, deepmind, normalization


def _deepmind_name(key: str) -> str:
    for pattern, name in _DEEPMIND:
        key = re.sub(f"^{pattern}", name, key)
    return key


def recognise(state: State, *, deepmind: bool = False) -> dict[str, Any] | None:
    """What `build_model` needs to hold `state` (canonical names), off keys and shapes; None if unknown."""
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
    return {
        "arch": f"preact_resnet{known_depth}",
        "width": width,
        "final_bn": "bn.weight" in shapes,
        **common,
    }


def _count(shapes: Mapping[str, Any], prefix: str) -> int:
    return len({key[len(prefix) :].partition(".")[0] for key in shapes if key.startswith(prefix)})
