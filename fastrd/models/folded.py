"""Batch normalisation folded into the convolutions before it, for networks that run in eval mode.

In eval mode batch normalisation is affine, so a convolution and the batch norm after it are one convolution
(Jacob et al. 2018, Eq. 14):

    w' = w gamma / sqrt(var + eps),    b' = beta + (b - mean) gamma / sqrt(var + eps)

The same function up to rounding, with far less memory traffic, forward and backward.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.capture import compiled
from ..core.foreach import copy_all
from ..kernels.cpu.chain import Chain
from .base import Conv2d, Network
from .chained import chained
from .fastest import Form, by_pytorch, fastest, has_ours

CONVOLUTIONS = (nn.Conv2d, Conv2d)  # and no others, which may do more than convolve


class _Fold(NamedTuple):
    conv: nn.Conv2d  # of the source
    norm: _BatchNorm  # of the source
    folded: nn.Conv2d  # of the copy


class Folded:
    """`.network` is a copy of `source` in eval mode whose parameters take no gradient, folded where it can be.

    Called as `.network` is it gives the same, differentiable once and with respect to the images. On a CPU it runs in
    the form that is the fastest there (`fastest`), chosen at the first images of a size and precision, for `images` of
    them where that is given: the chain of
    `.chains` in that precision, where there is one (`chained`); `.network`, with our convolutions or with PyTorch's;
    or, where `compile` says that half a minute before the first batch is worth it, `.network` compiled.

    `refresh()` brings the copy up to date with the source, in place: its tensors keep their addresses, which a
    captured CUDA graph relies on. The source itself is never touched and may train between two refreshes.

    A convolution is folded where its output goes into a batch norm and nowhere else, which is found by running the
    copy on `example` (a few images, on the device of the source). The folded copy must then give the same logits, with
    the norms as they are and with others: one that is not trained yet changes nothing, so that no mistake shows. Where
    it does not, because it does something that leaves no trace in the autograd graph, shares a weight between layers or
    reads an attribute of the batch norm, it stays unfolded.
    """

    def __init__(self, source: nn.Module, example: Tensor, *, compile: bool = False, images: int | None = None) -> None:
        source = getattr(source, "_orig_mod", source)
        self._images = images
        self._half: nn.Module | None = None
        self._copy(source)
        with torch.no_grad(), torch.autocast(example.device.type, enabled=False):
            pairs = _conv_norm_pairs(self.network, example)
            for tried in (_with_other_norms(source, pairs), source) if pairs else ():
                self._copy(tried)
                expected = self.network(example)
                self._fold(tried, pairs)
                if not self._gives(expected, example):
                    self._copy(source)
                    break
        self.chains = chained(self.network, example)
        self._compile = compile
        self._chosen: dict[tuple, Form] = {}

    def _copy(self, source: nn.Module) -> None:
        self.network = copy.deepcopy(source).eval().requires_grad_(False)
        self._folds: list[_Fold] = []
        own = [tensors[name] for tensors, name in _places(self.network)]
        self._copied = list(zip(own, _places(source), strict=True))

    def _fold(self, source: nn.Module, pairs: list[tuple[str, str]]) -> None:
        for conv_name, norm_name in pairs:
            conv: Any = source.get_submodule(conv_name)  # what `_conv_norm_pairs` found
            norm: Any = source.get_submodule(norm_name)
            folded: Any = self.network.get_submodule(conv_name)
            if folded.bias is None:
                folded.bias = nn.Parameter(conv.weight.new_empty(conv.out_channels), requires_grad=False)
            parent, _, child = norm_name.rpartition(".")
            setattr(self.network.get_submodule(parent), child, nn.Identity())
            self._folds.append(_Fold(conv, norm, folded))
        replaced = {id(t) for fold in self._folds for t in (*_tensors(fold.conv), *_tensors(fold.norm))}
        self._copied = [(own, (at, name)) for own, (at, name) in self._copied if id(at[name]) not in replaced]
        self.refresh()

    def _gives(self, expected: Tensor, example: Tensor) -> bool:
        try:
            return _close(self.network(example), expected)
        except Exception:  # a network of others may read anything of a layer that is gone
            return False

    def __call__(self, x: Tensor, features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        form = self._form(x) if x.device.type == "cpu" else self.network
        return form(x, features=True) if features else form(x)

    def _form(self, x: Tensor) -> Form:
        gradient = torch.is_grad_enabled() and x.requires_grad
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        kind = x.shape[1:], x.dtype, channels_last, gradient, _autocast()
        if kind not in self._chosen:
            forms = self._forms(x)
            self._chosen[kind] = forms[fastest(self.network, forms, x, self._images)]
        return self._chosen[kind]

    def _forms(self, x: Tensor) -> dict[str, Form]:
        """Those that there are for such images, by their names in `fastest.FORMS` and in that order."""
        plain = x.dtype == torch.float32 == next(self.network.parameters(), x).dtype
        half = plain and _autocast() == torch.bfloat16 and isinstance(self.network, Network)
        network, ours = self._in_bf16() if half else self.network, plain and _autocast() is None
        chain = self.chains.get(torch.bfloat16 if half else torch.float32) if half or ours else None
        forms: dict[str, Form | None] = {
            "chain": self._through(chain) if chain and x.is_contiguous(memory_format=torch.channels_last) else None,
            "compiled": compiled(network, dynamic=False) if self._compile else None,
            "layers": network if ours and has_ours(network) else None,
            "pytorch": by_pytorch(network),
        }
        return {name: form for name, form in forms.items() if form is not None}

    def _in_bf16(self) -> nn.Module:
        """A copy whose convolutions have the weights that autocast would make anew in each pass."""
        if self._half is None:
            self._half = copy.deepcopy(self.network)
            for module in self._half.modules():
                if type(module) in CONVOLUTIONS:
                    module.bfloat16()
        return self._half

    def _through(self, chain: Chain) -> Form:
        network: Any = self.network
        return lambda x, features=False: network.classified(chain(network.normalized(x)), features)

    @torch.no_grad()
    def refresh(self) -> None:
        copy_all((own, tensors[name]) for own, (tensors, name) in self._copied)
        if self._folds:
            self._refold()
        if self._half is not None:
            copy_all(zip(_tensors(self._half), _tensors(self.network), strict=True))

    def _refold(self) -> None:
        # The vectors of all layers at once: on a GPU each line is one launch, not one for each layer.
        convs, norms, folded = zip(*self._folds, strict=True)
        scales = torch._foreach_add([norm.running_var for norm in norms], [norm.eps for norm in norms])
        torch._foreach_rsqrt_(scales)
        _in_place(torch._foreach_mul_, scales, [norm.weight for norm in norms])
        shifts = torch._foreach_neg([norm.running_mean for norm in norms])
        _in_place(torch._foreach_add_, shifts, [conv.bias for conv in convs])
        torch._foreach_mul_(shifts, scales)
        _in_place(torch._foreach_add_, shifts, [norm.bias for norm in norms])
        copy_all(zip([own.bias for own in folded], shifts, strict=True))
        for conv, scale, own in zip(convs, scales, folded, strict=True):
            torch.mul(conv.weight, scale.reshape(-1, 1, 1, 1), out=own.weight)


def _autocast() -> torch.dtype | None:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


def _in_place(operation: Callable, vectors: Sequence[Tensor], others: Sequence[Tensor | None]) -> None:
    """A foreach operation of each vector and the other one, where there is one."""
    if pairs := [pair for pair in zip(vectors, others, strict=True) if pair[1] is not None]:
        operation(*map(list, zip(*pairs, strict=True)))


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _places(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where a module keeps each of its parameters and buffers: some put another tensor there in a forward pass."""
    found: dict[int, tuple[dict[str, Any], str]] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    found.setdefault(id(tensor), (tensors, name))
    return list(found.values())


