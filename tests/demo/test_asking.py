"""``spdk-kv demo`` asks a trained model, with its KV cache in several places."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import DynamicCache

from demo.models import save_model
from spdk_kv.cli import main
from spdk_kv.demo.asking.question import shipped_question
from spdk_kv.demo.asking.ways import WAYS, Way
from spdk_kv.demo.model import load_model
from spdk_kv.demo.places import PRETRAINED, is_fetched, pretrained_folder
from spdk_kv.errors import ShapeMismatch
from spdk_kv.store import KVStore
from spdk_kv.store import open as open_store

LAYERS, KV_HEADS, HEAD_DIM = 4, 2, 16
TOKEN_NBYTES = LAYERS * 2 * KV_HEADS * HEAD_DIM * 4
NEW = 6
# Where the user has the model that was fetched, before a test sets another place.
FETCHED = pretrained_folder() if is_fetched() else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "spdk_kv"


def demo(*words: object) -> Result:
    return CliRunner().invoke(main, ["demo", *(str(word) for word in words)])


def fields(*words: object) -> dict[str, Any]:
    result = demo("--new-tokens", NEW, "--json", *words)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_answers_from_memory_and_drive_are_equal(folder: Path, cache: Path) -> None:
    found = fields("--model", folder)
    assert found["model"] == "tiny"
    assert found["tokens_equal"] is True
    assert found["expected"] in shipped_question().document
    memory, drive, part = found["answers"]
    assert (memory["way"], drive["way"]) == ("in memory", "from the drive")
    assert memory["text"] == drive["text"] != ""
    assert memory["right"] is drive["right"] is False  # the weights are random
    assert memory["new_tokens"] == drive["new_tokens"] == NEW
    # The last token's K/V is never computed.
    whole = (found["prompt_tokens"] + NEW - 1) * TOKEN_NBYTES
    assert memory["resident_kv_nbytes"] == whole
    assert memory["read_nbytes_per_token"] == 0
    assert drive["resident_kv_nbytes"] == whole // 2  # two layers of four
    # All of it, but for chunks that are not full yet.
    assert 0.8 * whole < drive["read_nbytes_per_token"] < 1.3 * whole
    assert (part["way"], part["new_tokens"], found["left_out"]) == ("a part of it", NEW, [])
    assert 0 < part["read_nbytes_per_token"] < 0.5 * drive["read_nbytes_per_token"]
    assert 0 < part["resident_kv_nbytes"] < whole
    assert list(cache.iterdir()) == []


def test_lines_fit_and_say_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    location = f"file://{tmp_path}/kv"
    result = demo("--model", folder, "--new-tokens", NEW, "--location", location)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.stdout
    lines = result.stdout.splitlines()
    assert all(len(line) < 80 for line in lines if location not in line)
    assert shipped_question().text in " ".join(result.stdout.split())
    assert "Wrong: in memory, from the drive, a part of it." in result.stdout
    with open_store(location, create=False) as store:
        assert store.sequences() == []
        assert store.stats()["used_nbytes"] == 0


def test_right_answers_are_said_to_be(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [answer["text"] for answer in fields("--model", folder)["answers"]]
    monkeypatch.setattr(
        "spdk_kv.demo.asking.report.Answers.right", lambda self, answer: self.text(answer) in texts
    )
    assert "all are right" in demo("--model", folder, "--new-tokens", NEW).stdout


class _Forgetful(DynamicCache):
    """Gives zeros for the values of all tokens."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(*args, **kwargs)
        return keys, torch.zeros_like(values)


@pytest.mark.parametrize(("exact", "status"), [(True, 1), (False, 0)])
def test_other_tokens_of_an_exact_way_end_with_status_1(
    folder: Path, monkeypatch: pytest.MonkeyPatch, exact: bool, status: int
) -> None:
    way = Way(
        "forgetful",
        lambda store, model: nullcontext(_Forgetful(config=model.config)),
        lambda cache: 0,
        exact,
    )
    monkeypatch.setattr("spdk_kv.demo.WAYS", (*WAYS[:2], way))
    result = demo("--model", folder, "--new-tokens", NEW)
    assert result.exit_code == status, result.output
    assert "Not the tokens that came in memory: forgetful." in result.stdout


def test_a_way_that_refuses_the_model_is_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(store: KVStore, model: Any) -> AbstractContextManager[Any]:
        raise ShapeMismatch("no layer of this model has keys")

    ways = (*WAYS[:2], Way("choosy", refuse, lambda cache: 0, exact=False))
    monkeypatch.setattr("spdk_kv.demo.WAYS", ways)
    result = demo("--model", folder, "--new-tokens", NEW)
    assert result.exit_code == 0, result.output
    assert "The tokens of all 2 answers are equal." in result.stdout
    assert "Not served: choosy: no layer of this model has keys" in result.stdout


def test_sliding_windows_have_each_way_compute_the_prompt(tmp_path: Path) -> None:
    found = fields("--model", save_model(tmp_path / "sliding", sliding_window=1000))
    assert found["prompt_s"] is None
    assert found["tokens_equal"] is True
    memory, drive = found["answers"][:2]
    assert memory["resident_kv_nbytes"] <= 1000 * TOKEN_NBYTES
    assert drive["read_nbytes_per_token"] > 0


def test_a_fetched_model_is_asked_unless_a_text_is_named(cache: Path, tmp_path: Path) -> None:
    save_model(cache / "models" / PRETRAINED)
    assert fields()["model"] == PRETRAINED
    text = tmp_path / "text"
    text.write_text("a text to go on with " * 10)
    for words in (["--text", text, "--prompt-tokens", 50], ["--prompt-tokens", 50]):
        found = fields(*words)
        assert "answers" not in found
        assert found["prompt_tokens"] == 50
    assert [path.name for path in cache.iterdir()] == ["models"]


def test_a_model_that_is_too_short_is_refused(tmp_path: Path) -> None:
    short = save_model(tmp_path / "short", max_position_embeddings=400)
    result = demo("--model", short)
    assert result.exit_code == 2
    assert "short takes at most 400" in result.output


@pytest.mark.parametrize("template", [True, False])
def test_prompt_holds_document_and_question(tmp_path: Path, template: bool) -> None:
    folder = save_model(tmp_path / "m", **({} if template else {"template": None}))
    tokenizer: Any = load_model(folder).tokenizer
    question = shipped_question()
    prompt = question.prompt(tokenizer)
    assert prompt.shape[0] == 1
    count = len(question.document.split()) + len(question.text.split())
    assert prompt.shape[1] == count + (3 if template else 2)
    words = tokenizer.decode(prompt[0].tolist()).split()
    assert " ".join(question.document.split()[:9]) in " ".join(words[:12])


def test_the_document_answers_the_question_once() -> None:
    question = shipped_question()
    assert question.document.count(question.expected) == 1
    assert question.expected not in question.text


@pytest.mark.long
def test_the_fetched_model_answers_rightly() -> None:
    if FETCHED is None:
        pytest.skip("the model is not there: python -m spdk_kv.demo.fetch brings it")
    found = json.loads(demo("--model", FETCHED, "--json").stdout)
    assert found["tokens_equal"] is True
    assert [answer["right"] for answer in found["answers"]] == [True, True, True]
