"""Stores whose tensors go over a link: to a GPU where torch finds one, and an emulated one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from spdk_kv._native.link.emulated import EmulatedLink
from spdk_kv.link.cuda import link_for
from spdk_kv.link.gpus import Links
from spdk_kv.store import KVStore
from store.helpers import check_books, open_store

_GPU, _WHY_NOT = link_for("cuda") if torch.cuda.is_available() else (None, "torch finds no GPU")
# What "device memory" is: the emulated link's is the host's.
EMULATED = pytest.param("cpu", id="emulated")
CUDA = pytest.param(
    "cuda", id="cuda", marks=pytest.mark.skipif(_GPU is None, reason=f"no CUDA link: {_WHY_NOT}")
)
DEVICES = [EMULATED, CUDA]


@dataclass
class Linked:
    """A store, and the device that it reaches over ``link``."""

    store: KVStore
    device: str
    link: Any

    def carried(self) -> tuple[int, int]:
        """Bytes that went over links so far: to the device, and from it."""
        counters = [engine.stats() for engine in self.store.paths.routes.engines]
        return (
            sum(found["to_device_nbytes"] for found in counters),
            sum(found["from_device_nbytes"] for found in counters),
        )


def link_up(store: KVStore, device: str) -> Linked:
    """Makes ``store`` reach ``device``: "cpu" over an emulated link, a GPU over its own."""
    if device != "cpu":
        return Linked(store, device, _GPU)
    link = EmulatedLink(50e9)

    def find(wanted: Any) -> tuple[Any, str]:
        return (link, "") if wanted.type == "cpu" else (None, "there is only the emulated one")

    store.links = Links(store.paths.routes.engines, find)
    return Linked(store, device, link)


@contextmanager
def linked_store(where: Path | str, device: str, **options: Any) -> Iterator[Linked]:
    """An open store as :func:`open_store` makes it, linked, its books checked at the end."""
    with open_store(where, **({"capacity": "64 MiB"} | options)) as store:
        yield link_up(store, device)
        check_books(store)
