"""Rows and tables of what was found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quality import POOLS, Totals

LEAST_DENSE = 0.9


def counted(totals: Totals) -> list[str]:
    """The tasks that say something: those that the model itself can do."""
    return [task for task, score in totals.dense.items() if score.accuracy >= LEAST_DENSE]


def rows(totals: Totals) -> list[dict[str, Any]]:
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


def page(
    totals: Totals, found: Sequence[dict[str, Any]], method: str, machine: Sequence[str]
) -> str:
    """The report as Markdown."""
    tasks = list(totals.dense)
    lines = ["# Reading a part: answers and bytes", "", *machine, "", method, ""]
    lines += [_line(["", *tasks]), _line(["---"] * (len(tasks) + 1))]
    dense = [f"{score.accuracy:.1%} of {score.tokens}" for score in totals.dense.values()]
    lines += [_line(["dense", *dense]), ""]
    left_out = [task for task in tasks if task not in counted(totals)]
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
    lines += [
        "",
        "Worst loss: points of accuracy under dense, of the task where it is most. KL: of the "
        "distribution of the next token, to the dense one. Metadata: bytes in memory per token and "
        "layer. KiB read: per token of an answer, all layers, K and V in bfloat16, with the pool "
        "that the selector has by default.",
        "",
    ]
    return "\n".join(lines)


def stored_page(found: Sequence[dict[str, Any]]) -> str:
    """The same questions by both ways, as Markdown."""
    head = ["task", "selector", "answers", "in memory", "through the store", "KL", "KL", "MiB read"]
    lines = ["# The same through the read path", "", _line(head), _line(["---"] * len(head))]
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
    lines += ["", "MiB read: per token of an answer, in float32, the filling of the pool included."]
    return "\n".join([*lines, ""])


def speed_page(found: Sequence[dict[str, Any]], method: str, machine: Sequence[str]) -> str:
    """Tokens per second, as Markdown."""
    head = ["way", "drive", "compute", "batch", "tokens/s", "lowest", "highest", "MiB read", "MiB"]
    lines = ["# Reading a part: speed", "", *machine, "", method, ""]
    lines += [_line(head), _line(["---"] * len(head))]
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
    lines += ["", "MiB read: per token, from the drive. MiB: of host memory for K, V and codes."]
    return "\n".join([*lines, ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
