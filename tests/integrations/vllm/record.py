"""vLLM's contract with a secondary tier: `signatures.json`, by version and class.

cd tests; python -m integrations.vllm.record     adds the version that is installed
"""

from __future__ import annotations

import inspect
from pathlib import Path

from integrations.signatures import Recorded, load, record, save

PATH = Path(__file__).with_name("signatures.json")
_WHOLE = load(PATH) if PATH.exists() else {}
VERSIONS = tuple(sorted({name.split()[0] for name in _WHOLE}))


def recorded(version: str) -> dict[str, Recorded]:
    """By the name of the class."""
    prefix = f"{version} "
    return {
        name.removeprefix(prefix): methods
        for name, methods in _WHOLE.items()
        if name.startswith(prefix)
    }


def recorded_now() -> dict[str, Recorded]:
    """The same of the vLLM that is installed."""
    from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

    methods = [
        name
        for name, value in vars(SecondaryTierManager).items()
        if (inspect.isfunction(value) or isinstance(value, (classmethod, staticmethod)))
        and (name == "__init__" or not name.startswith("_"))
    ]
    return {
        "SecondaryTierManager": record(SecondaryTierManager, methods),
        "JobResult": record(JobResult, ["__init__"]),
        "TransferJob": record(TransferJob, ["__init__"]),
    }


if __name__ == "__main__":
    import vllm

    version = ".".join(vllm.__version__.split(".")[:2])
    _WHOLE.update({f"{version} {name}": found for name, found in recorded_now().items()})
    save(PATH, _WHOLE)
