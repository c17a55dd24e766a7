"""Groups of one layer that are in memory, and the reading of those that are not."""

from __future__ import annotations

import time
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from spdk_kv.sequence import GroupReading, Sequence
from spdk_kv.sparse import Pool, Settings
from spdk_kv.types import LayerShape, movable, torch_dtypes

Numbers = npt.NDArray[np.int64]
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Counters:
    """What reading a part did; see :meth:`SparseKVCache.stats`."""

    row_layers: int = 0
    selected_tokens: int = 0
    hits: int = 0
    misses: int = 0
    read_nbytes: int = 0
    read_wait_s: float = 0.0
    corrections: int = 0
    coverages: int = 0
    coverage: float = 0.0


@dataclass
class Coming:
    """A read that was started: which slots its groups go to."""

    reading: GroupReading
    places: Numbers


@dataclass
class Resident:
    """The resident groups of one layer: a table of them, and their K and V in host memory.

    A group that is in the table is whole in memory, or its read is under way and :meth:`gather`
    waits for that. Whatever ends otherwise (an error, an interrupt, a selection that nobody took)
    empties the table, so that no slot is ever taken for what it does not hold.
    """

    number: int
    shape: LayerShape
    settings: Settings
    counters: Counters
    rows: int
    _coming: list[Coming] = field(default_factory=list)
    _unsure: bool = False

    def __post_init__(self) -> None:
        self._pool = Pool(self.rows, self.settings.slots)
        # [rows * room, group_tokens, kv_heads, width]
        self._room = 0
        self._slots: Pair | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of host memory for K and V."""
        return 0 if self._slots is None else sum(each.nbytes for each in self._slots)

    def bring(self, sequence: Sequence, groups: Numbers, rows: Numbers) -> Numbers:
        """Starts to read those of ``groups``, ``[batch rows, count]``, that are not resident, for
        the ``rows`` only. Does not wait for the drive. Returns the slots, ``[rows, count]``.

        May be called again before :meth:`gather`: of a row, the slots of the last call hold.
        """
        self._unsure = True
        slots, wanted, places = [], [], []
        for row in rows:
            found, missing = self._pool.take(int(row), groups[row])
            slots.append(found)
            self.counters.hits += len(found) - len(missing)
            self.counters.misses += len(missing)
            wanted.append(np.stack([np.full_like(missing, row), groups[row, missing]], axis=1))
            places.append(np.stack([np.full_like(missing, row), found[missing]], axis=1))
        pairs = np.concatenate(wanted)
        if len(pairs):
            reading = sequence.start_groups(self.number, pairs, self.settings.group_tokens)
            self._coming.append(Coming(reading, np.concatenate(places)))
        return np.stack(slots)

    def gather(self, slots: Numbers) -> Pair:
        """K and V of the groups in ``slots``, ``[rows, kv_heads, count * group_tokens, width]``, in
        host memory. Blocks until those that were started have come; raises what the store does."""
        begin = time.perf_counter()
        while self._coming:
            coming = self._coming[0]
            self._put(coming.places, *coming.reading.finish())
            self.counters.read_nbytes += coming.reading.nbytes
            self._coming.pop(0)
        self.counters.read_wait_s += time.perf_counter() - begin
        self._unsure = False
        self._reserve(int(slots.max(initial=-1)) + 1)
        assert self._slots is not None
        places = (slots + self._room * np.arange(self.rows)[:, None]).reshape(-1)
        k, v = (self._picked(each, places) for each in self._slots)
        return k, v

    # By numpy, both ways: torch's own threads take longer to come together than such a copy takes.

    def _picked(self, slots: torch.Tensor, places: Numbers) -> torch.Tensor:
        picked = torch.from_numpy(movable(slots).numpy().take(places, 0)).view(slots.dtype)
        groups, size, *rest = picked.shape
        return picked.view(self.rows, groups // self.rows * size, *rest).transpose(1, 2)

    def drop(self) -> None:
        """What was brought is not wanted any more."""
        coming, self._coming = self._coming, []
        for each in coming:
            each.reading.cancel()
        if self._unsure:
            self._pool.clear()
            self._unsure = False

    def truncate(self, tokens: int) -> None:
        """Forgets all groups that are not whole within ``tokens``."""
        self.drop()
        self._pool.truncate(tokens // self.settings.group_tokens)

    def select(self, rows: Rows[int]) -> None:
        """The batch becomes the ``rows`` of what it was."""
        self.drop()
        if self._slots is not None:
            with torch.inference_mode(False):
                index = torch.tensor(rows)
                held = [self._by_row(each).index_select(0, index) for each in self._slots]
            self._slots = held[0].flatten(0, 1), held[1].flatten(0, 1)
        self._pool.reorder(rows)
        self.rows = len(rows)

    def _by_row(self, slots: torch.Tensor) -> torch.Tensor:
        return slots.view(self.rows, self._room, *slots.shape[1:])

    def _put(self, places: Numbers, k: torch.Tensor, v: torch.Tensor) -> None:
        self._reserve(int(places[:, 1].max()) + 1)
        assert self._slots is not None
        index = places[:, 0] * self._room + places[:, 1]
        for slots, read in zip(self._slots, (k, v), strict=True):
            movable(slots).numpy()[index] = movable(read).numpy()

    def _reserve(self, room: int) -> None:
        """Makes room for so many slots per row, and some more: short texts never take them all."""
        if room <= self._room and self._slots is not None:
            return
        room = min(self.settings.slots, max(room, 2 * self._room, 16))
        shape = self.shape
        # A tensor made in inference mode cannot be changed outside it.
        with torch.inference_mode(False):
            made = tuple(
                torch.empty(
                    (self.rows, room, self.settings.group_tokens, shape.kv_heads, width or 0),
                    dtype=torch_dtypes()[dtype],
                )
                for width, dtype in (
                    (shape.head_dim, str(shape.dtype)),
                    (shape.value_dim, str(shape.value_dtype)),
                )
            )
            if self._slots is not None:
                for new, old in zip(made, self._slots, strict=True):
                    new[:, : self._room] = self._by_row(old)
            k, v = (each.flatten(0, 1) for each in made)
        self._slots, self._room = (k, v), room
