"""When a store may be used, by whom, and whether it may be changed."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from types import TracebackType
from typing import NoReturn, TypeVar

from spdk_kv.errors import ClosedError

Self = TypeVar("Self", bound="Lifetime")


class Lifetime(ABC):
    """An open store, up to its end: a context manager, in the process that opened it."""

    _closed: bool
    _pid: int

    @property
    @abstractmethod
    def location(self) -> str: ...

    @abstractmethod
    def close(self) -> None: ...

    @property
    def read_only(self) -> bool:
        """Whether it was opened with ``read_only=True``, and changes nothing."""
        return False

    def refresh(self) -> bool:
        """Takes up what the writer of a store that is open ``read_only`` has flushed since. Blocks
        on the disk of the index. Sequences in use have what is new from their next call on.

        Returns:
            Whether there was anything new; False for a store that is not ``read_only``.

        Raises:
            CorruptionError: The index is damaged.
            DeviceGone: It was removed or replaced.
            DeviceError: Its disk failed.
            ClosedError: The store is closed.
        """
        self.check_open()
        return False

    def check_open(self) -> None:
        """Raises ClosedError after close, and in a process forked after open."""
        if self._closed:
            raise ClosedError(f"the store at {self.location} is closed")
        if os.getpid() != self._pid:
            raise ClosedError(
                f"the store at {self.location} was opened by process {self._pid} and cannot be "
                "used after a fork: open it in the child, with read_only=True to read it there"
            )

    def check_writable(self, what: str) -> None:
        """As :meth:`check_open`, and raises ReadOnlyStore where the store is open ``read_only``.
        ``what``: the call that would change it."""
        self.check_open()

    def __enter__(self: Self) -> Self:
        self.check_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{self!r} belongs to its process and cannot be pickled or copied: give its location "
            "to the other one, and open it in the worker with read_only=True: "
            f"spdk_kv.open({self.location!r}, read_only=True)"
        )
