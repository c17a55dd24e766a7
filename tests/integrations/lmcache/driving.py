"""A client driven as LMCache's adapter does it: submit, poll the eventfd, drain."""

from __future__ import annotations

import select
from collections.abc import Sequence
from typing import Any

import numpy as np

from spdk_kv.integrations.lmcache import Client
from spdk_kv.integrations.lmcache.client import Completion
from support.waiting import PATIENCE_S


def wait_for(client: Client, *numbers: int) -> list[Completion]:
    """The completions of batches, in the order of ``numbers``; any other one is a failure."""
    poller = select.poll()
    poller.register(client.event_fd(), select.POLLIN)
    found: dict[int, Completion] = {}
    while len(found) < len(numbers):
        assert poller.poll(PATIENCE_S * 1000), f"only {sorted(found)} of {numbers} have ended"
        for completion in client.drain_completions():
            assert completion[0] in numbers
            assert completion[0] not in found, "a batch that ended twice"
            found[completion[0]] = completion
    return [found[number] for number in numbers]


def content(number: int, nbytes: int) -> bytearray:
    return bytearray(np.random.default_rng(number).bytes(nbytes))


def put(client: Client, pages: dict[str, Any]) -> Completion:
    return wait_for(client, client.submit_batch_set(list(pages), views(pages.values())))[0]


def get(client: Client, sizes: dict[str, int]) -> tuple[list[bool], list[bytearray]]:
    """What was found under each key, and the places that were to be filled."""
    places = [bytearray(b"\xa5" * nbytes) for nbytes in sizes.values()]
    number = client.submit_batch_get(list(sizes), views(places))
    _, ok, error, found = wait_for(client, number)[0]
    assert ok, error
    assert found is not None
    return found, places


def exists(client: Client, keys: Sequence[str]) -> list[bool]:
    _, ok, error, found = wait_for(client, client.submit_batch_exists(keys))[0]
    assert ok, error
    assert found is not None
    return found


def views(buffers: Any) -> list[memoryview]:
    return [memoryview(buffer).cast("B") for buffer in buffers]
