"""``spdk-kv demo`` as a user runs it: a process of its own, its output, its end."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from spdk_kv.cli import main
from spdk_kv.demo.generation import Generation
from spdk_kv.demo.model import ByteTokenizer, read_text
from spdk_kv.demo.report import Report, print_report
from spdk_kv.store import open as open_store
from spdk_kv.types import KVShape
from support.subprocesses import interruptible_fixture
from support.terminal import read_terminal
from support.waiting import PATIENCE_S

interruptible = interruptible_fixture
COMMAND = [sys.executable, "-m", "spdk_kv", "demo"]
SMALL = ["--prompt-tokens", "200", "--new-tokens", "5"]
FIELDS = {
    "tokens_equal": bool,
    "new_tokens": int,
    "tokens_per_s_memory": float,
    "tokens_per_s_offloaded": float,
    "kv_nbytes": int,
    "written_nbytes": int,
    "read_nbytes": int,
    "cached_read_nbytes": int,
    "peak_rss_nbytes": int,
    "engine": str,
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    # One thread: small matrices gain nothing from two, and lose much beside other tests.
    own = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    return os.environ | own


def demo(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *words], env=environment, capture_output=True, text=True, check=False
    )


def demo_here(environment: dict[str, str], *words: str) -> Result:
    """In this process, where torch is loaded already."""
    env = {"XDG_CACHE_HOME": environment["XDG_CACHE_HOME"], "COLUMNS": "400"}
    return CliRunner().invoke(main, ["demo", *words], env=env)


def left_over(environment: dict[str, str]) -> list[Path]:
    return list(Path(environment["XDG_CACHE_HOME"], "spdk_kv").glob("demo-*"))


def test_json(environment: dict[str, str]) -> None:
    result = demo(environment, *SMALL, "--json")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert {name: type(found[name]) for name in FIELDS} == FIELDS
    assert found["tokens_equal"] is True
    assert found["new_tokens"] == 5
    # 8 layers, K and V, 8 heads of 64, float32; the last token's K/V is never computed.
    assert found["kv_nbytes"] == 204 * 8 * 2 * 8 * 64 * 4
    chunk = 16 << 10
    # Each head of them has an extent of its own: attention is computed on the CPU.
    whole = 204 * 64 * 4 // chunk * chunk * 2 * 8 * 8
    assert found["written_nbytes"] == whole
    # Every one of the 4 steps after the prompt read everything that was on the drive, by one path
    # or the other.
    assert 4 * 0.95 * whole < found["read_nbytes"] < 5 * whole
    assert 0 <= found["cached_read_nbytes"] <= found["read_nbytes"]
    assert found["resident_kv_nbytes"] == found["kv_nbytes"] // 4
    assert found["engine"] in ("uring", "threads")
    assert left_over(environment) == []


def test_pipe_gets_the_report_and_no_progress(environment: dict[str, str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Zwölf Boxkämpfer jagen Viktor quer über den großen Deich. " * 5)
    location = f"file://{tmp_path}/kv"
    result = demo(environment, *SMALL, "--text", str(text), "--location", location)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "\x1b" not in result.stdout
    assert "All 5 tokens are equal" in result.stdout
    assert "gibberish" in result.stdout
    assert "2 of 8 layers" in result.stdout
    assert location in result.stdout
    assert all(len(line) < 80 for line in result.stdout.splitlines() if location not in line)
    # The store stays, and nothing of the demo in it.
    with open_store(location, create=False) as store:
        assert store.sequences() == []
        assert len(store) == 0
        assert store.stats()["used_nbytes"] == 0
    assert left_over(environment) == []


@pytest.mark.usefixtures("interruptible")
def test_interrupt_ends_cleanly(environment: dict[str, str]) -> None:
    primary, secondary = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "--prompt-tokens", "50", "--new-tokens", "60"],
        env=environment | {"TERM": "xterm"}, stdout=subprocess.PIPE, stderr=secondary,
    )  # fmt: skip
    os.close(secondary)
    shown = read_terminal(primary, lambda shown: b"on the drive" in shown)
    assert left_over(environment) != []
    process.send_signal(signal.SIGINT)
    shown += read_terminal(primary, lambda shown: b"interrupted" in shown)
    assert process.wait(timeout=PATIENCE_S) == 130
    assert b"in memory" in shown  # the bar: standard error was a terminal
    assert b"Traceback" not in shown
    assert left_over(environment) == []
    assert process.stdout is not None
    assert process.stdout.read() == b""
    process.stdout.close()
    os.close(primary)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer, saved as transformers saves them."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("model") / "tiny"
    words = {word: number for number, word in enumerate(["?", *read_text(None).split()[:200]])}
    words = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=len(words), hidden_size=64, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=400,
        initializer_range=0.2, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_model_from_a_folder(environment: dict[str, str], model_folder: Path) -> None:
    result = demo_here(environment, *SMALL, "--model", str(model_folder), "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["tokens_equal"] is True
    assert found["kv_nbytes"] == 204 * 3 * 2 * 2 * 64 * 2
    assert found["read_nbytes"] > 0


def test_bad_arguments(environment: dict[str, str], model_folder: Path, tmp_path: Path) -> None:
    empty, binary, short = (tmp_path / name for name in ("empty", "binary", "short"))
    empty.write_text(" \n")
    binary.write_bytes(b"ab\xff")
    short.write_text("abc")
    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    hollow = tmp_path / "hollow"
    hollow.mkdir()
    cases: list[tuple[list[str], int, str]] = [
        (["--text", str(tmp_path / "none")], 2, "does not exist"),
        (["--text", str(tmp_path)], 2, "is a directory"),
        (["--text", str(empty)], 2, "holds no text"),
        (["--text", str(binary)], 2, "not UTF-8 text (byte 2)"),
        (["--text", str(short)], 2, "has only 3 tokens, not 2048; lower it to 3"),
        (["--model", str(tmp_path / "none")], 2, "does not exist"),
        (["--model", str(hollow)], 1, "has no config.json"),
        (["--model", str(broken)], 1, "can load"),
        (["--model", str(model_folder)], 2, "takes at most 400"),
        (["--new-tokens", "0"], 2, "not in the range"),
        (["--location", "nonsense://x", *SMALL], 2, "ram://"),
        (["--page-cache-dir", str(tmp_path)], 2, "--page-cache-dir requires --location"),
        (
            ["--location", f"file://{tmp_path}/kv", "--page-cache-dir", str(tmp_path), *SMALL],
            2,
            "needs no folder for the page cache",
        ),
    ]
    for words, status, complaint in cases:
        result = demo_here(environment, *words)
        assert result.exit_code == status, (words, result.output)
        assert complaint in result.output, (words, result.output)
        assert "Traceback" not in result.output


def test_without_transformers_it_says_what_to_install(environment: dict[str, str]) -> None:
    hide = "import sys; sys.modules['transformers'] = None; from spdk_kv.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", hide, "demo"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert "pip install 'spdk_kv[transformers]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_differing_tokens_are_reported_with_status_1(environment: dict[str, str]) -> None:
    # The null engine keeps no bytes, so what comes back is not what was stored.
    result = demo_here(environment, *SMALL, "--location", "null://")
    assert result.exit_code == 1, result.output
    assert "The tokens differ after the first" in result.stdout


def test_report_cannot_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    tokens = list(b"a\x1b[2Jb\r\nc [bold] \x07\xff")
    run = Generation(tokens, 1.0, 1.0, 1 << 20)
    model: Any = type("Chosen", (), {"label": "x", "tokenizer": ByteTokenizer(), "trained": True})
    report = Report(
        chosen=model, parameters=1, shape=KVShape(4, 1, 8, "float32", 10), prompt_tokens=3,
        memory=run, offloaded=run, kv_nbytes=64, resident_layers=2, prefetch_hits=0,
        read_wait_s=0.0, written_nbytes=0, read_nbytes=0, cached_read_nbytes=0, engine="ram", location="ram://",
        temporary=False,
    )  # fmt: skip
    print_report(report)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "a·[2Jb c [bold] ··" in shown
