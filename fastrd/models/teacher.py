"""Loading somebody's trained network, frozen, whatever it came in. Nothing in a file is ever executed."""

from __future__ import annotations

import difflib
import importlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core import checkpoint
from ..core.archives import check_tensors, load_torch
from .base import FeatureExtractor, Network, Normalization, with_features
from .foreign import Factory, adopt, is_foreign
from .layouts import State, canonical, recognise, unwrap
from .registry import build_model, canonical_name

NORMALIZATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
"""(mean, std) that the DeepMind family of RobustBench applies, by data set."""


def load_teacher(
    source: str | os.PathLike,
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    normalize: Normalization | None = None,
    in_channels: int | None = None,
    image_size: int = 32,
    device: str | torch.device = "cpu",
    threat_model: str = "Linf",
    dataset: str | None = None,
    module: nn.Module | Factory | None = None,
    **options: Any,
) -> nn.Module:
    """A frozen float32 network in eval mode under the network contract: logits, and features on request.

    source, one of
    - a run folder (best.pt, else its last good checkpoint) or a fastrd checkpoint: they know their
      architecture; averaged weights are taken where the run kept them;
    - a .safetensors file; its metadata may hold the architecture as JSON under "fastrd_spec";
    - a .pt or .pth state dict as the field publishes them: ResNet, PreActResNet, MobileNetV2, wide ResNets of
      the TRADES and DeepMind families; wrapped or not (`layouts.WRAPPERS`), with any common prefix, with
      normalisation buffers or none;
    - a RobustBench model id such as "Wang2023Better_WRN-28-10", resolved by the `robustbench` package for
      `dataset` and `threat_model`.

    What the keys and shapes of a state dict tell (architecture, width, classes, channels, stem,
    normalisation) need not be given; what is given must agree. `options` go to `build_model`:
    `activation="relu"` for the rare DeepMind file without SiLU, `shortcut="input"` for the PreActResNets
    whose projections read the raw input (Wong 2020), since keys do not tell these. The DeepMind family always
    normalises, but its files seldom hold mean and std: give `normalize`, or a `dataset` of `NORMALIZATION`.

    `module` is for a run or file of a network of one's own, whose name does not build it: the same network again, or
    what makes one, which then gets the weights.

    Loading is strict, executes nothing of the file and does not touch the random state.

    Raises:
        FileNotFoundError: no such path.
        ModuleNotFoundError: a package has to be installed first; the message holds the command.
        ValueError: an unreadable, hostile, torn or foreign file, or one that does not fit what was asked.
    """
    path = Path(source).expanduser()
    given = {"arch": arch, "num_classes": num_classes, "in_channels": in_channels, **options}
    given = {key: value for key, value in given.items() if value is not None}
    if arch is not None:
        given["arch"] = canonical_name(arch)
    if path.is_dir() or path.is_file():
        spec, state = _read(path)
        model: nn.Module = _assemble(path, state, spec, given, normalize, image_size, dataset, module)
    elif re.fullmatch(r"[A-Za-z0-9_-]+", str(source)):
        if normalize is not None or in_channels not in (None, 3) or given.keys() - {"num_classes", "in_channels"}:
            raise ValueError(
                f"{source}: no such file, and a RobustBench model brings its own architecture, normalisation "
                "and three channels; drop arch, normalize, in_channels, options, or give the path of a file"
            )
        model = _from_robustbench(str(source), dataset, threat_model)
        if num_classes not in (None, model.num_classes):
            raise ValueError(f"num_classes: got {num_classes}; {source} for {dataset} has {model.num_classes}")
    else:
        raise FileNotFoundError(f"{source}: no such file or folder; accepted: a checkpoint, run folder, RobustBench id")
    return model.to(device).requires_grad_(False).eval()


def _read(path: Path) -> tuple[dict[str, Any] | None, State]:
    """(spec, state dict) of what lies at `path`; spec is None where the file holds no architecture."""
    if path.is_dir():
        return _from_checkpoint(path, _read_run(path))
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    payload = load_torch(path)
    if checkpoint.is_payload(payload):
        return _from_checkpoint(path, checkpoint.read(path))
    try:
        return None, unwrap(payload)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_run(run: Path) -> dict[str, Any]:
    best = run / "best.pt"
    payload = checkpoint.read(best) if best.is_file() else checkpoint.load_last(run)
    if payload is None:
        raise FileNotFoundError(
            f"{run}: a folder without best.pt, last.pt or previous.pt; accepted: a fastrd run folder"
        )
    return payload


