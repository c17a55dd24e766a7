"""A model's K/V on a store, of which a decode step reads a part."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Rows
from dataclasses import replace

import torch

from spdk_kv.errors import StoreMismatch
from spdk_kv.integrations.transformers.lifetime import outside_inference
from spdk_kv.integrations.transformers.options import StreamOptions
from spdk_kv.integrations.transformers.shapes import guessed, shape_of
from spdk_kv.integrations.transformers.sparse.layer import Chosen, PartLayer
from spdk_kv.integrations.transformers.sparse.memory import Floats, check, needs_of
from spdk_kv.integrations.transformers.sparse.resident import Counters
from spdk_kv.integrations.transformers.stream import LayerStream, Pair
from spdk_kv.sequence import Sequence
from spdk_kv.sparse import Selector, Settings
from spdk_kv.store import KVStore
from spdk_kv.types import KVShape


class SparseStream(LayerStream):
    """A :class:`LayerStream` whose layers in ``scalings`` are read in groups of tokens where one
    token comes, and groups were chosen for it before. What comes otherwise (prompts, a token for
    which nobody chose) attends to everything.

    Args:
        store: Where K/V goes.
        options: As for :class:`LayerStream`.
        settings: How groups are chosen.
        scalings: For the layers of which a part is read, by their number: what products of queries
            and keys are multiplied by.
        adapters: For some of them, of low-rank keys; see :class:`~spdk_kv.sparse.LowRank`.
        memory_nbytes: What all of it may take in host memory; None is what the machine has left.
    """

    def __init__(
        self,
        store: KVStore,
        options: StreamOptions,
        settings: Settings,
        scalings: Mapping[int, float],
        adapters: Mapping[int, Floats],
        memory_nbytes: int | None,
    ) -> None:
        super().__init__(store, options)
        self.settings = settings
        self.part = Counters()
        self.first: Rows[int] | None = None
        """How many tokens of each row are padding, as the model was told."""
        # Those that stay in memory as a whole are attended to as a whole.
        self.scalings = {n: each for n, each in scalings.items() if n >= self.kept_layers}
        self.adapters = {n: each for n, each in adapters.items() if n in self.scalings}
        self._memory_nbytes = memory_nbytes
        self._parts: dict[int, PartLayer] = {}
        self._selectors: dict[int, Selector] = {}  # for layers that have not come yet

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> Pair:
        if layer == 0 and k.shape[2] > 1:
            self._check_memory(k, v)
        return super().update(layer, k, v)

    def _check_memory(self, k: torch.Tensor, v: torch.Tensor) -> None:
        sequence = self._sequence
        shape = (
            KVShape.of_layers(guessed([shape_of(k, v)], self.options.windows), batch=k.shape[0])
            if sequence is None
            else sequence.shape
        )
        tokens = max(self.options.max_tokens or 0, self.tokens(0) + k.shape[2])
        layers = {layer: self.adapters.get(layer) for layer in self.scalings}
        held = self.resident_nbytes + self.metadata_nbytes
        check(needs_of(shape, layers, tokens, self.settings), held, self._memory_nbytes)

    # -- a decode step --------------------------------------------------------------------------

    def choose(self, layer: int, query: torch.Tensor) -> None:
        """Selects, by ``query``, ``[rows, heads, 1, head_dim]``, what the next token of ``layer``
        attends to, and starts to read it; see :meth:`PartLayer.choose`."""
        sequence = self._sequence
        if sequence is None or not sequence.tokens(layer):
            return
        part = self._part(sequence, layer)
        part.choose(sequence, _of_token(query), self._padding(sequence))

    def correct(self, layer: int, query: torch.Tensor) -> None:
        """Judges that by the true query; see :meth:`PartLayer.correct`."""
        if self._sequence is not None and layer in self._parts:
            self._parts[layer].correct(self._sequence, _of_token(query))

    def remember(self, layer: int, query: torch.Tensor) -> None:
        """Keeps the true query of ``layer`` for the next step."""
        if layer in self._parts:
            self._parts[layer].last_query = query

    def last_query(self, layer: int) -> torch.Tensor | None:
        """What :meth:`remember` was given last, if the layer has been the same since."""
        part = self._parts.get(layer)
        return None if part is None else part.last_query

    def chosen(self, layer: int) -> Chosen | None:
        """What was chosen for the next token of ``layer``, if anything was."""
        part = self._parts.get(layer)
        return None if part is None else part.chosen(self.tokens(layer))

    def forget_choice(self, layer: int) -> None:
        """What was chosen for ``layer`` is not wanted: it attends to everything."""
        if layer in self._parts:
            self._parts[layer].drop()

    def forget_choices(self) -> None:
        """What was chosen and not attended to is not wanted any more."""
        for part in self._parts.values():
            part.drop()

    def _attended(
        self, sequence: Sequence, layer: int, past: int, k: torch.Tensor, v: torch.Tensor
    ) -> Pair:
        if layer not in self.scalings:
            return super()._attended(sequence, layer, past, k, v)
        part = self._part(sequence, layer)
        pair = part.attended(k, v, past)
        if pair is None:
            pair = super()._attended(sequence, layer, past, k, v)
            part.took_all(*pair, past, self._padding(sequence))
        return pair

    def _read_ahead(self, sequence: Sequence, layer: int, spare: int) -> None:
        # Of the next pass nobody knows yet whether it is a prompt's; of this one, whose.
        following = (layer + 1) % self.layers
        if following in self.scalings and (spare == 1 or following == 0):
            return
        super()._read_ahead(sequence, layer, spare)

    def _part(self, sequence: Sequence, layer: int) -> PartLayer:
        part = self._parts.get(layer)
        if part is None:
            shape, selector = sequence.shape, self._selectors.pop(layer, None)
            if selector is None:
                adapter = self.adapters.get(layer)
                selector = Selector(self.settings, adapter, scale=self.scalings[layer])
            made = layer, shape.layer(layer), shape.batch, selector, self.part
            part = self._parts[layer] = PartLayer(*made)
        return part

    def selectors(self) -> dict[int, Selector]:
        """What groups of each layer are selected by, of those that have come so far."""
        return {layer: part.selector for layer, part in list(self._parts.items())}

    def take_selectors(self, selectors: dict[int, Selector]) -> None:
        """The layers of the sequence begin with these, of the first tokens that it has."""
        self._selectors = {n: each for n, each in selectors.items() if n in self.scalings}

    def _padding(self, sequence: Sequence) -> Rows[int] | None:
        first = self.first
        return first if first is not None and len(first) == sequence.shape.batch else None

    # -- memory ---------------------------------------------------------------------------------

    @property
    def resident_nbytes(self) -> int:
        """Bytes of K and V in memory: groups, and newest tokens."""
        return sum(part.resident_nbytes for part in self._parts.values())

    @property
    def metadata_nbytes(self) -> int:
        """Bytes in memory of what groups are selected by."""
        waiting = self._selectors.values()
        return sum(each.nbytes for each in (*self.selectors().values(), *waiting))

    # -- changing: what is in memory is not there meanwhile, so that an interrupt costs a read -----

    def truncate(self, count: int) -> None:
        parts, self._parts = self._parts, {}
        super().truncate(count)
        for layer, selector in self._selectors.items():
            selector.truncate(self.tokens(layer))
        for layer, part in parts.items():
            part.truncate(self.tokens(layer))
        self._parts = parts

    def reorder(self, rows: Rows[int]) -> None:
        parts, self._parts, self._selectors = self._parts, {}, {}
        super().reorder(rows)
        for part in parts.values():
            part.select(rows)
        self._parts = parts

    def select(self, rows: Rows[int]) -> None:
        old = self._sequence
        if old is None or len(rows) == old.shape.batch:
            super().select(rows)
            return
        self.truncate(0)
        parts, self._parts, self._selectors = self._parts, {}, {}
        if old.temporary:
            # Groups are read from one sequence: it is copied, as one with a name is.
            self._drop_resident()
            self._copy(old, replace(old.shape, batch=len(rows)), self.layers, list(rows))
        else:
            super().select(rows)
        for part in parts.values():
            part.select(rows)
        self._parts = parts

    def take_fork(self, other: LayerStream, tokens: int) -> None:
        super().take_fork(other, tokens)
        sequence = self._sequence
        if sequence is None or not isinstance(other, SparseStream):
            return
        self.take_selectors(
            {
                layer: selector.copy(min(tokens, selector.tokens))
                for layer, selector in other.selectors().items()
            }
        )

    def clear(self) -> None:
        self._parts, self._selectors = {}, {}
        super().clear()

    def release(self) -> None:
        self._parts, self._selectors = {}, {}
        super().release()

    def resume(self, name: str, tokens: int) -> int:
        found = outside_inference(lambda: self._store.sequence(name))
        if found.granularity != "token":
            raise StoreMismatch(
                f"{name!r} is stored with granularity {found.granularity!r}, of which no groups of "
                "tokens are read: take another name, or an OffloadedKVCache, or delete it: "
                f"store.sequence({name!r}).delete()"
            )
        return super().resume(name, tokens)

    def _made(self, name: str, shape: KVShape, temporary: bool) -> Sequence:
        make = self._store.sequence
        return outside_inference(
            lambda: make(name, shape, granularity="token", temporary=temporary)
        )


def _of_token(query: torch.Tensor) -> torch.Tensor:
    """``[rows, heads, head_dim]`` in host memory, of the only token."""
    return query[:, :, -1].detach().float().cpu()
