"""A memory cgroup for a test."""

from __future__ import annotations

from typing import Any

import pytest

from spdk_kv.binding.memory_limit import memory_group, why_impossible


@pytest.fixture(name="group")
def group_fixture() -> Any:
    if reason := why_impossible():
        pytest.skip(reason)
    with memory_group() as made:
        yield made
    assert not made.path.exists()
