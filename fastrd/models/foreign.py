"""Networks of other makers as students: timm, torchvision, plugins, and modules of one's own."""

from __future__ import annotations

import copy
import hashlib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.fingerprint import tensors_of
from ..core.values import nearest, one_line
from .base import FeatureExtractor, Network, Normalization, classifier, head_name, with_features

Factory = Callable[..., nn.Module]
NETWORKS: dict[str, Factory] = {}
"""Networks that plugins registered, by name."""

GIVEN = "given:"  # prefix of the name of a network that only its owner can build again
SEPARATOR = ":"


def is_foreign(arch: str) -> bool:
    """Returns whether `build_foreign` is responsible for this name."""
    return SEPARATOR in arch or arch in NETWORKS


def check_name(arch: str) -> None:
    """Raises ValueError where a library has no such network, as far as the library is installed."""
    library, _, name = arch.rpartition(SEPARATOR)
    if library in LISTS:
        try:
            known = LISTS[library](_library(library, name))
        except ModuleNotFoundError:
            return  # a recipe can be read without it
        if name not in known:
            raise ValueError(f"arch: {library} has no model {name!r}{nearest(name, known)}")
    elif library and not arch.startswith(GIVEN):
        raise ValueError(_unknown(arch))


def build_foreign(
    arch: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    image_size: int = 32,
    normalize: Normalization | None = None,
    repeat_grey: bool = False,
    **options: Any,
) -> Foreign:
    """Returns a network under the network contract, for `build_model`, which has checked the numbers.

    Args:
        arch: "timm:NAME", "torchvision:NAME", or a name that a plugin registered.
        repeat_grey: repeat the one channel of grey images for a network that takes colour.
        normalize: per-channel (mean, std) of the network's input, applied inside.
        options: what the network itself takes, e.g. patch_size of a timm ViT.

    Raises:
        ModuleNotFoundError: timm or torchvision is not installed.
        ValueError: an unknown name, options that the network refuses, or grey images for a colour network.
    """
    if repeat_grey and in_channels != 1:
        raise ValueError(f"repeat_grey: got true for images of {in_channels} channels; accepted: only for grey ones")
    channels = 3 if repeat_grey else in_channels
    library, _, name = arch.rpartition(SEPARATOR)
    makers = {"": _plugin, "timm": _timm, "torchvision": _torchvision}
    if library not in makers:
        raise ValueError(_unknown(arch))
    check_name(arch)
    for option in options:
        if library and any(word in option for word in ("pretrained", "checkpoint", "weights", "cache_dir")):
            accepted = "none that loads a file, student.weights = FILE gives weights to start from"
            raise ValueError(f"options: got {option}; accepted: {accepted}")
    try:
        module = makers[library](name, num_classes, channels, image_size, options)
    except (ValueError, OSError, ImportError, MemoryError):
        raise
    except Exception as error:  # a foreign constructor may raise anything at all
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"arch: {arch} cannot be built with options {options}: {reason}") from error
    return Foreign(module, normalize, repeat_grey)


