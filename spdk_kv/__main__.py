"""``python -m spdk_kv``: the same as the command ``spdk-kv``."""

from __future__ import annotations

from spdk_kv.cli import main

if __name__ == "__main__":
    main(prog_name="spdk-kv")
