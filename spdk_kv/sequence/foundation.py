"""What a sequence stands on: its parts, what the store calls, and the numbers of layers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Sequential
from contextlib import contextmanager
from functools import cached_property

from spdk_kv.deadline import NEVER, Deadline
from spdk_kv.errors import ClosedError, ShapeMismatch, SpdkKvError, is_unreadable
from spdk_kv.index import SequenceRecord
from spdk_kv.placement import SequenceLayout
from spdk_kv.sequence.ahead import ReadAhead
from spdk_kv.sequence.body import Body
from spdk_kv.sequence.growth import Growth
from spdk_kv.sequence.host import Host
from spdk_kv.sequence.layer import Layer, LayerSnapshot
from spdk_kv.sequence.recorder import Recorder
from spdk_kv.sequence.whole import Whole
from spdk_kv.types import KVShape


class Foundation:
    """A sequence without the methods that its users call."""

    def __init__(
        self,
        host: Host,
        name: str,
        layout: SequenceLayout,
        growth: Growth,
        temporary: bool,
        life: object = None,
        birth: Sequential[LayerSnapshot] | None = None,
    ) -> None:
        self.name = name
        self._host = host
        self._layout = layout
        self._growth = growth
        self._learns = True  # of what is read ahead
        self._body = Body(host, name, layout, growth, birth)
        self.release_units: Callable[[], None] = self._body.units.release
        """Ends the tracking of its units, once nobody uses it; may be called again."""
        self._recorder = Recorder(host.catalog, name, self._body, temporary, life)

    @cached_property
    def _whole(self) -> Whole:
        return Whole(self._body.layers, self._recorder)

    @cached_property
    def _ahead(self) -> ReadAhead:
        body, most = self._body, self._layout.shape.max_tokens
        made = ReadAhead(self._host.paths, body.group, body.layers, most)
        made.learns = self._learns
        return made

    @property
    def _layers(self) -> list[Layer]:
        return self._body.layers

    @property
    def shape(self) -> KVShape:
        """The shape that it was created with."""
        return self._layout.shape

    @property
    def temporary(self) -> bool:
        """Whether it is gone when the store is closed."""
        return self._recorder.temporary

    @property
    def deleted(self) -> bool:
        """Whether :meth:`Sequence.delete` was called."""
        return self._recorder.deleted

    @property
    def dirty(self) -> bool:
        """Whether it has changes that :meth:`KVStore.flush` would record."""
        return self._recorder.dirty

    # -- what the store calls -------------------------------------------------------------------

    def forget_record(self) -> None:
        """Called by the store that its name no longer belongs to: drops its record, if any."""
        self._host.catalog.drop_sequence(self.name, self._recorder.life)

    def mark_new(self) -> None:
        """Called when it came to be: there is no record of it yet."""
        self._recorder.mark_dirty()

    def make_layers(self) -> None:
        """Makes at once what else is made when it is first needed. Blocks for staging memory."""
        self._body.layers  # noqa: B018

    def restore(self, record: SequenceRecord) -> None:
        """Takes up a recorded state. Blocks on the drive."""
        self._recorder.note, self._recorder.pinned = record.note, record.pinned
        at = first = 0
        for number, layer in enumerate(self._layers):
            layout = layer.contents.layout
            tokens = record.tokens[number]
            row_map = record.row_map[at : at + tokens * layout.batch * 4] if record.row_map else b""
            layer.restore(tokens, record.checksums[first : first + layout.extents], row_map)
            at, first = at + len(row_map), first + layout.extents
        self._recorder.mark_recorded()

    def stage_for_commit(self, deadline: Deadline = NEVER) -> None:
        """For :meth:`KVStore.flush`: see :meth:`Recorder.stage`. Blocks on the drive."""
        self._whole.finish(deadline)
        self._recorder.stage(deadline)

    def is_news(self, failure: Exception, audience: str) -> bool:
        """For :meth:`KVStore.flush`: see :meth:`Recorder.is_news`."""
        return self._recorder.is_news(failure, audience)

    @contextmanager
    def _counting_corruption(self) -> Iterator[None]:
        try:
            yield
        except SpdkKvError as failure:
            if is_unreadable(failure):
                self._host.catalog.count_corruption()
            raise

    def _mark_dirty(self) -> None:
        self._recorder.mark_dirty()
        # After that, or a flush that comes in between would find nothing to keep it for.
        if not self.temporary:
            self._host.keep_sequence(self)

    # -- arguments ------------------------------------------------------------------------------

    def _number(self, layer: int) -> int:
        number = operator.index(layer)
        if not 0 <= number < self.shape.layers:
            raise ShapeMismatch(f"sequence {self.name!r} has layers 0 to {self.shape.layers - 1}")
        return number

    def _usable_number(self, layer: int) -> int:
        self._host.check_open()
        if self._recorder.deleted:
            raise ClosedError(f"sequence {self.name!r} was deleted")
        return self._number(layer)

    def _layer(self, layer: int, deadline: Deadline = NEVER) -> Layer:
        found = self._layers[self._usable_number(layer)]
        self._whole.finish(deadline, found)
        return found

    def _numbers(self, layer: int | None, deadline: Deadline) -> Sequential[int]:
        """The number of ``layer``, or those of all layers."""
        if layer is None:
            self._usable_number(0)
            self._whole.finish(deadline)
            return range(self.shape.layers)
        self._layer(layer, deadline)
        return [self._number(layer)]
