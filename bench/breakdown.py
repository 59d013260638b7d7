"""What a step's time is spent on: seconds by kind of work, from torch's profiler."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile

KINDS = {
    "copies": r"^mem(cpy|set)|nchwtonhwc|nhwctonchw|^aten::(copy_|cat)$",
    "batch norm": r"batch_norm|\bbn_|batchnorm",
    "compiled pointwise work": r"^triton_|compiledfxgraph",
    "losses, banks, attack updates, crops": r"^fastrd::(?!conv2d)|^_(augment|distillation|inverse_norms|stream|finish"
    r"|gradient|share|project|score|update|step)(_kernel)?$",
    "convolutions, matrix products": r"conv|gemm|gemv|xmma|cutlass|cudnn|nvjet|dgrad|wgrad|fprop|winograd"
    r"|^aten::(mm|addmm|bmm)$|^_run(backward)?$",
    "weight update": r"sgd|multi_tensor_apply",
}
"""Kind -> what the names of its kernels, on a CPU its operators, have; the first that fits. Small letters."""
REST = "other pointwise work, reductions"
RUNS = 3


def breakdown(run: Callable[[], object]) -> dict[str, float]:
    """Seconds that the device is busy in one `run()`, by kind. What is left of its time nobody works,
    or Python does."""
    gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as trace:
        for _ in range(RUNS):
            run()
        if gpu:
            torch.cuda.synchronize()
    device = DeviceType.CUDA if gpu else DeviceType.CPU
    seconds: dict[str, float] = defaultdict(float)
    for event in trace.events():
        if event.device_type == device and not event.is_user_annotation:
            spent = event.self_device_time_total if gpu else event.self_cpu_time_total
            seconds[kind(event.name)] += spent / 1e6 / RUNS
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def kind(name: str) -> str:
    """Of a kernel or operator, by its name."""
    return next((found for found, names in KINDS.items() if re.search(names, name.lower())), REST)
