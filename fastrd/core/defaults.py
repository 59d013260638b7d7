"""What torch is set to while our code runs, whatever the caller of a public function has set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def ordinary_torch() -> Iterator[None]:
    """Runs the block with float32 and the CPU as defaults, gradients on, and no autocast."""
    before = torch.get_default_dtype()
    device = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    # Without a GPU a release of torch may warn about this one, though it enables nothing.
    on_gpu = torch.autocast("cuda", enabled=False) if torch.cuda.is_available() else nullcontext()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            on_gpu,
            device,
        ):
            yield
    finally:
        torch.set_default_dtype(before)
