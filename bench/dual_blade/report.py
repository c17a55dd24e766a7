"""The report: Markdown tables, JSON rows, and the plots where matplotlib is installed.

    python bench/dual_blade/report.py SAMPLES [--out FOLDER] [--json FILE]

draws it again from the samples that run.py kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

import ablation
import asked
import change
import plots
from rows import VARIANTS, Row, Sample, load_of, make_rows, yardsticks_of

from spdk_kv.units import MIB, format_nbytes


def read_samples(path: Path) -> list[Sample]:
    """The samples kept in ``path``, one JSON object per line."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def markdown(samples: Sequence[Sample], rows: Sequence[Row], pictures: Sequence[str]) -> str:
    """The whole report. ``pictures``: names of plot files beside it."""
    about = next(sample for sample in samples if sample["kind"] == "about")
    load, sticks = load_of(samples), yardsticks_of(samples)
    lines = [f"# {about['title']}", ""]
    lines += [f"- {line}" for line in about["machine"]]
    lines += [
        f"- load: {load.layers} layers, hidden {load.hidden}, batch {load.batch}, prompt "
        f"{load.prompt}, generate {load.generate}, fp16: {load.units} units of "
        f"{format_nbytes(load.unit_nbytes)}, W = {format_nbytes(load.nbytes)} after the prompt",
        f"- compute {about['compute_s'] * 1e3:g} ms per layer; link: {about['link_text']}",
        f"- fio: {sticks.read_gib_s:.2f} GiB/s read, {sticks.write_gib_s:.2f} write; memory copy "
        f"{sticks.copy_gib_s:.1f} GiB/s",
        f"- runs per case: {max(row.get('runs', 0) for row in rows)}; every figure is a median "
        "(quartiles); per token: over all tokens after the first two, unless another is named",
        "",
    ]
    for picture in pictures:
        lines += [f"![{Path(picture).stem}]({picture})", ""]
    budgets = [row for row in rows if row["kind"] == "budget"]
    for title, cell in _TABLES if budgets else ():
        lines += ["", f"## {title}", "", *_table(budgets, cell)]
    if any(row["variant"] == "dual" for row in budgets):
        lines += ["", "## What was asked, and what was reached", "", *_verdicts(budgets)]
    if lines_of := change.tables(rows):
        lines += ["", "## A budget that falls to a half, and rises to the double", "", *lines_of]
    if lines_of := ablation.tables(rows):
        lines += ["", "## Part by part", "", *lines_of]
    if errors := sorted({(row["variant"], error) for row in budgets for error in row["errors"]}):
        lines += ["", "## Runs that failed", "", *(f"- {name}: {why}" for name, why in errors)]
    return "\n".join(lines) + "\n"


def _spread(row: Row, name: str) -> str:
    middle, low, high = (row[f"{name}_{part}"] for part in ("p50", "p25", "p75"))
    return f"{middle:.3f}" if low == high else f"{middle:.3f} ({low:.3f} to {high:.3f})"


def _share(row: Row, name: str) -> str:
    return "" if row[name] is None else f"{row[name]:.0%}"


_TABLES: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("Decode, seconds per token", lambda row: _spread(row, "decode_s")),
    ("Decode against the bound", lambda row: f"{row['of_bound']:.2f}"),
    ("Decode, the first token's seconds", lambda row: f"{row['decode_first_s']:.3f}"),
    ("Decode, the mean of all tokens, the first too", lambda row: f"{row['decode_mean_s']:.3f}"),
    ("Prefill, seconds", lambda row: _spread(row, "prefill_s")),
    ("Utilisation: read from the drive while decoding, of fio", lambda r: _share(r, "utilisation")),
    ("Hit rate: asked for and not read from the drive", lambda row: _share(row, "hit_rate")),
    (
        "Left to the page cache while decoding, as a share of W (cached_share)",
        lambda row: "" if row["cached_share"] is None else f"{row['cached_share']:.3f}",
    ),
    ("CPU-seconds per token", lambda row: f"{row['cpu_s_per_token']:.2f}"),
    ("Major faults per token", lambda row: f"{row['major_faults_per_token']:,.0f}"),
)


def _mib(nbytes: float | None) -> str:
    return "" if nbytes is None else f"{nbytes / MIB:,.0f}"


def _table(rows: Sequence[Row], cell: Callable[[Row], str]) -> list[str]:
    """Budgets downwards, variants across."""
    names = _names(rows)
    titles = [*names, "budget of dual (MiB)"]
    lines = [f"| rho | bound | {' | '.join(titles)} |", "|---" * (len(titles) + 2) + "|"]
    for rho in sorted({row["rho"] for row in rows}):
        here = {row["variant"]: row for row in rows if row["rho"] == rho}
        bound = next((row["bound_s"] for row in here.values() if row["bound_s"]), None)
        cells = [
            "failed" if row is None or row["decode_s_p50"] is None else cell(row)
            for row in map(here.get, names)
        ]
        cells.append(_mib(here.get("dual", {}).get("x_nbytes")))
        lines.append(
            f"| {rho:g} | {'' if bound is None else f'{bound:.3f}'} | {' | '.join(cells)} |"
        )
    return lines


def _names(rows: Iterable[Row]) -> list[str]:
    seen = dict.fromkeys(row["variant"] for row in rows)
    return [name for name in VARIANTS if name in seen] + [n for n in seen if n not in VARIANTS]


def _verdicts(rows: Sequence[Row]) -> list[str]:
    lines = ["| rho | what | asked | reached | |", "|---|---|---|---|---|"]
    for rho, found in asked.of_budgets(rows):
        budget = "" if rho is None else f"{rho:g}"
        lines.append(
            f"| {budget} | {found.what} | {found.wanted} | {found.value:.3f} | {found.verdict} |"
        )
    return lines


def write(samples: Sequence[Sample], out: Path, json_file: Path | None) -> tuple[list[Row], str]:
    """Writes README.md, rows.json and the plots into ``out``; returns the rows and the text."""
    rows = [*make_rows(samples), *change.make_rows(samples), *ablation.make_rows(samples)]
    if not rows:
        raise ValueError("no run is among the samples")
    out.mkdir(parents=True, exist_ok=True)
    pictures = plots.draw(rows, out)
    text = markdown(samples, rows, pictures)
    (out / "README.md").write_text(text)
    content: Any = json.dumps(rows, indent=2) + "\n"
    (out / "rows.json").write_text(content)
    if json_file is not None:
        json_file.write_text(content)
    return rows, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("samples", type=Path)
    parser.add_argument("--out", type=Path, help="folder of the report; default: beside SAMPLES")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the rows there as well")
    words = parser.parse_args()
    _, text = write(read_samples(words.samples), words.out or words.samples.parent, words.json)
    print(text)


if __name__ == "__main__":
    main()
