"""The demo from start to report, at a size for tests."""

from __future__ import annotations

import json

import pytest

from fastrd import demo


@pytest.mark.slow
def test_demo_falls_back_to_the_digits_and_keeps_what_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("FASTRD_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "DIGITS_EPOCHS", 1)
    monkeypatch.setattr(demo, "EVALUATED", 20)
    small = {"data.train_limit": 400, "evaluation.attacks": ["clean", "pgd5"], "student.options.width": 4}
    monkeypatch.setattr(demo, "DIGITS", {**demo.DIGITS, **small})
    page = demo.run(tmp_path / "demo", device="cpu", progress=False)
    said = capsys.readouterr().out
    assert "using digits" in said and "cifar10: not found" in said, "says which data and why"
    assert page.exists() and page == tmp_path / "demo" / "digits-cpu" / "report.html"
    for name, method in (("demo-ard", "ARD"), ("demo-igdm", "ARD + IGDM"), ("demo-gacd", "GACD")):
        document = json.loads((page.parent / name / "evaluation.json").read_text())
        assert document["n"] == 20 and set(document["results"]) == {"clean", "pgd5"}
        assert -1 <= document["alignment"]["gc"] <= 1, "each student is compared with its teacher"
        assert name in said and method in said
    weights = {run.name: (run / "last.pt").read_bytes() for run in page.parent.iterdir() if run.is_dir()}
    assert len(weights) == 4
    demo.run(tmp_path / "demo", device="cpu", progress=False)
    assert weights == {run.name: (run / "last.pt").read_bytes() for run in page.parent.iterdir() if run.is_dir()}


def test_overrides_fit_the_demo_recipes():
    import torch

    from fastrd.recipe import Recipe

    for dataset in ("cifar10", "digits"):
        for device in ("cpu", "cuda"):
            changes = demo._overrides(dataset, torch.device(device))
            for name in ("demo-teacher", *demo.STUDENTS):
                recipe = Recipe.load(name, changes)
                assert recipe.data.name == dataset
    assert recipe.schedule.epochs == demo.DIGITS_EPOCHS and recipe.data.train_limit is None