def _from_checkpoint(path: Path, payload: Mapping[str, Any]) -> tuple[dict[str, Any], State]:
    try:
        return dict(payload["model"]["spec"]), unwrap(payload.get("ema") or payload["model"]["state"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: model: a fastrd checkpoint without a usable one ({error!r})") from None


def _read_safetensors(path: Path) -> tuple[dict[str, Any] | None, State]:
    safetensors = _package("safetensors", f"{path}: reading a .safetensors file")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        check_tensors(str(path), state, path.stat().st_size)
        spec = json.loads(metadata["fastrd_spec"]) if "fastrd_spec" in metadata else None
    except Exception as error:
        raise ValueError(f"{path}: not a readable safetensors file ({type(error).__name__}: {error})") from None
    if spec is not None and not isinstance(spec, dict):
        raise ValueError(f"{path}: its metadata fastrd_spec is not a JSON object")
    return spec, state


def _assemble(
    path: Path,
    state: State,
    spec: dict[str, Any] | None,
    given: dict[str, Any],
    normalize: Normalization | None,
    image_size: int,
    dataset: str | None,
    module: nn.Module | Factory | None,
) -> nn.Module:
    try:
        if spec is None:
            spec, state = _infer(state, given, normalize, image_size, dataset)
        else:
            spec = _agree(spec, given, normalize)
        model = _rebuilt(spec, module)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from error
    if normalize := (model.spec or {}).get("normalize"):
        mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in normalize)
        state = {"mean": mean, "std": std, **state}
    if isinstance(model, FeatureExtractor) and not state.keys() & model.state_dict().keys():
        state = {f"module.{key}": value for key, value in state.items()}  # as published
    _adopt(path, model, state)
    return model


def _rebuilt(spec: dict[str, Any], module: nn.Module | Factory | None) -> Any:
    """The network of a spec, without weights that mean anything; the random state stays as it is."""
    if module is not None:
        shape = {key: spec.get(key) for key in ("num_classes", "in_channels", "image_size")}
        with torch.random.fork_rng([]):
            model = adopt(module, shape)
        if model.spec != spec:
            raise ValueError(
                f"module: got {model.spec['arch']}, whose tensors are not those of {spec['arch']} in the file"
            )
        return model
    if isinstance(spec.get("arch"), str) and is_foreign(spec["arch"]):
        with torch.random.fork_rng([]):
            return build_model(**spec)
    # The meta device allocates nothing and draws no random numbers; the file's tensors are adopted below.
    with torch.device("meta"):
        return build_model(**spec)


def read_weights(source: str | os.PathLike, network: nn.Module) -> State:
    """The tensors that `load_teacher` finds at `source`, by the names of `network` as far as they are known.

    Raises:
        FileNotFoundError, ValueError: as `load_teacher`.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"weights: {path}: no such file or folder; accepted: a checkpoint or run folder")
    spec, state = _read(path)
    return canonical(state)[0] if spec is None and isinstance(network, Network) else state


def _infer(
    state: State,
    given: dict[str, Any],
    normalize: Normalization | None,
    image_size: int,
    dataset: str | None,
) -> tuple[dict[str, Any], State]:
    if is_foreign(given.get("arch", "")):
        return {"normalize": normalize, "image_size": image_size, **given}, state
    state, deepmind, stored = canonical(state)
    seen = recognise(state, deepmind=deepmind)
    if seen is None and not {"arch", "num_classes"} <= given.keys():
        raise ValueError(
            f"its keys fit no known architecture: {_listing([(k, _kind(v)) for k, v in state.items()], 6)}; "
            "tried ResNet, PreActResNet, MobileNetV2, cnn and the wide ResNets of the TRADES and DeepMind "
            "families; for another one build the module yourself and wrap it with fastrd.models.with_features"
        )
    if seen is not None and given.get("arch", seen["arch"]) != seen["arch"]:
        if deepmind:
            raise ValueError(f"arch: got {given['arch']!r}; the keys are the DeepMind family's, {seen['arch']}")
        seen = {key: seen[key] for key in ("num_classes", "in_channels", "stem")}
    spec = {**(seen or {}), **given, "image_size": image_size}
    channels = spec.get("in_channels", 3)
    found: Any = stored
    if stored is not None:
        found = tuple(values * channels if len(values) == 1 else values for values in stored)
        _same_normalization(normalize, found)
    elif normalize is None and deepmind:
        if dataset not in NORMALIZATION:
            raise ValueError(
                "DeepMind wide ResNets normalise their input, but the file holds no mean and std: give "
                f"normalize=(mean, std), or a dataset of {', '.join(NORMALIZATION)}; got dataset={dataset!r}"
            )
        found = NORMALIZATION[dataset]
    return {**spec, "normalize": found or normalize}, state


def _agree(spec: dict[str, Any], given: dict[str, Any], normalize: Normalization | None) -> dict[str, Any]:
    for key, value in given.items():
        if spec.get(key) != value:
            raise ValueError(f"{key}: got {value!r}; the file says {spec.get(key)!r}")
    _same_normalization(normalize, spec.get("normalize"))
    return spec


def _same_normalization(given: Normalization | None, stored: Any) -> None:
    if given is None:
        return
    pairs = [torch.tensor([list(map(float, values)) for values in pair]) for pair in (given, stored or ())]
    if pairs[0].shape != pairs[1].shape or not torch.allclose(pairs[0], pairs[1], atol=1e-4):
        raise ValueError(f"normalize: got {given}; the file normalises with {stored}; leave normalize out")


def _adopt(path: Path, model: Network, state: State) -> None:
    """Strict loading that takes the file's tensors, as float32, for the network's own."""
    expected = model.state_dict()
    counters = {key for key in expected if key.endswith("num_batches_tracked")}
    problems = {
        "missing": [(key, _kind(expected[key])) for key in expected if key not in state and key not in counters],
        "unexpected": [(key, _kind(state[key])) for key in state if key not in expected],
        "unlike": [
            (key, f"file {_kind(state[key])}, network {_kind(expected[key])}")
            for key in expected
            if key in state and _kind(state[key]) != _kind(expected[key])
        ],
    }
    if any(problems.values()):
        listing = "; ".join(f"{len(found)} {name}: {_listing(found, 4)}" for name, found in problems.items() if found)
        tried = ", ".join(f"{key}={value!r}" for key, value in (model.spec or {}).items())
        raise ValueError(f"{path}: the weights do not fit the network. {listing}. Tried: {tried}")
    for key, value in state.items():
        if not checkpoint.finite(value):
            raise ValueError(f"{path}: {key}: holds NaN or infinity, as after a diverged run; accepted: finite weights")
    full = {key: _plain(state[key]) if key in state else torch.zeros((), dtype=torch.long) for key in expected}
    model.load_state_dict(full, strict=True, assign=True)


def _kind(value: Tensor) -> str:
    dense = value.layout is torch.strided and not value.is_quantized
    number = "" if value.is_floating_point() else " complex" if value.is_complex() else " integer"
    return f"{tuple(value.shape)}{number if dense else ' not dense'}"


def _plain(value: Tensor) -> Tensor:
    return value.detach().to(torch.float32).contiguous() if value.is_floating_point() else value.detach()


def _listing(items: list[tuple[str, Any]], limit: int) -> str:
    text = ", ".join(f"{key} {detail}" for key, detail in items[:limit])
    return f"{text}, ..." if len(items) > limit else text


def _from_robustbench(name: str, dataset: str | None, threat_model: str) -> nn.Module:
    if dataset is None:
        raise ValueError(f"dataset: got None; a RobustBench id ({name!r}, no such file exists) needs one, as 'cifar10'")
    utils = _package(
        "robustbench.utils",
        f"{name}: no such file or folder, so it is taken for a RobustBench id, and resolving one",
        remedy=" (or give the path of the downloaded .pt file)",
    )
    try:
        model = utils.load_model(model_name=name, dataset=dataset, threat_model=threat_model)
    except KeyError as error:
        zoo = utils.all_models.get(utils.BenchmarkDataset(dataset), {})
        near = difflib.get_close_matches(name, zoo.get(utils.ThreatModel(threat_model), {}), n=3, cutoff=0.3)
        raise ValueError(
            f"{name}: no such file, and no RobustBench model for {dataset}, {threat_model}; "
            f"nearest: {', '.join(near) or 'none'}"
        ) from error
    return with_features(model)


def _package(module: str, purpose: str, remedy: str = "") -> Any:
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise ModuleNotFoundError(
            f"{purpose} needs the {package} package: pip install {package}{remedy}", name=package
        ) from None
