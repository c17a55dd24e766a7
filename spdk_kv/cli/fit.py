"""``spdk-kv fit``: low-rank adapters of a model's keys, from texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from spdk_kv.cli.models import gguf_option, load_model, model_option
from spdk_kv.cli.outputs import OUTPUT, in_a_folder
from spdk_kv.terminal import CommandFailed, json_option, print_json, progress
from spdk_kv.units import format_nbytes

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
# One text's share of all tokens is not less: a few words say little of a model's keys.
_LEAST_TOKENS = 16


@click.command()
@model_option
@gguf_option
@click.option(
    "--text",
    "texts",
    type=_FILE,
    multiple=True,
    required=True,
    help="UTF-8 text for the model to read; repeatable.",
)
@click.option(
    "-o",
    "--output",
    type=OUTPUT,
    callback=in_a_folder,
    required=True,
    help="File to write, in the safetensors format.",
)
@click.option(
    "--rank",
    type=click.IntRange(1),
    help="Directions to keep.  [default: an eighth of the elements of a key]",
)
@click.option(
    "--tokens",
    type=click.IntRange(_LEAST_TOKENS),
    default=16384,
    show_default=True,
    help="Tokens to read at most, of all texts in equal parts.",
)
@json_option
def fit(
    folder: Path,
    gguf: str | None,
    texts: tuple[Path, ...],
    output: Path,
    rank: int | None,
    tokens: int,
    as_json: bool,
) -> None:
    """Fit low-rank adapters to a model's keys.

    The model reads the texts, and of the keys of each layer (after RoPE, all KV heads together) the
    directions are kept that hold most of them. SparseKVCache takes the file for settings with
    lowrank keys, as the selectors kvswap and lowrank have them; other selectors need none.

    \b
    Example:
      spdk-kv fit --model ~/models/llama --text book.txt -o llama.safetensors
    """
    from spdk_kv.sparse.adapters import save_adapters

    contents = [_text(path) for path in texts]
    with progress(1, "loading"):
        model, tokenizer = load_model(folder, gguf)
    each = max(_LEAST_TOKENS, tokens // len(contents))
    ids = [list(tokenizer.encode(content))[:each] for content in contents]
    matrices, report = _fitted(model, ids, rank)
    facts = {name: str(value) for name, value in report.items()}
    try:
        save_adapters(output, matrices, facts)
    except OSError as error:
        raise CommandFailed(f"cannot write {output}: {error.strerror}") from error
    report = {"output": str(output), "nbytes": output.stat().st_size, **report}
    if as_json:
        print_json(report)
    else:
        _print(report)


def _fitted(
    model: Any, ids: list[list[int]], rank: int | None
) -> tuple[dict[int, Any], dict[str, Any]]:
    """The matrices by number of the layer, and what they are."""
    from spdk_kv.integrations.transformers.fitting import gather_keys

    with progress(sum(map(len, ids)), "reading") as advance:
        try:
            gathered = gather_keys(model, ids, advance=advance)
        except ValueError as wrong:
            raise CommandFailed(str(wrong)) from wrong
    matrices, energy = {}, {}
    with progress(len(gathered), "fitting") as advance:
        for number, gram in gathered.items():
            try:
                matrices[number], energy[number] = gram.directions(rank)
            except ValueError as wrong:
                raise click.BadParameter(str(wrong), param_hint="'--rank'") from wrong
            advance(1)
    some = next(iter(matrices.values()))
    return matrices, {
        "model_type": model.config.model_type,
        "layers": len(matrices),
        "key_elements": some.shape[0],
        "rank": some.shape[1],
        "tokens": next(iter(gathered.values())).tokens,
        "energy_least": min(energy.values()),
        "energy_mean": sum(energy.values()) / len(energy),
    }


def _text(path: Path) -> str:
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise click.BadParameter(
            f"{path} is not UTF-8 text (byte {error.start})", param_hint="'--text'"
        ) from error
    if not content.strip():
        raise click.BadParameter(f"{path} holds no text", param_hint="'--text'")
    return content


def _print(report: dict[str, Any]) -> None:
    click.echo(
        f"read     {report['tokens']:,} tokens with a {report['model_type']} model\n"
        f"kept     {report['rank']} of {report['key_elements']} directions in each of "
        f"{report['layers']} layers\n"
        f"energy   {report['energy_mean']:.1%} of the keys' on average, "
        f"{report['energy_least']:.1%} in the worst layer\n"
        f"written  {report['output']} ({format_nbytes(report['nbytes'])})"
    )
