"""What `spdk-kv demo` runs and prints."""

from __future__ import annotations

from spdk_kv.demo.generation import run
from spdk_kv.demo.limit import print_limited, require_groups, run_all
from spdk_kv.demo.limited import Task
from spdk_kv.demo.model import (
    DemoModel,
    kv_nbytes,
    load_model,
    prompt_tokens,
    random_model,
    read_text,
    require_transformers,
)
from spdk_kv.demo.report import Report, print_report

__all__ = [
    "DemoModel",
    "Report",
    "Task",
    "kv_nbytes",
    "load_model",
    "print_limited",
    "print_report",
    "prompt_tokens",
    "random_model",
    "read_text",
    "require_groups",
    "require_transformers",
    "run",
    "run_all",
]
