"""How transfers over a link are cut, learnt from what each took: pure decisions, no I/O, no clock.

A model of drive and link would have to know how a drive answers, what a command costs in processor
time, and who else is using both. So the cut in use is compared with others by what the transfers
themselves took.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

from spdk_kv.units import GIB, KIB, format_nbytes

# Found by experiment: with bench/pipeline.py, and the simulated drives of tests/link.

_SMALLEST_SEGMENT = 64 * KIB
# Transfers of a trial, right after as many with the usual cut: whatever changes from one minute to
# the next (other work, the drive itself) then changes both.
_TRIAL = 3
# To win, another cut has to be faster by this share, or by this share of the times' spread (their
# median absolute deviation) if that is more, in so many trials in a row. Noise hardly ever is.
_MIN_GAIN = 0.03
_GAIN_PER_SPREAD = 0.7
_WINS = 2
# A trial ends after its first transfer if that took this many times as long as usual.
_HOPELESS = 1.25
# Transfers until a cut that lost is tried again: at first, and at most. In the long run one
# transfer in a hundred is a trial.
_FIRST_PAUSE, _LONGEST_PAUSE = 64, 2048
# Transfers that define what is usual, and how many of the latest are compared with them.
_REMEMBERED, _LATEST = 24, 5
# A drive that is so many times as slow or fast as usual may well be another one: everything is
# tried again.
_CHANGED = 1.7
# The outcome of a trial that is missing after so many other transfers will never come: it failed.
_LOST_AFTER = 64


@dataclass(frozen=True)
class Limits:
    """What a cut must keep to.

    ``max_segment_nbytes``: the largest segment. ``multiple_nbytes``: every segment is a multiple
    of it. ``slots``: how many segments have room at once. ``whole_depth``: all slots are used,
    since of two transfers under way each would else take a share of the drive that depends on the
    other's depth.
    """

    max_segment_nbytes: int
    multiple_nbytes: int
    slots: int
    whole_depth: bool = False


@dataclass(frozen=True)
class Cut:
    """Segments of ``segment_nbytes``, ``depth`` at once, those on the link included."""

    segment_nbytes: int
    depth: int

    def __str__(self) -> str:
        return f"{format_nbytes(self.segment_nbytes)} x {self.depth}"


def segment_sizes(limits: Limits) -> list[int]:
    """Segment sizes to choose from: the largest, its half, and so on, as long as they keep to
    ``limits``. Raises ValueError where there are none."""
    found = []
    size = limits.max_segment_nbytes
    while size >= min(_SMALLEST_SEGMENT, limits.max_segment_nbytes):
        if size % limits.multiple_nbytes == 0:
            found.append(size)
        if size % 2:
            break
        size //= 2
    if not found:
        raise ValueError(
            f"segments of {limits.max_segment_nbytes} bytes are no multiple of "
            f"{limits.multiple_nbytes}"
        )
    return found


def first_cut(nbytes: int, limits: Limits) -> Cut:
    """Where to begin with transfers of ``nbytes``: with eight segments or more, so that drive and
    link overlap, unless those would be under 256 KiB, which is small for a drive."""
    most = max(nbytes // 8, 256 * KIB)
    sizes = segment_sizes(limits)
    return Cut(max((size for size in sizes if size <= most), default=sizes[-1]), limits.slots)


def alternatives(cut: Cut, limits: Limits) -> list[Cut]:
    """What to compare ``cut`` with, the likeliest first.

    Every other segment size, since a drive may do well with small and with large ones and badly
    in between; then half and twice the depth.
    """
    sizes = [size for size in segment_sizes(limits) if size != cut.segment_nbytes]
    sizes.sort(key=lambda size: max(size, cut.segment_nbytes) / min(size, cut.segment_nbytes))
    depths = [depth for depth in (cut.depth // 2, 2 * cut.depth) if 2 <= depth <= limits.slots]
    return [Cut(size, cut.depth) for size in sizes] + [
        Cut(cut.segment_nbytes, depth) for depth in depths if not limits.whole_depth
    ]


class Planner:
    """Finds the cut for transfers of one kind and about one size. The same calls give the same
    answers."""

    def __init__(self, nbytes: int, limits: Limits) -> None:
        self.limits = limits
        self.best = first_cut(nbytes, limits)
        # Seconds per byte of the latest transfers with the cut in use.
        self._usual: deque[float] = deque(maxlen=_REMEMBERED)
        self.tried: dict[Cut, float] = {}
        """How many times as long as usual other cuts took when they were tried last."""
        self._count = 0  # transfers with the cut in use; the planner's only clock
        self._due: dict[Cut, int] = {}  # the count at which each alternative is tried
        self._pause: dict[Cut, int] = {}  # how long it waits if it loses then
        self._trial: Cut | None = None
        self._planned = 0  # transfers of the trial that were planned,
        self._planned_at = 0  # the last of them at this count
        self._seen: list[float] = []  # seconds per byte of those that are over
        self._wins = 0
        self._before = 0.0  # what was usual just before the trial
        self._resume_at = 0  # the count from which trials may go on
        self._changed_at = 0  # the count of the last change that made everything be tried again
        self._schedule_all()

    def next(self) -> Cut:
        """How the next transfer is cut."""
        if self._trial is None:
            self._trial = self._first_due()
            self._planned = 0
        elif self._planned and self._count - self._planned_at > _LOST_AFTER:
            self._lose(self._trial)
            return self.best
        if self._trial is None or self._planned >= _TRIAL or self._count < self._resume_at:
            return self.best
        if not self._planned:
            self._seen = []
            self._before = self._latest()
        self._planned += 1
        self._planned_at = self._count
        return self._trial

    def note(self, cut: Cut, nbytes: int, took_s: float) -> None:
        """Notes that a transfer with this cut is over and took ``took_s`` for ``nbytes``; for one
        of several under way, the time that it added to the others."""
        if nbytes <= 0:
            return
        s_per_byte = max(took_s, 1e-9) / nbytes
        if cut == self._trial and self._planned:
            self._seen.append(s_per_byte)
            self._judge(cut)
        elif cut == self.best:
            self._usual.append(s_per_byte)
            self._count += 1
            self._notice_change()

    @property
    def bytes_per_s(self) -> float:
        """What the cut in use reaches; 0 while that is not known."""
        return 1 / median(self._usual) if self._usual else 0.0

    def why(self) -> str:
        """One line: what was chosen, and how others compared."""
        if not self._usual:
            return f"segments of {self.best}: nothing is measured yet"
        compared = ", ".join(f"{cut} {1 / ratio:.2f}" for cut, ratio in self.tried.items())
        return f"segments of {self.best}: {self.bytes_per_s / GIB:.2f} GiB/s" + (
            f"; shares of that reached by others: {compared}" if compared else ""
        )

    def _latest(self) -> float:
        return median(list(self._usual)[-_LATEST:])

    def _first_due(self) -> Cut | None:
        """The alternative that is due first, if one is."""
        if len(self._usual) < _TRIAL or not self._due:
            return None
        cut = min(self._due, key=lambda one: self._due[one])
        return cut if self._due[cut] <= self._count else None

    def _judge(self, cut: Cut) -> None:
        ratio = median(self._seen) / self._before
        if ratio > _HOPELESS or (len(self._seen) == _TRIAL and ratio > 1 - self._min_gain()):
            self.tried[cut] = ratio
            self._lose(cut)
        elif len(self._seen) == _TRIAL:
            self.tried[cut] = ratio
            self._wins += 1
            self._planned = 0
            # Not at once: the next trial compares with what is usual by then.
            self._resume_at = self._count + _TRIAL
            if self._wins == _WINS:
                self._adopt(cut)

    def _min_gain(self) -> float:
        usual = median(self._usual)
        spread = median(abs(one - usual) for one in self._usual) / usual
        return max(_MIN_GAIN, _GAIN_PER_SPREAD * spread)

    def _lose(self, cut: Cut) -> None:
        self._trial, self._wins = None, 0
        self._due[cut] = self._count + self._pause[cut]
        self._pause[cut] = min(2 * self._pause[cut], _LONGEST_PAUSE)
        self._resume_at = self._count + _TRIAL

    def _adopt(self, cut: Cut) -> None:
        previous, self.best = self.best, cut
        self._trial, self._wins = None, 0
        self._usual = deque(self._seen, maxlen=_REMEMBERED)
        self.tried = {}
        # What lost lately goes on waiting; the cut that it replaces waits as if it had lost once.
        due, pause = self._due, self._pause
        self._schedule_all()
        for one in self._due:
            if one in due and pause[one] > _FIRST_PAUSE:
                self._due[one], self._pause[one] = due[one], pause[one]
        self._due[previous] = self._count + _FIRST_PAUSE

    def _schedule_all(self) -> None:
        near = alternatives(self.best, self.limits)
        self._due = dict.fromkeys(near, self._count)
        self._pause = dict.fromkeys(near, _FIRST_PAUSE)

    def _notice_change(self) -> None:
        if len(self._usual) < 3 * _LATEST or self._count < self._changed_at + _REMEMBERED:
            return
        change = self._latest() / median(list(self._usual)[:-_LATEST])
        if not 1 / _CHANGED < change < _CHANGED:
            self._changed_at = self._count
            self._usual = deque(list(self._usual)[-_LATEST:], maxlen=_REMEMBERED)
            if self._trial is None:
                self._schedule_all()
