"""Where the demo's files lie: below the user's cache folder, on a drive."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from spdk_kv.terminal import CommandFailed

PRETRAINED = "SmolLM2-135M-Instruct"
"""The small trained model that `python -m spdk_kv.demo.fetch` brings."""

# Not /tmp: it is often in memory, and nothing would be read from a drive.
_CACHE = "XDG_CACHE_HOME"


def cache_folder() -> Path:
    """The folder of all that the demo keeps; it need not exist."""
    return Path(os.environ.get(_CACHE) or Path.home() / ".cache") / "spdk_kv"


def pretrained_folder() -> Path:
    """Where that model is, once it was fetched: a folder of transformers."""
    return cache_folder() / "models" / PRETRAINED


def is_fetched() -> bool:
    """Whether it was. It comes into its place whole."""
    return pretrained_folder().is_dir()


def temporary_folder(prefix: str, remedy: str) -> Path:
    """A new folder in there, for its owner only.

    Args:
        prefix: How its name begins.
        remedy: What the user may do instead, for the error's message.

    Raises:
        CommandFailed: It cannot be made.
    """
    cache = cache_folder()
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=prefix, dir=cache))
    except OSError as error:
        raise CommandFailed(
            f"cannot make a temporary folder in {cache}: {error.strerror}; {remedy}"
        ) from error
