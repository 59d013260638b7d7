"""Loading somebody's trained network, frozen, whatever it came in. Nothing in a file is ever executed."""

from __future__ import annotations

import difflib
import importlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core import checkpoint
from ..core.archives import check_tensors, load_torch
from ..core.arguments import check_device, check_logits, check_module
from ..core.files import check_regular
from ..core.fingerprint import device_of
from ..core.images import as_images, as_labels, pixels
from ..core.kinds import check_kinds
from ..core.values import check_option, one_line
from .base import PER_IMAGE, FeatureExtractor, Network, Normalization, with_features
from .foreign import Factory, adopt, copied, is_foreign
from .layouts import State, canonical, recognise, shared_prefix, unwrap, without_normalization
from .registry import NORMALIZATION, build_model, canonical_name

_C10, _C100 = NORMALIZATION["cifar10"], NORMALIZATION["cifar100"]
_C100_LONG = (
    (0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
    (0.2673342858792401, 0.2564384629170883, 0.27615047132568404),
)
ROBUSTBENCH: dict[tuple[str, str], dict[str, Any]] = {
    ("cifar10", "Andriushchenko2020Understanding"): {"shortcut": "input"},
    ("cifar10", "Wong2020Fast"): {"normalize": _C10, "shortcut": "input"},
    ("cifar10", "Rice2020Overfitting"): {"normalize": _C10},
    ("cifar10", "Kireev2021Effectiveness"): {"normalize": _C10},
    ("cifar10", "Chen2020Efficient"): {"normalize": _C10},
    ("cifar10", "Rony2019Decoupling"): {"normalize": ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262))},
    ("cifar10", "Augustin2020Adversarial"): {
        "normalize": (
            (0.4913997551666284, 0.48215855929893703, 0.4465309133731618),
            (0.24703225141799082, 0.24348516474564, 0.26158783926049628),
        )
    },
    ("cifar10", "Hendrycks2019Using"): {"normalize": "half"},
    ("cifar10", "Hendrycks2020AugMix"): {"normalize": "half"},
    ("cifar10", "Ding2020MMA"): {"normalize": "per-image"},
    ("cifar100", "Rice2020Overfitting"): {"normalize": _C100_LONG},
    ("cifar100", "Wu2020Adversarial"): {"normalize": _C100_LONG},
    ("cifar100", "Chen2020Efficient"): {"normalize": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))},
    ("cifar100", "Hendrycks2019Using"): {"normalize": "half"},
    ("cifar100", "Hendrycks2020AugMix"): {"normalize": "half"},
}
"""What RobustBench's classes do that their files do not say, by data set and the start of the model's name."""

CHECK_IMAGES, COMPARED_IMAGES = 256, 100
Labelled = tuple[Any, Any]
"""Images, uint8 (N, H, W, C) or float (N, C, H, W) in [0, 1], and their classes (N,)."""


@check_kinds
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
    prefix: str | None = None,
    check: Labelled | None = None,
    expected: float | None = None,
    **options: Any,
) -> nn.Module:
    """Returns a frozen float32 network in eval mode under the network contract: logits, and features on request.

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
    A file of the name that RobustBench gives it gets what RobustBench's class does and the file does not say
    (`ROBUSTBENCH`). `prefix` says which network to take where a file holds several.

    A file cannot say all that its network needs, so measure it: `check` is a batch of labelled images (the first
    CHECK_IMAGES count). Where another normalisation or option that the file leaves open is decidedly better on them,
    the file is refused with that remedy; where the accuracy is not decidedly better than guessing, or far below
    the published `expected` (a fraction), a warning says so.

    `module` is for a run or file of a network of one's own, whose name does not build it: the same network again, or
    what makes one, which then gets the weights.

    Loading is strict, executes nothing of the file and does not touch the random state.

    Raises:
        FileNotFoundError: no such path.
        ModuleNotFoundError: a package has to be installed first; the message holds the command.
        ValueError: an unreadable, hostile, torn or foreign file, or one that does not fit what was asked.
    """
    path, device = Path(source).expanduser(), check_device(device)
    arch = None if arch is None else canonical_name(arch)
    given = {"arch": arch, "num_classes": num_classes, "in_channels": in_channels, **options}
    given = {key: value for key, value in given.items() if value is not None}
    if path.exists():
        file = _File(path, *_read(path), image_size, dataset, module, prefix)
        known = file.robustbench_layout()
        if normalize is None:
            normalize = known.pop("normalize", None)
        given = {**known, **given}
        model, stored = file.build(given, normalize)
        if check is not None and file.spec is None:
            file.compare(model.to(device), stored, given, normalize, check)
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
    model = model.to(device).requires_grad_(False).eval()
    if check is not None:
        warn_if_poor(str(source), model, check, expected)
    return model


