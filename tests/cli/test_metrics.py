"""`spdk-kv metrics`: what open stores count, for Prometheus, from outside their processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from spdk_kv.cli import main
from spdk_kv.metrics.published import FILE_NAME
from store.helpers import folder_fixture, open_store
from support.subprocesses import interruptible_fixture
from support.waiting import PATIENCE_S, wait_until

folder = folder_fixture
interruptible = interruptible_fixture


def values(text: str, name: str) -> dict[str, float]:
    """Of each store the value of a metric that has one per store."""
    return {
        each.labels["store"]: each.value
        for family in text_string_to_metric_families(text)
        for each in family.samples
        if each.name == name
    }


def hits_are_told(folder: Path, hits: int) -> None:
    wait_until(lambda: f'"hits":{hits},' in (folder / FILE_NAME).read_text(errors="replace"))


def test_without_a_port_they_are_printed_once(folder: Path) -> None:
    with open_store(folder / "one") as store:
        open_store(folder / "two").close()
        store.put("a", torch.ones(1000))
        store.get("a")
        hits_are_told(folder / "one", 1)
        uris = [f"file://{folder / name}" for name in ("one", "two")]
        result = CliRunner().invoke(main, ["metrics", *uris])
        assert result.exit_code == 0, result.output
        assert values(result.output, "spdk_kv_up") == {uris[0]: 1, uris[1]: 0}
        assert values(result.output, "spdk_kv_hits_total") == {uris[0]: 1}
        # Nothing of the exporter's own process.
        families = text_string_to_metric_families(result.output)
        assert all(family.name.startswith("spdk_kv_") for family in families)


@contextmanager
def served(*words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "spdk_kv", "metrics", *words, "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        yield process, process.stderr.readline().strip()
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as found:
        text: str = found.read().decode()
        return text


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_through_the_lives_of_owners(folder: Path, end: signal.Signals) -> None:
    uri = f"file://{folder}"  # where there is no store yet
    with served(uri) as (process, url):
        assert url.startswith("http://127.0.0.1:")
        assert values(fetch(url), "spdk_kv_up") == {uri: 0}
        with open_store(folder) as store:
            store.put("a", torch.ones(1000))
            for _ in range(3):
                store.get("a")
            hits_are_told(folder, 3)
            text = fetch(url)
            assert values(text, "spdk_kv_up") == {uri: 1}
            assert values(text, "spdk_kv_hits_total") == {uri: 3}
            assert values(text, "spdk_kv_process_cpu_seconds_total")[uri] > 0
        assert values(fetch(url), "spdk_kv_up") == {uri: 0}
        assert values(fetch(url), "spdk_kv_hits_total") == {}
        process.send_signal(end)
        assert process.wait(PATIENCE_S) == (0 if end == signal.SIGTERM else 130)


def test_a_port_that_is_taken(folder: Path) -> None:
    open_store(folder).close()
    with served(f"file://{folder}") as (_, url):
        port = url.rpartition(":")[2].partition("/")[0]
        result = CliRunner().invoke(main, ["metrics", f"file://{folder}", "--port", port])
        assert result.exit_code == 1
        assert f"cannot serve at 127.0.0.1:{port}: Address already in use" in result.output


def test_without_prometheus_client_the_command_is_named(folder: Path) -> None:
    script = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "from spdk_kv.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "metrics", f"file://{folder}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "pip install prometheus-client" in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_input(tmp_path: Path) -> None:
    for words, status, complaint in (
        ([], 2, "Missing argument"),
        ([f"file://{tmp_path}"], 1, "no store at file://"),
        (["null://"], 2, "spdk_kv.metrics.register(store)"),
        ([f"file://{tmp_path}", "--port", "99999"], 2, "65535"),
    ):
        result = CliRunner().invoke(main, ["metrics", *words])
        assert (result.exit_code, complaint in result.output) == (status, True), result.output
    assert list(tmp_path.iterdir()) == []
