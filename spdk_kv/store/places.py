"""Whether the files of an open store are still where it would be looked for."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from spdk_kv.errors import DeviceGone


class Places:
    """The regular files among ``paths``, and which ones those are now.

    A file that is removed, replaced or renamed while it is open takes writes as before, but nobody
    finds them again.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._identities: dict[str, tuple[int, int]] = {}
        for path in map(os.path.abspath, paths):
            found = os.stat(path)
            if stat.S_ISREG(found.st_mode):
                self._identities[path] = (found.st_dev, found.st_ino)

    def check(self) -> None:
        """DeviceGone if a path no longer leads to the file that is open."""
        for path, identity in self._identities.items():
            try:
                found = os.stat(path)
                if (found.st_dev, found.st_ino) == identity:
                    continue
                what = "was replaced"
            except FileNotFoundError:
                what = "was removed or renamed"
            except OSError as refused:
                what = f"cannot be reached any more ({refused.strerror})"
            raise DeviceGone(
                f"{path} {what} while the store was open, so what is put cannot be found again. "
                "Close the store; put the file back if it was moved, or begin a new store",
                op="flush",
            )
