"""Tests marked `triton` launch kernels: on a GPU where there is one, else in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so an ordinary run leaves those tests out and
test_interpreter.py runs them in a process of their own.
"""

from __future__ import annotations

import pytest
from checks import CAN_LAUNCH


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "triton: launches kernels; needs a GPU or TRITON_INTERPRET=1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if CAN_LAUNCH:
        return
    left_out = [item for item in items if item.get_closest_marker("triton")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
