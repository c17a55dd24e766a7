"""What llama-cpp-python takes as a cache: `Llama.set_cache(StateCache(store, llama))`."""

from __future__ import annotations

import logging
import sys
import threading
import weakref
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from typing import Any

import numpy as np

from spdk_kv.errors import CorruptionError, KeyNotFound, SpdkKvError
from spdk_kv.integrations.llama_cpp.contexts import State, context_of
from spdk_kv.integrations.llama_cpp.identity import PREFIX, fingerprint
from spdk_kv.integrations.llama_cpp.keys import (
    Piece,
    Tokens,
    common_tokens,
    find,
    pieces_of,
    tokens_of,
)
from spdk_kv.store import KVStore

log = logging.getLogger(__name__)

# Pieces that are read ahead of the one that llama.cpp takes, or written behind the one it gives.
_AHEAD = 4


class StateCache:
    """Keeps the states of a `Llama` in a store: a prompt that begins as an earlier one did, in this
    process or before, is computed from there on. Fulfils ``BaseLlamaCache``.

    After an answer, the state of its tokens is stored in pieces of ``every`` tokens, and only the
    pieces that are not there yet. Before one, the longest stored beginning of the prompt goes
    straight into the context, unless that holds as much already. What cannot be read, or is not
    what was stored, is computed instead: the cache raises nothing but the ``KeyError`` of a miss.

    A context that can only be read as a whole (recurrent and hybrid models, sliding windows)
    stores one state per answer, which serves prompts that go on from exactly there.

    Belongs to one ``Llama``, and ends when that is closed; that waits for a copy under way. Any
    number may share a store.
    """

    def __init__(
        self,
        store: KVStore,
        llama: Any,
        *,
        least_tokens: int = 64,
        every: int = 256,
        timeout_s: float | None = 10.0,
    ) -> None:
        """
        Args:
            store: Where the states go. One that is open ``read_only`` is read, and not added to.
            llama: The ``llama_cpp.Llama`` that is served. Its model's files are read once, to tell
                them from others.
            least_tokens: Beginnings shorter than this are neither stored nor looked for.
            every: Tokens in a piece.
            timeout_s: Seconds after which the drive is not waited for any more, for each piece:
                what is read late is computed instead, what is written late is not stored. None
                waits as long as it takes.

        Raises:
            ValueError: ``llama`` has no state that its tokens alone determine.
            OSError: A file of the model cannot be read.
        """
        import llama_cpp

        llama_cpp.llama_cache.BaseLlamaCache.register(StateCache)
        if least_tokens < 1 or every < 1:
            raise ValueError("least_tokens and every are 1 or more")
        if _sees_images(llama):
            raise ValueError(
                "pictures are in the context, and not in the tokens that a key is made of"
            )
        self._store = store
        self._llama = weakref.ref(llama)
        self._context = context_of(llama)
        self._least = least_tokens
        self._timeout_s = timeout_s
        self._every = every if self._context.cuts else int(llama.n_ctx()) + 1
        self._prefix = f"{PREFIX}{fingerprint(store, llama)}/"
        self._asked: Tokens = tokens_of([])
        self._writing: deque[Future[None]] = deque()
        self._counts: Counter[str] = Counter()
        # Held while the context is used, so that it is not freed meanwhile.
        self._use = threading.RLock()
        this = weakref.ref(self)
        llama._stack.callback(lambda: _leave(this))
        _save_nothing(llama, this)

    # -- what the host calls --------------------------------------------------------------------

    @property
    def capacity_bytes(self) -> int:
        """Bytes that the store may hold, of this and everything else in it."""
        return int(self._store.stats()["capacity_nbytes"])

    @property
    def cache_size(self) -> int:
        """Bytes that the store holds, of this and everything else in it."""
        return int(self._store.stats()["used_nbytes"])

    def __contains__(self, key: Sequence[int]) -> bool:
        """Whether a beginning of the tokens ``key`` is stored. Does not block."""
        return bool(self._find(tokens_of(key)))

    def __getitem__(self, key: Sequence[int]) -> Any:
        """Puts the longest stored beginning of the tokens ``key`` into the context. Blocks on the
        drive.

        Returns:
            A ``LlamaState`` that says so. It carries no bytes: the context has them already, so the
            host finds nothing left to load.

        Raises:
            KeyError: Nothing is stored that the context does not hold already, or it cannot be
                read.
        """
        with self._use:
            llama = self._llama()
            if llama is None or _sees_images(llama):
                raise KeyError("this cache serves no model")
            self._asked = tokens = tokens_of(key)
            held = common_tokens(tokens_of(llama._input_ids), tokens)
            if not self._context.cuts and held < llama.n_tokens:
                held = 0
            pieces = self._find(tokens)
            if not pieces or pieces[-1].end <= held:
                self._counts["live" if pieces else "misses"] += 1
                raise KeyError("no longer beginning of these tokens is stored")
            kept = held // self._every * self._every if self._context.cuts else 0
            try:
                restored = self._restore(llama, tokens, kept, pieces)
            except Exception:  # no memory, say; the host dies of anything but a miss
                log.exception("taking up a state; it is computed instead")
                self._counts["failed"] += 1
                restored = 0
            self._counts["hits" if restored else "misses"] += 1
            if not restored:
                raise KeyError("what is stored of these tokens could not be read")
            self._counts["restored_tokens"] += restored
            return _state(llama)

    def __setitem__(self, key: Sequence[int], value: Any) -> None:
        """Stores the state of the context, whatever ``value`` is: the pieces that are not stored
        yet. Blocks while they are copied; they are written meanwhile and after."""
        if self._store.read_only:
            return
        with self._use:
            llama = self._llama()
            if llama is None or _sees_images(llama):
                return
            try:
                self._store_new(llama, tokens_of(key))
            except Exception:  # no memory for a copy, say; the host has its answer all the same
                log.exception("a state is not stored")
                self._counts["unsaved"] += 1

    # -- beyond its contract --------------------------------------------------------------------

    def stats(self) -> dict[str, int]:
        """What it did: ``hits``, ``misses``, ``live`` (the context held as much already),
        ``restored_tokens``, ``read_nbytes``, ``damaged`` and ``failed`` pieces, pieces ``saved``,
        ``written_nbytes``, pieces ``unsaved``. Does not block."""
        names = ("hits", "misses", "live", "restored_tokens", "read_nbytes", "damaged", "failed")
        return {name: self._counts[name] for name in (*names, "saved", "written_nbytes", "unsaved")}

    def wait(self) -> None:
        """Blocks until everything that was to be stored is, or has failed."""
        with self._use:
            self._end_writing(0)

    # -- within ---------------------------------------------------------------------------------

    def _find(self, tokens: Tokens) -> list[Piece]:
        # The last token has to be computed for the next one's logits; where nothing can be cut
        # off again, a state that has it is of no use.
        most = len(tokens) if self._context.cuts else len(tokens) - 1
        if most < self._least:
            return []
        try:
            if self._store.read_only:
                self._store.refresh()
            found = find(self._prefix, tokens, self._every, most, self._store.contains)
        except SpdkKvError as failure:
            self._failed("looking for a state", failure)
            return []
        return found if found and found[-1].end >= self._least else []

    def _restore(self, llama: Any, tokens: Tokens, kept: int, pieces: list[Piece]) -> int:
        """Puts ``pieces`` from ``kept`` tokens on into the context, as many as can be read. Returns
        how many tokens came."""
        reached = kept
        for piece, state in self._read([piece for piece in pieces if piece.start >= kept]):
            if reached == kept:
                self._context.keep(llama, kept)
            if not self._context.add(llama, state, piece, tokens):
                self._counts["failed"] += 1
                log.warning("llama.cpp refuses a stored state; it is computed and stored anew")
                self._forget(piece)
                break
            reached = piece.end
            self._counts["read_nbytes"] += state.nbytes
        return reached - kept

    def _forget(self, piece: Piece) -> None:
        """Or it would stay in the way of one that is as it should be."""
        if not self._store.read_only:
            with suppress(SpdkKvError):
                self._store.delete(piece.key)

    def _read(self, pieces: list[Piece]) -> Iterator[tuple[Piece, State]]:
        """The states of ``pieces`` up to the first that cannot be read."""
        waiting = iter(pieces)
        coming: deque[tuple[Piece, Future[Any]]] = deque()
        while True:
            while len(coming) <= _AHEAD and (piece := next(waiting, None)) is not None:
                try:
                    coming.append((piece, self._get(piece.key)))
                except SpdkKvError as failure:
                    self._failed("reading a state", failure)
                    waiting = iter(())
            if not coming:
                return
            piece, future = coming.popleft()
            try:
                state = future.result()
            except SpdkKvError as failure:
                self._failed("reading a state", failure)
                return
            yield piece, state

    def _get(self, key: str) -> Future[Any]:
        return self._store.get_async(key, as_numpy=True, timeout_s=self._timeout_s)

    def _store_new(self, llama: Any, key: Tokens) -> None:
        tokens = tokens_of(llama._input_ids)
        # Tokens that were guessed, and computed in vain, may follow.
        answered = common_tokens(tokens, key)
        if answered < len(tokens) and not self._context.cuts:
            return
        pieces = self._unstored(tokens[:answered])
        if pieces:
            with closing(self._context.take(llama, pieces)) as states:
                for piece, state in zip(pieces, states, strict=False):
                    if not self._write(piece, state):
                        break

    def _unstored(self, tokens: Tokens) -> list[Piece]:
        """The pieces of ``tokens`` to store: of all of them, and of the prompt they began with,
        which may be asked again."""
        ends = {len(tokens)}
        asked = len(self._asked)
        if self._context.cuts and common_tokens(self._asked, tokens) == asked:
            ends.add(asked)
        ends = {end for end in ends if end >= self._least}
        if not ends:
            return []
        pieces = pieces_of(self._prefix, tokens, self._every, ends)
        try:
            return [piece for piece in pieces if not self._store.contains(piece.key)]
        except SpdkKvError as failure:
            self._failed("looking for a state", failure)
            return []

    def _write(self, piece: Piece, state: State) -> bool:
        """Begins to store a piece. False if there is no use in trying the next one."""
        if not self._end_writing(_AHEAD - 1):
            # Without the one before it nobody finds it, and the next may take as long to fail.
            self._counts["unsaved"] += 1
            return False
        try:
            if not self._store.worth_writing({piece.key: state.nbytes})[0]:
                self._counts["unsaved"] += 1
                return False
            future = self._store.put_async(piece.key, state, timeout_s=self._timeout_s)
        except SpdkKvError as failure:
            self._counts["unsaved"] += 1
            log.warning("a state of %d tokens is not stored: %s", piece.end, failure)
            return False
        self._counts["saved"] += 1
        self._counts["written_nbytes"] += state.nbytes
        self._writing.append(future)
        return True

    def _end_writing(self, most: int) -> bool:
        """Waits until at most ``most`` pieces are being written. False where one failed."""
        is_sound = True
        while len(self._writing) > most:
            failure = self._writing.popleft().exception()
            if failure is not None:
                self._counts["saved"] -= 1
                self._counts["unsaved"] += 1
                log.warning("a state is not stored: %s", failure)
                is_sound = False
        return is_sound

    def _failed(self, what: str, failure: SpdkKvError) -> None:
        damaged = isinstance(failure, CorruptionError)
        self._counts["damaged" if damaged else "failed"] += 1
        # Evicted between looking and reading is nothing to be told.
        if not isinstance(failure, KeyNotFound):
            log.warning("%s: %s; it is computed instead", what, failure)


