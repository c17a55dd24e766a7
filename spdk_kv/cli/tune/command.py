"""``spdk-kv tune``: settings for reading a part, from what this machine does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from spdk_kv.cli.models import gguf_option, load_config, model_option
from spdk_kv.cli.outputs import OUTPUT, in_a_folder
from spdk_kv.cli.tune.places import measured_store
from spdk_kv.cli.tune.plot import picture, require_matplotlib
from spdk_kv.cli.tune.report import Report, print_report
from spdk_kv.memory import available_for_page_cache, read_memory
from spdk_kv.terminal import CommandFailed, console, json_option, print_json
from spdk_kv.units import parse_nbytes

if TYPE_CHECKING:
    from spdk_kv.measure.sparse import Measured, Subject

# Beyond that a context is rather chosen than met.
_MOST_TOKENS = 32768
_LEAST_TOKENS = 256


def _nbytes(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """Parses a byte count as people write it: ``512MiB``, ``2 GiB``."""
    if value is None:
        return None
    try:
        return parse_nbytes(value)
    except ValueError as error:
        raise click.BadParameter(str(error), context, parameter) from error


@click.command()
@model_option
@gguf_option
@click.option(
    "--location",
    required=True,
    metavar="URI",
    help="Where the KV cache is to lie: file:///DIR, ram://, or the URI of a drive with a store.",
)
@click.option(
    "--memory",
    callback=_nbytes,
    metavar="SIZE",
    help="Memory for what is resident and what it is scored by.  [default: what is free]",
)
@click.option(
    "--tokens",
    type=click.IntRange(_LEAST_TOKENS),
    help="Tokens of context.  [default: the most that the model takes, up to 32768]",
)
@click.option(
    "--batch", type=click.IntRange(1), default=1, show_default=True, help="Rows of the batch."
)
@click.option(
    "--share",
    "percent",
    type=click.FloatRange(0.1, 100),
    default=7.5,
    show_default=True,
    metavar="PERCENT",
    help="Tokens to attend to, in percent of the context.",
)
@click.option(
    "--compute-ms",
    type=click.FloatRange(0.001),
    metavar="MS",
    help="Milliseconds that a step takes with K/V in memory.  [default: estimated from the size "
    "of the weights, for the CPU]",
)
@click.option(
    "--size",
    callback=_nbytes,
    default="512 MiB",
    show_default=True,
    metavar="SIZE",
    help="Bytes to write and to read from, at most half of the free space.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.01, 3600),
    default=10.0,
    show_default=True,
    help="How long to measure.",
)
@click.option(
    "-o",
    "--output",
    type=OUTPUT,
    callback=in_a_folder,
    help="File to write the settings to, as JSON.",
)
@click.option(
    "--plot",
    type=OUTPUT,
    callback=in_a_folder,
    help="Picture to draw with matplotlib, such as tune.png.",
)
@json_option
def tune(
    folder: Path,
    gguf: str | None,
    location: str,
    memory: int | None,
    tokens: int | None,
    batch: int,
    percent: float,
    compute_ms: float | None,
    size: int,
    seconds: float,
    output: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Choose settings for reading a part of the KV cache.

    Of the model only the configuration is read. Scattered reads of this drive and scoring on this
    processor are measured, and what decoding would be with them is modelled: how many tokens/s for
    which share of the tokens, in groups of which size, with how much in memory. How often a group
    is resident already is as measured on SmolLM2. SparseKVCache takes the settings as settings=.

    A folder gets a temporary store, and a drive must hold one, of which nothing is lost. Nothing is
    left behind.

    \b
    Example:
      spdk-kv tune --model ~/models/llama --location file:///mnt/kv \\
          --memory 2GiB -o llama.json
    """
    from spdk_kv.sparse.tuning import SHARES, Goal, best_of_shares, choose, whole_cost

    if plot is not None:
        require_matplotlib()
    subject, name = _subject(folder, gguf, tokens, batch, compute_ms, seconds)
    limit = _available() if memory is None else memory
    measured, place, engine = _measured(location, size, subject)
    machine, decoding = measured.machine, measured.decoding
    share = percent / 100
    choice = choose(Goal(share, limit), machine, decoding)
    report = Report(
        model=name,
        location=place,
        engine=engine,
        memory_nbytes=limit,
        measured=measured,
        rows=best_of_shares(sorted({*SHARES, share}), limit, machine, decoding),
        whole=whole_cost(machine, decoding),
        choice=choice,
    )
    if output is not None:
        _write(output, choice.settings.to_json())
    if plot is not None:
        picture(plot, report.points, (choice.share, choice.cost.tokens_per_s), report.title)
    if as_json:
        print_json(report.fields())
        return
    print_report(report)
    if output is None:
        click.echo(f"\n{choice.settings.to_json()}")
    else:
        click.echo(
            f"\nWritten to {output}. To use it:\n"
            f'  settings = Settings.from_json(Path("{output}").read_text())\n'
            "  cache = SparseKVCache(store, model, settings=settings)"
        )


def _subject(
    folder: Path,
    gguf: str | None,
    tokens: int | None,
    batch: int,
    compute_ms: float | None,
    seconds: float,
) -> tuple[Subject, str]:
    """What is to be measured, and what to call the model."""
    with console(stderr=True).status("reading the configuration"):
        config = load_config(folder, gguf)
        from spdk_kv.integrations.transformers.dimensions import dimensions_of
        from spdk_kv.measure.sparse import Subject

        found = dimensions_of(config)
    most = found.max_tokens or _MOST_TOKENS
    if tokens is not None and tokens > most:
        raise click.BadParameter(f"the model takes at most {most}", param_hint="'--tokens'")
    subject = Subject(
        layer=found.layer,
        layers=found.layers,
        heads=found.heads,
        tokens=tokens or min(most, _MOST_TOKENS),
        batch=batch,
        weights_nbytes=found.weights_nbytes,
        compute_s=None if compute_ms is None else compute_ms / 1e3,
        seconds=seconds,
    )
    return subject, Path(gguf).stem if gguf else folder.resolve().name


def _measured(location: str, size: int, subject: Subject) -> tuple[Measured, str, str]:
    """What came out, on which location, and by which engine."""
    from spdk_kv.measure.sparse import measure_machine

    with (
        console(stderr=True).status("opening a store") as status,
        measured_store(location, size) as (store, nbytes),
    ):
        found = measure_machine(store, subject, nbytes, status.update)
        return found, location, store.engine.name


def _available() -> int:
    found = available_for_page_cache(read_memory(), 0)
    if not found:
        raise click.UsageError("how much memory is free is not known here: say it with --memory")
    return found


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(f"{text}\n", encoding="utf-8")
    except OSError as error:
        raise CommandFailed(f"cannot write {path}: {error.strerror}") from error
