"""Takes the state of tokens out of a `Llama`'s context, and puts it back, in one copy each way.

llama.cpp writes the state of a *sequence*, whole. It is cut by its own means: another sequence is
made of some of the cells (no bytes are moved) and written alone. A context whose cells cannot be
told apart (recurrent, hybrid, sliding window) is written whole, and serves its exact length only.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Generator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from spdk_kv.integrations.llama_cpp.keys import Piece, Tokens

log = logging.getLogger(__name__)

State = NDArray[np.uint8]
"""A state's bytes."""

# The sequence that a Llama computes in, and one that it doesn't use.
_ITS = 0
_ASIDE = 1
_BEGINNING = _END = -1

# So that the drive reads and writes it without another copy.
_ALIGNMENT = 4096


class Context(Protocol):
    """How the state of a Llama is taken out and put back. Not thread-safe, as a Llama isn't."""

    cuts: bool
    """Whether a state may be of any tokens, and not only of all that there are."""

    def take(self, llama: Any, pieces: list[Piece]) -> Generator[State, None, None]:
        """A copy of the state of each piece; fewer, if llama.cpp fails. The context is as before
        when the iterator ends or is closed."""

    def keep(self, llama: Any, tokens: int) -> None:
        """Forgets all but the first ``tokens`` tokens; everything, where it can't be cut."""

    def add(self, llama: Any, state: State, piece: Piece, tokens: Tokens) -> bool:
        """Puts the state of a piece of ``tokens`` behind what is there. False if llama.cpp refuses
        it; ``llama`` holds what it says it does all the same."""


def context_of(llama: Any) -> Context:
    """The way that fits ``llama``.

    Raises:
        ValueError: Its context has no state to keep; the message says why.
    """
    import llama_cpp

    if llama._ctx.memory is None:
        raise ValueError("a model without a KV cache (for embeddings only) has no states to keep")
    if llama_cpp.llama_model_has_encoder(llama.model):
        raise ValueError("the state of a model with an encoder depends on more than its tokens")
    one = llama.context_params.n_seq_max == 1 or llama.context_params.kv_unified
    sliding = llama_cpp.llama_model_n_swa(llama.model) > 0
    recurrent = llama_cpp.llama_model_is_recurrent(llama.model)
    hybrid = llama_cpp.llama_model_is_hybrid(llama.model)
    return Cells() if one and not (sliding or recurrent or hybrid) else Whole()


class Cells:
    """A context that holds a cell per token, each of its own."""

    cuts = True

    def take(self, llama: Any, pieces: list[Piece]) -> Generator[State, None, None]:
        import llama_cpp

        memory = llama._ctx.memory
        llama_cpp.llama_memory_seq_cp(memory, _ITS, _ASIDE, _BEGINNING, _END)
        try:
            for piece in pieces:
                # Sequence 0 is written: of any other, a context for one leaves out the number.
                llama_cpp.llama_memory_seq_rm(memory, _ITS, _BEGINNING, _END)
                llama_cpp.llama_memory_seq_cp(memory, _ASIDE, _ITS, piece.start, piece.end)
                state = _buffer(llama_cpp.llama_state_seq_get_size(llama.ctx, _ITS))
                written = llama_cpp.llama_state_seq_get_data(
                    llama.ctx, _pointer(state), state.nbytes, _ITS
                )
                if not _is_all(state, written):
                    return
                yield state
        finally:
            llama_cpp.llama_memory_seq_rm(memory, _ITS, _BEGINNING, _END)
            llama_cpp.llama_memory_seq_cp(memory, _ASIDE, _ITS, _BEGINNING, _END)
            llama_cpp.llama_memory_seq_rm(memory, _ASIDE, _BEGINNING, _END)

    def keep(self, llama: Any, tokens: int) -> None:
        import llama_cpp

        llama_cpp.llama_memory_seq_rm(llama._ctx.memory, _ITS, tokens, _END)
        _now_holds(llama, tokens)

    def add(self, llama: Any, state: State, piece: Piece, tokens: Tokens) -> bool:
        import llama_cpp

        memory = llama._ctx.memory
        try:
            taken = llama_cpp.llama_state_seq_set_data(
                llama.ctx, _pointer(state), state.nbytes, _ASIDE
            )
            # What is refused leaves nothing; what says that it is other tokens is not taken up.
            if taken != state.nbytes or not _spans(memory, piece):
                return False
            llama_cpp.llama_memory_seq_cp(memory, _ASIDE, _ITS, _BEGINNING, _END)
        finally:
            llama_cpp.llama_memory_seq_rm(memory, _ASIDE, _BEGINNING, _END)
        _came(llama, piece, tokens)
        return True


class Whole:
    """A context that is written and read as a whole."""

    cuts = False

    def take(self, llama: Any, pieces: list[Piece]) -> Generator[State, None, None]:
        import llama_cpp

        for _ in pieces:
            state = _buffer(llama_cpp.llama_state_get_size(llama.ctx))
            written = llama_cpp.llama_state_get_data(llama.ctx, _pointer(state), state.nbytes)
            if not _is_all(state, written):
                return
            yield state

    def keep(self, llama: Any, tokens: int) -> None:
        import llama_cpp

        if tokens < llama.n_tokens:
            llama_cpp.llama_memory_clear(llama._ctx.memory, True)
            _now_holds(llama, 0)

    def add(self, llama: Any, state: State, piece: Piece, tokens: Tokens) -> bool:
        import llama_cpp

        taken = llama_cpp.llama_state_set_data(llama.ctx, _pointer(state), state.nbytes)
        if taken != state.nbytes:
            self.keep(llama, 0)
            return False
        _came(llama, piece, tokens)
        return True


def _spans(memory: Any, piece: Piece) -> bool:
    import llama_cpp

    first = llama_cpp.llama_memory_seq_pos_min(memory, _ASIDE)
    last = llama_cpp.llama_memory_seq_pos_max(memory, _ASIDE)
    return bool(first == piece.start and last == piece.end - 1)


def _now_holds(llama: Any, tokens: int) -> None:
    """Tells ``llama`` that its context holds so many tokens, and no logits of the last."""
    llama.n_tokens = tokens
    llama._requires_eval = True


def _came(llama: Any, piece: Piece, tokens: Tokens) -> None:
    """Tells ``llama`` that its context holds ``piece`` as well."""
    llama.input_ids[piece.start : piece.end] = tokens[piece.start : piece.end]
    if llama._logits_all:
        # The scores of what was computed elsewhere are not kept. One that is no number in each row
        # makes its probabilities none either, so that nobody is given those of another text.
        llama.scores[piece.start : piece.end, 0] = np.nan
    _now_holds(llama, piece.end)


def _buffer(nbytes: int) -> State:
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes]


def _pointer(state: State) -> Any:
    return state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def _is_all(state: State, written: int) -> bool:
    if written != state.nbytes:
        log.warning("llama.cpp wrote %d bytes of a state of %d", written, state.nbytes)
    return bool(written == state.nbytes)