def warn_if_poor(name: str, model: nn.Module, check: Labelled, expected: float | None = None) -> float:
    """Returns the clean accuracy of a network on labelled images; warns where it is poor, see `load_teacher`.

    Guessing is right on as many or more in one of a thousand such batches at most, else it is not ruled out. Far below
    is five points and three standard deviations of n images.

    Raises ValueError: the network fails on these images, or gives no logits of their classes.
    """
    from scipy.stats import binom  # slow to import

    right = is_right(model, check)
    accuracy, n = float(right.mean()), len(right)
    spread = 3 * (accuracy * (1 - accuracy) / n) ** 0.5
    found = f"{name}: right on {accuracy:.1%} of {n} clean images"
    classes = int(getattr(model, "num_classes", 0)) or int(max(check[1])) + 1
    if n >= 50 and binom.sf(right.sum() - 1, n, 1 / classes) > 1e-3:
        causes = "untrained or trained too briefly, other classes, or another normalisation"
        warnings.warn(f"{found}, not decidedly better than guessing: {causes}", stacklevel=4)
    elif expected is not None and accuracy < expected - 0.05 - spread:
        warnings.warn(f"{found}, far below the published {expected:.1%}", stacklevel=4)
    return accuracy


def borrowed(name: str, module: nn.Module, check: Labelled, classes: int) -> nn.Module:
    """Returns a frozen copy in eval mode of a caller's network, measured on labelled images; the module stays as it is.

    Raises:
        TypeError: not a module.
        ValueError: not float32, of other classes or images than the data, without logits, not finite, or not to be
            copied; names the role.
    """
    network = copied(name, module)
    check_module(name, network, "a torch.nn.Module, or what load_teacher takes")
    network.eval()
    for parameter in network.parameters():
        parameter.detach_()  # the copy of a ScriptModule has a graph
    images = pixels(as_images(check[0][:2]), device_of(network))
    try:
        with torch.no_grad():
            output = network(images)
        check_logits(output, len(images))
        if output.shape[1] != classes:
            raise ValueError(f"{output.shape[1]} classes; the data have {classes}")
        if not checkpoint.finite(output):
            raise ValueError("NaN or infinite logits; accepted: finite weights")
        with torch.no_grad():
            with_features(network)(images, features=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a network of others may raise anything
        raise ValueError(f"{name}: {one_line(error)}; images of the data are {tuple(images.shape[1:])}") from error
    warn_if_poor(name, network, check)
    return network


@torch.no_grad()
def is_right(model: nn.Module, check: Labelled) -> np.ndarray:
    """Returns which of the first CHECK_IMAGES labelled images a network classifies right, bool (n,)."""
    images = as_images(check[0][:CHECK_IMAGES])
    labels = as_labels(check[1][:CHECK_IMAGES], len(images))
    device = device_of(model)
    found = []
    for x, y in zip(images.split(64), labels.split(64), strict=True):
        logits = model(pixels(x, device))
        check_logits(logits, len(y))
        found.append((logits.argmax(1).cpu() == y).numpy())
    return np.concatenate(found)


@dataclass(frozen=True)
class _File:
    """What lies at a path, and what the caller says of it; `spec` is None where it holds no architecture."""

    path: Path
    spec: dict[str, Any] | None
    state: State
    image_size: int
    dataset: str | None
    module: nn.Module | Factory | None
    prefix: str | None

    def build(self, given: dict[str, Any], normalize: Normalization | None) -> tuple[nn.Module, bool]:
        """Returns the network, and whether its normalisation came from the file."""
        state, stored = self.state, True
        try:
            if self.spec is None:
                spec, state, stored = self._infer(given, normalize)
            else:
                spec = self.spec
                for key, value in given.items():
                    if spec.get(key) != value:
                        raise ValueError(f"{key}: got {value!r}; the file says {spec.get(key)!r}")
                _same_normalization(normalize, spec.get("normalize"))
            model = _rebuilt(spec, self.module)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise ValueError(f"{self.path}: {one_line(error)}") from error
        normalize = (model.spec or {}).get("normalize")
        if normalize and normalize != PER_IMAGE:
            mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in normalize)
            state = {"mean": mean, "std": std, **state}
        if isinstance(model, FeatureExtractor):
            state = _renamed(state, model)
        _adopt(self.path, model, state)
        return model, stored

    def robustbench_layout(self) -> dict[str, Any]:
        """Returns what is known of a file that has the name of a RobustBench model."""
        hundred = any(value.ndim == 2 and value.shape[0] == 100 for value in self.state.values())
        dataset = self.dataset or ("cifar100" if hundred else "cifar10")
        names = ((name, known) for (data, name), known in ROBUSTBENCH.items() if data == dataset and self.spec is None)
        return next((dict(known) for name, known in names if self.path.stem.startswith(name)), {})

    def compare(
        self, model: nn.Module, stored: bool, given: dict[str, Any], normalize: Normalization | None, check: Labelled
    ) -> None:
        """Raises ValueError where what the file leaves open, done otherwise, is decidedly better on labelled images."""
        if not isinstance(model, Network) or model.spec is None:
            return
        choices: list[dict[str, Any]] = [{}]
        if normalize is None and not stored:
            colours = NORMALIZATION if model.in_channels == 3 else ("half",)
            choices += [{"normalize": name} for name in ("none", PER_IMAGE, *colours)]
        for option, values in (("shortcut", ("activated", "input")), ("activation", ("relu", "silu"))):
            known = option in given or (option == "activation" and not model.spec["arch"].startswith("dm-"))
            if option in model.spec and not known:
                others = [{option: value} for value in values if value != model.spec[option]]
                choices += [{**choice, **other} for choice in choices for other in others]
        check = check[0][:COMPARED_IMAGES], check[1][:COMPARED_IMAGES]  # each choice costs as much again
        here, device = is_right(model.eval(), check), device_of(model)
        best, gain, accuracy = {}, 0, 0.0
        for choice in choices[1:]:
            options = {key: value for key, value in choice.items() if key != "normalize"}
            other = self.build({**given, **options}, choice.get("normalize", normalize))[0]
            right = is_right(other.to(device).eval(), check)
            wins, losses = int((right & ~here).sum()), int((here & ~right).sum())
            # Three standard deviations of a difference that is none.
            if wins - losses > max(gain, 0.03 * len(here), 3 * (wins + losses) ** 0.5):
                best, gain, accuracy = choice, wins - losses, float(right.mean())
        if best:
            remedy = ", ".join(f"{key}={value!r}" for key, value in best.items())
            raise ValueError(
                f"{self.path}: right on {here.mean():.1%} of {len(here)} clean images as its tensors alone tell, and "
                f"on {accuracy:.1%} with {remedy}; give {remedy}"
            )

    def _infer(self, given: dict[str, Any], normalize: Normalization | None) -> tuple[dict[str, Any], State, bool]:
        """The spec, the state dict under our names, and whether the file holds its normalisation."""
        if is_foreign(given.get("arch", "")):
            state, stored = without_normalization(self.state)
            if stored is not None:
                _same_normalization(normalize, stored)
            return {"normalize": stored or normalize, "image_size": self.image_size, **given}, state, stored is not None
        state, deepmind, stored, place, beside = canonical(self.state, self.prefix)
        if beside:
            listed = _listing([(key, _kind(value)) for key, value in beside.items()], 4)
            warnings.warn(f"{self.path}: taken: {place!r}; ignored beside it: {listed}", stacklevel=5)
        if stored is None and normalize is None and any(part.isdigit() and int(part) for part in place.split(".")):
            raise ValueError(
                f"the network is at {place!r}, a later part of a Sequential, and the file holds nothing of what comes "
                "before it; it probably normalises the images: give normalize=(mean, std), or one of none, "
                f"{PER_IMAGE}, {', '.join(NORMALIZATION)}"
            )
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
        spec = {**(seen or {}), **given, "image_size": self.image_size}
        channels = spec.get("in_channels", 3)
        found: Any = stored
        if stored is not None:
            found = tuple(values * channels if len(values) == 1 else values for values in stored)
            _same_normalization(normalize, found)
        elif normalize is None and deepmind:
            if self.dataset not in ("cifar10", "cifar100"):
                raise ValueError(
                    "DeepMind wide ResNets normalise their input, but the file holds no mean and std: give "
                    f"normalize=(mean, std), or a dataset of cifar10, cifar100; got dataset={self.dataset!r}"
                )
            found = NORMALIZATION[self.dataset]
        return {**spec, "normalize": found or normalize}, state, stored is not None


