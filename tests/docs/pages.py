"""The pages of README and docs, taken apart: code blocks, inline code, links and anchors."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from support.places import ROOT

_BLOCK = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)")
_INLINE = re.compile(r"`([^`\n]+)`")
_HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, what else its info string says, its text and first line."""

    language: str
    note: str
    text: str
    line: int


@dataclass(frozen=True)
class Page:
    """A Markdown file; ``name`` is its path from the root of the checkout."""

    name: str
    text: str

    @property
    def path(self) -> Path:
        return ROOT / self.name

    @property
    def blocks(self) -> list[Block]:
        found = []
        for match in _BLOCK.finditer(self.text):
            language, _, note = match[1].strip().partition(" ")
            line = self.text.count("\n", 0, match.start()) + 2
            found.append(Block(language, note, match[2], line))
        return found

    @property
    def prose(self) -> str:
        """The text without its blocks."""
        return _BLOCK.sub("", self.text)

    @property
    def links(self) -> list[str]:
        return _LINK.findall(self.prose)

    @property
    def inline_code(self) -> list[str]:
        return _INLINE.findall(self.prose)

    @property
    def anchors(self) -> set[str]:
        """What `#...` may name, as GitHub makes it of headings."""
        found: set[str] = set()
        seen: Counter[str] = Counter()
        for heading in _HEADING.findall(self.prose):
            anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
            seen[anchor] += 1
        return found


@cache
def pages() -> tuple[Page, ...]:
    """README.md and all pages of docs/."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return tuple(Page(str(path.relative_to(ROOT)), path.read_text()) for path in paths)


def page(name: str) -> Page:
    return next(found for found in pages() if found.name == name)
