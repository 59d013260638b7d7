"""The network contract, kept in one place.

Every network here maps images `x`, float (N, C, H, W) in [0, 1], to logits (N, classes); called with
`features=True` it also returns the penultimate features (N, D), those its last linear layer reads.
Normalisation, when a network has one, is inside it. `with_features` gives any other module the same contract.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.arguments import check_logits
from ..kernels.cpu.conv2d import conv2d

Normalization = tuple[Sequence[float], Sequence[float]] | str
"""Per-channel (mean, std) of pixels in [0, 1], or a name: see `registry.NORMALIZATION` and `PER_IMAGE`."""

PER_IMAGE = "per-image"
"""Each image less its mean, over its standard deviation (unbiased, at least 1/sqrt(C H W)): Ding 2020 (MMA)."""


class _Headed(nn.Module):
    """What networks under the contract have in common: a last linear layer `head_name`, and a normalisation or none."""

    head_name: str
    mean: Tensor | None
    std: Tensor | None

    @property
    def head(self) -> nn.Linear:
        return cast(nn.Linear, self.get_submodule(self.head_name))

    @property
    def feature_dim(self) -> int:
        return self.head.in_features

    @property
    def num_classes(self) -> int:
        return self.head.out_features

    def keep_normalization(self, normalize: Any) -> None:
        """Keeps (mean, std), or None, as buffers of shape (C, 1, 1)."""
        for name, values in zip(("mean", "std"), normalize or (None, None), strict=True):
            self.register_buffer(name, None if values is None else torch.tensor(values).reshape(-1, 1, 1))


class Network(_Headed):
    """Base of our networks: a subclass gives `embed` and creates the linear layer `head_name`.

    `feature_dim`, `num_classes`, `in_channels` are ints; `spec`, set by `build_model`, rebuilds the network. A subclass
    passes on what describes the images, `in_channels` and `normalize`, as `**images`.
    """

    head_name = "linear"
    spec: dict[str, Any] | None = None

    def __init__(self, *, in_channels: int = 3, normalize: Normalization | None = None) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.per_image = normalize == PER_IMAGE
        self.keep_normalization(None if self.per_image else normalize)

    def embed(self, x: Tensor) -> Tensor:
        """Returns the features (N, D) of normalised images."""
        raise NotImplementedError

    def forward(self, x: Tensor, features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        return self.classified(self.embed(self.normalized(x)), features)

    def normalized(self, x: Tensor) -> Tensor:
        # Without this a grey image would broadcast against a three-channel mean and pass for a colour one.
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x: got shape {tuple(x.shape)}; accepted: (N, {self.in_channels}, H, W) images in [0, 1]")
        if self.per_image:
            mean, std = x.mean((1, 2, 3), keepdim=True), x.std((1, 2, 3), keepdim=True)
            return (x - mean) / std.clamp_min(x[0].numel() ** -0.5)
        return x if self.mean is None or self.std is None else (x - self.mean) / self.std

    def classified(self, embedding: Tensor, features: bool) -> Tensor | tuple[Tensor, Tensor]:
        # In the weights' type under autocast too: IGDM subtracts logits, and those around 10 are 1/16 apart in
        # bfloat16.
        with torch.autocast(embedding.device.type, enabled=False):
            logits = self.head(embedding.to(self.head.weight.dtype))
        return (logits, embedding) if features else logits


class Conv2d(nn.Conv2d):
    """nn.Conv2d without groups or dilation, in the fastest way there is (`kernels.conv2d`)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias)

    def forward(self, x: Tensor, *, add: Tensor | None = None, relu: bool = False) -> Tensor:
        """Returns relu(convolution + add), in one pass where there is one."""
        stride, (padding, _) = self.stride[0], cast("tuple[int, int]", self.padding)
        return conv2d(x, self.weight, self.bias, stride=stride, padding=padding, add=add, relu=relu)


def activated(norm: nn.Module, conv: Conv2d, x: Tensor, add: Tensor | None = None) -> Tensor:
    """Returns relu(norm(conv(x)) + add), by the convolution alone once `norm` is folded into it."""
    if isinstance(norm, nn.Identity):
        return conv(x, add=add, relu=True)
    y = norm(conv(x))
    return (y if add is None else y.add_(add)).relu_()  # a norm's backward reads its input


