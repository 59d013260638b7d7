"""One captured step of every method on a GPU: equal to the plain one, and nothing in it waits.
The first minute of a report."""

from __future__ import annotations

import pytest
import torch
from test_capture import STEPS, batches, make

from fastrd.models import build_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("case", STEPS)
def test_a_captured_step(monkeypatch, case):
    """The attack is one CUDA graph of plain operators: torch.compile, which takes a minute, is left out."""
    for module in ("core.capture", "engine.step", "attacks"):
        monkeypatch.setattr(f"fastrd.{module}.compiled", lambda function, **options: function)
    torch.manual_seed(0)
    networks = {
        name: build_model("cnn", num_classes=4, image_size=8, width=3).cuda().requires_grad_(name == "student")
        for name in ("student", "teacher", "clean_teacher")
    }
    for name in ("teacher", "clean_teacher"):
        networks[name].eval()
    told = []
    for compile in (False, True):
        engine = make(case, networks, compile=compile)
        losses = []
        for number, batch in enumerate(batches(4)):
            x, y, index = (part.cuda() for part in batch)
            generator = torch.Generator("cuda").manual_seed(number)
            torch.cuda.synchronize()
            # The first steps record, and set GACD's normaliser.
            torch.cuda.set_sync_debug_mode("error" if number > 2 else "default")
            try:
                terms, _ = engine(x, y, index, epoch=1, epochs=4, batch=number, generator=generator)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            losses.append({name: value.clone() for name, value in terms.items()})
        told.append([{name: value.item() for name, value in terms.items()} for terms in losses])
    for plain, captured in zip(*told, strict=True):
        assert captured == pytest.approx(plain, rel=1e-2)
