"""The machine: makes its images, boots it, runs commands in it, and leaves nothing behind."""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from labkit.guestlink import Command, GuestLink, GuestLost
from labkit.hardware import MIB, Drive, Hardware, accelerator_options, command_line
from labkit.initramfs import build
from labkit.needs import Host, LabUnavailable, find_host
from labkit.qmp import Qmp

HERE = Path(__file__).resolve().parent.parent
PR_SET_PDEATHSIG = 1
_PIECE_NBYTES = 1 << 16
_libc = ctypes.CDLL(None)


def _die_with_parent() -> None:
    """In the child: it ends with us, even if we are killed."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@functools.cache
def kvm_works(host: Host, patience_s: float = 4.0) -> bool:
    """Whether a kernel under KVM prints its first line in time: on some nested hosts it hangs."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    command = [
        *(host.qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", "q35", *accelerator_options("kvm"), "-m", "256", "-serial", "stdio"),
        *("-kernel", str(host.kernel), "-append", "console=ttyS0 earlyprintk=ttyS0 panic=-1"),
    ]
    trial = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        preexec_fn=_die_with_parent,
    )  # fmt: skip
    try:
        assert trial.stdout is not None
        os.set_blocking(trial.stdout.fileno(), False)
        until = time.monotonic() + patience_s
        seen = b""
        while time.monotonic() < until and trial.poll() is None:
            seen += trial.stdout.read() or b""
            if b"Linux version" in seen:
                return True
            time.sleep(0.05)
        return False
    finally:
        trial.kill()
        trial.communicate()


