"""Transfers to and from a real GPU's memory, with torch beside them."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from spdk_kv._native.checksum import crc32c
from spdk_kv._native.transfer import READ, WRITE
from spdk_kv.engines import QueueOptions
from spdk_kv.link.cuda import link_for, stream_of
from spdk_kv.link.pipeline import Pipeline
from spdk_kv.testing import SMALL, address_of
from support.media import EVERY, KEEPING, medium
from support.waiting import PATIENCE_S

MIB = 1 << 20
LINK, WHY_NOT = link_for("cuda") if torch.cuda.is_available() else (None, "torch finds no GPU")
pytestmark = pytest.mark.skipif(LINK is None, reason=f"no CUDA link here: {WHY_NOT}")
KINDS = [kind for kind in KEEPING if not kind.endswith("partition")]


@pytest.fixture(params=KINDS)
def engine(request, tmp_path):
    with medium(request.param, tmp_path) as found:
        yield found.engine


def noise(nbytes: int, seed: int = 0) -> torch.Tensor:
    data = np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)
    return torch.from_numpy(data)


def put(engine, offset: int, data: torch.Tensor) -> None:
    view = data.numpy()
    transfer = engine.transfer(WRITE)
    transfer.keep(view)
    transfer.add(offset, address_of(view), len(view))
    engine.run(transfer)


def over(engine, op, offset, tensor, **options):
    """A transfer of a tensor's bytes on the GPU, in order with torch's current stream."""
    transfer = engine.transfer(op, link=LINK, stream=stream_of(tensor.device), **options)
    transfer.keep(tensor)
    transfer.add(offset, tensor.data_ptr(), tensor.nbytes)
    return transfer


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 3 * MIB + 17])
@pytest.mark.parametrize("hand_over", [False, True])
def test_reads_bring_exactly_their_bytes(engine, nbytes, hand_over) -> None:
    data = noise(4 * MIB)
    put(engine, 0, data)
    around = torch.full((nbytes + 512,), 0xEE, dtype=torch.uint8, device="cuda")
    into = around[256 : 256 + nbytes]
    transfer = over(engine, READ, 5, into, checksum=True, hand_over=hand_over)
    engine.run(transfer, timeout_s=PATIENCE_S)
    assert torch.equal(into.cpu(), data[5 : 5 + nbytes])
    assert bool((around[:256] == 0xEE).all())
    assert bool((around[256 + nbytes :] == 0xEE).all())
    assert transfer.crc() == crc32c(data[5 : 5 + nbytes].numpy())


@pytest.mark.parametrize("nbytes", [1, 4096, 3 * MIB + 17])
def test_writes_put_exactly_their_bytes(engine, nbytes) -> None:
    data = noise(nbytes, nbytes)
    transfer = over(engine, WRITE, 4096, data.cuda(), checksum=True)
    engine.run(transfer, timeout_s=PATIENCE_S)
    into = torch.zeros(nbytes, dtype=torch.uint8, device="cuda")
    engine.run(over(engine, READ, 4096, into), timeout_s=PATIENCE_S)
    assert torch.equal(into.cpu(), data)
    assert transfer.crc() == crc32c(data.numpy())


def test_in_order_with_the_current_stream(engine) -> None:
    """Without a single synchronisation: what was queued before comes before, and after, after."""
    data = noise(2 * MIB)
    put(engine, 0, data)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        into = torch.zeros(2 * MIB, dtype=torch.uint8, device="cuda")
        for turn in range(20):
            torch.cuda._sleep(2_000_000)
            into.fill_(turn)  # may still run when the bytes land
            read = over(engine, READ, 0, into, hand_over=True)
            engine.run(read, timeout_s=PATIENCE_S)
            copy = into.clone()
            torch.cuda._sleep(2_000_000)
            source = copy ^ turn  # may still be computed when the write is submitted
            engine.run(over(engine, WRITE, 4 * MIB, source), timeout_s=PATIENCE_S)
            back = torch.zeros_like(into)
            engine.run(over(engine, READ, 4 * MIB, back, hand_over=True), timeout_s=PATIENCE_S)
            assert torch.equal(back.cpu(), data ^ turn), turn


def test_memory_that_torch_reuses_is_never_written_late(engine) -> None:
    """Tensors dropped as soon as the read is handed over; their memory is the next one's."""
    put(engine, 0, torch.full((MIB,), 0x11, dtype=torch.uint8))
    for _ in range(50):
        into = torch.zeros(MIB, dtype=torch.uint8, device="cuda")
        read = over(engine, READ, 0, into, hand_over=True)
        engine.run(read, timeout_s=PATIENCE_S)
        del into, read
        other = torch.full((MIB,), 0x22, dtype=torch.uint8, device="cuda")
        assert bool((other == 0x22).all())
        del other


def test_many_threads(engine) -> None:
    outcomes: list[object] = []

    def work(number: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                data = noise(MIB, number)
                source = data.cuda()
                for turn in range(10):
                    engine.run(over(engine, WRITE, number * MIB, source), timeout_s=PATIENCE_S)
                    into = torch.zeros(MIB, dtype=torch.uint8, device="cuda")
                    read = over(engine, READ, number * MIB, into, hand_over=bool(turn % 2))
                    engine.run(read, timeout_s=PATIENCE_S)
                    outcomes.append(torch.equal(into.cpu(), data))
        except Exception as failure:
            outcomes.append(failure)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert outcomes == [True] * 60


@pytest.mark.parametrize("kind", EVERY)
def test_every_engine_and_the_adaptive_pipeline(kind, tmp_path) -> None:
    options = QueueOptions(depth=8, segment_nbytes=MIB, hugepages=False)
    with medium(kind, tmp_path, options) as found:
        pipeline = Pipeline(found.engine, LINK)
        into = torch.zeros(4 * MIB, dtype=torch.uint8, device="cuda")
        for _ in range(40):
            transfer = pipeline.transfer(READ, into.nbytes, stream=stream_of("cuda"))
            transfer.keep(into)
            transfer.add(0, into.data_ptr(), into.nbytes)
            found.engine.run(transfer, timeout_s=PATIENCE_S)
        assert pipeline.stats()["link"] == "cuda"
        assert pipeline.stats()["link_gib_s"] > 0


def test_captured_graphs_are_not_disturbed(tmp_path) -> None:
    """Reads go on in another thread while torch captures a graph."""
    with medium("ram", tmp_path, SMALL) as found:
        engine, stop, outcomes = found.engine, threading.Event(), []
        into = torch.zeros(MIB, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()

        def read() -> None:
            while not stop.is_set():
                transfer = engine.transfer(READ, link=LINK)
                transfer.keep(into)
                transfer.add(0, into.data_ptr(), into.nbytes)
                outcomes.append(transfer.run(60))

        engine.use_link(LINK)
        thread = threading.Thread(target=read)
        thread.start()
        try:
            x = torch.zeros(1024, device="cuda")
            for _ in range(5):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    y = x + 1
                graph.replay()
                torch.cuda.synchronize()
                assert bool((y == 1).all())
        finally:
            stop.set()
            thread.join(PATIENCE_S)
        assert set(outcomes) == {0}


def test_a_device_without_a_link_has_a_reason() -> None:
    assert link_for("cuda")[0] is LINK
    assert link_for("cpu")[1] == "cpu is no CUDA device"
