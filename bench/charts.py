"""The charts of RESULTS.md: each figure as a share of its target, by matplotlib."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from record import Figure, short

_TICKS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.5, 2, 3, 4, 5, 7, 10, 20, 50)
# Colours that colour-blind readers can tell apart (Okabe and Ito); the shapes differ as well.
_MET, _MISSED = ("#0b2e6f", "o"), ("#d55e00", "X")


def missing() -> str | None:
    """Why no charts can be drawn, or None."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "matplotlib is not installed (pip install 'spdk_kv[bench]')"
    return None


def digest(figures: Sequence[tuple[Figure, str]]) -> str:
    """What a chart carries inside, so that a test can tell which figures it was drawn from."""
    drawn = [
        (figure.what, drive, figure.value, figure.low, figure.high, figure.wanted)
        for figure, drive in figures
    ]
    return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()


def draw(title: str, figures: Sequence[tuple[Figure, str]], path: Path) -> None:
    """Draws ``figures`` (figure, drive), the first on top, into the SVG file ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, rcParams, ticker

    # The same figures give the same file: names of its parts come from a fixed salt.
    rcParams["svg.hashsalt"] = "spdk_kv"
    rcParams["svg.fonttype"] = "none"
    several = len({drive for _, drive in figures}) > 1
    chart, axes = pyplot.subplots(figsize=(9, 1.1 + 0.21 * len(figures)))
    for row, (figure, _) in enumerate(figures):
        target = figure.target
        assert target is not None
        colour, marker = _MET if target.is_met(figure.value) else _MISSED
        if figure.low is not None and figure.high is not None:
            ends = [target.share(figure.low), target.share(figure.high)]
            axes.plot(ends, [row, row], color=colour, lw=2, alpha=0.35, solid_capstyle="butt")
        axes.plot(target.share(figure.value), row, marker, color=colour, ms=5)
    axes.axvline(1, color="0.3", lw=1.2, zorder=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.FixedLocator(_TICKS))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_yticks(
        range(len(figures)),
        [figure.what + (f" ({short(drive)})" if several else "") for figure, drive in figures],
        fontsize=8,
    )
    axes.set_ylim(len(figures) - 0.4, -0.6)
    axes.grid(axis="x", color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{title}: measured against the target", fontsize=10)
    axes.set_xlabel("1 is the target, right of it is better; o met, x missed", fontsize=8)
    chart.tight_layout()
    path.parent.mkdir(exist_ok=True)
    metadata = {"Date": None, "Creator": None, "Identifier": digest(figures)}
    chart.savefig(path, metadata=metadata)
    pyplot.close(chart)
