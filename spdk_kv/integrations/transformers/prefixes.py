"""Finds which of many texts has the longest beginning in common with a given one. Pure: no I/O.

A PATRICIA trie, as in a String B-tree: it knows where texts part, and not what they say in between.
So it takes the same few hundred bytes for a text of any length, and is right to the token, where
hashes of blocks of tokens are right to the block, and take more the longer the text is. Which text
it comes to has the longest beginning in common of all, but how long that is, only a look at that
one text says: the caller has to read it.
"""

from __future__ import annotations

import zlib
from array import array
from dataclasses import dataclass

from spdk_kv.integrations.transformers.text import Ids, common_tokens

_ROOT = 0
_NONE = -1
# The key under which a text hangs that ends where others go on.
_END = -1


@dataclass(frozen=True)
class StoredPrompt:
    """A text whose K/V is stored.

    Attributes:
        name: Of the sequence that holds it.
        tokens: How long it is.
        hits: How often its beginning was used.
        used_s: Unix time of the last use.
    """

    name: str
    tokens: int
    hits: int
    used_s: float


class Prefixes:
    """Texts of one row each, by name. For one thread at a time.

    ``version`` is another number after every :meth:`add` and :meth:`remove`.
    """

    def __init__(self) -> None:
        self.version = 0
        # Of each node: how many tokens all texts below it share, the node above and the key there,
        # and a leaf below (a leaf: itself). Leaves have no children; a node has two or more, except
        # for the root.
        self._depth = array("q", [0])
        self._above = array("q", [_NONE])
        self._key = array("q", [_NONE])
        self._leaf = array("q", [_NONE])
        self._children: dict[int, dict[int, int]] = {_ROOT: {}}
        self._free: list[int] = []
        # Of each leaf: the names of the text, and what was counted; of each name its leaf.
        self._names: dict[int, str | list[str]] = {}
        self._leaf_of: dict[str, int] = {}
        self._crc = array("Q", [0])
        self._hits = array("Q", [0])
        self._used_s = array("d", [0.0])

    def __len__(self) -> int:
        return len(self._leaf_of)

    def __contains__(self, name: str) -> bool:
        return name in self._leaf_of

    # -- looking --------------------------------------------------------------------------------

    def candidate(self, ids: Ids) -> str | None:
        """The text that has as much of the beginning of ``ids``, ``[tokens, 1]``, as any other has;
        None where there are no texts."""
        node = self._descend(ids)
        # A text that ends here rather than one that goes on: all of it is used.
        leaf = self._leaf[self._children.get(node, {}).get(_END, node)]
        return None if leaf == _NONE else self._first_name(leaf)

    def is_still(self, name: str, ids: Ids) -> bool:
        """Whether ``ids``, or their beginning, are what ``name`` was added with."""
        leaf = self._leaf_of.get(name)
        if leaf is None or len(ids) < self._depth[leaf]:
            return False
        return _crc(ids[: self._depth[leaf]]) == self._crc[leaf]

    def tokens(self, name: str) -> int:
        """How many tokens ``name`` was added with. KeyError where it is not there."""
        return self._depth[self._leaf_of[name]]

    def texts(self) -> list[StoredPrompt]:
        """All of them, in the order in which they were added."""
        return [
            StoredPrompt(name, self._depth[leaf], self._hits[leaf], self._used_s[leaf])
            for name, leaf in self._leaf_of.items()
        ]

    def hit(self, name: str, now_s: float) -> None:
        """Counts that ``name`` was used, if it is there."""
        leaf = self._leaf_of.get(name)
        if leaf is not None:
            self._hits[leaf] += 1
            self._used_s[leaf] = now_s

    # -- changing -------------------------------------------------------------------------------

    def add(
        self, name: str, ids: Ids, nearest: Ids | None, hits: int = 0, used_s: float = 0.0
    ) -> None:
        """Adds a text, ``[tokens, 1]``, under a name that is not there yet.

        ``nearest``: the text of the :meth:`candidate` for ``ids``; None where there was none.
        """
        shared = 0 if nearest is None else common_tokens(ids, nearest)
        leaf = _NONE
        if nearest is not None and shared == len(ids) == len(nearest):
            leaf = self._leaf[self._descend(ids)]
            names = self._names[leaf]
            self._names[leaf] = [*([names] if isinstance(names, str) else names), name]
        else:
            above = self._parting(ids, nearest, shared)
            leaf = self._new(len(ids), above, _at(ids, shared))
            self._leaf[leaf] = leaf
            self._names[leaf] = name
            self._crc[leaf] = _crc(ids)
            self._hits[leaf], self._used_s[leaf] = hits, used_s
            if self._leaf[above] == _NONE:
                self._leaf[above] = leaf
        self._leaf_of[name] = leaf
        self.version += 1

    def remove(self, name: str) -> None:
        """Forgets ``name``, if it is there."""
        leaf = self._leaf_of.pop(name, None)
        if leaf is None:
            return
        self.version += 1
        names = self._names[leaf]
        if isinstance(names, list) and len(names) > 1:
            self._names[leaf] = [other for other in names if other != name]
            return
        del self._names[leaf]
        above = self._unhang(leaf)
        self._free.append(leaf)
        while above != _NONE and self._leaf[above] == leaf:
            left = next(iter(self._children[above].values()), None)
            self._leaf[above] = _NONE if left is None else self._leaf[left]
            above = self._above[above]

    # -- the trie -------------------------------------------------------------------------------

    def _descend(self, ids: Ids) -> int:
        """The last node on the way of ``ids``; the leaf of that very text, if there is one."""
        node = _ROOT
        while (children := self._children.get(node)) and self._depth[node] <= len(ids):
            child = children.get(_at(ids, self._depth[node]))
            if child is None:
                break
            node = child
        return node

    def _parting(self, ids: Ids, nearest: Ids | None, shared: int) -> int:
        """The node at which ``ids`` leaves the other texts, after ``shared`` tokens."""
        node = _ROOT
        while self._depth[node] < shared:
            child = self._children[node][_at(ids, self._depth[node])]
            if self._depth[child] > shared or child not in self._children:
                break
            node = child
        if self._depth[node] == shared or nearest is None:
            return node
        # All texts below share more than that: a node comes in between.
        key = self._key[child]
        between = self._new(shared, node, key)
        self._children[between] = {}
        self._leaf[between] = self._leaf[child]
        self._hang(child, between, _at(nearest, shared))
        return between

    def _unhang(self, leaf: int) -> int:
        """Takes the leaf out, and the node above it if that has one child left. Returns the node
        where it hung."""
        above = self._above[leaf]
        children = self._children[above]
        del children[self._key[leaf]]
        if len(children) > 1 or above == _ROOT:
            return above
        (left,) = children.values()
        higher = self._above[above]
        self._hang(left, higher, self._key[above])
        del self._children[above]
        self._free.append(above)
        return higher

    def _hang(self, node: int, above: int, key: int) -> None:
        self._above[node], self._key[node] = above, key
        self._children[above][key] = node

    def _new(self, depth: int, above: int, key: int) -> int:
        if self._free:
            node = self._free.pop()
        else:
            node = len(self._depth)
            for column in (self._depth, self._above, self._key, self._leaf):
                column.append(0)
            for counts in (self._crc, self._hits):
                counts.append(0)
            self._used_s.append(0.0)
        self._depth[node] = depth
        self._hang(node, above, key)
        return node

    def _first_name(self, leaf: int) -> str:
        names = self._names[leaf]
        return names if isinstance(names, str) else names[0]


def _at(ids: Ids, index: int) -> int:
    return int(ids[index, 0]) if index < len(ids) else _END


def _crc(ids: Ids) -> int:
    return zlib.crc32(ids.tobytes())