def stem_layers(in_channels: int, width: int, stem: str, *, stride: int = 1) -> tuple[Conv2d, nn.Module]:
    """Returns the first convolution of a network and the pooling that follows its activation.

    "cifar" is 3x3 with `stride`, without pooling; "stl10" divides the resolution by 4 (7x7, stride 2, then
    3x3 max pooling).
    """
    if stem == "cifar":
        return Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False), nn.Identity()
    return Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False), nn.MaxPool2d(3, stride=2, padding=1)


def global_pool(x: Tensor) -> Tensor:
    """Pools (N, C, H, W) -> (N, C), in any memory format."""
    return x.mean((2, 3))


class FeatureExtractor(_Headed):
    """A foreign module under the network contract; the module itself stays reachable as `.module`."""

    def __init__(self, module: nn.Module, head_name: str) -> None:
        super().__init__()
        self.module = module
        self.head_name = f"module.{head_name}"
        self._recording = self._checked = False
        self._recorded: Tensor | None = None
        # A bound method, unlike a closure, follows the wrapper through copy.deepcopy and pickle.
        self.head.register_forward_pre_hook(self._record)

    def _record(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._recording:
            self._recorded = inputs[0]

    def forward(self, x: Tensor, features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        if not features:
            return self.module(x)
        self._recording = True
        try:
            logits = self.module(x)
        finally:
            self._recording = False
            embedding, self._recorded = self._recorded, None
        check_logits(logits, len(x))
        found = "no features" if embedding is None else f"features {tuple(embedding.shape)}"
        fits = embedding is not None and embedding.ndim == 2 and logits.shape == (len(embedding), self.num_classes)
        if fits and not self._checked and not torch.compiler.is_compiling():
            # A layer of the right size may still not be the one the logits come from; once is enough.
            with torch.no_grad():
                made = self.head(embedding)
            fits, found = bool(torch.allclose(made, logits, rtol=1e-2, atol=1e-3)), "other logits"
            self._checked = fits
        if embedding is None or not fits:
            layer = self.head_name.removeprefix("module.")
            raise ValueError(
                f"with_features: layer {layer!r} gave {found} for logits {tuple(logits.shape)}, so it does not make "
                "the logits; name the layer that does: with_features(module, head='...')"
            )
        return logits, embedding


def with_features(module: nn.Module, *, head: str | None = None) -> nn.Module:
    """Puts `module` under the network contract: `M(x)` -> logits, `M(x, features=True)` -> (logits, features).

    A module that obeys the contract already is returned as it is. Any other is wrapped: its features are the
    input (N, D) of its last registered nn.Linear, or of the one named `head`; `.module` is the module itself,
    with the keys of its state dict as they were.

    Raises:
        TypeError: `module` is not an nn.Module.
        ValueError: it has no such linear layer; or, at a call with `features=True`, that layer does not make
            the logits.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: got {type(module).__name__}; accepted: a torch.nn.Module")
    if head is None and obeys_contract(module):
        return module
    return FeatureExtractor(module, head_name(module, head))


def classifier(module: nn.Module) -> nn.Linear:
    """Returns the last linear layer of a network under the contract: logits = classifier(module)(features)."""
    if isinstance(module, (Network, FeatureExtractor)):
        return module.head
    return cast(nn.Linear, module.get_submodule(head_name(module)))


def obeys_contract(module: nn.Module) -> bool:
    plain = getattr(module, "_orig_mod", module)
    try:
        takes_features = "features" in inspect.signature(plain.forward).parameters
    except (TypeError, ValueError):  # of a ScriptModule
        return False
    return takes_features and hasattr(plain, "feature_dim") and hasattr(plain, "num_classes")


def head_name(module: nn.Module, given: str | None = None) -> str:
    """Returns the name of the last linear layer of a module, or `given`, which must be one of them."""
    names = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear) and name]
    if given is not None and given not in names:
        raise ValueError(f"head: got {given!r}; accepted: the name of an nn.Linear, one of {names}")
    if not names:
        raise ValueError(
            f"with_features: {type(module).__name__} has no nn.Linear inside to find its features by; give "
            "it a forward(x, features=False) and the attributes feature_dim and num_classes"
        )
    return given or names[-1]
