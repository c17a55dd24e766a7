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

from spdk_kv.binding.memory_limit import why_impossible
from spdk_kv.measure.decode.case import Outcome
from spdk_kv.measure.decode.load import Load, Noise
from spdk_kv.measure.decode.replay import Replay, SimulatedGpu
from support.places import ROOT

FOLDER = ROOT / "bench" / "dual_blade"
GIB = 1 << 30
LOAD = Load(layers=2, hidden=256, batch=2, prompt=64, generate=4)


@pytest.fixture(scope="module")
def parts() -> Iterator[dict[str, ModuleType]]:
    """The scripts of the folder, imported as they import each other."""
    names = ("rows", "plan", "plots", "report", "change", "ablation")
    names += ("copy_threads", "flexllmgen", "strong")
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
        steps_device_nbytes=[size // 4 for size in nbytes], **more,
    )  # fmt: skip
    return {"kind": "case", "run": run, "rho": rho, "outcome": asdict(outcome)}


def about() -> dict[str, Any]:
    return {
        "kind": "about", "title": "A title", "load": asdict(LOAD), "link": None,
        "link_text": "none", "compute_s": 0.0, "machine": ["CPU: one"],
    }  # fmt: skip


def explained(budget_nbytes: int) -> dict[str, Any]:
    return {"residency": {"budget_nbytes": budget_nbytes, "cached_nbytes": budget_nbytes - 1}}


def samples() -> list[dict[str, Any]]:
    return [
        about(),
        {"kind": "copy", "gib_s": 8.0},
        {"kind": "fio", "read_gib_s": 2.0, "write_gib_s": 1.0},
        {"kind": "fio", "read_gib_s": 4.0, "write_gib_s": 3.0},
        case(0, 0.5, "dual", [7.0, 7.0, 1.0, 2.0, 9.0], explained=explained(3 << 20)),
        case(1, 0.5, "dual", [8.0, 7.0, 3.0, 4.0, 5.0], explained=explained(5 << 20)),
        case(2, 0.5, "dual", [9.0, 7.0, 6.0, 6.0, 6.0], explained=explained(4 << 20)),
        case(0, 0.5, "flexllmgen", [9.0, 9.0, 8.0, 8.0, 8.0]),
        case(0, 1.2, "flexllmgen", [2.0, 2.0]),
    ]


def test_bounds(parts: dict[str, ModuleType]) -> None:
    bounds = parts["rows"].bounds_s
    load = Load(layers=16, hidden=2048, batch=16, prompt=1024)
    assert load.nbytes == 2 * GIB
    # 1 GiB from a drive of 4 GiB/s, 1 GiB from memory at 8.
    assert bounds(2 * GIB, 0.5, load, 4.0, 8.0) == pytest.approx((0.375, 0.25))
    # Everything fits, also what was appended since.
    assert bounds(2.1 * GIB, 1.2, load, 4.0, 8.0) == pytest.approx((2.1 / 8, 2.1 / 8))
    assert bounds(2 * GIB, 0.0, load, 4.0, 8.0) == pytest.approx((0.5, 0.5))


def test_rows_are_medians_over_runs_of_medians_over_all_but_the_first_steps(
    parts: dict[str, ModuleType],
) -> None:
    rows = parts["rows"].make_rows(samples())
    assert [(row["rho"], row["variant"]) for row in rows] == [
        (0.5, "flexllmgen"), (0.5, "dual"), (1.2, "flexllmgen")
    ]  # fmt: skip
    dual = rows[1]
    assert dual["cached_share"] is None  # as in samples of earlier versions
    assert (dual["runs"], dual["decode_s_p50"], dual["prefill_s_p50"]) == (3, 4.0, 16.0)
    assert (dual["decode_s_p25"], dual["decode_s_p75"]) == (3.0, 5.0)
    assert (dual["decode_first_s"], dual["decode_mean_s"]) == (8.0, pytest.approx(87 / 15))
    assert (dual["x_nbytes"], dual["cached_nbytes"]) == (4 << 20, (4 << 20) - 1)
    assert (dual["fio_read_gib_s"], dual["memory_copy_gib_s"]) == (3.0, 8.0)
    assert dual["hit_rate"] == pytest.approx(0.75)
    nbytes = sum(LOAD.step_nbytes(step) for step in (2, 3, 4)) / 3
    assert dual["read_gib_s"] == pytest.approx(nbytes / GIB / 4.0)
    assert dual["of_bound"] == pytest.approx(4.0 / dual["bound_s"])
    assert rows[0]["decode_s_over_duals"] == 2.0
    assert rows[2]["decode_s_over_duals"] is None
    # Where there are no others, the first steps count.
    assert (rows[2]["decode_s_p50"], rows[2]["decode_first_s"]) == (2.0, 2.0)
    json.dumps(rows)


