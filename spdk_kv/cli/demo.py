"""``spdk-kv demo``: a model answers or goes on, with its KV cache in memory and on the drive."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from spdk_kv.demo import (
    Answers,
    DemoModel,
    Report,
    is_fetched,
    kv_nbytes,
    load_model,
    pretrained_folder,
    print_answers,
    print_report,
    prompt_tokens,
    random_model,
    read_text,
    require_transformers,
    temporary_folder,
)
from spdk_kv.terminal import json_option, print_json, progress
from spdk_kv.units import MIB, format_nbytes, parse_nbytes

if TYPE_CHECKING:
    from spdk_kv.store import KVStore

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_PATH = click.Path(exists=True, path_type=Path)
_COUNT = click.IntRange(min=1)
_ELSEWHERE = "name another place with --location file:///DIR"
_PROMPT_TOKENS = 2048
_LEAST_LIMIT_NBYTES = 64 * MIB  # one forward pass needs more than half of it


class _Place(NamedTuple):
    """Which store to use.

    Attributes:
        location: its URI; None for a temporary one.
        page_cache_dir: the folder of its PageCacheOptions.
    """

    location: str | None
    page_cache_dir: Path | None


@click.command()
@click.option("--text", type=_FILE, help="UTF-8 text to continue, instead of answering.")
@click.option(
    "--model",
    "path",
    metavar="PATH",
    type=_PATH,
    help="Folder of a transformers model, or a GGUF file.  [default: SmolLM2 if it was fetched]",
)
@click.option(
    "--location", help="URI of the store, such as file:///DIR.  [default: a temporary folder]"
)
@click.option(
    "--page-cache-dir",
    type=_FOLDER,
    help="Folder on another drive for the page cache of an spdk:// or ng:// store.",
)
@click.option(
    "--prompt-tokens",
    "prompt_count",
    type=_COUNT,
    help=f"Continue this many tokens of a text.  [default: {_PROMPT_TOKENS}]",
)
@click.option(
    "--new-tokens", type=_COUNT, default=32, show_default=True, help="Tokens to generate."
)
@click.option(
    "--memory-limit",
    metavar="SIZE",
    help="Compare ways to keep the KV cache under a memory limit, such as 128MiB.",
)
@json_option
def demo(
    text: Path | None,
    path: Path | None,
    location: str | None,
    page_cache_dir: Path | None,
    prompt_count: int | None,
    new_tokens: int,
    memory_limit: str | None,
    as_json: bool,
) -> None:
    """Let a model decode with its KV cache on the drive.

    A trained model answers a question to a document of some 3,000 tokens with its KV cache in
    memory, with all of it read from the drive for every token, and with a part of it read. `python
    -m spdk_kv.demo.fetch` fetches a small one, SmolLM2. Without one, or with --text or
    --prompt-tokens, a text is continued instead, by a model with random weights unless --model
    names another.

    The exit status is 1 if the tokens differ. Nothing is left behind; a store at --location is
    kept, without the demo's data.

    With --memory-limit the batch is so large that its K/V takes 1.5 times the limit. A text is
    then continued under the limit (a memory cgroup) with the cache on the drive, in mapped files,
    and in memory, each in a process of its own. The exit status is 1 if the first of them does not
    give the same tokens as without a limit.
    """
    if page_cache_dir is not None and location is None:
        raise click.UsageError("--page-cache-dir requires --location")
    place = _Place(location, page_cache_dir)
    count = prompt_count or _PROMPT_TOKENS
    if memory_limit is not None:
        _limited(text, path, place, count, new_tokens, memory_limit, as_json)
        return
    goes_on = text is not None or prompt_count is not None
    if path is None and is_fetched() and not goes_on:
        path = pretrained_folder()
    content = read_text(text)
    with progress(1, "loading"):
        require_transformers()
        chosen = random_model(count + new_tokens) if path is None else load_model(path)
    if chosen.trained and not goes_on:
        answers = _ask(chosen, place, new_tokens)
        _show(answers.fields(), as_json, lambda: print_answers(answers))
    else:
        report = _compare(chosen, content, place, count, new_tokens)
        _show(report.fields(), as_json, lambda: print_report(report))


def _show(fields: dict[str, Any], as_json: bool, print_lines: Callable[[], None]) -> None:
    """Prints what was found; ends the command with status 1 if tokens differ."""
    if as_json:
        print_json(fields)
    else:
        print_lines()
    if not fields["tokens_equal"]:
        click.get_current_context().exit(1)


def _ask(chosen: DemoModel, place: _Place, new_tokens: int) -> Answers:
    from spdk_kv.demo import WAYS, ask, shipped_question

    question = shipped_question()
    prompt = question.prompt(chosen.tokenizer)
    count = prompt.shape[1]
    _check_length(chosen, count + new_tokens, "'--model'")
    # The prompt's, and that of one way at a time, whose room may come free a little late.
    room = 3 * kv_nbytes(chosen, count + new_tokens)
    # Past the page cache, which has room for all of this: what is asked is what a drive can do.
    with _store(place, room, "direct") as store:
        asked = ask(store, chosen.model, prompt, new_tokens, WAYS)
        return Answers(
            chosen=chosen,
            parameters=sum(weight.numel() for weight in chosen.model.parameters()),
            question=question,
            prompt_tokens=count,
            asked=asked,
            engine=store.engine.name,
            location=store.location,
            temporary=place.location is None,
        )


def _limited(
    text: Path | None,
    path: Path | None,
    store: _Place,
    prompt_count: int,
    new_tokens: int,
    limit: str,
    as_json: bool,
) -> None:
    from spdk_kv.demo import Task, print_limited, require_memory_cgroup, run_limited

    try:
        limit_nbytes = parse_nbytes(limit)
    except ValueError as wrong:
        raise click.BadParameter(str(wrong), param_hint="'--memory-limit'") from wrong
    if limit_nbytes < _LEAST_LIMIT_NBYTES:
        raise click.BadParameter(
            f"{format_nbytes(limit_nbytes)} is less than one forward pass needs; it takes at least "
            f"{format_nbytes(_LEAST_LIMIT_NBYTES)}",
            param_hint="'--memory-limit'",
        )
    read_text(text)
    require_memory_cgroup()
    require_transformers()
    place = temporary_folder("demo-", _ELSEWHERE)
    try:
        report = run_limited(
            Task(
                variant="",
                folder=str(place),
                location=store.location or "",
                page_cache_dir=str(store.page_cache_dir or ""),
                text=None if text is None else str(text),
                model=None if path is None else str(path),
                prompt_tokens=prompt_count,
                new_tokens=new_tokens,
                limit_nbytes=limit_nbytes,
            )
        )
    finally:
        shutil.rmtree(place, ignore_errors=True)
    _show(report, as_json, lambda: print_limited(report))


def _compare(
    chosen: DemoModel, text: str, place: _Place, prompt_count: int, new_tokens: int
) -> Report:
    from transformers import DynamicCache

    from spdk_kv.demo import generate
    from spdk_kv.integrations.transformers import OffloadedKVCache

    most = prompt_count + new_tokens
    _check_length(chosen, most, "'--prompt-tokens'")
    prompt = prompt_tokens(chosen.tokenizer, text, prompt_count)
    model, config = chosen.model, chosen.model.config
    with _store(place, kv_nbytes(chosen, most)) as store:
        # A warm-up: the first pass also sets up torch's threads and kernels.
        generate(model, prompt[:, :512], 2, DynamicCache(config=config), lambda count: None)
        with progress(new_tokens, "in memory") as advance:
            memory = generate(model, prompt, new_tokens, DynamicCache(config=config), advance)
        before = store.stats()
        with (
            OffloadedKVCache(store, config, max_tokens=most) as cache,
            progress(new_tokens, "on the drive") as advance,
        ):
            offloaded = generate(model, prompt, new_tokens, cache, advance)
            sequence = cache.sequence
            assert sequence is not None
            shape, nbytes, stats = sequence.shape, sequence.nbytes, cache.stats()
        after = store.stats()

        def grown(part: str, name: str) -> int:
            return int(after[part][name] - before[part][name])

        cached_read_nbytes = grown("residency", "cached_read_nbytes")
        return Report(
            chosen=chosen,
            parameters=sum(weight.numel() for weight in model.parameters()),
            shape=shape,
            prompt_tokens=prompt_count,
            memory=memory,
            offloaded=offloaded,
            kv_nbytes=nbytes,
            resident_layers=stats["resident_layers_peak"],
            prefetch_hits=stats["prefetch_hits"],
            read_wait_s=stats["read_wait_s"],
            written_nbytes=grown("transfers", "written_nbytes"),
            read_nbytes=grown("transfers", "read_nbytes") + cached_read_nbytes,
            cached_read_nbytes=cached_read_nbytes,
            engine=store.engine.name,
            location=store.location,
            temporary=place.location is None,
        )


def _check_length(chosen: DemoModel, tokens: int, param_hint: str) -> None:
    config = chosen.model.config.get_text_config(decoder=True)
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and tokens > most:
        raise click.BadParameter(
            f"with the new tokens this makes {tokens}, but {chosen.label} takes at most {most}",
            param_hint=param_hint,
        )


@contextmanager
def _store(place: _Place, kv_nbytes: int, policy: str = "adaptive") -> Iterator[KVStore]:
    """The store at ``place``, or a new one in a folder that is removed at the end."""
    from spdk_kv.store import PageCacheOptions
    from spdk_kv.store import open as open_store

    page_cache = PageCacheOptions(folder=place.page_cache_dir, policy=policy)
    if place.location is not None:
        try:
            store = open_store(place.location, page_cache=page_cache)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="'--location'") from error
        with store:
            yield store
        return
    folder = temporary_folder("demo-", _ELSEWHERE)
    try:
        # More room than that: extents are whole chunks, and the store needs some for itself.
        capacity = kv_nbytes + kv_nbytes // 8 + 64 * MIB
        with open_store(f"file://{folder}", capacity=capacity, page_cache=page_cache) as store:
            yield store
    finally:
        shutil.rmtree(folder, ignore_errors=True)
