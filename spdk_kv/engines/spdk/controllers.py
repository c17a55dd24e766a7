"""The controllers of this process: one connection each, which its engines share."""

from __future__ import annotations

import threading
from types import ModuleType
from typing import Any

from spdk_kv.engines.location import Location
from spdk_kv.engines.spdk import environment
from spdk_kv.engines.spdk.refusal import refusal
from spdk_kv.errors import DeviceGone, DeviceTimeout

# How long to wait while another thread connects to the same controller, or lets go of it.
_OTHERS_S = 12.0


class _Connection:
    """A controller and the number of its users. ``lock`` is held while it is connected or closed,
    which waits for that controller, and so holds up nobody but those who want the same."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.controller: Any = None
        self.users = 0  # guarded by _lock, with those who wait
        self.attempts = 0
        self.refused = OSError()  # the last attempt


_connections: dict[str, _Connection] = {}
_lock = threading.Lock()


def transport_id(location: Location) -> str:
    """SPDK's transport ID for ``location``."""
    if location.scheme == "spdk":
        return f"trtype:PCIe traddr:{location.path}"
    if location.scheme == "spdk+vfiouser":
        return f"trtype:VFIOUSER traddr:{location.path} subnqn:{location.nqn}"
    family = "IPv6" if ":" in location.host else "IPv4"
    return (
        f"trtype:TCP adrfam:{family} traddr:{location.host} trsvcid:{location.port} "
        f"subnqn:{location.nqn}"
    )


def acquire(location: Location) -> Any:
    """The connection to the controller of ``location``. Blocks while it connects, 12 s at most (a
    PCIe drive: as long as it takes to become ready). Raises DeviceGone, DeviceTimeout or
    EngineUnavailable, which says why."""
    spdk = environment.bindings()
    name = transport_id(location)
    with _lock:
        connection = _connections.setdefault(name, _Connection())
        connection.users += 1
    attempts = connection.attempts
    try:
        if not connection.lock.acquire(timeout=_OTHERS_S):
            raise DeviceTimeout(
                f"{location}: another thread has waited for this drive for {_OTHERS_S:g} s",
                op="open",
            )
        try:
            if connection.controller is None:
                if connection.attempts > attempts:
                    raise connection.refused  # while this one waited; it need not wait again
                connection.controller = _connect(spdk, name, location)
            return connection.controller
        except OSError as refused:
            if refused is not connection.refused:
                connection.refused = refused
                connection.attempts += 1
            reach_nbytes = environment.settings().memory_nbytes
            raise refusal(location, refused, reach_nbytes) from refused
        finally:
            connection.lock.release()
    except BaseException:
        _leave(name, connection)
        raise


def _connect(spdk: ModuleType, name: str, location: Location) -> Any:
    controller = spdk.Controller(name)
    if location.scheme == "spdk+vfiouser":
        # The transport has no word for it, and takes whatever is at the socket.
        found = controller.describe()["nqn"]
        if found not in ("", location.nqn):
            controller.close()
            raise DeviceGone(
                f"the vfio-user target at {location.path} is {found}, not {location.nqn}; its "
                "namespaces are not touched"
            )
    return controller


def release(location: Location) -> None:
    """Undoes :func:`acquire`; the last user disconnects, which blocks."""
    name = transport_id(location)
    _leave(name, _connections[name])


def _leave(name: str, connection: _Connection) -> None:
    with _lock:
        connection.users -= 1
        last = not connection.users
    if not last:
        return
    with connection.lock:
        with _lock:
            # Somebody may have come meanwhile, or was the last one and has done this.
            if connection.users or _connections.get(name) is not connection:
                return
        if connection.controller is not None:
            connection.controller.close()
            connection.controller = None
        with _lock:
            if not connection.users:
                del _connections[name]
