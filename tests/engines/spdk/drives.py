"""Namespaces of a running target in the place of data files, so that the store's tests, and the
processes that they start, run on the engine `spdk` as they are."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spdk_kv.engines.spdk import environment
from spdk_kv.units import parse_nbytes

NQN = "nqn.2026-11.io.spdk-kv:test"
# Small enough that any machine has it, and for the smaller commands of the tests enough.
SETTINGS = environment.SpdkSettings(hugepages=False, memory_nbytes=512 << 20)
_VARIABLE = "SPDK_KV_TEST_DRIVES"
MOST_NAMESPACES = 32
_BLOCK_NBYTES = 4096
# Beside the capacity: the superblock's MiB.
_MORE_NBYTES = 1 << 20


def rpc(path: Path, method: str, **parameters: Any) -> Any:
    """One JSON-RPC call to the target at a socket; RuntimeError where it refuses."""
    request: dict[str, Any] = {"jsonrpc": "2.0", "id": 1, "method": method}
    if parameters:
        request["params"] = parameters
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(path))
        connection.sendall(json.dumps(request).encode())
        answer = b""
        while True:
            received = connection.recv(65536)
            if not received:
                raise ConnectionError("the target closed the connection")
            answer += received
            try:
                response = json.loads(answer)
            except ValueError:
                continue
            break
    if "error" in response:
        raise RuntimeError(f"{method}: {response['error']}")
    return response.get("result")


@contextlib.contextmanager
def drives(folder: Path, rpc_path: Path, uri: str) -> Iterator[None]:
    """While it lasts, stores in folders have their data on namespaces of their own, here and in
    child processes. ``folder``: for the books; ``uri``: of the target, without a namespace. The
    namespaces go at the end, when nothing uses them any more."""
    books = folder / "drives.json"
    books.write_text(json.dumps({"rpc": str(rpc_path), "uri": uri, "of": {}}))
    os.environ[_VARIABLE] = str(books)
    try:
        yield
    finally:
        del os.environ[_VARIABLE]
        for nsid in json.loads(books.read_text())["of"].values():
            _remove(rpc_path, nsid)


def in_use() -> bool:
    """Whether :func:`drives` is in force."""
    return _VARIABLE in os.environ


def instead_of(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``spdk_kv.open`` for a store whose index lies in ``folder``.

    A first opening makes a namespace for ``capacity``. The engine that the options name is left
    out, since there is one only.
    """
    with contextlib.suppress(environment.EngineUnavailable):
        environment.configure(SETTINGS)
    with _books() as books:
        name = str(folder.resolve())
        nsid = books["of"].get(name)
        if nsid is None and options.get("create") is not False:
            nsid = _free_number(books)
            books["of"][name] = nsid
            _add(Path(books["rpc"]), nsid, parse_nbytes(options["capacity"]) + _MORE_NBYTES)
    wanted = {name: value for name, value in options.items() if name not in ("engine", "mmap")}
    # As a folder would: whoever was killed before the first superblock left a blank drive.
    wanted.setdefault("create", True)
    return wanted | {"location": f"{books['uri']}/{nsid or 1}", "index_dir": folder}


def uri_of(folder: Path) -> str:
    """Where the data of the store in ``folder`` is."""
    with _books() as books:
        return f"{books['uri']}/{books['of'][str(folder.resolve())]}"


@contextlib.contextmanager
def _books() -> Iterator[dict[str, Any]]:
    """Read, and put back whole, by one process at a time: any of them may be killed at any time."""
    path = Path(os.environ[_VARIABLE])
    with path.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = path.read_text()
        books = json.loads(text)
        yield books
        if json.dumps(books) != text:
            new = path.with_suffix(".new")
            new.write_text(json.dumps(books))
            new.replace(path)


def _free_number(books: dict[str, Any]) -> int:
    """A namespace's number that nothing uses; those of stores that were removed are free again."""
    for folder, nsid in list(books["of"].items()):
        if not os.path.exists(folder):
            _remove(Path(books["rpc"]), nsid)
            del books["of"][folder]
    return next(n for n in range(1, MOST_NAMESPACES) if n not in books["of"].values())


def _add(rpc_path: Path, nsid: int, nbytes: int) -> None:
    name = f"Drive{nsid}"
    size = {"num_blocks": nbytes // _BLOCK_NBYTES, "block_size": _BLOCK_NBYTES}
    identity = f"00000000-0000-4000-8000-{nsid:012}"
    rpc(rpc_path, "bdev_malloc_create", name=name, uuid=identity, **size)
    rpc(rpc_path, "nvmf_subsystem_add_ns", nqn=NQN, namespace={"bdev_name": name, "nsid": nsid})


def _remove(rpc_path: Path, nsid: int) -> None:
    rpc(rpc_path, "nvmf_subsystem_remove_ns", nqn=NQN, nsid=nsid)
    rpc(rpc_path, "bdev_malloc_delete", name=f"Drive{nsid}")
