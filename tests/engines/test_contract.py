"""The published engine contract, on every engine over real media."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from spdk_kv.engines import QueueOptions, open_engine, parse_location
from spdk_kv.engines.memory import RamEngine
from spdk_kv.errors import EngineUnavailable
from spdk_kv.testing import SMALL, EngineContract, Medium, TransferContract, read, write
from support import blockdev
from support.media import FILES, KEEPING, medium

BLOCK = 4096


class TestEngines(EngineContract):
    @pytest.fixture(params=KEEPING)
    def medium(self, request, tmp_path) -> Iterator[Medium]:
        with medium(request.param, tmp_path, self.options) as found:
            yield found


class TestNull(TransferContract):
    @pytest.fixture
    def medium(self, tmp_path) -> Iterator[Medium]:
        with medium("null", tmp_path, self.options) as found:
            yield found


@pytest.mark.parametrize("kind", FILES)
def test_a_file_grows_and_is_private(kind, tmp_path):
    before = os.umask(0o777)
    try:
        path = tmp_path / "new.data"
        name = kind.partition("-")[0]
        engine = open_engine(parse_location(str(tmp_path)), str(path), engine=name, options=SMALL)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    engine.ensure(1 << 20)
    assert path.stat().st_size >= 1 << 20
    assert engine.capacity_nbytes is None
    write(engine, 12 * BLOCK, b"hello")
    assert read(engine, 12 * BLOCK, 5) == b"hello"
    engine.close()


@pytest.mark.parametrize("engine", ["uring", "threads"])
def test_a_filesystem_without_direct_io_is_refused_with_the_remedy(engine, tmp_path):
    with blockdev.ramfs(tmp_path / "ramfs") as folder:
        location = parse_location(str(folder))
        with pytest.raises(EngineUnavailable, match="pagecache"):
            open_engine(location, str(folder / "data"), engine=engine)
        chosen = open_engine(location, str(folder / "data"))
        assert chosen.name == "pagecache"
        chosen.close()


def test_options_and_sizes_are_checked():
    for wrong in ({"depth": 0}, {"depth": 5000}, {"segment_nbytes": 5000}, {"segment_nbytes": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            QueueOptions(**wrong)
    with pytest.raises(ValueError, match="capacity"):
        RamEngine(0, SMALL)
    with pytest.raises(ValueError, match="served by"):
        open_engine(parse_location("null://"), engine="uring")
