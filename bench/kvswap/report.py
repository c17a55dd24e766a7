"""The report of a run: Markdown, rows as JSON, a record, and plots where matplotlib is installed.

Everything is made of the rows. A folder that has rows already keeps those that were not run again,
but for those of a part that is made in another way now.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plots
from figures import figures
from quality import POOLS, Totals

import record

Row = dict[str, Any]
Name = tuple[Any, ...]
LEAST_DENSE = 0.9


def counted(totals: Totals) -> list[str]:
    """The tasks that say something: those that the model itself can do."""
    return [task for task, score in totals.dense.items() if score.accuracy >= LEAST_DENSE]


def rows(totals: Totals) -> list[Row]:
    """One row per selector and share."""
    found = []
    for (variant, share), one in totals.selected.items():
        tasks = counted(totals)
        lost = {
            task: 100 * (totals.dense[task].accuracy - score.accuracy)
            for task, score in one.scores.items()
        }
        weight = sum(one.scores[task].tokens for task in tasks)
        kl = sum(one.scores[task].kl for task in tasks) / weight if weight else None
        read = {
            f"{pool:g}": reads.nbytes_per_token(one.settings.group_tokens * totals.token_nbytes)
            for pool, reads in one.reads.items()
        }
        found.append(
            {
                "part": "quality",
                "selector": variant,
                "share": share,
                "tokens": one.settings.tokens,
                "group_tokens": one.settings.group_tokens,
                "recent": one.settings.recent,
                "worst_loss_points": max((lost[task] for task in tasks), default=None),
                "worst_task": max(tasks, key=lambda task: lost[task], default=None),
                "kl": kl,
                "metadata_nbytes": one.token_nbytes,
                "read_nbytes_per_token": read[f"{one.pool:g}"],
                "pool": one.pool,
                "read_nbytes_per_token_of_pools": read,
                "miss_rate_of_pools": {
                    f"{pool:g}": reads.miss_rate for pool, reads in one.reads.items()
                },
                "accuracy": {task: score.accuracy for task, score in one.scores.items()},
                "dense_accuracy": {task: score.accuracy for task, score in totals.dense.items()},
                "answers": {task: score.answers for task, score in one.scores.items()},
            }
        )
    return found


def about(part: str, method: str, machine: Sequence[str]) -> Row:
    """The row that says how the rows of ``part`` were made, and on which machine."""
    return {"part": "about", "of": part, "method": method, "machine": list(machine)}


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """``new``, after those of ``old`` that it does not have: of other parts, and of the same part
    made in the same way."""
    methods = {row["of"]: row["method"] for row in old if row["part"] == "about"}
    again = {row["of"] for row in new if row["part"] == "about"}
    again = {part for part in again if methods.get(part) == _method(new, part)}
    made = {_part(row) for row in new}
    found = {_name(row) for row in new}
    return [
        *(row for row in old if _part(row) not in made or _kept(row, again, found)),
        *(_with_machines(row, old) if row.get("of") in again else row for row in new),
    ]


def _with_machines(told: Row, old: Sequence[Row]) -> Row:
    """``told`` with the machines of rows that were made before as well."""
    (before,) = (row["machine"] for row in old if _name(row) == _name(told))
    return {**told, "machine": list(dict.fromkeys([*before, *told["machine"]]))}


def _method(rows: Sequence[Row], part: str) -> str:
    (method,) = (row["method"] for row in rows if row["part"] == "about" and row["of"] == part)
    return str(method)


def _kept(row: Row, again: set[str], found: set[Name]) -> bool:
    return row["part"] in again and _name(row) not in found


def _name(row: Row) -> Name:
    """What tells a row from the others of its part."""
    fields = ("part", "of", "selector", "share", "task", "variant", "drive", "compute", "batch")
    return tuple(row.get(field) for field in fields)


def write(found: Sequence[Row], out: Path, drive: str) -> None:
    """Writes README.md, rows.json, record.json and plots into ``out``, where older rows of other
    parts are taken over."""
    out.mkdir(parents=True, exist_ok=True)
    at = out / "rows.json"
    everything = merged(json.loads(at.read_text("utf-8")) if at.exists() else [], found)
    everything.sort(key=lambda row: list(PAGES).index(_part(row)))
    at.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    pictures = plots.draw(everything, out)
    (out / "README.md").write_text(markdown(everything, pictures), encoding="utf-8")
    told = [row for row in everything if row["part"] == "about"]
    if asked := figures(everything):
        method = " ".join(row["method"] for row in told)
        made = record.today("reading_a_part", drive, told[-1]["machine"], method, asked)
        record.write(out / "record.json", [made])


def markdown(found: Sequence[Row], pictures: Sequence[str] = ()) -> str:
    """All of the report."""
    lines = ["# Reading a part of K and V", ""]
    for name in pictures:
        lines += [f"![{name.removesuffix('.png')}]({name})", ""]
    for part, page in PAGES.items():
        mine = [row for row in found if row["part"] == part]
        if not mine:
            continue
        lines += [f"## {part.capitalize()}", ""]
        for told in found:
            if told["part"] == "about" and told["of"] == part:
                lines += [told["method"], "", *(f"- {line}" for line in told["machine"]), ""]
        lines += [*page(mine), ""]
    return "\n".join(lines)


def _quality(found: Sequence[Row]) -> list[str]:
    """Accuracies, their losses and what was read."""
    dense: dict[str, float] = found[0]["dense_accuracy"]
    answers: dict[str, int] = found[0]["answers"]
    tasks = list(dense)
    lines = [_line(["", *tasks]), _line(["---"] * (len(tasks) + 1))]
    lines += [_line(["dense", *(f"{dense[task]:.1%}" for task in tasks)])]
    lines += [_line(["answers", *(str(answers.get(task, "")) for task in tasks)]), ""]
    left_out = [task for task in tasks if dense[task] < LEAST_DENSE]
    if left_out:
        lines += [f"Not counted, for the model itself is below 90 %: {', '.join(left_out)}.", ""]
    head = ["selector", "share", *tasks, "worst loss", "KL", "metadata", "KiB read"]
    head += [f"misses, pool {pool:g}" for pool in POOLS]
    lines += [_line(head), _line(["---"] * len(head))]
    for row in sorted(found, key=lambda row: (row["share"], row["worst_loss_points"] or 0)):
        cells = [row["selector"], f"{row['share']:.2%}"]
        cells += [
            f"{row['accuracy'][task]:.1%}" if task in row["accuracy"] else "" for task in tasks
        ]
        worst, kl = row["worst_loss_points"], row["kl"]
        cells += ["" if worst is None else f"{worst:.1f}", "" if kl is None else f"{kl:.3f}"]
        cells += [f"{row['metadata_nbytes']:g} B", f"{row['read_nbytes_per_token'] / 1024:.0f}"]
        cells += [f"{row['miss_rate_of_pools'][f'{pool:g}']:.0%}" for pool in POOLS]
        lines.append(_line(cells))
    return [
        *lines,
        "",
        "Share: of the tokens, selected at each step; the newest tokens are in memory and attended "
        "to as well (`recent`, in rows.json). Worst loss: points of accuracy under dense, of the "
        "task where it is most. KL: of the distribution of the next token, to the dense one. "
        "Metadata: bytes in memory per token and layer. KiB read: per token of an answer, all "
        "layers, K and V in bfloat16, with the pool that the selector has by default.",
    ]


def _stored(found: Sequence[Row]) -> list[str]:
    """The same questions by both ways."""
    head = ["task", "selector", "answers", "in memory", "through the store", "KL", "KL", "MiB read"]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in found:
        lines.append(
            _line(
                [
                    row["task"],
                    f"{row['selector']} at {row['share']:.1%}",
                    str(row["answers"]),
                    f"{row['accuracy_in_memory']:.1%}",
                    f"{row['accuracy']:.1%}",
                    f"{row['kl_in_memory']:.4f}",
                    f"{row['kl']:.4f}",
                    f"{row['read_nbytes_per_token'] / (1 << 20):.2f}",
                ]
            )
        )
    return [
        *lines,
        "",
        "MiB read: per token of an answer, in float32, the filling of the pool included.",
    ]


def _speed(found: Sequence[Row]) -> list[str]:
    """Tokens per second."""
    head = ["way", "drive", "compute", "batch", "tokens/s", "lowest", "highest", "MiB read", "MiB"]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in sorted(found, key=lambda one: (one["batch"], one["compute"], one["drive"])):
        lines.append(
            _line(
                [
                    row["variant"],
                    row["drive"],
                    row["compute"],
                    str(row["batch"]),
                    f"{row['tokens_per_s']:.2f}",
                    f"{row['lowest_tokens_per_s']:.2f}",
                    f"{row['highest_tokens_per_s']:.2f}",
                    f"{row['read_nbytes_per_token'] / (1 << 20):.2f}",
                    f"{row['memory_nbytes'] / (1 << 20):.0f}",
                ]
            )
        )
    return [
        *lines,
        "",
        "MiB read: per token, from the drive. MiB: of host memory for K, V and codes.",
    ]


def _step(found: Sequence[Row]) -> list[str]:
    """Milliseconds per token."""
    head = ["cache", "ms per token", "fastest", "slowest", "selecting, ms", "MiB read", "MiB"]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in found:
        seconds = (row[f"{which}step_s"] for which in ("", "lowest_", "highest_"))
        cells = [row["variant"], *(f"{1e3 * each:.1f}" for each in seconds)]
        cells += [f"{1e3 * row['select_s']:.1f}"]
        cells += [f"{row['read_nbytes_per_token'] / (1 << 20):.2f}"]
        nbytes = row["memory_nbytes"]
        lines.append(_line([*cells, "" if nbytes is None else f"{nbytes / (1 << 20):.0f}"]))
    return [*lines, "", "MiB read: per token. MiB: of host memory for K, V and codes."]


def _limited(found: Sequence[Row]) -> list[str]:
    """Who survives."""
    head = [
        "cache",
        "limit",
        "ended",
        "tokens/s",
        "text, s",
        "MiB read",
        "tokens alike",
        "peak, MiB",
    ]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in found:
        cells = [row["variant"], "yes" if row["limited"] else "no", row["ended"]]
        if row["ended"] == "finished":
            cells += [f"{row['tokens_per_s']:.2f}", f"{row['prompt_s']:.0f}"]
            cells += [f"{row['read_nbytes_per_token'] / (1 << 20):.1f}"]
            cells += [f"{row['alike']} of {len(row['found'])}"]
        else:
            cells += [""] * 4
        peak = row["peak_nbytes"]
        lines.append(_line([*cells, "" if peak is None else f"{peak / (1 << 20):.0f}"]))
    return [*lines, "", "MiB read: per token. Tokens alike: with what comes without a limit."]


PAGES = {
    "quality": _quality,
    "stored": _stored,
    "speed": _speed,
    "batches": _speed,
    "step": _step,
    "limited": _limited,
}


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _part(row: Row) -> str:
    part: str = row["of"] if row["part"] == "about" else row["part"]
    return part
