"""Of which model and settings a state is: what has to be equal for it to be taken up again."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from spdk_kv.errors import SpdkKvError
from spdk_kv.store import KVStore

PREFIX = "llama_cpp/"
"""How the keys of everything begin that is stored here."""

# A model in several files is opened by its first: NAME-00001-of-00003.gguf.
_SPLIT = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")
_READ_NBYTES = 8 << 20

# Settings that change how fast a state is computed, and not what it is. Any other counts, those of
# later releases too.
_OF_SPEED = {
    *("n_batch", "n_ubatch", "n_threads", "n_threads_batch", "offload_kqv", "op_offload"),
    *("no_perf", "n_ctx", "n_outputs_max"),
}


def fingerprint(store: KVStore, llama: Any) -> str:
    """32 hexadecimal digits that are others for another model file, adapter, setting of the context
    or release of llama-cpp-python.

    Blocks: reads every byte of the model's files, once for each file; the digest is kept in
    ``store`` until the file's size or times change.
    """
    import llama_cpp

    params = llama.context_params
    settings = {
        name: repr(getattr(params, name))
        for name, kind, *_ in params._fields_
        if name not in _OF_SPEED and issubclass(kind, ctypes._SimpleCData) and _is_plain(kind)
    }
    identity = {
        "host": llama_cpp.__version__,
        "files": [_digest(store, path) for path in _files(Path(llama.model_path))],
        "adapter": [_digest(store, Path(llama.lora_path)), llama.lora_scale]
        if llama.lora_path
        else None,
        "overrides": repr(sorted((llama.kv_overrides or {}).items())),
        # Some models turn their keys by other angles when the context is long.
        "n_ctx": llama.n_ctx(),
        "context": settings,
    }
    text = json.dumps(identity, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _is_plain(kind: type) -> bool:
    """Whether a field is a number, and not the address of something."""
    return not issubclass(kind, (ctypes.c_void_p, ctypes.c_char_p))


def _files(path: Path) -> list[Path]:
    split = _SPLIT.match(path.name)
    if split is None:
        return [path]
    name, _, number = split.groups()
    return [
        path.with_name(f"{name}-{part:05}-of-{number}.gguf") for part in range(1, int(number) + 1)
    ]


def _digest(store: KVStore, path: Path) -> str:
    """The SHA-256 of a file, from ``store`` where it was read before and did not change since."""
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        state = [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
        name = hashlib.blake2b(os.fsencode(path.resolve()), digest_size=16).hexdigest()
        key = f"{PREFIX}files/{name}"
        try:
            known = json.loads(store.get(key, as_numpy=True).tobytes())
            if known["state"] == state:
                return str(known["sha256"])
        except SpdkKvError:
            pass  # never read, or not readable: it is read now
        digest = hashlib.sha256()
        buffer = bytearray(_READ_NBYTES)
        while read := file.readinto(buffer):
            digest.update(memoryview(buffer)[:read])
    known = {"state": state, "sha256": digest.hexdigest()}
    if not store.read_only:
        with suppress(SpdkKvError):  # it is read again next time
            store.put(key, np.frombuffer(json.dumps(known).encode(), np.uint8))
    return str(known["sha256"])
