"""The commands, as scripts/setup_vfio.py and `spdk-kv device` call them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spdk_kv.binding.bind import BindRequest, bind
from spdk_kv.binding.hugepages import hugepages
from spdk_kv.binding.kernel import WritableKernel
from spdk_kv.binding.permissions import permissions
from spdk_kv.binding.persist import Persistence
from spdk_kv.binding.report import Report, reported
from spdk_kv.binding.restore import rebind, restore
from spdk_kv.binding.status import status

_PACKAGE = Path(__file__).resolve().parent.parent


class Tool:
    """The commands. Each returns a :class:`Report`, even for a refusal.

    Args:
        root: the folder that stands for ``/``.
        program: the command line that a boot would run, without a subcommand.
        kernel: another kernel, for tests.
    """

    def __init__(
        self, root: Path, program: Sequence[str], kernel: WritableKernel | None = None
    ) -> None:
        self._root = root
        self._kernel = kernel or WritableKernel()
        self._persistence = Persistence(root, program, _PACKAGE)

    def status(self) -> Report:
        """Reports every NVMe function, and why it may or may not be taken."""
        return reported(lambda: status(self._root, self._kernel))

    def bind(
        self,
        bdf: str,
        serial: str,
        *,
        yes: bool = False,
        destroys: str | None = None,
        persist: bool = False,
    ) -> Report:
        """Takes one drive; a dry run unless ``yes``."""
        request = BindRequest(bdf, serial, yes=yes, destroys=destroys, persist=persist)
        return reported(lambda: bind(self._root, self._kernel, request, self._persistence))

    def restore(self, bdf: str | None = None) -> Report:
        """Gives back one drive, or every drive that was bound."""
        return reported(lambda: restore(self._root, self._kernel, bdf, self._persistence))

    def rebind(self) -> Report:
        """Binds what was made persistent; run at boot."""
        return reported(lambda: rebind(self._root, self._kernel, self._persistence))

    def hugepages(self, amount: str) -> Report:
        """Raises the number of hugepages."""
        return reported(lambda: hugepages(self._root, self._kernel, amount))

    def permissions(self, bdf: str, group: str) -> Report:
        """Lets a group use a bound drive."""
        return reported(
            lambda: permissions(self._root, self._kernel, bdf, group, self._persistence)
        )
