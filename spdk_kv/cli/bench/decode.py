"""``spdk-kv bench decode``: which path to the drive is fastest at which memory budget."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from spdk_kv.binding import MemoryGroup, memory_group, why_impossible
from spdk_kv.errors import CapacityError, SpdkKvError, file_error
from spdk_kv.terminal import console, is_terminal, json_option, print_json, progress
from spdk_kv.units import GIB, MIB, format_nbytes, parse_nbytes

if TYPE_CHECKING:
    from spdk_kv.measure import Load, Outcome

_VARIANTS = ("direct", "pagecache", "dual")
# Budgets as shares of the KV cache, unless --budget names some.
_SHARES = (0.25, 0.5, 1.2)
_SECONDS = 3.0  # per run: nine of them in about half a minute
_IGNORES_BUDGET = "pagecache"
_TOKENS, _STEPS = 1024, 24
_LEAST_NBYTES = 64 * MIB


def _nbytes(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Parses byte counts as people write them: one, or those of a repeated option."""
    try:
        if isinstance(value, tuple):
            return tuple(parse_nbytes(one) for one in value)
        return parse_nbytes(value)
    except ValueError as error:
        raise click.BadParameter(str(error), context, parameter) from error


@click.command("decode")
@click.option(
    "--dir",
    "folder",
    type=click.Path(exists=True, file_okay=False),
    default=".",
    show_default=True,
    help="Folder on the drive to measure.",
)
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    callback=_nbytes,
    metavar="SIZE",
    help="Memory for the page cache; repeatable.  [default: 0.25, 0.5, 1.2 of --size]",
)
@click.option(
    "--size",
    callback=_nbytes,
    default="512 MiB",
    show_default=True,
    metavar="SIZE",
    help="Size of the KV cache.",
)
@json_option
def bench_decode(folder: str, budgets: tuple[int, ...], size: int, as_json: bool) -> None:
    """Find the path to the drive that decodes fastest at a memory budget.

    Replays a prompt and some tokens (real I/O, no model) in three variants: every layer is read
    directly, every layer is read through the page cache, or the store chooses for each layer (dual,
    the default of a store).

    As root, each run is in a memory cgroup whose limit is the budget and what the run really holds
    besides while it decodes, and the machine's page cache is emptied before each run. Otherwise the
    store is given the budget, and the page cache itself is not limited. Takes about a
    minute and leaves nothing behind.
    """
    load = _load(size)
    _check_room(folder, load)
    chosen = budgets or tuple(round(share * load.nbytes) for share in _SHARES)
    unlimited = why_impossible()
    with tempfile.TemporaryDirectory(prefix=".spdk_kv-bench-", dir=folder) as place:
        rows = list(_measure(place, load, sorted(set(chosen)), limited=unlimited is None))
    report = _report(folder, load, unlimited, rows)
    if as_json:
        print_json(report)
    else:
        _print(report)


