"""bench/dual_blade: the arithmetic of its rows and report, its schedule, and one tiny real run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from spdk_kv.cli.decode_case import Outcome
from spdk_kv.cli.decode_load import Load
from spdk_kv.cli.memory_limit import why_impossible

FOLDER = Path(__file__).resolve().parent.parent / "bench" / "dual_blade"
GIB = 1 << 30
LOAD = Load(layers=2, hidden=256, batch=2, prompt=64, generate=4)


@pytest.fixture(scope="module")
def parts() -> Iterator[dict[str, ModuleType]]:
    """The scripts of the folder, imported as they import each other."""
    names = ("rows", "plan", "plots", "report")
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: __import__(name) for name in names}
    finally:
        sys.path.remove(str(FOLDER))
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
                del sys.modules[name]


def case(run: int, rho: float, variant: str, steps: list[float], **more: Any) -> dict[str, Any]:
    nbytes = [LOAD.step_nbytes(step) for step in range(len(steps))]
    outcome = Outcome(
        variant, 1000, prefill_s=2 * steps[0], steps_s=steps, steps_nbytes=nbytes,
        asked_nbytes=sum(nbytes), device_nbytes=sum(nbytes) // 4, **more,
    )  # fmt: skip
    return {"kind": "case", "run": run, "rho": rho, "outcome": asdict(outcome)}


def about() -> dict[str, Any]:
    return {
        "kind": "about", "title": "A title", "load": asdict(LOAD), "link": None,
        "link_text": "none", "compute_s": 0.0, "machine": ["CPU: one"],
    }  # fmt: skip


def samples() -> list[dict[str, Any]]:
    return [
        about(),
        {"kind": "copy", "gib_s": 8.0},
        {"kind": "fio", "read_gib_s": 2.0, "write_gib_s": 1.0},
        {"kind": "fio", "read_gib_s": 4.0, "write_gib_s": 3.0},
        case(0, 0.5, "dual", [1.0, 2.0, 9.0]),
        case(1, 0.5, "dual", [3.0, 4.0, 5.0]),
        case(2, 0.5, "dual", [6.0, 6.0, 6.0]),
        case(0, 0.5, "flexllmgen", [8.0, 8.0, 8.0]),
        case(0, 1.2, "flexllmgen", [2.0, 2.0, 2.0]),
    ]


def test_the_limit_is_own_memory_and_a_share_of_the_cache(parts: dict[str, ModuleType]) -> None:
    assert parts["rows"].limit_nbytes(100, 0.5, LOAD) == 100 + LOAD.nbytes // 2


def test_bounds(parts: dict[str, ModuleType]) -> None:
    bounds = parts["rows"].bounds_s
    load = Load(layers=16, hidden=2048, batch=16, prompt=1024)
    assert load.nbytes == 2 * GIB
    # 1 GiB from a drive of 4 GiB/s, 1 GiB from memory at 8.
    assert bounds(2 * GIB, 0.5, load, 4.0, 8.0) == pytest.approx((0.375, 0.25))
    # Everything fits, also what was appended since.
    assert bounds(2.1 * GIB, 1.2, load, 4.0, 8.0) == pytest.approx((2.1 / 8, 2.1 / 8))
    assert bounds(2 * GIB, 0.0, load, 4.0, 8.0) == pytest.approx((0.5, 0.5))


def test_rows_are_medians_over_runs_of_medians_over_steps(parts: dict[str, ModuleType]) -> None:
    rows = parts["rows"].make_rows(samples())
    assert [(row["rho"], row["variant"]) for row in rows] == [
        (0.5, "flexllmgen"), (0.5, "dual"), (1.2, "flexllmgen")
    ]  # fmt: skip
    dual = rows[1]
    assert (dual["runs"], dual["decode_s_p50"], dual["prefill_s_p50"]) == (3, 4.0, 6.0)
    assert (dual["decode_s_p25"], dual["decode_s_p75"]) == (3.0, 5.0)
    assert dual["decode_s_worst"] == 9.0
    assert (dual["fio_read_gib_s"], dual["memory_copy_gib_s"]) == (3.0, 8.0)
    assert dual["hit_rate"] == pytest.approx(0.75)
    nbytes = sum(LOAD.step_nbytes(step) for step in range(3)) / 3
    assert dual["read_gib_s"] == pytest.approx(nbytes / GIB / 4.0)
    assert dual["of_bound"] == pytest.approx(4.0 / dual["bound_s"])
    assert rows[0]["x_of_dual"] == 2.0
    assert rows[2]["x_of_dual"] is None
    json.dumps(rows)


def test_a_run_that_failed_is_told_and_counts_in_no_figure(parts: dict[str, ModuleType]) -> None:
    failed = {"variant": "strong", "limit_nbytes": 1, "error": "killed"}
    broken = {"kind": "case", "run": 0, "rho": 0.2, "outcome": failed}
    found = [*samples(), broken]
    rows = parts["rows"].make_rows(found)
    assert rows[0]["decode_s_p50"] is None
    assert rows[0]["errors"] == ["killed"]
    text = parts["report"].markdown(found, rows, [])
    assert "- strong: killed" in text
    assert "| 0.2 |  | failed | failed | failed |" in text


def test_rows_need_to_know_the_load_and_the_drive(parts: dict[str, ModuleType]) -> None:
    make_rows = parts["rows"].make_rows
    with pytest.raises(ValueError, match="which load"):
        make_rows(samples()[1:])
    with pytest.raises(ValueError, match="'fio'"):
        make_rows([one for one in samples() if one["kind"] != "fio"])


def test_verdicts(parts: dict[str, ModuleType]) -> None:
    found = samples()
    text = parts["report"].markdown(found, parts["rows"].make_rows(found), ["decode.png"])
    assert "![decode](decode.png)" in text
    assert "| 0.5 | decode lower than flexllmgen's by | at least 0.424 | 0.500 | met |" in text
    assert "at the best budget | at least 0.6 | 0.500 | missed |" in text
    assert "| 0.5 | decode / bound | at most 1.1 |" in text


def test_every_other_run_goes_backwards(parts: dict[str, ModuleType]) -> None:
    plan = parts["plan"].Plan(LOAD, variants=("strong", "dual"), rhos=(0.5, 1.2))
    forwards = list(parts["plan"].interleaved(plan, 0))
    assert forwards == [(0.5, "strong"), (0.5, "dual"), (1.2, "strong"), (1.2, "dual")]
    assert list(parts["plan"].interleaved(plan, 1)) == forwards[::-1]


def test_plots_are_pictures_or_there_are_none(parts: dict[str, ModuleType], tmp_path: Path) -> None:
    pictures = parts["plots"].draw(parts["rows"].make_rows(samples()), tmp_path)
    if reason := parts["plots"].missing():
        assert pictures == []
        pytest.skip(reason)
    assert pictures == ["decode.png", "prefill.png", "utilisation.png"]
    for name in pictures:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_tiny_real_run(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("emptying the page cache needs root")
    if reason := why_impossible():
        pytest.skip(reason)
    words = [
        *("--dir", str(tmp_path), "--out", str(tmp_path / "out"), "--runs", "1"),
        *("--rho", "1.2", "--variants", "flexllmgen,strong,dual"),
        *("--layers", "4", "--hidden", "256", "--batch", "4", "--prompt", "256", "--generate", "4"),
        *("--fio-seconds", "0.2", "--json", str(tmp_path / "rows.json")),
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(FOLDER / "run.py"), *words],
        capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(FOLDER.parent.parent)},
    )  # fmt: skip
    if "fio is not installed" in done.stderr:
        pytest.skip("fio is not installed")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["rho"], row["variant"]) for row in rows] == [
        (1.2, variant) for variant in ("flexllmgen", "strong", "dual")
    ]
    for row in rows:
        assert row["errors"] == []
        assert {"decode_s_p50", "prefill_s_p50", "read_gib_s", "bound_s", "fio_read_gib_s"} <= set(
            row
        )
        assert row["decode_s_p50"] > 0
    assert "## Decode, seconds per token" in (tmp_path / "out" / "README.md").read_text()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "rows.json"]
