"""Callbacks of futures: whatever one does, everybody else's futures complete."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any

import pytest

import spdk_kv
from spdk_kv._native.transfer import READ
from spdk_kv.engines import Engine, open_engine, parse_location
from support.waiting import PATIENCE_S

# Begins work that ends once the event is set.
Begin = Callable[[threading.Event], "Future[Any]"]


@pytest.fixture(params=["engine", "store"])
def begun(request, caplog) -> Iterator[tuple[Begin, Callable[[], None]]]:
    """What begins asynchronous work, by a transfer or on one of a few threads, and what closes."""
    caplog.set_level(logging.CRITICAL, "spdk_kv")
    if request.param == "engine":
        engine = open_engine(parse_location("null://"))
        yield (
            lambda end: engine.start(reading(engine), lambda _: end.wait(PATIENCE_S)),
            engine.close,
        )
        engine.close()
        return
    with spdk_kv.open("ram://", capacity="8 MiB") as store:
        yield lambda end: store.run_in_background(lambda: end.wait(PATIENCE_S)), store.close


def reading(engine: Engine) -> Any:
    transfer = engine.transfer(READ)
    transfer.add(0, 0, 1)
    return transfer


def with_callback(begin: Begin, callback: Callable[[Future[Any]], object]) -> Future[Any]:
    """A future that had ``callback`` before it was done."""
    end = threading.Event()
    future = begin(end)
    future.add_done_callback(callback)
    end.set()
    return future


def ended() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


class Gate:
    """A callback that can be waited for, and that something is done in."""

    def __init__(self, act: Callable[[], object] = lambda: None) -> None:
        self._act = act
        self.over = threading.Event()
        self.found: list[object] = []

    def __call__(self, future: Future[Any]) -> None:
        try:
            self.found.append(self._act())
        finally:
            self.over.set()


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, ValueError])
def test_a_callback_may_raise_anything(begun, kind):
    begin, close = begun

    def fail() -> None:
        raise kind

    for _ in range(6):  # more than a store has threads
        gate = Gate(fail)
        with_callback(begin, gate)
        assert gate.over.wait(PATIENCE_S)
        assert begin(ended()).result(PATIENCE_S)
    close()


def test_a_callback_may_wait_for_another_future(begun):
    begin, close = begun
    gates = [
        Gate(lambda: begin(ended()).result(PATIENCE_S)),
        Gate(lambda: len(wait([begin(ended())], 30).done)),
    ]
    for gate in gates:
        with_callback(begin, gate)
        assert gate.over.wait(PATIENCE_S)
    assert [gate.found for gate in gates] == [[True], [1]]
    close()


def test_a_callback_may_close_what_it_came_from(begun):
    begin, close = begun
    gate = Gate(close)
    with_callback(begin, gate)
    assert gate.over.wait(PATIENCE_S)
    with pytest.raises(spdk_kv.ClosedError):
        begin(ended())


def test_closing_waits_for_callbacks(begun):
    begin, close = begun
    gate = Gate()
    future = with_callback(begin, gate)
    close()
    assert gate.over.is_set()
    late = Gate()
    future.add_done_callback(late)
    assert late.over.is_set(), "where it is done a callback is called at once"


def test_what_exits_in_a_callback_is_logged(caplog):
    with spdk_kv.open("ram://", capacity="8 MiB") as store:
        end = threading.Event()
        future = store.run_in_background(lambda: end.wait(PATIENCE_S))
        future.add_done_callback(lambda _: sys.exit(3))
        end.set()
    assert "exception calling callback" in caplog.text
