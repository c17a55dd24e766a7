"""The dashboard of docs/how-to asks for nothing that is not exported, and its page explains it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from docs.pages import page
from metrics.samples import sample
from spdk_kv.metrics import Published
from support.places import ROOT

DASHBOARD = ROOT / "docs" / "how-to" / "grafana-dashboard.json"
PAGE = "docs/how-to/watch-a-store.md"
_METRIC = re.compile(r"\b(spdk_kv_\w+)(\{[^}]*\})?")
_GROUPING = re.compile(r"\b(?:by|on|without|ignoring) ?\(([^)]*)\)")
_WORD = re.compile(r"[a-z_]+(?= *\()")
_FUNCTIONS = {"sum", "by", "on", "rate", "increase", "histogram_quantile", "time"}


def exported() -> dict[str, set[str]]:
    """The labels of each series that is exported."""
    registry = CollectorRegistry()
    registry.register(Published(lambda: [("one", sample())]))
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for each in family.samples:
            found.setdefault(each.name, set()).update(each.labels)
    return found


def targets() -> list[tuple[str, str, str]]:
    """(title of the panel, expression, legend) of all there are."""
    board = json.loads(DASHBOARD.read_text())
    return [
        (panel["title"], target["expr"], target["legendFormat"])
        for panel in board["panels"]
        for target in panel["targets"]
    ]


def complaints(expression: str, legend: str) -> list[str]:
    """What of an expression is not exported, or does not parse."""
    known, found = exported(), []
    left: set[str] | None = None
    for name, selector in _METRIC.findall(expression):
        if name not in known:
            found.append(f"no {name}")
            continue
        left = known[name] if left is None else left & known[name]
        used = re.findall(r"(\w+) *(?:=~|!~|!=|=)", selector)
        found += [f"{name} has no {label}" for label in used if label not in known[name]]
        if selector and "$store" not in selector:
            found.append(f"{name} is not of the chosen store")
    if left is None:
        return found or ["nothing is asked for"]
    for labels in _GROUPING.findall(expression):
        for label in filter(None, map(str.strip, labels.split(","))):
            if label not in left:
                found.append(f"nothing has {label}")
    groups = re.findall(r"\bby ?\(([^)]*)\)", expression)
    for group in groups:
        left &= set(map(str.strip, group.split(",")))
    shown = set(re.findall(r"\{\{(\w+)\}\}", legend))
    found += [f"the legend shows {label}, which is gone" for label in shown - left]
    if "histogram_quantile" in expression and "le" not in left:
        found.append("a quantile needs le")
    found += [f"{word} is no function" for word in set(_WORD.findall(expression)) - _FUNCTIONS]
    if expression.count("(") != expression.count(")"):
        found.append("brackets")
    counters = {name for name in known if name.endswith(("_total", "_bucket", "_sum", "_count"))}
    for name, _ in _METRIC.findall(expression):
        plain = re.search(rf"(?:rate|increase)\({name}\b", expression) is None
        if name in counters and plain and name != "spdk_kv_corruptions_total":
            found.append(f"{name} only grows: what matters is its rate")
    return found


@pytest.mark.parametrize(("title", "expression", "legend"), targets())
def test_expressions_name_only_what_is_exported(title: str, expression: str, legend: str) -> None:
    assert complaints(expression, legend) == [], f"{title}: {expression}"


@pytest.mark.parametrize(
    ("expression", "legend", "complaint"),
    [
        ('rate(spdk_kv_hit_total{store=~"$store"}[1m])', "", "no spdk_kv_hit_total"),
        ('spdk_kv_units{store=~"$store", layer="1"}', "", "spdk_kv_units has no layer"),
        ("spdk_kv_units{}", "", "spdk_kv_units is not of the chosen store"),
        ('sum by (op) (spdk_kv_units{store=~"$store"})', "", "nothing has op"),
        ('sum by (path) (spdk_kv_units{store=~"$store"})', "{{store}}",
         "the legend shows store, which is gone"),
        ('spdk_kv_hits_total{store=~"$store"}', "",
         "spdk_kv_hits_total only grows: what matters is its rate"),
        ('avg_rate(spdk_kv_hits_total{store=~"$store"}[1m])', "", "avg_rate is no function"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_noticed(expression: str, legend: str, complaint: str) -> None:
    assert complaint in complaints(expression, legend)


def test_panels_do_not_overlap_and_each_has_its_line_on_the_page() -> None:
    board: dict[str, Any] = json.loads(DASHBOARD.read_text())
    taken: set[tuple[int, int]] = set()
    rows = re.findall(r"^\| ([^|]+?) \|", page(PAGE).text.partition("## In Grafana")[2], re.M)
    titles = [panel["title"] for panel in board["panels"]]
    assert [row for row in rows if row in titles] == titles
    assert len({panel["id"] for panel in board["panels"]}) == len(titles)
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["description"].endswith("."), panel["title"]


def test_metrics_that_the_page_names_are_exported() -> None:
    named = set(re.findall(r"\bspdk_kv_[a-z_]*[a-z]\b(?!/)", page(PAGE).text))
    assert named
    assert named <= set(exported())


def test_the_stores_to_choose_from_are_those_that_are_exported() -> None:
    board = json.loads(DASHBOARD.read_text())
    (store,) = [each for each in board["templating"]["list"] if each["name"] == "store"]
    assert store["definition"] == "label_values(spdk_kv_up, store)"
    assert exported()["spdk_kv_up"] == {"store"}
