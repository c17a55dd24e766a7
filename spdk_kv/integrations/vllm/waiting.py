"""How much may wait for the drive. Pure: who asks says what time it is."""

from __future__ import annotations

from collections import OrderedDict


class Waiting:
    """What is under way between vLLM's memory and the store.

    A block that waits to be stored takes up room in vLLM's CPU cache, so that only so many bytes
    may: what comes then is declined, which costs a later miss. A request whose blocks are loaded
    waits for all that was asked for before: while that takes long, lookups miss, and what comes
    is computed.
    """

    def __init__(self, most_stores_nbytes: int, patience_s: float) -> None:
        self._most_nbytes = most_stores_nbytes
        self._patience_s = patience_s
        self._stores: dict[int, int] = {}
        self._stores_nbytes = 0
        self._loads: OrderedDict[int, float] = OrderedDict()
        self.lookups_miss = False
        """Whether loads take too long, as of the last :meth:`look`."""

    def may_store(self, nbytes: int) -> bool:
        """Whether so many bytes more may wait. One job always may where none waits."""
        return not self._stores or self._stores_nbytes + nbytes <= self._most_nbytes

    def began_store(self, number: int, nbytes: int) -> None:
        """A job to store so many bytes waits from now on."""
        self._stores[number] = nbytes
        self._stores_nbytes += nbytes

    def began_load(self, number: int, now_s: float) -> None:
        """A job to load waits from now on."""
        self._loads[number] = now_s

    def ended(self, number: int) -> None:
        """A job is over."""
        self._loads.pop(number, None)
        self._stores_nbytes -= self._stores.pop(number, 0)

    def look(self, now_s: float) -> None:
        """Decides whether lookups miss from now on."""
        oldest_s = next(iter(self._loads.values()), now_s)
        self.lookups_miss = now_s - oldest_s > self._patience_s
