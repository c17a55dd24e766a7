"""How a page lies in a host's memory: as pieces that are reached where they are, or by a copy."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

import numpy as np

from spdk_kv.integrations.sglang.identity import Keys, pool_facts
from spdk_kv.scattered import Bytes

log = logging.getLogger(__name__)


class Pool:
    """A host pool as SGLang registered it.

    ``logical``: it holds no bytes, others hold what belongs to its pages. ``pieces``: how many
    buffers a page is made of; 0 where the host gives no addresses, and pages are copied by it.
    """

    def __init__(self, host: Any, model: Mapping[str, Any], shard: Mapping[str, Any], name: str):
        self.host: Any = host
        self.name = name
        self.logical = False
        sizes = self._piece_sizes()
        self.pieces = len(sizes)
        self.page_nbytes = sum(sizes)
        # What the memory is that addresses point to: alive as long as a transfer may use them.
        self._memory = _tensors_of(host)
        facts = {**pool_facts(host), "pool": name, "pieces": sizes}
        self.keys = Keys(model, shard, facts)

    def _piece_sizes(self) -> list[int]:
        import torch

        page = int(getattr(self.host, "logical_page_size", 0) or self.host.page_size or 1)
        try:
            found = self.host.get_page_buffer_meta(torch.arange(page, dtype=torch.int64))
        except (NotImplementedError, ValueError) as why:
            log.info("pages of pool %s are copied by SGLang: %s", self.name, why)
            return []
        if found is None:
            self.logical = True
            return []
        return [int(nbytes) for nbytes in found[1]]

    def pages(self, indices: Any, count: int) -> list[list[Bytes]]:
        """The pieces of ``count`` pages that begin at these host indices (a CPU tensor of token
        slots). ValueError where they are not as many."""
        addresses, sizes = self.host.get_page_buffer_meta(indices)
        if len(addresses) != count * self.pieces:
            raise ValueError(
                f"{len(addresses)} buffers for {count} pages of {self.pieces} in pool {self.name}"
            )
        views = [
            self._view(address, nbytes) for address, nbytes in zip(addresses, sizes, strict=True)
        ]
        return [views[at : at + self.pieces] for at in range(0, len(views), self.pieces)]

    def _view(self, address: int, nbytes: int) -> Bytes:
        memory = _array_type(nbytes).from_address(address)
        memory.owner = self._memory
        return np.frombuffer(memory, np.uint8)

    def starts(self, indices: Any, count: int) -> list[int]:
        """The first token slot of each page."""
        slots = indices.tolist()
        if not count or len(slots) % count:
            raise ValueError(f"{len(slots)} slots for {count} pages of pool {self.name}")
        return list(slots[:: len(slots) // count])


@lru_cache(maxsize=64)
def _array_type(nbytes: int) -> Any:
    # ctypes makes a new class at each multiplication.
    return type("HostMemory", (ctypes.c_char * nbytes,), {})


def _tensors_of(host: Any) -> list[Any]:
    import torch

    found = []
    for value in vars(host).values():
        members = value if isinstance(value, (list, tuple)) else (value,)
        found += [member for member in members if isinstance(member, torch.Tensor)]
    return found


def bytes_of(tensor: Any) -> Bytes:
    """The bytes of a CPU tensor in C order: its own memory where it is contiguous. Of anything else
    with a buffer, that."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        view = memoryview(tensor)
        return np.frombuffer(view, np.uint8) if view.nbytes else np.empty(0, np.uint8)
    if not tensor.numel():
        return np.empty(0, np.uint8)
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return cast(Bytes, flat.view(torch.uint8).numpy())
