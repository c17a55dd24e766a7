#!/usr/bin/env python3
"""Runs commands inside the lab's guest for the host; see labkit/guestlink.py.

Reads lines of JSON from the virtio-serial port ``spdk_kv.lab`` and answers on it. Ends when the
host hangs up, and the machine with it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pwd
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

PORT = "spdk_kv.lab"


def find_port() -> str:
    """The port's device: without udev there are no links by name."""
    for _ in range(600):
        for name in Path("/sys/class/virtio-ports").glob("*/name"):
            if name.read_text().strip() == PORT:
                return f"/dev/{name.parent.name}"
        time.sleep(0.1)
    raise SystemExit(f"no virtio-serial port {PORT}")


class Agent:
    def __init__(self, port: int) -> None:
        self._port = port
        self._writing = threading.Lock()
        self._running: dict[int, subprocess.Popen[bytes]] = {}

    def say(self, **message: object) -> None:
        line = json.dumps(message).encode() + b"\n"
        with self._writing:
            while line:
                line = line[os.write(self._port, line) :]

    def serve(self) -> None:
        self.say(ready=True)
        rest = b""
        waiter = select.poll()
        waiter.register(self._port, 0)
        while True:
            piece = os.read(self._port, 1 << 16)
            if not piece:
                return  # the host has hung up
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                message = json.loads(line)
                if message["do"] == "run":
                    threading.Thread(target=self._run, args=(message,), daemon=True).start()
                elif message["do"] == "signal":
                    self._signal(message["id"], message["signal"])

    def _signal(self, number: int, which: int) -> None:
        running = self._running.get(number)
        if running is not None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.killpg(running.pid, which)

    def _run(self, message: dict) -> None:
        number = message["id"]
        home, identity = "/root", {}
        if message["user"] is not None:
            user = message["user"]
            known = pwd.getpwuid(user) if isinstance(user, int) else pwd.getpwnam(user)
            home = "/tmp"
            identity = {"user": known.pw_uid, "group": known.pw_gid}
            identity["extra_groups"] = message["groups"]
        env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        env |= {"HOME": home, "TERM": "dumb", "LANG": "C.UTF-8"}
        try:
            running = subprocess.Popen(
                message["argv"],
                env=env | message["env"],
                cwd=message["cwd"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                **identity,
            )
        except (OSError, ValueError) as refused:
            self.say(id=number, err=base64.b64encode(f"{refused}\n".encode()).decode(), status=127)
            return
        self._running[number] = running
        ended = threading.Event()
        copying = [
            threading.Thread(target=self._copy, args=(number, name, pipe, ended), daemon=True)
            for name, pipe in (("out", running.stdout), ("err", running.stderr))
        ]
        for thread in copying:
            thread.start()
        status = running.wait()
        ended.set()
        for thread in copying:
            thread.join()
        del self._running[number]
        self.say(id=number, status=status)

    def _copy(self, number: int, name: str, pipe: IO[bytes], ended: threading.Event) -> None:
        """Until its end; or, as what a command left in the background may hold the pipe for ever,
        until the command has ended and all that it wrote was read."""
        waiter = select.poll()
        waiter.register(pipe, select.POLLIN)
        with pipe:
            while True:
                last = ended.is_set()
                if waiter.poll(0 if last else 100):
                    piece = os.read(pipe.fileno(), 1 << 15)
                    if not piece:
                        return
                    self.say(id=number, **{name: base64.b64encode(piece).decode()})
                elif last:
                    return


def main() -> None:
    # Ctrl-C on the console is for a person's shell.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    port = os.open(find_port(), os.O_RDWR)
    Agent(port).serve()


if __name__ == "__main__":
    sys.exit(main())