def _read(path: Path) -> tuple[dict[str, Any] | None, State]:
    """(spec, state dict) of what lies at `path`; spec is None where the file holds no architecture."""
    if path.is_dir():
        best = path / "best.pt"
        payload = checkpoint.read(best) if best.is_file() else checkpoint.load_last(path)
        if payload is None:
            names = "best.pt, last.pt or previous.pt"
            raise FileNotFoundError(f"{path}: a folder without {names}; accepted: a fastrd run folder")
        return _from_checkpoint(path, payload)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    payload = load_torch(path)
    if checkpoint.is_payload(payload):
        return _from_checkpoint(path, checkpoint.read(path))
    try:
        return None, unwrap(payload)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _from_checkpoint(path: Path, payload: Mapping[str, Any]) -> tuple[dict[str, Any], State]:
    try:
        return dict(payload["model"]["spec"]), unwrap(payload.get("ema") or payload["model"]["state"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: model: a fastrd checkpoint without a usable one ({error!r})") from None


def _read_safetensors(path: Path) -> tuple[dict[str, Any] | None, State]:
    check_regular(path)
    safetensors = _package("safetensors", f"{path}: reading a .safetensors file")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        check_tensors(str(path), state, path.stat().st_size)
        spec = json.loads(metadata["fastrd_spec"]) if "fastrd_spec" in metadata else None
    except Exception as error:
        what = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"{path}: not a readable safetensors file ({what})") from None
    if spec is not None and not isinstance(spec, dict):
        raise ValueError(f"{path}: its metadata fastrd_spec is not a JSON object")
    return spec, state


def _renamed(state: State, model: FeatureExtractor) -> State:
    """A published state under the names of a wrapped network: another prefix, which all keys share or do not have."""
    own = model.state_dict().keys()
    if state.keys() & own - {"mean", "std"}:
        return state
    new, old = (shared_prefix(keys - {"mean", "std"}) for keys in (own, state.keys()))
    return {key if key in ("mean", "std") else new + key.removeprefix(old): v for key, v in state.items()}


def _rebuilt(spec: dict[str, Any], module: nn.Module | Factory | None) -> Any:
    """The network of a spec, without weights that mean anything; the random state stays as it is."""
    if module is not None:
        shape = {key: spec.get(key) for key in ("num_classes", "in_channels", "image_size")}
        with torch.random.fork_rng([]):
            model = adopt(module, shape)
        if model.spec != spec:
            got, wanted = model.spec["arch"], spec.get("arch")
            raise ValueError(f"module: got {got}, whose tensors are not those of {wanted} in the file")
        return model
    if isinstance(spec.get("arch"), str) and is_foreign(spec["arch"]):
        with torch.random.fork_rng([]):
            return build_model(**spec)
    # The meta device allocates nothing and draws no random numbers; the file's tensors are adopted below.
    with torch.device("meta"):
        return build_model(**spec)


def read_weights(source: str | os.PathLike, network: nn.Module) -> State:
    """Returns the tensors that `load_teacher` finds at `source`, by the names of `network` as far as they are known.

    Raises:
        FileNotFoundError: no such path.
        ValueError: as `load_teacher`, or a tensor that cannot be trained on.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"weights: {path}: no such file or folder; accepted: a checkpoint or run folder")
    spec, state = _read(path)
    for name, value in state.items():
        if not checkpoint.is_dense(value) or not checkpoint.finite(value):
            got = f"{value.dtype}, {value.layout}" if not checkpoint.is_dense(value) else "NaN or infinity"
            raise ValueError(f"weights: {path}: {name[:80]}: got {got}; accepted: finite, dense tensors")
    return canonical(state).state if spec is None and isinstance(network, Network) else state


def _same_normalization(given: Normalization | None, stored: Any) -> None:
    if given is None or given == stored:
        return
    message = f"normalize: got {given}; the file normalises with {stored}; leave normalize out"
    if isinstance(stored, str):
        raise ValueError(message)
    if isinstance(given, str):
        check_option("normalize", given, ("none", PER_IMAGE, *NORMALIZATION))
        given = NORMALIZATION.get(given, ((), ()))
    pairs = [torch.tensor([list(map(float, values)) for values in pair]) for pair in (given, stored or ((), ()))]
    if pairs[0].shape != pairs[1].shape or not torch.allclose(pairs[0], pairs[1], atol=1e-4):
        raise ValueError(message)


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
    full = {key: torch.zeros((), dtype=torch.long) for key in expected}
    for key, value in state.items():
        full[key] = value.detach().to(torch.float32).contiguous() if value.is_floating_point() else value.detach()
    model.load_state_dict(full, strict=True, assign=True)


def _kind(value: Tensor) -> str:
    number = "" if value.is_floating_point() else " complex" if value.is_complex() else " integer"
    if not checkpoint.is_dense(value):
        number = f" {value.dtype}, {value.layout}"
    return f"{tuple(value.shape)}{number}"


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
        problem = f"no such file, and no RobustBench model for {dataset}, {threat_model}"
        raise ValueError(f"{name}: {problem}; nearest: {', '.join(near) or 'none'}") from error
    return with_features(model)


def _package(module: str, purpose: str, remedy: str = "") -> Any:
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        needs = f"{purpose} needs the {package} package: pip install {package}{remedy}"
        raise ModuleNotFoundError(needs, name=package) from None
