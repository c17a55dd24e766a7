"""How transfers over a link are cut, learnt from what each took: pure decisions, no I/O, no clock.

A model of drive and link would have to know how a drive answers, what processor time a command
costs, and who else is about. So the way that is in use is compared with others, by what the
transfers themselves took.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

from spdk_kv.units import GIB, KIB, format_nbytes

_SMALLEST_CHUNK = 64 * KIB
# Transfers that another way is tried with each time, right after as many in the usual way: what
# changes from one minute to the next (other work, the drive's own) changes both.
_TRY = 3
# It has to be faster by this much, or by this part of what times spread by (their median absolute
# deviation) if that is more, each time of so many in a row; noise is not, so often.
_WORTH = 0.03
_OF_SPREAD = 0.7
_WINS = 2
# No need to see a second transfer of one that is slower by this much.
_HOPELESS = 1.25
# Transfers until one that lost is tried again: at first, and at most. In the long run one
# transfer in a hundred is a try.
_WAIT_FIRST, _WAIT_MOST = 64, 2048
# Transfers that what is usual is known from, and how much of it is compared with the latest.
_REMEMBERED, _LATEST = 24, 5
# So much slower or faster than usual is another drive, as far as plans go: all is tried again.
_CHANGED = 1.7
# A try whose outcome has not come after so many of the others never will (it failed, say).
_LOST_AFTER = 64


@dataclass(frozen=True)
class Limits:
    """``segment_nbytes``: the largest chunk. ``multiple_nbytes``: every chunk is a multiple of it.
    ``slots``: chunks that have room at once. ``whole_depth``: all of them are used; two transfers
    under way would else share the drive, and what one took says nothing about its plan."""

    segment_nbytes: int
    multiple_nbytes: int
    slots: int
    whole_depth: bool = False


@dataclass(frozen=True)
class Cut:
    """Chunks of ``chunk_nbytes``, ``depth`` at once, those on the link included."""

    chunk_nbytes: int
    depth: int

    def __str__(self) -> str:
        return f"{format_nbytes(self.chunk_nbytes)} x {self.depth}"


def chunks(limits: Limits) -> list[int]:
    """Chunk sizes to choose from: the largest, and its halves as long as they keep to limits.
    ValueError where there are none."""
    found = []
    chunk = limits.segment_nbytes
    while chunk >= min(_SMALLEST_CHUNK, limits.segment_nbytes):
        if chunk % limits.multiple_nbytes == 0:
            found.append(chunk)
        if chunk % 2:
            break
        chunk //= 2
    if not found:
        raise ValueError(
            f"segments of {limits.segment_nbytes} bytes are no multiple of {limits.multiple_nbytes}"
        )
    return found


def first_cut(nbytes: int, limits: Limits) -> Cut:
    """Where to begin with transfers of ``nbytes``: some chunks at least, so that drive and link
    overlap, and none that is small for a drive."""
    most = max(nbytes // 8, 256 * KIB)
    found = chunks(limits)
    return Cut(max((chunk for chunk in found if chunk <= most), default=found[-1]), limits.slots)


def others(cut: Cut, limits: Limits) -> list[Cut]:
    """What to compare ``cut`` with, the likeliest first: every other chunk size, since a drive may
    do well with small and with large ones and badly in between, and half and twice the depth."""
    sizes = [size for size in chunks(limits) if size != cut.chunk_nbytes]
    sizes.sort(key=lambda size: max(size, cut.chunk_nbytes) / min(size, cut.chunk_nbytes))
    depths = [depth for depth in (cut.depth // 2, 2 * cut.depth) if 2 <= depth <= limits.slots]
    return [Cut(size, cut.depth) for size in sizes] + [
        Cut(cut.chunk_nbytes, depth) for depth in depths if not limits.whole_depth
    ]


class Planner:
    """The cut for transfers of one kind and about one size. The same calls, the same answers."""

    def __init__(self, nbytes: int, limits: Limits) -> None:
        self.limits = limits
        self.best = first_cut(nbytes, limits)
        # Seconds per byte of the transfers that were cut like that; and how many times as long
        # others took when they were tried last.
        self._usual: deque[float] = deque(maxlen=_REMEMBERED)
        self.tried: dict[Cut, float] = {}
        self._count = 0
        self._due: dict[Cut, int] = {}  # the count when another's turn is, and
        self._wait: dict[Cut, int] = {}  # how long it waits if it loses
        self._trial: Cut | None = None
        self._begun = 0  # transfers of the trial that were planned,
        self._begun_at = 0  # since this count
        self._seen: list[float] = []
        self._wins = 0
        self._before = 0.0  # what was usual just before the trial
        self._again_at = 0
        self._surprise = 0  # the count of the last change that made all be tried again
        self._look_around()

    def next(self) -> Cut:
        """How the next transfer is cut."""
        if self._trial is None:
            self._trial = self._turn()
            self._begun = 0
        elif self._begun and self._count - self._begun_at > _LOST_AFTER:
            self._lose(self._trial)
            return self.best
        if self._trial is None or self._begun >= _TRY or self._count < self._again_at:
            return self.best
        if not self._begun:
            self._seen = []
            self._before = self._latest()
        self._begun += 1
        self._begun_at = self._count
        return self._trial

    def saw(self, cut: Cut, nbytes: int, took_s: float) -> None:
        """A transfer that was cut like that is over, or has added so much to what went before."""
        if nbytes <= 0:
            return
        s_per_byte = max(took_s, 1e-9) / nbytes
        if cut == self._trial and self._begun:
            self._seen.append(s_per_byte)
            self._judge(cut)
        elif cut == self.best:
            self._usual.append(s_per_byte)
            self._count += 1
            self._notice_change()

    @property
    def bytes_per_s(self) -> float:
        """What the usual way reaches; 0: not known yet."""
        return 1 / median(self._usual) if self._usual else 0.0

    def why(self) -> str:
        """One line: what was chosen, and what else was seen."""
        if not self._usual:
            return f"chunks of {self.best}: nothing is measured yet"
        others = ", ".join(f"{cut} {1 / ratio:.2f}" for cut, ratio in self.tried.items())
        return f"chunks of {self.best}: {self.bytes_per_s / GIB:.2f} GiB/s" + (
            f"; of that reached {others}" if others else ""
        )

    def _latest(self) -> float:
        return median(list(self._usual)[-_LATEST:])

    def _turn(self) -> Cut | None:
        """The other way that is due first, if one is."""
        if len(self._usual) < _TRY or not self._due:
            return None
        cut = min(self._due, key=lambda one: self._due[one])
        return cut if self._due[cut] <= self._count else None

    def _judge(self, cut: Cut) -> None:
        ratio = median(self._seen) / self._before
        if ratio > _HOPELESS or (len(self._seen) == _TRY and ratio > 1 - self._worth()):
            self.tried[cut] = ratio
            self._lose(cut)
        elif len(self._seen) == _TRY:
            self.tried[cut] = ratio
            self._wins += 1
            self._begun = 0
            # Not at once: against what is usual by then.
            self._again_at = self._count + _TRY
            if self._wins == _WINS:
                self._move(cut)

    def _worth(self) -> float:
        usual = median(self._usual)
        spread = median(abs(one - usual) for one in self._usual) / usual
        return max(_WORTH, _OF_SPREAD * spread)

    def _lose(self, cut: Cut) -> None:
        self._trial, self._wins = None, 0
        self._due[cut] = self._count + self._wait[cut]
        self._wait[cut] = min(2 * self._wait[cut], _WAIT_MOST)
        self._again_at = self._count + _TRY

    def _move(self, cut: Cut) -> None:
        left, self.best = self.best, cut
        self._trial, self._wins = None, 0
        self._usual = deque(self._seen, maxlen=_REMEMBERED)
        self.tried = {}
        # What lost lately waits on; what it won against waits as if it had lost once.
        due, wait = self._due, self._wait
        self._look_around()
        for one in self._due:
            if one in due and wait[one] > _WAIT_FIRST:
                self._due[one], self._wait[one] = due[one], wait[one]
        self._due[left] = self._count + _WAIT_FIRST

    def _look_around(self) -> None:
        near = others(self.best, self.limits)
        self._due = dict.fromkeys(near, self._count)
        self._wait = dict.fromkeys(near, _WAIT_FIRST)

    def _notice_change(self) -> None:
        if len(self._usual) < 3 * _LATEST or self._count < self._surprise + _REMEMBERED:
            return
        change = self._latest() / median(list(self._usual)[:-_LATEST])
        if not 1 / _CHANGED < change < _CHANGED:
            self._surprise = self._count
            self._usual = deque(list(self._usual)[-_LATEST:], maxlen=_REMEMBERED)
            if self._trial is None:
                self._look_around()