def test_the_bound_is_of_what_was_really_left_to_the_page_cache(
    parts: dict[str, ModuleType],
) -> None:
    def row(share: float) -> dict[str, Any]:
        left = [LOAD.nbytes, LOAD.nbytes, *[round(share * LOAD.nbytes)] * 3]
        own = case(0, 0.5, "dual", [3.0] * 5, steps_cached_nbytes=left)
        (found,) = parts["rows"].make_rows([*samples()[:4], own])
        return found

    flattered, exact = row(0.62), row(0.5)
    assert (flattered["cached_share"], exact["cached_share"]) == (
        pytest.approx(0.62, abs=1e-4),
        0.5,
    )
    assert flattered["bound_s"] < exact["bound_s"]
    assert flattered["of_bound"] > exact["of_bound"]
    rho_only = parts["rows"].make_rows([*samples()[:4], case(0, 0.5, "dual", [3.0] * 5)])[0]
    assert exact["bound_s"] == pytest.approx(rho_only["bound_s"])
    text = parts["report"].markdown([*samples()[:4]], [flattered], [])
    assert "## Left to the page cache while decoding" in text
    assert "0.620" in text


def test_a_run_that_failed_is_told_and_counts_in_no_figure(parts: dict[str, ModuleType]) -> None:
    failed = {"variant": "strong", "limit_nbytes": 1, "error": "killed"}
    broken = {"kind": "case", "run": 0, "rho": 0.2, "outcome": failed}
    found = [*samples(), broken]
    rows = parts["rows"].make_rows(found)
    assert rows[0]["decode_s_p50"] is None
    assert rows[0]["errors"] == ["killed"]
    text = parts["report"].markdown(found, rows, [])
    assert "- strong: killed" in text
    assert "| 0.2 |  | failed | failed | failed |  |" in text


def test_rows_need_to_know_the_load_and_the_drive(parts: dict[str, ModuleType]) -> None:
    make_rows = parts["rows"].make_rows
    with pytest.raises(ValueError, match="which load"):
        make_rows(samples()[1:])
    with pytest.raises(ValueError, match="'fio'"):
        make_rows([one for one in samples() if one["kind"] != "fio"])


def changed(parts: dict[str, ModuleType]) -> list[dict[str, Any]]:
    """Two runs; the bound is 1 s at rho 1, and 2 s at 0.5."""
    rhos = [1.0] * 4 + [0.5] * 4
    found = []
    for run, steps in enumerate(([1.0] * 4 + [9.0, 2.2, 2.4, 2.0], [1.0] * 4 + [9.0] * 4)):
        sample = case(run, 0.0, "dual", steps, steps_budget_nbytes=[7 << 20] * 4 + [3 << 20] * 4)
        found.append({"kind": "change", "run": run, "rhos": rhos, "outcome": sample["outcome"]})
    return found


def test_a_change_is_told_step_by_step(
    parts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        parts["rows"].Yardsticks, "bounds_s", lambda self, nbytes, rho: (1 / rho, 1 / rho)
    )
    found = [*samples(), *changed(parts)]
    rows = parts["change"].make_rows(found)
    assert [row["kind"] for row in rows] == ["change"] * 8 + ["settle"]
    assert [row["of_bound"] for row in rows[3:6]] == [1.0, 4.5, pytest.approx(2.8)]
    assert [row["x_nbytes"] for row in rows[3:5]] == [7 << 20, 3 << 20]
    # The second step of the first run was the first one inside 1.15; the other run had none.
    assert rows[8]["steps_of_runs"] == [2, None]
    assert (rows[8]["of_bound_before"], rows[8]["rho_before"], rows[8]["rho"]) == (1.0, 1.0, 0.5)
    text = "\n".join(parts["change"].tables(rows))
    assert "| dual | 1 to 0.5 | 1.00 | 2, none |" in text
    assert "| 4 | 0.5 | 2.000 | 9.000 | 3 |" in text
    json.dumps(rows)


