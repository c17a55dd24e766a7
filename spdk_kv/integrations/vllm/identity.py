"""What keeps the blocks of other models, layouts and parts apart: a key is a hash of it and of
vLLM's key, which says which tokens a block is of, and nothing else."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

log = logging.getLogger(__name__)

# Of 128 bits: two of 2^40 keys are the same with a chance of 2^-49.
_KEY_NBYTES = 16
# Without the padding: 22 characters.
_KEY_LENGTH = -(-_KEY_NBYTES * 8 // 6)


class Keys:
    """Keys of the store for one model, layout and rank."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        """``facts``: whatever must be the same for a block to be used again, as plain JSON."""
        canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"))
        self._seed = hashlib.blake2b(canonical.encode(), digest_size=64).digest()

    def __call__(self, key: bytes) -> str:
        """The key in the store for a key of vLLM's, of any length. Short, since a store keeps
        millions of them in memory."""
        # Hashed with a key: the end of the facts cannot be taken for the beginning of vLLM's key.
        digest = hashlib.blake2b(key, digest_size=_KEY_NBYTES, key=self._seed).digest()
        return urlsafe_b64encode(digest)[:_KEY_LENGTH].decode("ascii")


def weights_of(model: str, identity: str) -> list[Any]:
    """What tells the weights of ``model`` from others of its name: ``identity`` where it is given,
    else names, sizes and times of the files, where the model is a folder. Blocks on its disk."""
    if identity:
        return ["identity", identity]
    if not os.path.isdir(model):
        log.warning(
            "spdk_kv knows the model %r by its name only: set the tier's option identity (to the "
            "revision, say) where other weights may come under that name",
            model,
        )
        return ["name"]
    found = []
    for folder, _, names in os.walk(model):
        for name in names:
            path = os.path.join(folder, name)
            # As with what is left of a download: a link to nothing.
            with suppress(OSError):
                state = os.stat(path)
                found.append([os.path.relpath(path, model), state.st_size, state.st_mtime_ns])
    return ["files", sorted(found)]
