"""SGLang's own controller on the CPU: written through its threads, fetched back, compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang", reason="SGLang is not installed: scripts/test.sh --hosts sglang")

from integrations.sglang import host

MHA = ("layer_first", "page_first", "page_first_direct", "page_head")
MLA = ("layer_first", "page_first", "page_first_direct")
CASES = [("mha", layout) for layout in MHA] + [("mla", layout) for layout in MLA]


def pools(kind: str, layout: str) -> tuple[Any, Any]:
    return host.mha_pools(layout) if kind == "mha" else host.mla_pools(layout)


@pytest.mark.parametrize(("kind", "layout"), CASES)
@pytest.mark.parametrize("interface_v1", [1, 0])
def test_pages_come_back_after_a_restart(
    tmp_path: Path, kind: str, layout: str, interface_v1: int
) -> None:
    tokens = list(range(20 * host.PAGE))
    options = host.extra(f"file://{tmp_path}/kv", interface_v1=interface_v1)
    device, pool = pools(kind, layout)
    with host.controller(device, pool, options) as engine:
        indices = pool.alloc(len(tokens))
        wanted = host.fill(pool, indices, seed=1)
        assert host.write(engine, indices, tokens) == len(tokens)
    device, pool = pools(kind, layout)
    with host.controller(device, pool, options) as engine:
        found, completed = host.prefetch(engine, [*tokens, *range(7000, 7000 + host.PAGE)])
        assert completed == len(tokens)
        assert host.same(host.pages_at(pool, found), wanted)
