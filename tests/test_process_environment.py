"""How a process waits and what it says on a busy machine, without one."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest

from fastrd.core import process_environment
from fastrd.core.process_environment import FEW_SPINS, SPINS, WAITING, ContentionWatch

SECOND = 10**9


def started(code: str, **variables: str) -> str:
    """What a process prints that has imported torch in a command's order; only `variables` say how it waits."""
    clean = {name: value for name, value in os.environ.items() if name not in WAITING}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=clean | variables, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, FEW_SPINS), ({SPINS: "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_a_command_sets_how_threads_wait_before_torch_and_leaves_what_is_set(variables, expected):
    code = (
        "import os, sys; from fastrd.cli import main; before = 'torch' in sys.modules; main(['recipes'])\n"
        f"print(before, os.environ.get({SPINS!r}))"
    )
    assert started(code, **variables).splitlines()[-1] == f"False {expected}"


def test_the_command_line_and_a_job_do_not_load_torch_before_they_have_set_it():
    assert started("import sys, fastrd.cli, fastrd.reproduce.job; print('torch' in sys.modules)") == "False\n"


def test_the_package_does_not_import_torchs_compiler():
    """Which takes about as long as torch itself."""
    assert (
        started("import sys, fastrd.workflow, fastrd.engine.trainer; print('torch._dynamo' in sys.modules)")
        == "False\n"
    )


@pytest.fixture
def told(monkeypatch):
    """Looks once a second at what the system tells of (seconds run, seconds waited); returns the warnings."""
    for name in WAITING:
        monkeypatch.delenv(name, raising=False)

    def look(*times, threads=2):
        watch, clock = ContentionWatch(), iter(range(1, 100))
        monkeypatch.setattr(process_environment.time, "monotonic", lambda: next(clock))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for ran, waited in times:
                monkeypatch.setattr(process_environment, "_ran_and_waited", lambda t=(ran * SECOND, waited * SECOND): t)
                watch.look(threads)
        return [str(warning.message) for warning in caught]

    return look


def test_contention_is_told_once_and_names_the_variable(told):
    (text,) = told((5, 9), (6, 9.5), (7, 10), (8, 10.5))
    assert f"{SPINS}={FEW_SPINS}" in text


@pytest.mark.parametrize("times", [[(5, 9), (6, 9.05), (7, 9.1)], [(0, 0), (0, 0)], [(5, 9)]])
def test_no_false_alarm(told, times):
    assert told(*times) == []


def test_nothing_is_said_where_no_thread_spins(told, monkeypatch):
    busy = [(5, 9), (6, 10), (7, 11)]
    assert told(*busy, threads=1) == []
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert told(*busy) == []


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="the system does not tell")
def test_the_system_tells_how_long_this_process_has_run():
    ran, waited = process_environment._ran_and_waited()
    assert ran > 0 and waited >= 0
