"""The stores of a rank: closed when nobody moves pages any more, and not before. Without SGLang."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import numpy as np
import pytest

from integrations.sglang.test_keys import Config
from spdk_kv.integrations.opening import Opening
from spdk_kv.integrations.sglang.stores import Stores
from support.waiting import PATIENCE_S, wait_until


def test_closing_waits_for_who_moves_pages_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("spdk_kv.integrations.waits._SAID_AFTER_S", 0.001)
    monkeypatch.setattr("spdk_kv.integrations.waits._SAID_EVERY_S", 0.001)
    stores = Stores(Opening(f"file://{tmp_path}/kv"), Config())
    closing = threading.Thread(target=stores.close)
    with caplog.at_level(logging.WARNING), stores.use(shared=True) as store:
        assert store is not None
        closing.start()
        wait_until(lambda: caplog.text.count("1 calls that move pages") > 2)
        assert store.location in caplog.text
        # The drive has the memory of its pages until it is done.
        store.put("k", np.zeros(5000))
        # Who comes now finds nothing, and is not waited for in vain.
        with stores.use(shared=False) as later:
            assert later is None
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    assert stores.opened() == []
    stores.close()
