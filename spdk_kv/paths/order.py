"""Which layer is read next: learnt from the turns before; pure."""

from __future__ import annotations

# A successor seen so often in a row is relied on.
_SURE = 2


class ScanOrder:
    """Learns which layer follows which. A decode reads its layers in the same order at each step,
    whatever that order is."""

    def __init__(self) -> None:
        self._next: dict[int, int] = {}
        self._seen: dict[int, int] = {}
        self._last: int | None = None

    def note(self, layer: int) -> None:
        """``layer`` is read now."""
        last, self._last = self._last, layer
        if last is None or last == layer:
            return
        self._seen[last] = self._seen.get(last, 0) + 1 if self._next.get(last) == layer else 1
        self._next[last] = layer

    def ahead(self, count: int) -> list[int]:
        """Up to ``count`` layers expected after the last one, as far as the order is certain."""
        found: list[int] = []
        layer = self._last
        while layer is not None and len(found) < count and self._seen.get(layer, 0) >= _SURE:
            layer = self._next[layer]
            if layer == self._last or layer in found:
                break
            found.append(layer)
        return found
