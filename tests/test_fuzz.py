"""A short run of every fuzzing target; `make fuzz` is the long one."""

from __future__ import annotations

from itertools import islice

import pytest

from tests.fuzz.runner import attempts, load_targets

MUTATIONS = 20


@pytest.mark.parametrize("name", [name for name, target in load_targets().items() if not target.slow])
def test_damaged_files_end_in_an_error_that_is_foreseen(name):
    failures = list(filter(None, islice(attempts(load_targets()[name]), MUTATIONS)))
    assert not failures, failures[0]
