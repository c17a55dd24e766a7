"""Lines that fit into a terminal of 80 columns, and cannot do anything to it."""

from __future__ import annotations

import textwrap

_WIDTH = 79


def wrapped(text: str, indent: str = "  ") -> str:
    """``text`` in lines; all but the first begin with ``indent``."""
    return textwrap.fill(
        text, width=_WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )


def readable(text: str) -> str:
    """``text`` on one line, without characters that would move a terminal's cursor."""
    return "".join(
        character if character.isprintable() and character != "\ufffd" else "\N{MIDDLE DOT}"
        for character in " ".join(text.split())
    )
