"""Whether a store that is open read only has a block: asked on another thread, and answered a step
later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future


class Asking:
    """Such a store looks at its index's disk for news when a key is not known, which must not hold
    the scheduler up. An answer holds as long as the request that asked for it.

    ``ask`` begins to look keys up: a future of whether each is there.
    """

    def __init__(self, ask: Callable[[Sequence[str]], Future[list[bool]]]) -> None:
        self._ask = ask
        self._answers: dict[str, bool | None] = {}
        self._asked_by: dict[str, list[str]] = {}
        self._next: list[str] = []
        self._under_way: list[tuple[Future[list[bool]], list[str]]] = []

    def find(self, name: str, request: str) -> bool | None:
        """Whether the store has ``name``; None: that is not known yet."""
        if name not in self._answers:
            self._answers[name] = None
            self._asked_by.setdefault(request, []).append(name)
            self._next.append(name)
        return self._answers[name]

    def begin(self) -> None:
        """Asks for everything that was not known, at once."""
        if self._next:
            names, self._next = self._next, []
            self._under_way.append((self._ask(names), names))

    def take(self) -> None:
        """Takes the answers that have come; what could not be looked up is missing."""
        still = []
        for future, names in self._under_way:
            if not future.done():
                still.append((future, names))
                continue
            found = [False] * len(names) if future.exception() else future.result()
            for name, is_there in zip(names, found, strict=True):
                if name in self._answers:
                    self._answers[name] = is_there
        self._under_way = still

    def missed(self, name: str) -> None:
        """It could not be loaded."""
        if name in self._answers:
            self._answers[name] = False

    def forget(self, request: str) -> None:
        """The request is over; others ask anew."""
        for name in self._asked_by.pop(request, ()):
            self._answers.pop(name, None)
