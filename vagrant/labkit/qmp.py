"""QEMU's own control socket (QMP): unplugging drives, and whatever else QEMU can be asked."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

# A busy host lets QEMU wait long, too.
_ANSWER_S = 120.0


class QmpError(Exception):
    """QEMU refused a command."""


class Qmp:
    """A connection to QEMU. One thread at a time."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("r", encoding="utf-8")
        self._events: list[dict[str, Any]] = []
        self._receive(_ANSWER_S)  # the greeting
        self.execute("qmp_capabilities")

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        self._socket.settimeout(timeout_s)
        line = self._lines.readline()
        if not line:
            raise QmpError("QEMU has ended")
        message: dict[str, Any] = json.loads(line)
        return message

    def execute(self, command: str, **arguments: object) -> Any:
        """Runs ``command`` (underscores in argument names stand for hyphens)."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        request = json.dumps({"execute": command, "arguments": named})
        self._socket.sendall(request.encode() + b"\n")
        while True:
            message = self._receive(_ANSWER_S)
            if "error" in message:
                raise QmpError(f"{command}: {message['error'].get('desc')}")
            if "return" in message:
                return message["return"]
            self._events.append(message)

    def wait_event(self, name: str, timeout_s: float = 30.0, **data: object) -> dict[str, Any]:
        """The next event ``name`` that carries ``data``. TimeoutError."""
        until = time.monotonic() + timeout_s
        while True:
            for number, event in enumerate(self._events):
                fields = event.get("data", {})
                if event.get("event") == name and data.items() <= fields.items():
                    return self._events.pop(number)
            left_s = until - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(f"no event {name} {data or ''} within {timeout_s} s")
            self._events.append(self._receive(left_s))

    def close(self) -> None:
        """Closes the socket; QEMU goes on."""
        self._lines.close()
        self._socket.close()
