"""Links, anchors and paths in README and docs lead somewhere; README fits on one page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs.pages import Page, page, pages
from support.places import ROOT

_PATH = re.compile(
    r"(?<![\w/])(?:spdk_kv|cython_src|tests|bench|scripts|vagrant|docs)/[\w./-]*\w|"
    r"\b(?:README|CONTRIBUTING|CHANGELOG)\.md"
)
_README_LINES = 100


def _broken(source: Page, link: str) -> str | None:
    """Why ``link`` leads nowhere, or None. Nothing is asked of the network."""
    if link.startswith(("https://", "mailto:")):
        return None
    target, _, anchor = link.partition("#")
    path = (source.path.parent / target).resolve() if target else source.path
    if not path.exists():
        return f"{link}: no such file"
    if anchor:
        found = page(str(Path(path).relative_to(ROOT)))
        if anchor not in found.anchors:
            return f"{link}: no such heading"
    return None


@pytest.mark.parametrize("source", pages(), ids=lambda source: source.name)
def test_links_resolve(source: Page) -> None:
    broken = [why for link in source.links if (why := _broken(source, link))]
    assert not broken, f"{source.name}: {broken}"


@pytest.mark.parametrize("source", pages(), ids=lambda source: source.name)
def test_paths_of_the_repository_exist(source: Page) -> None:
    text = re.sub(r"https?://\S+", "", source.text)
    missing = sorted({name for name in _PATH.findall(text) if not (ROOT / name).exists()})
    assert not missing, f"{source.name} names {missing}"


def test_every_page_is_reached_from_the_index() -> None:
    seen, waiting = set(), ["README.md"]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        source = page(name)
        for link in source.links:
            path = (source.path.parent / link.partition("#")[0]).resolve()
            if path.suffix == ".md" and path.is_relative_to(ROOT) and path.exists():
                target = str(path.relative_to(ROOT))
                if any(target == known.name for known in pages()):
                    waiting.append(target)
    assert seen == {known.name for known in pages()}


def test_readme_fits_on_one_page() -> None:
    assert page("README.md").text.count("\n") <= _README_LINES
