"""Whether a layer may still be used."""

from __future__ import annotations

from types import TracebackType

from spdk_kv.errors import DeviceError, SpdkKvError


class Condition:
    """Sound, until a write fails, a change stops half way, or the sequence is deleted.

    Guarded by the layer's lock.
    """

    def __init__(self, name: str) -> None:
        self.failure: SpdkKvError | None = None
        self.interrupted = DeviceError(
            f"{name}: a change was interrupted half way; delete the sequence and compute it again"
        )

    def check(self) -> None:
        """Raises what made the layer unusable, if anything did."""
        if self.failure is not None:
            raise self.failure.with_traceback(None)

    def change(self) -> Change:
        """A context for a change that must be made as a whole.

        Whatever is raised within it, a signal handler's KeyboardInterrupt included, leaves the
        layer unusable, since nobody knows how much of the change was made. Contexts may nest.
        """
        return Change(self)


class Change:
    """See :meth:`Condition.change`."""

    __slots__ = ("_before", "_condition")

    def __init__(self, condition: Condition) -> None:
        self._condition = condition
        self._before = condition.failure

    def __enter__(self) -> None:
        self._condition.failure = self._condition.interrupted

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._condition.failure = self._before