def _sees_images(llama: Any) -> bool:
    return hasattr(llama.chat_handler, "clip_model_path")


def _state(llama: Any) -> Any:
    """The state that ``llama``'s context is in, without its bytes."""
    import llama_cpp

    return llama_cpp.LlamaState(
        input_ids=llama._input_ids.copy(),
        scores=np.empty((llama.n_tokens, 0), np.single),
        n_tokens=llama.n_tokens,
        llama_state=b"",
        llama_state_size=0,
        seed=llama._seed,
    )


def _save_nothing(llama: Any, this: weakref.ref[StateCache]) -> None:
    """Spares ``llama`` the three copies of its state, and of its scores, that it makes to store it:
    the cache takes what it needs from the context. Only for that: who else calls ``save_state``
    gets all of it."""
    import llama_cpp

    storing = llama_cpp.Llama._create_completion.__code__
    held = weakref.ref(llama)

    def save_state() -> Any:
        its: Any = held()
        if its.cache is this() and sys._getframe(1).f_code is storing:
            return _state(its)
        return type(its).save_state(its)

    llama.save_state = save_state


def _leave(this: weakref.ref[StateCache]) -> None:
    """Ends a cache whose Llama is being closed."""
    cache = this()
    if cache is not None:
        with cache._use:
            cache._llama = lambda: None  # type: ignore[assignment]
