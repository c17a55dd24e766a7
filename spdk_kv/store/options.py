"""The option objects of :func:`spdk_kv.open`: how the drive is driven, and the page cache used."""

from __future__ import annotations

import os
from dataclasses import dataclass

from spdk_kv.engines import QueueOptions
from spdk_kv.residency import make_policy
from spdk_kv.units import parse_nbytes


@dataclass(frozen=True)
class EngineOptions:
    """How a store drives its drive: the argument ``engine`` of :func:`spdk_kv.open`.

    Attributes:
        name: ``"uring"``, ``"threads"`` or ``"pagecache"`` for files and block devices (other
            locations have one engine each). Default None: the best direct one that may be used
            here.
        depth: Commands in flight on each queue, 1 to 4096. Default 16.
        segment: Bytes of the largest command, a multiple of 4096 up to 1 GiB, as an int or text
            like ``"256 KiB"``. Default 1 MiB. The engine takes ``2 * depth * segment`` bytes of
            memory for itself.
        queue_pairs: Queues with ``depth`` commands each, 1 to 64, each driven by a thread of its
            own. More than 1 is for ``spdk://`` alone. Default 1.
        hugepages: Memory for transfers is on transparent hugepages where the kernel provides them;
            reserved ones are for SPDK alone. Default True.
        staging: Bytes of idle memory kept for the next transfers, as an int or text. Half of it
            may hold what is read ahead. Default 512 MiB; it grows to that only with use.
        discard: Give back what comes free: space of a file goes to its filesystem (holes, and the
            file's end), a drive is told of it (TRIM). None (the default) does so for files, in the
            background and when the store is closed. True does so for drives as well, and a flush
            returns when it is done. False leaves it to :meth:`KVStore.trim`.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of its range, or is not a size.
    """

    name: str | None = None
    depth: int = 16
    segment: int | str = "1 MiB"
    queue_pairs: int = 1
    hugepages: bool = True
    staging: int | str = "512 MiB"
    discard: bool | None = None

    def __post_init__(self) -> None:
        if self.name is not None and not isinstance(self.name, str):
            raise TypeError(f"EngineOptions.name is a str or None, not {self.name!r}")
        for field in ("depth", "queue_pairs"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"EngineOptions.{field} is an int, not {value!r}")
        _check_bool(self, "hugepages")
        if self.discard is not None:
            _check_bool(self, "discard")
        for field in ("segment", "staging"):
            _nbytes(self, field)
        try:
            _ = self.queue_options
        except ValueError as wrong:
            raise ValueError(f"EngineOptions: {wrong}") from None

    @property
    def segment_nbytes(self) -> int:
        """``segment`` in bytes."""
        return _nbytes(self, "segment")

    @property
    def staging_nbytes(self) -> int:
        """``staging`` in bytes."""
        return _nbytes(self, "staging")

    @property
    def queue_options(self) -> QueueOptions:
        """The part that the engine itself is opened with."""
        return QueueOptions(self.depth, self.segment_nbytes, self.hugepages, self.queue_pairs)


@dataclass(frozen=True)
class PageCacheOptions:
    """What a store reads through the page cache: the argument ``page_cache`` of
    :func:`spdk_kv.open`.

    Attributes:
        policy: Which layers of sequences are read through the page cache, and which directly.
            ``"adaptive"`` (the default) follows the memory that is free, ``"paper"`` binds each
            unit when it is made (DUAL-BLADE), ``"direct"`` and ``"pagecache"`` are one path for
            all.
        memory: Bytes that the page cache may hold for that, as an int or text like ``"2 GiB"``.
            Default None: what MemAvailable and the cgroups around the process leave, read again
            at every step.
        folder: For ``spdk://`` and ``ng://``, whose bytes the page cache does not reach: an
            existing folder on another drive, where an unnamed file takes copies of what is read
            through the page cache. It needs ``verify=True``. Default None: such a drive is read
            directly only.
        mmap: With the engine ``pagecache``, a get without ``out``, ``device`` and ``as_numpy``
            returns the page cache itself instead of a copy. Its checksum is verified once, by the
            get: pages that the kernel drops and reads again later are not checked, and a drive
            that fails then shows as SIGBUS. Default False.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: The policy is unknown, or ``memory`` is not a size.
    """

    policy: str = "adaptive"
    memory: int | str | None = None
    folder: str | os.PathLike[str] | None = None
    mmap: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.policy, str):
            raise TypeError(f"PageCacheOptions.policy is a str, not {self.policy!r}")
        make_policy(self.policy)
        if self.memory is not None:
            _nbytes(self, "memory")
        if not isinstance(self.folder, (str, os.PathLike, type(None))):
            raise TypeError(f"PageCacheOptions.folder is a path, not {self.folder!r}")
        _check_bool(self, "mmap")

    @property
    def memory_nbytes(self) -> int | None:
        """``memory`` in bytes, or None."""
        return None if self.memory is None else _nbytes(self, "memory")

    @property
    def folder_path(self) -> str | None:
        """``folder`` as an absolute path, or None."""
        return None if self.folder is None else os.path.abspath(self.folder)


def _check_bool(options: object, field: str) -> None:
    value = getattr(options, field)
    if not isinstance(value, bool):
        raise TypeError(f"{type(options).__name__}.{field} is a bool, not {value!r}")


def _nbytes(options: object, field: str) -> int:
    value = getattr(options, field)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(
            f"{type(options).__name__}.{field} is a size (an int or text like '64 MiB'), not "
            f"{value!r}"
        )
    try:
        return parse_nbytes(value)
    except ValueError as wrong:
        raise ValueError(f"{type(options).__name__}.{field}: {wrong}") from None
