"""A function of tensors as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

WARM_UP = 2  # calls that compile, choose algorithms and fill caches, none of which may happen under capture


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor


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
        return _Recorded(graph, held, output)