def _with_other_norms(source: nn.Module, pairs: list[tuple[str, str]]) -> nn.Module:
    copied, generator = copy.deepcopy(source), torch.Generator("cpu").manual_seed(0)
    for _, name in pairs:
        norm: Any = copied.get_submodule(name)
        for tensor, low, high in (
            *((tensor, 0.5, 1.5) for tensor in (norm.weight, norm.running_var)),
            *((tensor, -0.5, 0.5) for tensor in (norm.bias, norm.running_mean)),
        ):
            if tensor is not None:
                tensor.copy_(torch.empty(tensor.shape, device="cpu").uniform_(low, high, generator=generator))
    return copied


def _conv_norm_pairs(network: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """Names of (convolution, batch norm) that each run once, where only the norm reads what the convolution made."""
    made: dict[int, tuple[str, Tensor]] = {}  # the tensors are kept, so that no id is used twice
    pairs: list[tuple[str, str]] = []
    calls: Counter[str] = Counter()

    def after_conv(name: str, output: Tensor) -> None:
        calls[name] += 1
        made[id(output)] = (name, output)

    def before_norm(name: str, x: Tensor) -> None:
        calls[name] += 1
        if id(x) in made:
            pairs.append((made[id(x)][0], name))

    hooks = []
    for name, module in network.named_modules():
        if type(module) in CONVOLUTIONS:
            hooks.append(module.register_forward_hook(lambda m, i, output, name=name: after_conv(name, output)))
        elif isinstance(module, _BatchNorm) and module.running_var is not None:
            hooks.append(module.register_forward_pre_hook(lambda m, inputs, name=name: before_norm(name, inputs[0])))
    try:
        with torch.enable_grad():
            logits = network(example.detach().requires_grad_())
    finally:
        for hook in hooks:
            hook.remove()
    readers = _readers(logits)
    by_name = dict(made.values())
    return [
        (conv, norm) for conv, norm in pairs if calls[conv] == calls[norm] == 1 and readers[by_name[conv].grad_fn] == 1
    ]


def _readers(output: Tensor) -> Counter:
    """How many operations read the result of each node of the autograd graph."""
    readers: Counter = Counter()
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node in seen or node is None:
            continue
        seen.add(node)
        for source, _ in node.next_functions:
            readers[source] += 1
            waiting.append(source)
    return readers


def _close(actual: Tensor, expected: Tensor) -> bool:
    rounding = 1e4 * torch.finfo(expected.dtype).eps  # some hundred layers, each with its own
    return bool((actual - expected).abs().max() <= rounding * expected.abs().max())