class Foreign(FeatureExtractor):
    """A named foreign network: grey images repeated and normalised as asked for, then the module."""

    spec: dict[str, Any] | None = None

    def __init__(self, module: nn.Module, normalize: Normalization | None, repeat_grey: bool) -> None:
        super().__init__(module, head_name(module))
        self.repeat_grey = repeat_grey
        self.keep_normalization(normalize)

    def forward(self, x: Tensor, features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        if self.repeat_grey:
            x = x.expand(-1, 3, -1, -1)
        if self.mean is not None and self.std is not None:
            x = (x - self.mean) / self.std
        return super().forward(x, features)


def copied(name: str, module: nn.Module) -> nn.Module:
    """Returns a copy of a caller's network `name`, or raises ValueError where it cannot be copied."""
    try:
        return copy.deepcopy(getattr(module, "_orig_mod", module))
    except (TypeError, RuntimeError, ValueError) as error:
        reason = one_line(error)
        raise ValueError(f"{name}: cannot be copied ({reason}); accepted: a module that copy.deepcopy takes") from None


def adopt(student: nn.Module | Factory, shape: Mapping[str, Any]) -> Any:
    """Returns a module of one's own under the network contract, with a `spec` that tells it from others.

    Args:
        student: a module, which is copied and left as it is, or what makes one: called with those of num_classes,
            in_channels and image_size that it has as parameters.
        shape: num_classes, in_channels, image_size.

    Raises:
        TypeError: neither a module nor something to call, or no module came of it.
        ValueError: the module has no linear layer that could make the logits.
    """
    if isinstance(student, nn.Module):
        module = copied("student", student)
    elif callable(student):
        known = inspect.signature(student).parameters
        module = student(**{key: value for key, value in shape.items() if key in known})
    else:
        raise TypeError(f"student: got {type(student).__name__}; accepted: a torch.nn.Module or what makes one")
    if not isinstance(module, nn.Module):
        raise TypeError(f"student: got a {type(module).__name__} of what was called; accepted: a torch.nn.Module")
    if isinstance(module, (Network, Foreign)) and module.spec:
        return module  # of build_model
    kind = type(getattr(module, "module", module)).__name__
    tensors = "".join(f"{k} {tuple(v.shape)} {v.dtype};" for k, v in module.state_dict().items())
    module = with_features(module)
    digest = hashlib.sha256(tensors.encode()).hexdigest()[:16]
    adopted: Any = module
    adopted.spec = {"arch": GIVEN + kind, "tensors": digest, **shape}
    return module


def check_network(network: Any, x: Tensor, num_classes: int) -> None:
    """Raises ValueError unless `network` can be attacked and trained on images like `x` (N, C, H, W), N >= 2.

    It must give logits (N, num_classes) and features (N, D) in float32 in either mode, its last linear layer must make
    the logits of the features, a gradient must reach the images, and it must have something to train. It is left as it
    is, and so is the random state.
    """
    name = getattr(network, "spec", None) or {}
    where = f"student: {name.get('arch', type(network).__name__)}"
    kinds = {t.dtype for _, t in tensors_of(network) if isinstance(t, nn.Parameter) or t.is_floating_point()}
    if kinds != {torch.float32}:
        found = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds)) or "none"
        raise ValueError(f"{where}: got parameters or buffers of {found}; accepted: float32 (module.float())")
    if not any(p.requires_grad for p in network.parameters()):
        raise ValueError(f"{where}: no parameter takes a gradient; accepted: a network that can be trained")
    trial, again = copy.deepcopy(network), copy.deepcopy(network)
    devices = [x.device] if x.is_cuda else []
    images = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.random.fork_rng(devices), torch.enable_grad():
        try:
            for training in (True, False):
                mode, logits = ("train" if training else "eval"), (len(x), num_classes)
                plain = trial.train(training)(images)
                _expect(f"{where}: logits in {mode} mode", plain, logits)
                outputs, features = trial(images, features=True)
                _expect(f"{where}: logits beside features in {mode} mode", outputs, logits)
                _expect(f"{where}: features in {mode} mode", features, (len(x), network.feature_dim))
            expected = classifier(trial)(features)
            (gradient,) = torch.autograd.grad(outputs.square().sum(), images, allow_unused=True)
        except Exception as error:  # a foreign module may raise anything at all
            if isinstance(error, ValueError) and str(error).startswith(where):
                raise
            grey = x.shape[1] == 1 and "channel" in str(error)
            hint = "; a colour network takes grey images as x.expand(-1, 3, -1, -1)" if grey else ""
            raise ValueError(f"{where}: fails on images {tuple(x.shape)}: {one_line(error)}{hint}") from error
        if not torch.allclose(expected, outputs, rtol=1e-4, atol=1e-5):
            raise ValueError(f"{where}: its last linear layer of the features does not give the logits")
        if gradient is None:
            raise ValueError(f"{where}: no gradient reaches the images, so it cannot be attacked")
        if not _restores(again, trial, x):
            accepted = "a network whose state_dict() holds all that training changes, which a checkpoint keeps"
            raise ValueError(f"{where}: gives other logits with the state_dict() that it had; accepted: {accepted}")


