"""What README and docs show is what happens: their Python runs, page by page and in order, and the
outputs below it and below commands are those that come.

A block's info string says how it is meant: `python` runs; `python given=model` runs with a small
`model` and its `inputs`; `python no-run: REASON` is compiled only. `output` is what the Python
block before it prints. `console` has lines `$ spdk-kv ...`, each with its output. Figures in
outputs may differ, and `...` stands for anything.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaConfig, LlamaForCausalLM

from docs.pages import Block, Page, pages
from spdk_kv.cli import main
from spdk_kv.integrations.transformers import CACHE_ARGUMENT

LANGUAGES = {"python", "output", "console", "sh", "text"}
# Folders of the examples, and where they lie in a test.
PLACES = {"/var/cache/kv": "kv", "/mnt/nvme": "nvme"}
_FIGURE = re.compile(r"\b[0-9a-f]{32}\b|\d[\d,.:-]*(?: [KMGT]iB\b| B\b|%)?")


def _moved(text: str, folder: Path) -> str:
    """``text`` with the folders of the examples in ``folder``, for the installed transformers."""
    for place, name in PLACES.items():
        text = text.replace(place, str(folder / name))
    return re.sub(r"\bcache=", f"{CACHE_ARGUMENT}=", text)


def _same(shown: str, came: str) -> bool:
    """Whether ``came`` is what is shown, but for figures, spacing and `...`."""
    want, have = (re.sub(r"\s+", " ", _FIGURE.sub("#", text).strip()) for text in (shown, came))
    pattern = ".*?".join(re.escape(part) for part in want.split("..."))
    return re.fullmatch(pattern, have, re.DOTALL) is not None


def test_figures_may_differ_and_nothing_else() -> None:
    assert _same("speed 2.52 GiB/s, 1,577 commands", "speed   3 GiB/s, 12 commands\n")
    assert _same("uuid 6545b25b0a89444aa6d55f6937582f01", "uuid aaaab25b0a89444aa6d55f6937582f01")
    assert _same("engine ...\nused 1.8%", "engine uring (direct)\nused 18.0%")
    assert not _same("engine uring", "engine threads")
    assert not _same("a\nb", "a\nb\nc")


def _model() -> dict[str, Any]:
    """A small model and something for it to continue."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=None,
        pad_token_id=0,
    )
    ids = torch.randint(2, 96, (1, 40))
    return {
        "model": LlamaForCausalLM(config).eval(),
        "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
    }


class _Reader:
    """Works through a page as somebody does who types everything in."""

    def __init__(self, page: Page, folder: Path) -> None:
        self._page = page
        self._folder = folder
        self._names: dict[str, Any] = {"__name__": "__main__"}
        self._printed = ""

    def work_through(self) -> None:
        for block in self._page.blocks:
            where = f"{self._page.name}:{block.line}"
            if block.language == "python":
                self._run(block, where)
            elif block.language == "output":
                shown = _moved(block.text, self._folder)
                assert _same(shown, self._printed), f"{where} shows other than\n{self._printed}"
            elif block.language == "console":
                self._type_in(block, where)

    def _run(self, block: Block, where: str) -> None:
        code = compile(_moved(block.text, self._folder), where, "exec")
        if block.note.startswith("no-run"):
            return
        if block.note == "given=model":
            self._names |= _model()
        out = StringIO()
        with redirect_stdout(out), warnings.catch_warnings():
            warnings.filterwarnings("error", "(?s).*spdk_kv", DeprecationWarning)
            exec(code, self._names)
        self._printed = out.getvalue()

    def _type_in(self, block: Block, where: str) -> None:
        for command, shown in _commands(_moved(block.text, self._folder)):
            words = command.split()
            assert words[0] == "spdk-kv", f"{where}: only spdk-kv is run here"
            done = CliRunner().invoke(main, words[1:], prog_name="spdk-kv")
            assert done.exit_code == 0, f"{where}: {command}\n{done.output}"
            assert _same(shown, done.output), f"{where}: {command} prints\n{done.output}"

    def close(self) -> None:
        for found in list(self._names.values()):
            if type(found).__module__.startswith("spdk_kv.") and hasattr(found, "close"):
                found.close()


def _commands(text: str) -> Iterator[tuple[str, str]]:
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        yield command, shown


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_page_shows_what_happens(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in PLACES.values():
        (tmp_path / name).mkdir()
    (tmp_path / "kv").rmdir()
    reader = _Reader(page, tmp_path)
    try:
        reader.work_through()
    finally:
        reader.close()


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_every_block_says_what_it_is(page: Page) -> None:
    for block in page.blocks:
        where = f"{page.name}:{block.line}"
        assert block.language in LANGUAGES, f"{where}: {block.language!r}"
        if block.note:
            assert block.language == "python", where
            assert block.note == "given=model" or re.match(r"no-run: \w+", block.note), where
    assert page.text.count("\n```") % 2 == 0, f"{page.name}: a block is not closed, or indented"
