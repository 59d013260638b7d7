"""Kernels compiled without their GPU, and the table that `fastrd doctor --kernels` prints."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks import OTHER_TRITONS, assert_compiles
from fastrd.kernels import pgd_step
from fastrd.kernels.runtime import aot
from fastrd.kernels.runtime import roofline as inspect
from fastrd.kernels.runtime.jit import kernel, recording, tl
from fastrd.kernels.runtime.machine_code import loop_instructions


@kernel
def _example(x_ptr, size, rate, BLOCK: tl.constexpr, FLAG: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(x_ptr + place, rate, mask=place < size)


def test_recorded_launches_carry_types_constants_and_work():
    def run() -> None:
        x = torch.empty(100, dtype=torch.bfloat16, device="meta")
        for size, flag in ((96, True), (96, True), (1, False)):
            _example[(4,)](x, size, 0.5, BLOCK=128, FLAG=flag, num_warps=8)

    first, second = aot.recorded(run, "sm_90", "problem", {"example": (200, 7, "bf16")})
    assert first.signature == {"x_ptr": "*bf16", "size": "i32", "rate": "fp32"}
    assert first.constants == {"BLOCK": 128, "FLAG": True} and first.divisible == ("size",)
    assert (first.num_warps, first.bytes, first.flops, first.flops_in) == (8, 200, 7, "bf16")
    # Triton compiles a kernel anew for an integer that is 1.
    assert second.constants == {"BLOCK": 128, "FLAG": False, "size": 1}
    assert second.problem == "problem, FLAG = False"


def test_recording_ends_with_its_block():
    with pytest.raises(KeyError), recording("sm_90"):
        raise KeyError
    x = torch.rand(3, 4)
    assert pgd_step.pgd_step(x, x, x, step_size=0.1, epsilon=0.1).shape == x.shape
    from fastrd.kernels.runtime.jit import target_of

    assert target_of(torch.device("cpu")) == "sm_80"


def test_unknown_targets_are_refused():
    with pytest.raises(ValueError, match=r"^target: got 'sm_70'; accepted: sm_80, "):
        aot.resources("sm_70")


def test_floors_by_hand():
    row = aot.Resources("k", "p", "sm_90", 1, 0, 0, 128, [], 4_300_000, 0, "fp32")
    assert inspect.floor(row, "H200") == pytest.approx(1e-6)
    row = aot.Resources("k", "p", "sm_90", 1, 0, 0, 128, [], 1, 790_000_000, "bf16")
    assert inspect.floor(row, "H200") == pytest.approx(1e-6)
    row = aot.Resources("k", "p", "sm_90", 1, 0, 0, 128, [], 1, 395_000_000, "tf32x3")
    assert inspect.floor(row, "H200") == pytest.approx(3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("folder", [None, *OTHER_TRITONS], ids=str)
def test_launches_compile_whatever_their_integers(folder):
    """Triton makes a constant of an integer that is 1, and tells the compiler of multiples of 16."""
    pytest.importorskip("triton")
    aot.resources("sm_90", pythonpath=None if folder is None else str(folder), specialisations=True)


def test_specialised_launches():
    def run() -> None:
        _example[(4,)](torch.empty(100, device="meta"), 3, 0.5, BLOCK=128, FLAG=True)

    (launch,) = aot.recorded(run, "sm_90", "problem", {})
    one, multiple, neither = aot.specialised(launch)
    assert one.constants == {**launch.constants, "size": 1} and set(one.signature) == {"x_ptr", "rate"}
    assert multiple.divisible == ("size",) and not neither.divisible


CODE = """
/*0000*/ MOV R1, R2 ;
/*0010*/ IADD3 R1, R1, 1 ;
/*0020*/ @!P0 BRA 0x50 ;
/*0030*/ FSEL R1, R1, R2, P1 ;
/*0040*/ FSEL R3, R1, R2, P1 ;
/*0050*/ FFMA R1, R1, R2, R3 ;
/*0060*/ NOP ;
/*0070*/ @P1 BRA 0x10 ;
/*0080*/ IADD3 R1, R1, 1 ;
/*0090*/ FFMA R1, R1, R2, R3 ;
/*00a0*/ @P1 BRA 0x80 ;
/*00b0*/ BRA 0xb0 ;
"""


def test_instructions_of_the_main_loop_are_those_of_the_shortest_way():
    """Addition, branch, multiply-add and branch back; a second and shorter loop and the end count nothing."""
    assert loop_instructions(CODE) == 4
    assert loop_instructions("/*0000*/ EXIT ;") is None


def test_predictions_by_hand():
    """16 warps of 100 instructions take 400 clocks to issue; 4096 x 300 operations take 300."""
    row = aot.Resources("k", "p", "sm_90", 64, 0, 0, 512, [], 1, 132 * 4096 * 300, "bf16", 132, 100)
    found = inspect.predicted(row)
    assert (found.issue, found.arithmetic) == (400, 300)
    assert found.seconds == pytest.approx(400 / inspect.CLOCK)
    assert found.share_of_floor == pytest.approx(inspect.floor(row, "H200") / found.seconds)
    alone = inspect.predicted(dataclasses.replace(row, registers=128))
    assert alone.seconds == pytest.approx(700 / inspect.CLOCK)
    assert inspect.predicted(dataclasses.replace(row, instructions=None)) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "kernel", "most"),
    [
        ("info_nce", "info_nce.stream N = M = 32768, D = 128, bf16", {"info_nce.stream": 560}),
        ("info_nce", "info_nce.gradient N = M = 32768, D = 128, bf16", {"info_nce.gradient": 440}),
        ("nce_bank", "sample, B = 64, M = 50000, D = 128, bf16", {"nce_bank.score_kernel": 1030}),
    ],
)
def test_kernels_issue_no_more_than_they_did(module, kernel, most):
    """Instructions of a warp for a tile on sm_90, with some room for other versions of the compiler."""
    pytest.importorskip("triton")
    rows = [row for row in aot.resources("sm_90", kernel, module=module) if row.tiles]
    assert rows
    for row in rows:
        assert row.instructions and row.instructions <= most[row.kernel], row
        assert inspect.predicted(row).share_of_floor <= 1


@pytest.mark.slow
def test_report_has_a_line_for_each_launch():
    pytest.importorskip("triton")
    lines = inspect.report(["sm_90"], "pgd_step").splitlines()
    assert lines[0].split() == [
        *("kernel", "problem", "target", "regs", "spill", "shared", "matrix", "MB", "GFLOP"),
        *("A100", "H100", "H200", "instr", "issue", "tensor", "us", "%"),
    ]
    rows = [line for line in lines if line.startswith("pgd_step.step")]
    assert len(rows) == 2
    for line in rows:
        cells = line.split()
        registers, spill = cells[cells.index("sm_90") + 1 :][:2]
        assert 0 < int(registers) <= 255 and spill == "0"
    # Four times 1024 x 3 x 32 x 32 float32 pixels through 4.3 TB/s.
    assert rows[1].split()[-6:] == ["11.7", *5 * ["-"]] and rows[1].split()[-10] == "50.3"


@pytest.mark.parametrize("folder", OTHER_TRITONS, ids=lambda path: path.name)
def test_other_versions_of_triton_come_first(folder):
    asked = [sys.executable, "-c", "import triton; print(triton.__file__)"]
    done = subprocess.run(
        asked, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).is_relative_to(folder)


@pytest.mark.slow
@pytest.mark.parametrize("folder", OTHER_TRITONS, ids=lambda path: path.name)
def test_other_versions_of_triton_spill_nothing_either(folder):
    """On one target: each takes half a minute, and the others are compiled by the newest version."""
    assert_compiles("sm_90", pythonpath=str(folder))