@torch.no_grad()
def _restores(fresh: nn.Module, network: nn.Module, x: Tensor) -> bool:
    """Whether `fresh` gives the logits of `network`, in eval mode, once it has its state."""
    try:
        fresh.load_state_dict(network.state_dict())
    except RuntimeError:  # of other tensors
        return False
    torch.manual_seed(0)
    expected = network.eval()(x)
    torch.manual_seed(0)
    return torch.allclose(fresh.eval()(x), expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def _expect(what: str, value: Any, shape: tuple[int, int]) -> None:
    found = (value.dtype, tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
    if found != (torch.float32, shape):
        raise ValueError(f"{what}: got {found}; accepted: float32 {shape}")


def load_start(network: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Gives `network` the weights of `state`.

    The last linear layer may be missing or of another number of classes: it then stays as it was drawn.

    Raises ValueError: anything else is missing, left over, of another shape or of other numbers; names it.
    """
    own = network.state_dict()
    if not set(state) & set(own):
        state = {f"module.{key}": value for key, value in state.items()}  # as published, for a wrapped module
    head = {id(p) for p in classifier(network).parameters()}
    heads = {name for name, p in network.named_parameters() if id(p) in head}
    fresh = [n for n in own if n in heads and (n not in state or state[n].shape != own[n].shape)]
    optional = {n for n in own if n.endswith("num_batches_tracked") or n in ("mean", "std")}
    both = [n for n in own if n in state]
    problems = {
        "missing": [n for n in own if n not in state and n not in heads | optional],
        "of another shape": [n for n in both if n not in fresh and state[n].shape != own[n].shape],
        "of other numbers": [n for n in both if state[n].is_floating_point() != own[n].is_floating_point()],
        "not of this network": [n for n in state if n not in own and n not in heads],
    }
    for what, names in problems.items():
        if names:
            found = f"{len(names)} {what}: {', '.join(names[:4])}"
            raise ValueError(f"{where}: the weights do not fit the student: {found}")
    network.load_state_dict({**own, **{n: state[n] for n in both if n not in fresh}})


def _plugin(name: str, num_classes: int, channels: int, image_size: int, options: dict[str, Any]) -> nn.Module:
    return NETWORKS[name](num_classes=num_classes, in_channels=channels, image_size=image_size, **options)


def _timm(name: str, num_classes: int, channels: int, image_size: int, options: dict[str, Any]) -> nn.Module:
    timm = _library("timm", name)
    shape = {"num_classes": num_classes, "in_chans": channels}
    if (config := timm.get_pretrained_cfg(name)) is not None and config.fixed_input_size:
        shape["img_size"] = image_size
    return timm.create_model(name, pretrained=False, **{**shape, **options})


def _torchvision(name: str, num_classes: int, channels: int, image_size: int, options: dict[str, Any]) -> nn.Module:
    models = _library("torchvision", name).models
    if channels != 3:
        raise ValueError(
            f"in_channels: got {channels} for torchvision:{name}, which takes colour images; accepted: 3, or "
            "student.repeat_grey = true, which repeats a grey channel"
        )
    shape: dict[str, Any] = {"num_classes": num_classes}
    if name.startswith("vit_"):
        shape["image_size"] = image_size
    return models.get_model(name, weights=None, **{**shape, **options})


LISTS: dict[str, Callable[[Any], list[str]]] = {
    "timm": lambda timm: timm.list_models(),
    "torchvision": lambda torchvision: torchvision.models.list_models(module=torchvision.models),  # classifiers
}


def _library(package: str, name: str) -> Any:
    try:
        return importlib.import_module(package)
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch fails with RuntimeError
        needs = f"{package}{SEPARATOR}{name} needs the {package} package ({error})"
        raise ModuleNotFoundError(f"arch: {needs}: pip install {package}", name=package) from None


def _unknown(arch: str) -> str:
    if arch.startswith(GIVEN):
        return (
            f"arch: got {arch!r}: a network of one's own, which its name does not build; accepted: the same network "
            "given again (student= in Python), or one that a plugin registers (--plugin)"
        )
    return f"arch: got {arch!r}; accepted: timm{SEPARATOR}NAME or torchvision{SEPARATOR}NAME"
