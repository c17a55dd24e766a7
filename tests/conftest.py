"""What holds for every test: which of them run when, and how hypothesis looks for examples.

scripts/test.sh runs pytest twice: all but the tests marked `machine` on two workers, then those
alone, one after the other. Plain `pytest` runs both kinds together.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from support.rounds import LONG
from support.summary import write_summary

TESTS = Path(__file__).parent
# Where spdk_kv is installed, the package in the checkout lacks what was compiled, and `python -m
# pytest` puts it in front. An editable install needs no path.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != TESTS.resolve().parent]
# Longest first, so that no worker is left with a long one at the end.
FIRST = ("engines/spdk/", "test_packaging.py", "store/", "bench/", "cli/")
# Each module starts a target that keeps a core busy and takes hugepages: one at a time.
TOGETHER = "tests/engines/spdk/"

# How long an example takes depends on what else runs; what hangs, the timeout of the test ends.
# Most state lives in a folder that each example makes for itself.
COMMON = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.register_profile("default", COMMON, derandomize=True)
settings.register_profile("long", COMMON)
settings.load_profile("long" if LONG else "default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--machine-tests",
        choices=("include", "exclude", "only"),
        default="include",
        help="what to do with the tests marked `machine` (default: include)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    which = config.getoption("--machine-tests")
    kept, left_out = [], []
    for item in items:
        if item.get_closest_marker("long") and not LONG:
            item.add_marker(pytest.mark.skip(reason="a long run: scripts/test.sh --long"))
        is_machine = item.get_closest_marker("machine") is not None
        wanted = which == "include" or is_machine == (which == "only")
        (kept if wanted else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
    items[:] = sorted(kept, key=_place)


@pytest.fixture(scope="session", autouse=True)
def _folder_without_packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The children's working folder: `python -c` and `-m` import from there before all else."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("work"))
    yield
    os.chdir(before)


def _place(item: pytest.Item) -> int:
    path = item.path.relative_to(TESTS).as_posix() if TESTS in item.path.parents else ""
    return next((at for at, start in enumerate(FIRST) if path.startswith(start)), len(FIRST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object | None:
    """With --dist loadfile, what is in the folder ``TOGETHER`` goes to one worker as a whole."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return TOGETHER if nodeid.startswith(TOGETHER) else super()._split_scope(nodeid)

    return Scheduling(config, log)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if hasattr(terminalreporter.config, "workerinput"):
        return  # a worker of pytest-xdist, whose tests the main process counts
    only_machine = terminalreporter.config.getoption("--machine-tests") == "only"
    path = os.environ.get("SPDK_KV_TEST_SUMMARY")
    write_summary(terminalreporter, only_machine, Path(path) if path else None)
