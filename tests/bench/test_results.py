"""bench/: its scripts start, its records are whole, and RESULTS.md is what they make."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from support.places import ROOT

BENCH = ROOT / "bench"
RECORDS = [*BENCH.glob("results/*.json"), *BENCH.glob("results/*/record.json")]


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    """The modules of bench/, imported as they import each other."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCH))
    try:
        yield {name: __import__(name) for name in ("record", "charts", "results_page")}
    finally:
        sys.path.remove(str(BENCH))
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCH)):
                del sys.modules[name]


def test_the_page_is_what_its_script_makes(bench: dict[str, ModuleType]) -> None:
    results_page = bench["results_page"]
    made = results_page.page(results_page.newest(BENCH / "results"))
    assert (BENCH / "RESULTS.md").read_text(encoding="utf-8") == made, (
        "run python bench/results_page.py"
    )


def test_each_chart_shows_the_figures_of_the_page(bench: dict[str, ModuleType]) -> None:
    results_page = bench["results_page"]
    for question, kept in results_page.newest(BENCH / "results").items():
        chart = results_page.picture(question, kept)
        if chart.suffix == ".svg":
            drawn = bench["charts"].digest(results_page.asked(kept))
            assert drawn in chart.read_text(encoding="utf-8"), "run python bench/results_page.py"
        else:
            assert chart.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: str(path.relative_to(BENCH)))
def test_records_are_whole_and_name_their_report(bench: dict[str, ModuleType], path: Path) -> None:
    for one in bench["record"].read(path):
        if one.report:
            assert (BENCH / "results" / one.report).is_file()
        if path.name != "record.json":
            assert path.name.startswith(one.date)


def good() -> dict[str, object]:
    target = {"side": "at least", "bound": 0.9, "asked_by": "spdk_kv"}
    figure = {
        "what": "read", "value": 0.8, "unit": "of fio", "low": 0.7, "high": 1.0, "target": target,
    }  # fmt: skip
    return {
        "question": "fio", "drive": "disk", "date": "2026-11-20", "commit": "abc",
        "machine": ["CPU: one"], "method": "two rounds", "figures": [figure], "report": "",
        "runs": None,
    }  # fmt: skip


def test_a_record_is_read_as_it_was_written(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    record, path = bench["record"], tmp_path / "kept.json"
    target = record.Target("at most", 1.15)
    figures = [record.figure("CPU", [1.3, 1.1, 1.2], "of fio", target)]
    made = record.today("fio", "disk", ["CPU: one"], "three rounds", figures, runs={"a": [1]})
    record.write(path, [made])
    assert record.read(path) == [made]
    (figure,) = made.figures
    assert (figure.value, figure.low, figure.high) == (1.2, 1.1, 1.3)
    assert (figure.wanted, figure.verdict) == ("at most 1.15", "missed")


@pytest.mark.parametrize(
    "change",
    [
        {"question": "speed"}, {"drive": ""}, {"date": "yesterday"}, {"commit": ""},
        {"machine": []}, {"method": ""}, {"figures": []}, {"figures": [{"what": "read"}]},
        {"more": 1},
    ],
    ids=lambda change: "-".join(change),
)  # fmt: skip
def test_a_record_that_lacks_something_is_refused(
    bench: dict[str, ModuleType], tmp_path: Path, change: dict[str, object]
) -> None:
    path = tmp_path / "kept.json"
    path.write_text(json.dumps([good() | change]))
    with pytest.raises(ValueError, match=r"kept\.json"):
        bench["record"].read(path)


def test_the_newest_record_of_each_drive_counts(
    bench: dict[str, ModuleType], tmp_path: Path
) -> None:
    older, newer, disk = (
        good() | {"drive": drive, "date": date}
        for drive, date in (
            ("simulated (loop)", "2026-11-20"),
            ("simulated (loop)", "2026-11-26"),
            ("disk", "2026-11-19"),
        )
    )
    (tmp_path / "a.json").write_text(json.dumps([newer, disk]))
    (tmp_path / "b.json").write_text(json.dumps([older]))
    found = bench["results_page"].newest(tmp_path)
    kept = [(one.record.drive, one.record.date) for one in found["fio"]]
    assert kept == [("disk", "2026-11-19"), ("simulated (loop)", "2026-11-26")]


def test_every_script_starts() -> None:
    """What they import from the package exists: no type checker reads them."""
    names = sorted(path.stem for path in BENCH.glob("*.py"))
    code = "import sys; sys.path.insert(0, sys.argv[1]); [__import__(n) for n in sys.argv[2:]]"
    for folder, scripts in ((BENCH, names), (BENCH / "dual_blade", ["run", "report", "child"])):
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder), *scripts],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_a_tiny_real_comparison_leaves_records(
    bench: dict[str, ModuleType], tmp_path: Path
) -> None:
    if shutil.which("fio") is None:
        pytest.skip("fio is not installed")
    kept = tmp_path / "kept.json"
    words = ("--size", "256MiB", "--seconds", "0.2", "--rounds", "1", "--json", str(kept))
    done = subprocess.run(
        [sys.executable, str(BENCH / "against_fio.py"), "--dir", str(tmp_path), *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "uring" in done.stderr and done.returncode:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    (made,) = bench["record"].read(kept)
    assert made.question == "fio"
    assert {figure.verdict for figure in made.figures} <= {"", "met", "missed"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept.json"]


def test_sides_stand_together_with_the_best_of_each_column_bold(
    bench: dict[str, ModuleType], tmp_path: Path
) -> None:
    record, page = bench["record"], bench["results_page"]

    def side(what: str, by: str, speed: list[float], cpu: float | None) -> object:
        measured = [record.figure("speed", speed, "MiB/s")]
        if cpu is not None:
            measured.append(record.figure("CPU", [cpu], "s/GiB"))
        return record.Side(what, by, measured)

    sides = [
        side("load", "ours", [900.0, 1100.0, 1000.0], 0.25),
        side("store", "ours", [50.0], 0.5),
        side("load", "theirs", [1200.0], 0.125),
        side("store", "theirs", [40.0], None),
    ]
    made = record.today("fio", "disk", ["CPU: one"], "once", [record.figure("a", [1], "s")], None)
    assert made.sides == []
    path = tmp_path / "a.json"
    made = record.today("fio", "disk", ["CPU: one"], "once", made.figures, None, sides)
    record.write(path, [made])
    assert record.read(path) == [made]
    text = page.page({"fio": [page.Kept(made, BENCH / "results" / "a.json")]})
    table = text.partition("Side by side, disk:\n\n")[2].partition("\n\n")[0]
    assert table.splitlines() == [
        "| what | by | speed, MiB/s | CPU, s/GiB |",
        "|---|---|---|---|",
        "| load | ours | 1000 (900 to 1100) | 0.25 |",
        "| load | theirs | **1200** | **0.125** |",
        "| store | ours | **50** | 0.5 |",
        "| store | theirs | 40 |  |",
    ]
