"""llama-cpp-python: the states of a `Llama`, kept on the drive. Tested with 0.3.36.

`cache.py` is what the host sees. `keys.py` says which pieces of a text are kept, and under which
keys; `contexts.py` takes them out of llama.cpp and puts them back; `identity.py` says of which
model and settings they are; `serve.py` starts the host's server with such a cache. The host is
imported when a cache is made, not before.
"""

from __future__ import annotations

from spdk_kv.integrations.llama_cpp.cache import StateCache

__all__ = ["StateCache"]
