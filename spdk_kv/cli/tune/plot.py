"""Tokens/s against the share of the tokens that is read: as text, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spdk_kv.terminal import CommandFailed

_BAR = 44  # characters of the longest bar
_EIGHTHS = " ▏▎▍▌▋▊▉"


def text_plot(points: Sequence[tuple[str, float]]) -> str:
    """One bar per point: its label, and as long as its value."""
    longest = max(value for _, value in points)
    width = max(len(label) for label, _ in points)
    return "\n".join(
        f"{label:>{width}} {_bar(value / longest * _BAR)} {value:.3g}" for label, value in points
    )


def _bar(length: float) -> str:
    whole, part = int(length), int(length % 1 * 8)
    return "█" * whole + _EIGHTHS[part].strip()


def require_matplotlib() -> None:
    """Raises CommandFailed where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as missing:
        raise CommandFailed(
            "a picture needs matplotlib: pip install 'spdk_kv[bench]', or leave --plot out"
        ) from missing
    matplotlib.use("agg")


def picture(
    path: Path, points: Sequence[tuple[float, float]], chosen: tuple[float, float], title: str
) -> None:
    """Draws (share, tokens/s) into the file ``path``, whose ending says how.

    Raises CommandFailed where matplotlib is not installed, or the file cannot be written so.
    """
    require_matplotlib()
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(
        [100 * share for share, _ in points], [rate for _, rate in points], marker="o", label="best"
    )
    axes.plot(100 * chosen[0], chosen[1], "r*", markersize=14, label="chosen")
    axes.set(
        xscale="log",
        xlabel="tokens attended to, % of the context",
        ylabel="tokens/s (modelled)",
        title=title,
    )
    axes.set_ylim(bottom=0)
    axes.set_xticks([100 * share for share, _ in points])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise CommandFailed(f"cannot draw {path}: {error}") from error
    finally:
        pyplot.close(figure)
