"""Where the time of a training run goes: `fastrd train --profile`."""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule
from torch.utils.flop_counter import FlopCounterMode

from ..evaluation.inputs import evaluating
from ..kernels.runtime.roofline import SUSTAINED
from .process import synchronized_time

TRACED_STEPS = 3
UNTRACED_STEPS = 3  # compilation and warm-up


class Profiler:
    """Seconds in each phase of the step, by a clock that waits for the device, and a trace of a few steps.

    The waits cost the overlap of host and device, so a profiled run is somewhat slower than a plain one.
    """

    def __init__(self, run: Path, device: torch.device, peak: float, attack_peak: float) -> None:
        """peak, attack_peak: FLOP/s that the device could reach, the latter in the attack's precision: `peak_flops`."""
        self.path, self.device = run / "trace.json.gz", device
        self.peaks = defaultdict(lambda: peak, attack=attack_peak)
        self.seconds: dict[str, float] = {}
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it says that it starts and finds no GPU
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._trace = profile(
            activities=activities,
            schedule=schedule(wait=UNTRACED_STEPS - 1, warmup=1, active=TRACED_STEPS, repeat=1),
            on_trace_ready=self._write,
        )
        self._trace.start()

    def _write(self, trace: profile) -> None:
        partial = self.path.with_name("trace.part.json.gz")
        trace.export_chrome_trace(os.fspath(partial))
        os.replace(partial, self.path)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = synchronized_time(self.device)
        with record_function(name):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + synchronized_time(self.device) - began

    def step(self) -> None:
        """Counts a step; called after every training step."""
        self._trace.step()

    def close(self) -> None:
        self._trace.stop()

    def epoch(self, images: int, flops: Mapping[str, float]) -> str:
        """Returns one epoch as text, and the clocks set back. flops: model FLOPs by phase, for one image.

        Utilisation is the share of the time that the peak rate would take. The FLOPs are those of direct convolutions:
        by Winograd's algorithm it may exceed 100 %.
        """
        seconds, self.seconds = self.seconds, {}
        rows = sorted(seconds.items(), key=lambda row: -row[1])
        total = sum(seconds.values())
        lines = []
        for name, spent in [*rows, ("all", total)]:
            done = {phase: images * count for phase, count in flops.items() if name in (phase, "all") and count}
            line = f"  {name:<10} {spent:8.2f} s {spent / total:6.1%}"
            if done:
                least = sum(count / self.peaks[phase] for phase, count in done.items())
                rate = sum(done.values()) / spent
                line += f"  {rate / 1e12:8.3g} TFLOP/s, {least / spent:.0%} model-flops utilisation"
            lines.append(line)
        return "\n".join([*lines, f"  {images / total:,.0f} images/s"])


def forward_flops(network: nn.Module, x: torch.Tensor) -> float:
    """Operations (two for a multiply-add) of one forward pass of one image; x is one batch of one image."""
    with evaluating(network), FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x)
    return float(counter.get_total_flops())


@functools.cache  # measured twice it would be two numbers
def peak_flops(device: torch.device, precision: str) -> float:
    """FLOP/s that matrix products reach on the device: from the table of known GPUs, else measured for a moment."""
    if device.type == "cuda":
        for name, rates in SUSTAINED.items():
            if name in torch.cuda.get_device_name(device) and precision in rates:
                return rates[precision]
    side = 4096 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(side, side, device=device, dtype=dtype)
    times = []
    for _ in range(5):
        began = synchronized_time(device)
        torch.mm(a, a)
        times.append(synchronized_time(device) - began)
    return 2 * side**3 / min(times)
