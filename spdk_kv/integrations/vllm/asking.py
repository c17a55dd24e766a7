"""Whether a store that is open read only has a block: asked on another thread, and answered a step
later."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from spdk_kv.errors import SpdkKvError


@dataclass
class _Question:
    answer: Future[list[bool]]
    names: list[str]  # none any more once it was given up
    asked_s: float


class Asking:
    """Such a store looks at its index's disk for news when a key is not known, which must not hold
    the scheduler up. An answer holds as long as the request that asked for it. What is not known
    after ``patience_s`` is missing; nothing else is asked then, until that disk answers.

    ``ask`` begins to look keys up: a future of whether each is there. Whoever calls says what time
    it is.
    """

    def __init__(
        self, ask: Callable[[Sequence[str]], Future[list[bool]]], patience_s: float
    ) -> None:
        self._ask = ask
        self._patience_s = patience_s
        self._answers: dict[str, bool | None] = {}
        self._asked_by: dict[str, list[str]] = {}
        self._next: list[str] = []
        self._under_way: list[_Question] = []
        self._is_stuck = False

    def find(self, name: str, request: str) -> bool | None:
        """Whether the store has ``name``; None: that is not known yet."""
        if name not in self._answers:
            self._asked_by.setdefault(request, []).append(name)
            self._answers[name] = False if self._is_stuck else None
            if not self._is_stuck:
                self._next.append(name)
        return self._answers[name]

    def begin(self, now_s: float) -> None:
        """Asks for everything that was not known, at once."""
        if self._next:
            names, self._next = self._next, []
            try:
                self._under_way.append(_Question(self._ask(names), names, now_s))
            except SpdkKvError:  # closed, say
                self._answer(names, [False] * len(names))

    def take(self, now_s: float) -> None:
        """Takes the answers that have come; what could not be looked up is missing."""
        still = []
        self._is_stuck = False
        for question in self._under_way:
            if question.answer.done():
                names = question.names
                failed = question.answer.exception() is not None
                self._answer(names, [False] * len(names) if failed else question.answer.result())
                continue
            still.append(question)
            if now_s - question.asked_s > self._patience_s:
                self._is_stuck = True
                self._answer(question.names, [False] * len(question.names))
                question.names = []
        self._under_way = still

    def _answer(self, names: Sequence[str], found: Iterable[bool]) -> None:
        for name, is_there in zip(names, found, strict=False):
            if name in self._answers:
                self._answers[name] = is_there

    def missed(self, name: str) -> None:
        """It could not be loaded."""
        if name in self._answers:
            self._answers[name] = False

    def forget(self, request: str) -> None:
        """The request is over; others ask anew."""
        for name in self._asked_by.pop(request, ()):
            self._answers.pop(name, None)