def _load(size: int) -> Load:
    """A load of about ``size`` bytes, of 16 layers and 2048 elements per token."""
    from spdk_kv.measure import Load

    if size < _LEAST_NBYTES:
        raise click.BadParameter(
            f"{format_nbytes(size)} is too small to measure; use at least "
            f"{format_nbytes(_LEAST_NBYTES)}",
            param_hint="'--size'",
        )
    one = Load(batch=1, prompt=_TOKENS, generate=_STEPS + 1)
    batch = max(1, size // one.nbytes)
    prompt = _TOKENS * size // (one.nbytes * batch)
    return Load(batch=batch, prompt=prompt, generate=_STEPS + 1)


def _check_room(folder: str, load: Load) -> None:
    try:
        space = os.statvfs(folder)
    except OSError as refused:
        raise file_error("open", folder, refused) from refused
    needed = load.capacity_nbytes + load.capacity_nbytes // 8 + 64 * MIB
    if space.f_bavail * space.f_frsize < needed:
        raise CapacityError(f"{folder} has no room for {format_nbytes(needed)}")


def _measure(
    place: str, load: Load, budgets: Sequence[int], *, limited: bool
) -> Iterator[dict[str, Any]]:
    """One row per budget and variant."""
    cases = cases_of(budgets, limited=limited)
    own: dict[str, Outcome] = {}
    with progress(len(cases) + (len(_VARIANTS) if limited else 0), "decoding") as advance:
        for variant in _VARIANTS if limited else ():
            own[variant] = _run(place, load, variant, seconds=0.0)
            advance(1)
        for budget, variant in cases:
            if limited:
                outcome = _run(place, load, variant, budget=budget, alone=own[variant])
            else:
                outcome = _run(place, load, variant, budget=budget, limited=False)
            advance(1)
            yield _row(budget, outcome, load)


def cases_of(budgets: Sequence[int], *, limited: bool) -> list[tuple[int, str]]:
    """(budget, variant) of every run."""
    cases = [(budget, variant) for budget in budgets for variant in _VARIANTS]
    if limited:
        return cases
    # Without a cgroup nothing limits the kernel's page cache, so one run serves every budget.
    return [case for case in cases if case[1] != _IGNORES_BUDGET or case[0] == budgets[-1]]


def _run(
    place: str,
    load: Load,
    variant: str,
    *,
    budget: int | None = None,
    alone: Outcome | None = None,
    limited: bool = True,
    seconds: float = _SECONDS,
) -> Outcome:
    """One run in a cgroup that leaves ``budget`` to the page cache beside what the run ``alone``
    held; without one where there is none. Not ``limited``: the store is given the budget instead.

    Raises SpdkKvError.
    """
    from spdk_kv.measure import Case, limits, run_in_subprocess

    options = {"memory": budget} if variant == "dual" and not limited else {}
    memory = limits(alone, budget) if alone is not None and budget is not None else {}
    with _group(limited) as group:
        case = Case(
            variant=variant,
            folder=place,
            load=asdict(load),
            group=str(group.path) if group else "",
            group_version=group.version if group else 2,
            **memory,
            options=options,
            drop_caches=os.geteuid() == 0,
            seconds=seconds,
        )
        outcome = run_in_subprocess(case)
    if outcome.error:
        raise SpdkKvError(f"{variant}: {outcome.error}")
    return outcome


@contextmanager
def _group(wanted: bool) -> Iterator[MemoryGroup | None]:
    if not wanted:
        yield None
        return
    with memory_group() as group:
        group.forbid_swap()
        yield group


def _row(budget: int, outcome: Outcome, load: Load) -> dict[str, Any]:
    from spdk_kv.measure import cached_share

    return {
        "budget_nbytes": budget,
        "rho": budget / load.nbytes,
        "cached_share": cached_share(outcome, load),
        "variant": outcome.variant,
        "decode_s_p50": outcome.step_s,
        "decode_first_s": outcome.steps_s[0],
        "prefill_s": outcome.prefill_s,
        "read_gib_s": outcome.step_nbytes / GIB / outcome.step_s,
        "hit_rate": outcome.hit_rate,
        "cpu_s_per_token": outcome.cpu_s / len(outcome.steps_s),
        "steps": len(outcome.steps_s),
    }


def fastest(rows: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Budget -> the variant that decoded fastest at it."""
    best: dict[int, Mapping[str, Any]] = {}
    for row in rows:
        before = best.setdefault(row["budget_nbytes"], row)
        if row["decode_s_p50"] < before["decode_s_p50"]:
            best[row["budget_nbytes"]] = row
    return {budget: row["variant"] for budget, row in best.items()}


def _report(
    folder: str, load: Load, unlimited: str | None, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "dir": folder,
        "kv_nbytes": load.nbytes,
        "units": load.units,
        "unit_nbytes": load.unit_nbytes,
        "limited_by": "page_cache=" if unlimited else "memory cgroup",
        "why_no_cgroup": unlimited,
        "rows": rows,
        "fastest": {str(budget): name for budget, name in fastest(rows).items()},
    }


_Cell = Callable[[Mapping[str, Any]], str]
_COLUMNS: tuple[tuple[str, _Cell], ...] = (
    ("budget", lambda row: f"{format_nbytes(row['budget_nbytes'])} ({row['rho']:.0%})"),
    (
        "left to cache",
        lambda row: "" if row["cached_share"] is None else f"{row['cached_share']:.0%}",
    ),
    ("path", lambda row: row["variant"]),
    ("ms per token", lambda row: f"{row['decode_s_p50'] * 1e3:,.0f}"),
    ("first", lambda row: f"{row['decode_first_s'] * 1e3:,.0f}"),
    ("GiB/s", lambda row: f"{row['read_gib_s']:.2f}"),
    ("from memory", lambda row: "" if row["hit_rate"] is None else f"{row['hit_rate']:.0%}"),
    ("prefill s", lambda row: f"{row['prefill_s']:.2f}"),
)


def _print(report: Mapping[str, Any]) -> None:
    best = {int(budget): name for budget, name in report["fastest"].items()}
    table = [
        [cell(row) for _, cell in _COLUMNS]
        + ["fastest" if best[row["budget_nbytes"]] == row["variant"] else ""]
        for row in report["rows"]
    ]
    head = [
        f"KV cache of {format_nbytes(report['kv_nbytes'])}, {report['units']} units of "
        f"{format_nbytes(report['unit_nbytes'])}, on the drive under {report['dir']}",
    ]
    if report["why_no_cgroup"]:
        head.append(
            f"page cache not limited ({report['why_no_cgroup']}): dual was given the budget, "
            "pagecache could use all free memory"
        )
    for text in head:
        click.echo(text)
    names = [*(name for name, _ in _COLUMNS), ""]
    if is_terminal():
        _print_table(names, table, report["rows"])
        return
    widths = [max(len(line[at]) for line in [names, *table]) for at in range(len(names))]
    for line in [names, *table]:
        click.echo("  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip())


def _print_table(
    names: Sequence[str], table: Sequence[Sequence[str]], rows: Sequence[Mapping[str, Any]]
) -> None:
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    for at, name in enumerate(names):
        shown.add_column(name, justify="left" if at in (0, 2, len(names) - 1) else "right")
    for number, line in enumerate(table):
        last = number + 1 == len(rows) or (
            rows[number]["budget_nbytes"] != rows[number + 1]["budget_nbytes"]
        )
        shown.add_row(*line, style="bold" if line[-1] else None, end_section=last)
    console().print(shown)
