from typing import Any

class MemoryBackend:
    backend: Any
    def __init__(self, nbytes: int) -> None: ...
