"""The plots of a run, by matplotlib (``pip install 'spdk_kv[bench]'``); without it, none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# Colours that people who see fewer of them can tell apart (Okabe and Ito).
_COLOURS = ("#0b2e6f", "#d55e00", "#009e73", "#56b4e9", "#e69f00", "#cc79a7")
_TICKS = (0.5, 1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 70)
_LEAST_LOSS = 0.3  # points; a logarithm has no place for less


def draw(rows: Sequence[Row], out: Path) -> list[str]:
    """Draws ``quality.png`` and ``speed.png`` of what there is; returns their names."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    quality = [row for row in rows if row["part"] == "quality" and row["kl"] is not None]
    speed = [row for row in rows if row["part"] == "speed" and row["compute"] == "emulated"]
    drawn = []
    if quality:
        _quality(quality, out / "quality.png")
        drawn.append("quality.png")
    if speed:
        _speed(speed, out / "speed.png")
        drawn.append("speed.png")
    return drawn


def _quality(rows: Sequence[Row], path: Path) -> None:
    """What is lost over the share of the tokens, and over the bytes that are read."""
    from matplotlib import pyplot, ticker

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), dpi=150, sharey=True)
    names = list(dict.fromkeys(row["selector"] for row in rows))
    lines = [name for name in names if sum(row["selector"] == name for row in rows) > 1]
    for name in names:
        mine = sorted((row for row in rows if row["selector"] == name), key=lambda r: r["share"])
        style = {"color": "0.55", "marker": "x", "ls": "", "ms": 5}
        if name in lines:
            style = {"color": _COLOURS[lines.index(name)], "marker": "o", "label": name}
        for axes, xs in (
            (left, [100 * row["share"] for row in mine]),
            (right, [row["read_nbytes_per_token"] / (1 << 20) for row in mine]),
        ):
            losses = [max(row["worst_loss_points"], _LEAST_LOSS) for row in mine]
            axes.plot(xs, losses, **style)
            if name not in lines:
                axes.annotate(
                    name, (xs[0], losses[0]), (4, 3), textcoords="offset points",
                    fontsize=6.5, color="0.4",
                )  # fmt: skip
    left.set(xlabel="share of the tokens that is selected, %", ylabel="worst task: points lost")
    right.set(xlabel="MiB read per token")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(ticker.FixedLocator(_TICKS))
            axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axis.set_minor_locator(ticker.NullLocator())
        axes.axhline(2, color="0.75", ls="--", lw=1)
        axes.grid(color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    figure.suptitle("What reading a part costs in answers; dashed: 2 points", fontsize=10)
    _save(figure, path)


def _speed(rows: Sequence[Row], path: Path) -> None:
    """Tokens per second of every way on every drive, of the smallest batch."""
    from matplotlib import pyplot

    batch = min(row["batch"] for row in rows)
    rows = [row for row in rows if row["batch"] == batch]
    drives = list(dict.fromkeys(row["drive"] for row in rows))
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.32 * len(rows)), dpi=150)
    labels = []
    for drive in reversed(drives):
        for row in reversed([one for one in rows if one["drive"] == drive]):
            at, speed = len(labels), row["tokens_per_s"]
            axes.barh(at, speed, color=_COLOURS[drives.index(drive)])
            axes.annotate(
                f"{speed:.2g}", (speed, at), (3, 0), textcoords="offset points",
                va="center", fontsize=8,
            )  # fmt: skip
            labels.append(f"{row['variant']}, {drive}")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set(xscale="log", xlabel="tokens per second")
    axes.set_title(f"Decoding at {rows[0]['tokens']:,} tokens, batch {batch}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
