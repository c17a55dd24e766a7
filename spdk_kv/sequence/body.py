"""What a sequence works with, made when it is first needed: an unused fork takes next to none."""

from __future__ import annotations

from collections.abc import Sequence

from spdk_kv.paths import Orchestrator, UnitGroup
from spdk_kv.placement import Ground, SequenceLayout
from spdk_kv.sequence.contents import Contents
from spdk_kv.sequence.growth import Growth
from spdk_kv.sequence.host import Host
from spdk_kv.sequence.layer import Layer, LayerSnapshot


class Units:
    """The tracking of a sequence's units, which ends once nobody uses the sequence. Does not refer
    to it."""

    def __init__(self, paths: Orchestrator) -> None:
        self._paths = paths
        self.group: UnitGroup | None = None

    def release(self) -> None:
        """May be called again."""
        if self.group is not None:
            self._paths.release(self.group)


class Body:
    """The layers of a sequence and their units, made when they are first asked for.

    Does not refer to the sequence, which is to leave memory with its last reference. Thread-safe.
    """

    def __init__(
        self,
        host: Host,
        name: str,
        layout: SequenceLayout,
        growth: Growth,
        birth: Sequence[LayerSnapshot] | None = None,
    ) -> None:
        self.units = Units(host.paths)
        self.growth = growth
        self.layout = layout
        self._host = host
        self._name = name
        self._birth = birth
        self._layers: list[Layer] | None = None

    @property
    def layers(self) -> list[Layer]:
        """All layers. Making them may block for staging memory."""
        return self._layers or self._make()

    @property
    def made_layers(self) -> list[Layer]:
        """The layers, if they were asked for."""
        with self.growth.lock:  # they may be being made
            return self._layers or []

    @property
    def states(self) -> Sequence[LayerSnapshot | Layer]:
        """What tells how many tokens each layer has. Makes nothing that can be done without."""
        birth = self._birth
        return self.layers if birth is None else birth

    @property
    def group(self) -> UnitGroup:
        """Its units."""
        if self.units.group is None:
            self._make()
        assert self.units.group is not None
        return self.units.group

    def _make(self) -> list[Layer]:
        with self.growth.lock:
            if self._layers is None:
                self.units.release()  # those that an interrupt kept from their end
                self._layers = self._make_layers()
                self._birth = None
            return self._layers

    def _make_layers(self) -> list[Layer]:
        host, growth, layout = self._host, self.growth, self.layout
        grounds = growth.grounds()
        of_units = [
            _unit_grounds(ground, layer.unit_extents)
            for ground, layer in zip(grounds, layout.layers, strict=True)
        ]
        is_own = not growth.is_shared
        group = host.paths.adopt(f"sequence {self._name!r}", of_units, copyable=is_own)
        self.units.group = group
        layers = []
        for number, ground in enumerate(grounds):
            contents = Contents(
                f"sequence {self._name!r}, layer {number}",
                layout.layers[number],
                ground,
                growth.writable(number),
                group.layers[number],
                host.paths,
            )
            layer = Layer(contents, host.paths, host.staging, host.verify)
            if self._birth is not None:
                layer.begin(self._birth[number])
            layers.append(layer)
        return layers


def _unit_grounds(ground: Ground, counts: Sequence[int]) -> list[tuple[Ground, int]]:
    found, first = [], 0
    for count in counts:
        part = slice(first, first + count)
        found.append((tuple(stretch.of(part) for stretch in ground), count))
        first += count
    return found
