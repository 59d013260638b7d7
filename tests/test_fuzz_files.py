"""A short run of the fuzzers of files; `make fuzz` is the long one."""

from __future__ import annotations

from random import Random

import pytest
from fuzz.files import targets

NAMES = (
    "checkpoint entries",
    "checkpoint bytes",
    "state dict entries",
    "state dict bytes",
    "old state dict bytes",
    "safetensors",
    "npz bytes",
    "npz headers",
    "packed file",
)


@pytest.mark.parametrize("name", NAMES)
def test_mutated_files_are_read_or_refused_by_name(tmp_path, name):
    if name == "safetensors":
        pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    attempt = targets(tmp_path)[name]
    for seed in range(40):
        attempt(Random(seed))


def test_the_fuzzers_are_all_run(tmp_path):
    assert set(NAMES) == targets(tmp_path).keys()
