"""`spdk-kv stat --prompts`: the texts that caches stored."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from spdk_kv.cli import main
from spdk_kv.cli.stat.prompts import lines_of
from spdk_kv.integrations.notes import NoteHead, pack_head
from spdk_kv.store import open as open_store
from spdk_kv.types import KVShape

IDENTITY = b"of a model"


def note(tokens: int, rows: int, hits: int, used_s: float) -> bytes:
    head = NoteHead(0, tokens, rows, len(IDENTITY), hits, used_s)
    return pack_head(head, IDENTITY) + IDENTITY + bytes(4 * tokens * rows)


@pytest.fixture
def store_uri(tmp_path: Path) -> str:
    uri, now_s = f"file://{tmp_path / 'store'}", time.time()
    shape = KVShape(layers=2, kv_heads=1, head_dim=64, dtype="float32", max_tokens=16)
    with open_store(uri, capacity="16 MiB") as store:
        store.sequence("a chat", shape).note = note(1200, 1, 0, now_s - 7200)
        store.sequence("rows", shape).note = note(70, 3, 2, now_s - 110)
        store.sequence("a document", shape).note = note(4096, 1, 17, now_s)
        store.sequence("of one's own", shape).note = b"something else"
        store.sequence("without", shape)
    return uri


def test_lists_texts_by_tokens_hits_and_age(store_uri: str) -> None:
    result = CliRunner().invoke(main, ["stat", store_uri, "--prompts"])
    assert result.exit_code == 0, result.output
    first, *others = result.stdout.splitlines()
    assert re.fullmatch(r"a document  4,096 tokens, 17 hits, used \d+ s ago", first)
    assert others == [
        "rows        70 tokens x 3 rows, 2 hits, used 2 min ago",
        "a chat      1,200 tokens, 0 hits, used 2 h ago",
    ]
    told = CliRunner().invoke(main, ["stat", store_uri, "--prompts", "--json"]).stdout
    listed = json.loads(told)["prompts"]
    assert [each["name"] for each in listed] == ["a document", "rows", "a chat"]
    assert set(listed[0]) == {"name", "tokens", "rows", "hits", "used_s"}


def test_a_store_without_texts_says_so(tmp_path: Path) -> None:
    uri = f"file://{tmp_path / 'store'}"
    open_store(uri, capacity="16 MiB").close()
    assert "none" in CliRunner().invoke(main, ["stat", uri, "--prompts"]).stdout
    assert lines_of([]) == [("prompts", "none")]


def test_it_needs_no_transformers(store_uri: str) -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from spdk_kv.cli import main\n"
        f"main(['stat', {store_uri!r}, '--prompts'])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "17 hits" in told.stdout, told.stderr
