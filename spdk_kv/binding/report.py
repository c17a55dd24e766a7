"""How a command ended: exit status, lines for people, and fields for JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from spdk_kv.devices.inspection import Code, Reason, Refused, ToolMissing, Unreadable

DONE, REFUSED, FAILED = 0, 2, 3
_OUTCOMES = {DONE: "done", REFUSED: "refused", FAILED: "failed"}


@dataclass(frozen=True)
class Report:
    """How a command ended.

    Attributes:
        status: the exit status: 0 done, 2 refused, 3 failed and rolled back.
        lines: text for people.
        fields: what JSON has besides ``outcome`` and ``reasons``.
    """

    status: int
    lines: Sequence[str]
    fields: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """The lines, without control characters that a drive's or file's name may contain."""
        return "\n".join("".join(_printable(c) for c in line) for line in self.lines)

    def json(self) -> str:
        """The report for programs: ``outcome``, ``reasons`` and the command's own fields."""
        values = {"outcome": _OUTCOMES[self.status], "reasons": [], **self.fields}
        return json.dumps(values, indent=2)


def _printable(character: str) -> str:
    return character if character.isprintable() else f"\\x{ord(character):02x}"


def refusal(reasons: Sequence[Reason], head: str = "refused, nothing was changed:") -> Report:
    """A report with exit status 2 that lists ``reasons``."""
    lines = [head, *(f"  {reason.code.value}: {reason.found}" for reason in reasons)]
    return Report(REFUSED, lines, {"reasons": [reason.fields() for reason in reasons]})


def reported(command: Callable[[], Report]) -> Report:
    """Runs ``command``; a missing tool or an unreadable answer becomes a refusal.

    Commands let such errors escape only before their first change.
    """
    try:
        return command()
    except Refused as error:
        return refusal(error.reasons)
    except ToolMissing as error:
        return refusal([Reason(Code.TOOL_MISSING, f"{error} is not installed")])
    except (Unreadable, OSError, ValueError) as error:
        return refusal([Reason(Code.UNREADABLE, str(error))])