class Machine:
    """A booted PC; a context manager. ``folder`` holds its images, console log and ``share``.

    ``accelerator``: kvm or tcg; None tries KVM first. ``console``: None logs to ``console.log``.
    """

    def __init__(
        self, hardware: Hardware, *, accelerator: str | None = None, boot_timeout_s: float = 600.0
    ) -> None:
        self.hardware = hardware
        self.accelerator = accelerator or os.environ.get("SPDK_KV_LAB_ACCEL") or None
        self.boot_timeout_s = boot_timeout_s
        self.folder = Path(tempfile.mkdtemp(prefix="spdk_kv-lab-"))
        self.share = self.folder / "share"
        self.share.mkdir()
        self._process: subprocess.Popen[bytes] | None = None
        self._link: GuestLink | None = None
        self._qmp: Qmp | None = None
        for drive in hardware.drives:
            if drive.image is None:
                drive.image = self.folder / f"{drive.name}.img"
            if not drive.image.exists():
                with drive.image.open("wb") as image:
                    image.truncate(drive.nbytes)

    def __enter__(self) -> Machine:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    # -- the life of it -------------------------------------------------------------------------

    def start(self) -> None:
        """Boots; returns when commands can be run. LabUnavailable, GuestLost, TimeoutError."""
        agent = f"{shlex.quote(sys.executable)} {shlex.quote(str(HERE / 'guest_agent.py'))}"
        self._launch(agent, ["-serial", f"file:{self.folder / 'console.log'}"])
        self._link = GuestLink(self._socket("link"))
        self._qmp = Qmp(self._socket("qmp"))
        try:
            self._link.wait_ready(self.boot_timeout_s, self._alive)
        except (GuestLost, TimeoutError) as failed:
            said = f"{self._qemu_said()}\n{self.console()[-2000:]}"
            raise type(failed)(f"{failed}; QEMU and its console said: {said}") from None

    def shell(self) -> int:
        """Boots with the console on this terminal, for a person. Returns QEMU's exit status."""
        shell = "setsid sh -c 'exec bash -l </dev/ttyS0 >/dev/ttyS0 2>&1'"
        self._launch(shell, ["-serial", "mon:stdio"], stdin=None)
        assert self._process is not None
        return self._process.wait()

    def stop(self) -> None:
        """Ends the machine at once, as pulling the plug would, and removes its folder."""
        for end in (self._qmp, self._link):
            if end is not None:
                end.close()
        self._qmp = self._link = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def _launch(
        self, agent: str, console: Sequence[str], stdin: int | None = subprocess.DEVNULL
    ) -> None:
        host = find_host()
        if self.accelerator is None:
            self.accelerator = "kvm" if kvm_works(host) else "tcg"
        mib = self.hardware.hugepage_nbytes // MIB
        guest = shlex.quote(str(HERE / "guest.sh"))
        build(host, self.folder / "initramfs", f"/bin/sh {guest} boot {mib} {agent}")
        command = command_line(host, self.hardware, self.accelerator, self.folder, "")
        self._process = subprocess.Popen(
            [*command, *console],
            stdin=stdin,
            stderr=None if stdin is None else (self.folder / "qemu.log").open("wb"),
            # Ctrl-C is ours to handle: QEMU would end on its own and look like a crash.
            start_new_session=stdin is not None,
            preexec_fn=_die_with_parent,
        )

    def _alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _socket(self, name: str) -> Path:
        """Waits until QEMU has made its socket."""
        path = self.folder / name
        for _ in range(1200):
            if path.exists():
                return path
            if not self._alive():
                break
            time.sleep(0.1)
        raise LabUnavailable(f"QEMU did not start: {self._qemu_said()}")

    def _qemu_said(self) -> str:
        return (self.folder / "qemu.log").read_text(errors="replace").strip()

    # -- inside it ------------------------------------------------------------------------------

    @property
    def link(self) -> GuestLink:
        """The line to the guest's agent."""
        if self._link is None:
            raise GuestLost("the machine is not running")
        return self._link

    def run(self, *argv: object, timeout_s: float = 60.0, **options: Any) -> Command:
        """Runs a command inside as root and waits for it; see :meth:`GuestLink.start`."""
        command = self.link.start([str(word) for word in argv], **options)
        self.link.wait(command, timeout_s)
        return command

    def console(self) -> str:
        """What the guest's kernel printed so far."""
        log = self.folder / "console.log"
        return log.read_text(errors="replace") if log.exists() else ""

    # -- its drives -----------------------------------------------------------------------------

    @property
    def qmp(self) -> Qmp:
        """QEMU's control socket."""
        if self._qmp is None:
            raise GuestLost("the machine is not running")
        return self._qmp

    def drive(self, name: str) -> Drive:
        """The drive called ``name``."""
        return next(drive for drive in self.hardware.drives if drive.name == name)

    def unplug(self, name: str) -> None:
        """Presses the button of a drive's slot: the guest lets go of it, then it is out."""
        self.qmp.execute("device_del", id=name)

    def wait_unplugged(self, name: str, timeout_s: float = 60.0) -> None:
        """Until the drive is out. TimeoutError."""
        self.qmp.wait_event("DEVICE_DELETED", timeout_s, device=name)

    def image_hash(self, name: str) -> str:
        """A SHA-256 of all that a drive would hand out now: of its size, and of what is not zero,
        and where; for most of an image is a hole."""
        image = self.drive(name).image
        assert image is not None
        with image.open("rb", buffering=0) as content:
            nbytes = content.seek(0, os.SEEK_END)
            digest = hashlib.sha256(str(nbytes).encode())
            at = 0
            while (at := _next_data(content.fileno(), at)) < nbytes:
                # Whole pieces, whatever the file system counts as data.
                at -= at % _PIECE_NBYTES
                piece = os.pread(content.fileno(), _PIECE_NBYTES, at)
                if piece.count(0) != len(piece):
                    digest.update(at.to_bytes(8, "little") + piece)
                at += _PIECE_NBYTES
            return digest.hexdigest()

    def image_hashes(self) -> dict[str, str]:
        """:meth:`image_hash` of every drive."""
        return {drive.name: self.image_hash(drive.name) for drive in self.hardware.drives}


def _next_data(fd: int, at: int) -> int:
    """Where the file's next data begins, from ``at`` on; past its end where there is none."""
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError as none:
        if none.errno != errno.ENXIO:
            raise
        return sys.maxsize
