"""`spdk-kv demo --memory-limit`: what survives a limit, and that the report says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from cli.test_demo import environment as environment_fixture
from cli.test_demo import left_over
from spdk_kv.binding.memory_limit import why_impossible
from spdk_kv.cli import main
from spdk_kv.demo.limited import comparison
from spdk_kv.demo.limited.mapped import mapped_cache
from spdk_kv.demo.limited.task import Task, run_in_subprocess

environment = environment_fixture
COMMAND = [sys.executable, "-m", "spdk_kv", "demo"]
MIB = 1 << 20


@pytest.fixture
def groups() -> None:
    if why := why_impossible():
        pytest.skip(why)


@pytest.mark.machine
@pytest.mark.timeout(1200)
def test_only_offloaded_and_mapped_survive_and_tokens_are_equal(
    environment: dict[str, str], groups: None
) -> None:
    words = ["--memory-limit", "64MiB", "--prompt-tokens", "1000", "--new-tokens", "3", "--json"]
    # Under a limit of cgroup v1 nobody who writes is slowed down: if the disk is busy with what
    # other tests left to be written, the kernel may find nothing to reclaim, and kill.
    os.sync()
    result = subprocess.run(
        [*COMMAND, *words], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr
    found = json.loads(result.stdout)
    assert set(found) == {
        *("limit_nbytes", "kv_nbytes", "model", "rows", "prompt_tokens", "new_tokens"),
        *("tokens_equal", "residency", "runs"),
    }
    # 16 layers, K and V, 8 heads of 64, float32; the last token's K/V is never computed.
    assert found["kv_nbytes"] == found["rows"] * 1002 * 16 * 2 * 8 * 64 * 4
    assert 1.4 * 64 * MIB < found["kv_nbytes"] < 3 * 64 * MIB
    assert found["new_tokens"] == 3
    free, offloaded, mapped, memory = found["runs"]
    assert [run["name"] for run in found["runs"]] == [
        *("in memory, no limit", "OffloadedKVCache", "mapped files", "in memory")
    ]
    assert (free["ended"], free["peak_nbytes"]) == ("finished", None)
    assert offloaded["ended"] == mapped["ended"] == "finished"
    assert offloaded["tokens_equal"] is mapped["tokens_equal"] is found["tokens_equal"] is True
    assert (memory["ended"], memory["tokens_equal"]) == ("killed", None)
    assert all(run["peak_nbytes"] <= 64 * MIB for run in found["runs"][1:])
    # The memory that the store took to be available is the group's.
    assert "spdk_kv-" in found["residency"]["limited_by"]
    assert found["residency"]["available_nbytes"] < 64 * MIB
    assert left_over(environment) == []


def test_lines_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    run = {
        "variant": "offloaded", "ended": "finished", "why": "", "tokens_per_s": 12.34,
        "prompt_s": 1.0, "decode_s": 2.0, "peak_nbytes": 64 * MIB, "tokens_equal": True,
    }  # fmt: skip
    killed = run | {"ended": "killed", "why": "no more memory", "tokens_equal": None}
    other = run | {"tokens_equal": False, "peak_nbytes": None}
    report = {
        "limit_nbytes": 64 * MIB, "kv_nbytes": 128 * MIB, "model": "m", "rows": 2,
        "prompt_tokens": 10, "new_tokens": 3, "tokens_equal": False,
        "residency": {"cached_read_nbytes": 1, "direct_read_nbytes": 2, "reason": "budget [bold]"},
        "runs": [{"name": "a", **run}, {"name": "b", **killed}, {"name": "c", **other}],
    }  # fmt: skip
    comparison.print_limited(report)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["a", "12.3", "tokens/s", "1.0", "s", "64.0", "MiB"] in lines
    assert ["b", "killed", "64.0", "MiB", "no", "more", "memory"] in lines
    assert ["c", "12.3", "tokens/s", "1.0", "s", "other", "tokens"] in lines
    assert ["budget", "[bold]."] in lines
    assert any("gave other tokens" in " ".join(line) for line in lines)


def test_mapped_files_hold_what_was_given(tmp_path: Path) -> None:
    from transformers import LlamaConfig, MistralConfig

    cache = mapped_cache(LlamaConfig(num_hidden_layers=2), tmp_path, 20)
    assert cache is not None
    given = torch.randn(2, 3, 12, 8)
    for first, last in ((0, 10), (10, 11), (11, 12)):
        for layer in range(2):
            part = given[:, :, first:last]
            k, v = cache.update(part + layer, -part, layer)
            assert torch.equal(k, given[:, :, :last] + layer)
            assert torch.equal(v, -given[:, :, :last])
    assert cache.get_seq_length() == 12
    assert {file.stat().st_size for file in tmp_path.iterdir()} == {20 * 2 * 3 * 8 * 4}
    assert len(list(tmp_path.iterdir())) == 4
    sliding = MistralConfig(num_hidden_layers=2, sliding_window=8)
    assert mapped_cache(sliding, tmp_path, 20) is None


def test_a_child_that_fails_says_why(tmp_path: Path) -> None:
    task = Task("in memory", str(tmp_path), "", None, str(tmp_path), 10, 2, 64 * MIB)
    found = run_in_subprocess(task)
    assert found.ended == "failed"
    assert "config.json" in found.why


def test_without_cgroups_it_says_what_is_missing(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() == 0:
        monkeypatch.setattr(comparison, "why_impossible", lambda: "no cgroup can be made here")
    result = CliRunner().invoke(main, ["demo", "--memory-limit", "64MiB"], env=environment)
    assert result.exit_code == 1
    assert "--memory-limit needs a memory cgroup of its own" in result.output
    assert left_over(environment) == []


@pytest.mark.parametrize(
    ("size", "complaint"), [("much", "not a byte count"), ("1MiB", "at least 64.0 MiB")]
)
def test_bad_limits(environment: dict[str, str], size: str, complaint: str) -> None:
    result = CliRunner().invoke(main, ["demo", "--memory-limit", size], env=environment)
    assert result.exit_code == 2
    assert complaint in result.output
