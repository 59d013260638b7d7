"""Networks and attacks as programs: torch.compile, and CUDA graphs, which launch many kernels at once.

`Captured` is one graph of a whole function, for what leaves nothing behind but its output: an attack. Networks inside
a training step come through `captured_passes`, by torch.compile's own graphs: there each pass is one, forward and
backward, and even those that precede the recording are the step's own, so batch norm's statistics count each once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 2  # calls that compile, choose algorithms and fill caches, none of which may happen under capture


def compiled(function: Callable, **options: Any) -> Callable:
    """Returns `torch.compile(function, **options)` that shares no programs with other functions or networks.

    Dynamo keeps 8 programs for one code object, which all networks of a class and all closures of a function have in
    common. Beyond those it runs uncompiled or, under `fullgraph`, fails.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__code__ = call.__code__.replace()  # an equal one, but another object
    return torch.compile(call, **options)


def capturable(x: Tensor) -> bool:
    """Returns whether work on x can become a graph."""
    return x.is_cuda


def autocast(x: Tensor, precision: str, *, cache: bool) -> torch.autocast:
    """Returns the context of forward passes on x: bfloat16 where `precision` is "bf16".

    cache: keep casts of parameters between uses, which a CUDA graph must not read.
    """
    return torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=precision == "bf16", cache_enabled=cache)


_Recorded = tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]  # graph, its inputs, its output


class Captured:
    """`fn(*inputs) -> Tensor`, recorded at the first call with inputs of given shapes and replayed afterwards.

    One launch from the host instead of one for each kernel. `fn` must not synchronise, and whatever else it reads
    (parameters, say) must stay at its address; it may change in place between calls.
    """

    def __init__(self, fn: Callable[..., Tensor]) -> None:
        self.fn = fn
        self._recorded: dict[tuple, _Recorded] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        key = (autocast, *((t.shape, t.stride(), t.dtype, t.device) for t in inputs))
        if key not in self._recorded:
            self._recorded[key] = self._record(inputs)
        graph, held, output = self._recorded[key]
        for own, given in zip(held, inputs, strict=True):
            own.copy_(given)
        graph.replay()
        return output.clone()  # the next replay overwrites it

    def _record(self, inputs: tuple[Tensor, ...]) -> _Recorded:
        held = tuple(torch.empty_like(t).copy_(t) for t in inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.fn(*held)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads (a loader's, say) may go on using the device meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = self.fn(*held)
        return graph, held, output


def captured_passes(network: nn.Module) -> Callable[..., tuple[Tensor, ...]]:
    """Returns `network`, compiled, each of its passes a graph after the second call.

    Outputs are overwritten after the next `new_step`. Parts of a network that cannot be captured run without.
    """
    return compiled(network, dynamic=False, mode="reduce-overhead")


def new_step(network: nn.Module) -> None:
    """Releases what the captured passes of any network gave, but for the gradients left in this one."""
    for parameter in network.parameters():
        if parameter.grad is not None:  # a backward pass's own output, or a sum with it
            parameter.grad = parameter.grad.clone()
    torch.compiler.cudagraph_mark_step_begin()


def clone_outputs(network: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Returns `network` with copies for outputs, which outlive the step."""
    return lambda *args, **kwargs: tuple(output.clone() for output in network(*args, **kwargs))
