"""What `spdk-kv demo` runs and prints."""

from __future__ import annotations

from spdk_kv.demo.asking.question import shipped_question
from spdk_kv.demo.asking.report import Answers, print_answers
from spdk_kv.demo.asking.run import ask
from spdk_kv.demo.asking.ways import WAYS
from spdk_kv.demo.generation import generate
from spdk_kv.demo.limited.comparison import print_limited, require_memory_cgroup, run_limited
from spdk_kv.demo.limited.task import Task
from spdk_kv.demo.model import (
    DemoModel,
    kv_nbytes,
    load_model,
    prompt_tokens,
    random_model,
    read_text,
    require_transformers,
)
from spdk_kv.demo.places import is_fetched, pretrained_folder, temporary_folder
from spdk_kv.demo.report import Report, print_report

__all__ = [
    "WAYS",
    "Answers",
    "DemoModel",
    "Report",
    "Task",
    "ask",
    "generate",
    "is_fetched",
    "kv_nbytes",
    "load_model",
    "pretrained_folder",
    "print_answers",
    "print_limited",
    "print_report",
    "prompt_tokens",
    "random_model",
    "read_text",
    "require_memory_cgroup",
    "require_transformers",
    "run_limited",
    "shipped_question",
    "temporary_folder",
]
