"""Which layer is read next, learnt from the scans before. Pure."""

from __future__ import annotations

# A successor seen this many times in a row is relied on: twice, since once may be chance.
_CERTAIN = 2


class ScanOrder:
    """Learns which layer follows which. A decode step reads its layers in the same order as the
    one before, whatever that order is."""

    def __init__(self) -> None:
        self._next: dict[int, int] = {}
        self._seen: dict[int, int] = {}
        self._last: int | None = None

    def record(self, layer: int) -> None:
        """``layer`` is being read."""
        last, self._last = self._last, layer
        if last is None or last == layer:
            return
        self._seen[last] = self._seen.get(last, 0) + 1 if self._next.get(last) == layer else 1
        self._next[last] = layer

    def expected(self, count: int) -> list[int]:
        """Up to ``count`` layers that will follow the last one, as far as the order is certain."""
        found: list[int] = []
        layer = self._last
        while layer is not None and len(found) < count and self._seen.get(layer, 0) >= _CERTAIN:
            layer = self._next[layer]
            if layer == self._last or layer in found:
                break
            found.append(layer)
        return found
