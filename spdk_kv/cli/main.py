"""``spdk-kv``: the command line. Each command is in a module of its own, loaded when called."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version

import click

from spdk_kv.cli.lazy import LazyGroup

try:
    VERSION = version("spdk_kv")
except PackageNotFoundError:  # a checkout that was never installed
    VERSION = "0.0.0+uninstalled"

# Name -> (module:attribute, line in the help). The line stands here because asking the command for
# it would import the command and torch, which takes seconds.
COMMANDS = {
    "bench": ("spdk_kv.cli.bench.group:bench", "Measure a drive, an engine or a policy."),
    "demo": ("spdk_kv.cli.demo:demo", "Let a model decode with its KV cache on the drive."),
    "device": ("spdk_kv.cli.device:device", "Take a drive from the kernel, or give it back."),
    "doctor": (
        "spdk_kv.cli.doctor.command:doctor",
        "Show what this machine offers and how to fix what is missing.",
    ),
    "fit": ("spdk_kv.cli.fit:fit", "Fit low-rank adapters to a model's keys."),
    "metrics": ("spdk_kv.cli.metrics:metrics", "Export what stores count, for Prometheus."),
    "stat": ("spdk_kv.cli.stat.command:stat", "Show what a store holds."),
    "top": ("spdk_kv.cli.top.command:top", "Watch what open stores do."),
    "trim": ("spdk_kv.cli.trim:trim", "Give a store's free space back."),
    "tune": (
        "spdk_kv.cli.tune.command:tune",
        "Choose settings for reading a part of the KV cache.",
    ),
}


@click.group(cls=LazyGroup, commands_at=COMMANDS)
@click.version_option(VERSION, prog_name="spdk-kv")
@click.option("-v", "--verbose", count=True, help="Log to stderr; twice for debugging.")
def main(verbose: int) -> None:
    """Keep KV caches of large language models on an NVMe drive."""
    if verbose:
        # Only this package's logger: the root logger would also show those of torch and others.
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logger = logging.getLogger("spdk_kv")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if verbose == 1 else logging.DEBUG)
