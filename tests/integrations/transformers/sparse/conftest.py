"""Texts are short here: the newest tokens would be nearly all of them, and little would be read."""

from __future__ import annotations

from typing import Any

import pytest

from spdk_kv.integrations.transformers.sparse import cache
from spdk_kv.sparse import Settings, preset

RECENT = 16


@pytest.fixture(autouse=True)
def few_newest_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches without settings of their own keep few newest tokens in memory."""

    def made(name: str, **changes: Any) -> Settings:
        recent = min(preset(name).recent, RECENT)
        return preset(name, **{"recent": recent} | changes)

    monkeypatch.setattr(cache, "preset", made)
