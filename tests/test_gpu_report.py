"""The report of a GPU: what it runs exists, it goes on where it was stopped, and it writes all or nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from bench import gpu_report
from bench.gpu_report import Stage

TINY = Stage("pgd_step", 1, "bench/test_pgd_step.py", ("128", "ours"))
CHECK = Stage("check", 1, "tests/test_attacks.py")


@pytest.fixture
def stages(monkeypatch):
    def choose(*chosen):
        monkeypatch.setattr(gpu_report, "stages", lambda dry: list(chosen))

    return choose


@pytest.mark.parametrize("benchmarks", [False, True])
def test_every_stage_selects_something(benchmarks):
    chosen = [stage for stage in gpu_report.stages(dry=True) if stage.writes_benchmarks == benchmarks]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--collect-only",
        *sorted({stage.path for stage in chosen}),
    ]
    found = subprocess.run(
        command,
        cwd=gpu_report.ROOT,
        env={**os.environ, "FASTRD_BENCH_TINY": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout
    tests = found.stdout.splitlines()
    for stage in chosen:
        assert any(
            test.startswith(stage.path) and all(word in test for word in stage.words) for test in tests
        ), stage.name


@pytest.mark.slow
def test_dry_run_goes_on_where_it_was_stopped_and_ends_in_one_file_and_a_page(stages, tmp_path, capfd):
    stages(CHECK, TINY)
    assert gpu_report.main(["--dry-run", str(tmp_path), "--minutes", "0.9"]) == 3, "no time for the second"
    assert (tmp_path / "raw/check.json").exists() and not (tmp_path / "dry-run.json").exists()
    assert gpu_report.main(["--dry-run", str(tmp_path)]) == 0
    assert "1 of 2 stages done before" in capfd.readouterr().out
    document = json.loads((tmp_path / "dry-run.json").read_text())
    assert [b["extra_info"]["variant"] for b in document["benchmarks"]] == ["ours"]
    assert "tests collected" in document["tests"]["check"]["summary"]
    assert "PGD step" in (tmp_path / "raw/report.html").read_text()


@pytest.mark.parametrize("path", ["tests/nothing_there.py", "bench/nothing_there.py"])
def test_a_failed_stage_stops_the_report_and_leaves_nothing(stages, tmp_path, path, capfd):
    stages(Stage("broken", 1, path), TINY)
    assert gpu_report.main(["--dry-run", str(tmp_path)]) == 3
    assert "broken: exit status" in capfd.readouterr().out
    assert not list(tmp_path.glob("**/*.json")) and not list(tmp_path.glob("**/*.part"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(capsys):
    assert gpu_report.main([]) == 1
    assert "nothing measured" in capsys.readouterr().err