def test_the_budgets_of_a_change_fit_its_load(parts: dict[str, ModuleType]) -> None:
    change = parts["change"]
    assert change.load_for(LOAD).steps == len(change.budgets())
    assert list(change.changes()) == [(12, 0.45), (22, 0.9)]


def test_the_ablation_has_a_row_per_setting(parts: dict[str, ModuleType]) -> None:
    ablation = parts["ablation"]
    found = samples()
    for setting in reversed(ablation.SETTINGS):
        sample = case(0, 0.0, setting.variant, [3.0, 3.0, 2.0], explained=explained(2 << 20))
        outcome = Outcome(**sample["outcome"])
        found.append({"kind": "ablation", **ablation.fields(setting, outcome, 0)})
    rows = ablation.make_rows(json.loads(json.dumps(found)))
    assert [row["label"] for row in rows] == [setting.label for setting in ablation.SETTINGS]
    assert (rows[0]["ahead"], rows[0]["decode_s_p50"], rows[0]["decode_first_s"]) == (0, 2.0, 3.0)
    text = "\n".join(ablation.tables(rows))
    assert "| +dual: adaptive | 2 | 2.000 (2.000 to 2.000) |" in text
    assert "| X = 0.22 W | 2 |" in text
    assert ablation.SWEEP[1].options(LOAD) == {"memory": round(0.22 * LOAD.nbytes)}


@pytest.mark.parametrize("link", [None, 1e9])
@pytest.mark.parametrize("baseline", ["flexllmgen", "strong"])
def test_the_baselines_replay(
    parts: dict[str, ModuleType], tmp_path: Path, baseline: str, link: float | None
) -> None:
    noise, gpu = Noise(LOAD), SimulatedGpu(1e-4, link)
    files = {"flexllmgen": "NumpyFiles", "strong": "OneFile"}
    medium = getattr(parts[baseline], files[baseline])(tmp_path, LOAD)
    path = parts["copy_threads"].ScheduledPath(LOAD, noise, gpu, medium, None)
    try:
        replay = Replay(LOAD, noise, path)
        replay.prefill()
        for _ in range(LOAD.steps):
            replay.step()
        replay.check()
    finally:
        path.close()
    assert list(tmp_path.iterdir()) == []


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
    found = [*samples(), *changed(parts)]
    rows = [*parts["rows"].make_rows(found), *parts["change"].make_rows(found)]
    pictures = parts["plots"].draw(rows, tmp_path)
    if reason := parts["plots"].missing():
        assert pictures == []
        pytest.skip(reason)
    assert pictures == ["decode.png", "prefill.png", "utilisation.png", "change.png"]
    for name in pictures:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.machine
@pytest.mark.timeout(1200)
def test_a_tiny_real_run(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("emptying the page cache needs root")
    if reason := why_impossible():
        pytest.skip(reason)
    words = [
        *("--dir", str(tmp_path), "--out", str(tmp_path / "out"), "--runs", "1"),
        *("--rho", "0.6", "--variants", "dual", "--budgets"),
        *("--layers", "4", "--hidden", "256", "--batch", "4"),
        *("--prompt", "8192", "--generate", "8"),
        *("--fio-seconds", "0.2", "--json", str(tmp_path / "rows.json")),
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(FOLDER / "run.py"), *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "fio is not installed" in done.stderr:
        pytest.skip("fio is not installed")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["kind"], row["rho"], row["variant"]) for row in rows] == [("budget", 0.6, "dual")]
    for row in rows:
        assert row["errors"] == []
        assert {"decode_s_p50", "prefill_s_p50", "read_gib_s", "bound_s", "fio_read_gib_s"} <= set(
            row
        )
        assert row["decode_s_p50"] > 0
        # Of 128 MiB, so that the few MiB by which steps differ stay small.
        assert row["cached_share"] == pytest.approx(0.6, rel=0.02)
    assert "## Decode, seconds per token" in (tmp_path / "out" / "README.md").read_text()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "rows.json"]
