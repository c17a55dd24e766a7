"""Commands inside the guest: the host's end of the line that guest_agent.py holds the other of.

Each message is a line of JSON; several commands may run at once.
"""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class GuestLost(Exception):
    """The guest ended, or its agent no longer answers."""


@dataclass
class Command:
    """A command that runs, or ran, inside. ``status``: its exit status (minus the signal that
    ended it), None while it runs."""

    number: int
    argv: Sequence[str]
    on_output: Callable[[str, bytes], None] | None
    status: int | None = None
    timed_out: bool = False
    _pieces: list[tuple[str, bytes]] = field(default_factory=list)

    def text(self, stream: str = "") -> str:
        """What it printed so far on ``out`` or ``err``; on both, in order, if none is named."""
        pieces = [piece for name, piece in list(self._pieces) if not stream or name == stream]
        return b"".join(pieces).decode(errors="replace")


class GuestLink:
    """The line to the guest's agent. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._changed = threading.Condition()
        self._commands: dict[int, Command] = {}
        self._number = 0
        self._ready = self._lost = False
        self._reader = threading.Thread(target=self._read, name="lab-link", daemon=True)
        self._reader.start()

    def wait_ready(self, timeout_s: float, alive: Callable[[], bool]) -> None:
        """Until the agent speaks. GuestLost where ``alive`` turns false before, TimeoutError."""
        until = time.monotonic() + timeout_s
        with self._changed:
            while not self._ready:
                if self._lost or not alive():
                    raise GuestLost("the machine ended while it booted")
                if time.monotonic() > until:
                    raise TimeoutError(f"the machine did not boot within {timeout_s:.0f} s")
                self._changed.wait(0.2)

    def start(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
        user: str | int | None = None,
        groups: Sequence[int] = (),
        on_output: Callable[[str, bytes], None] | None = None,
    ) -> Command:
        """Starts a command, as root or as ``user`` (with ``groups`` beside its own)."""
        with self._changed:
            self._number += 1
            command = Command(self._number, list(argv), on_output)
            self._commands[command.number] = command
        self._send(
            {"id": command.number, "do": "run", "argv": list(argv), "cwd": cwd, "user": user,
             "groups": list(groups), "env": dict(env or {})}
        )  # fmt: skip
        return command

    def wait(self, command: Command, timeout_s: float) -> int:
        """Its exit status; kills it, and says so in ``timed_out``, when the time is over."""
        if not self._wait(command, timeout_s):
            command.timed_out = True
            self.signal(command, 9)
            if not self._wait(command, 120.0):
                raise GuestLost(f"{command.argv[0]} cannot be killed: the guest hangs")
        assert command.status is not None
        return command.status

    def wait_text(self, command: Command, text: str, timeout_s: float) -> None:
        """Until the command printed ``text``. TimeoutError; GuestLost where it ended without."""
        until = time.monotonic() + timeout_s
        with self._changed:
            while text not in command.text():
                if command.status is not None:
                    raise GuestLost(f"ended without {text!r}:\n{command.text()}")
                if time.monotonic() > until or self._lost:
                    raise TimeoutError(f"no {text!r} in {timeout_s} s:\n{command.text()}")
                self._changed.wait(0.2)

    def signal(self, command: Command, number: int) -> None:
        """Sends a signal to the command and all it started."""
        self._send({"id": command.number, "do": "signal", "signal": number})

    def close(self) -> None:
        """Ends the line. The guest powers off when it sees that."""
        with contextlib.suppress(OSError):  # QEMU was faster
            self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._socket.close()

    def _wait(self, command: Command, timeout_s: float) -> bool:
        until = time.monotonic() + timeout_s
        with self._changed:
            while command.status is None:
                if self._lost:
                    raise GuestLost(f"the machine ended during {command.argv[0]}")
                if time.monotonic() > until:
                    return False
                self._changed.wait(0.2)
        return True

    def _send(self, message: Mapping[str, Any]) -> None:
        with self._changed:
            try:
                self._socket.sendall(json.dumps(message).encode() + b"\n")
            except OSError as broken:
                raise GuestLost("the machine has ended") from broken

    def _read(self) -> None:
        rest = b""
        while True:
            try:
                piece = self._socket.recv(1 << 16)
            except OSError:
                piece = b""
            if not piece:
                break
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                self._take(json.loads(line))
        with self._changed:
            self._lost = True
            self._changed.notify_all()

    def _take(self, message: dict[str, Any]) -> None:
        with self._changed:
            if message.get("ready"):
                self._ready = True
            command = self._commands.get(message.get("id", 0))
            for stream in ("out", "err"):
                if command is not None and stream in message:
                    piece = base64.b64decode(message[stream])
                    command._pieces.append((stream, piece))
                    if command.on_output is not None:
                        command.on_output(stream, piece)
            if command is not None and "status" in message:
                command.status = message["status"]
                del self._commands[command.number]
            self._changed.notify_all()
