"""How much of a stored sequence a cache may go on from."""

from __future__ import annotations

import logging

import torch

from spdk_kv.errors import KeyNotFound, ShapeMismatch, StoreMismatch
from spdk_kv.integrations.transformers.identity import Identity
from spdk_kv.integrations.transformers.lifetime import outside_inference
from spdk_kv.integrations.transformers.note import Note, decode
from spdk_kv.integrations.transformers.text import Ids, common_tokens
from spdk_kv.integrations.transformers.watch import UnknownTokens, tokens_of
from spdk_kv.store import KVStore

log = logging.getLogger(__name__)

RESERVED = "prompt-cache/"
"""What the names of a PromptCache's prompts begin with; nobody writes those again."""

_HOW = "pass the model itself and input_ids= to go on from them"


def ids_of(input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Ids:
    """The text of ``input_ids``, ``[rows, tokens]`` or ``[tokens]``, as it is compared.

    Raises:
        ShapeMismatch: It is no such tensor, or the mask is not one of padding on the left.
    """
    if not isinstance(input_ids, torch.Tensor) or input_ids.dim() not in (1, 2):
        raise ShapeMismatch("input_ids is a tensor of token ids, [batch, tokens]")
    ids = input_ids if input_ids.dim() == 2 else input_ids[None]
    if ids.is_floating_point() or not ids.numel():
        raise ShapeMismatch(
            f"input_ids are whole numbers, at least one: not {list(ids.shape)} of {ids.dtype}"
        )
    try:
        return tokens_of(ids, attention_mask)
    except UnknownTokens as error:
        raise ShapeMismatch(str(error)) from error


def stored_note(
    store: KVStore, name: str, identity: Identity, ids: Ids | None, limit: int | None = None
) -> Note | None:
    """What is stored as ``name``, with the text cut to what ``ids`` begins with; None where nothing
    of it can be taken up, which is logged where it matters.

    Args:
        store: The store.
        name: Of a sequence, which need not exist.
        identity: Of the model that goes on from it.
        ids: What the text is to be, in the end; its last token is always computed anew.
        limit: From how many tokens on K depends on the length; see :func:`length_limit`.

    Raises:
        StoreMismatch: It is another model's. Says in what.
    """
    try:
        # As it is now, which may not be recorded yet.
        sequence = outside_inference(lambda: store.sequence(name))
    except KeyNotFound:
        return None
    found, held = decode(sequence.note), sequence.tokens()
    if found is None:
        log.warning(
            "%r begins anew: what is stored does not say in the words of this release which model "
            "and text it is of",
            name,
        )
        return None
    if identity.weights is None or found.identity.weights is None:
        whose = "those given" if identity.weights is None else "those that it is stored with"
        log.warning(
            "%r begins anew: its %d stored tokens are not taken up, since the weights cannot be "
            "checked with a bare configuration, %s; %s",
            *(name, held, whose, _HOW),
        )
        return None
    differences = identity.differences(found.identity)
    if differences and _only_newer(identity, found.identity, differences):
        log.warning("%r begins anew: %s", name, "; ".join(differences))
        return None
    if differences:
        raise StoreMismatch(
            f"{name!r} is stored with another model: {'; '.join(differences)}. Take another name, "
            f"or delete it: store.sequence({name!r}).delete()"
        )
    if ids is None:
        log.warning(
            "%r begins anew: its %d stored tokens are not taken up without the text; %s",
            *(name, held, _HOW),
        )
        return None
    if limit is not None and len(ids) >= limit:
        log.warning(
            "%r begins anew: with this kind of RoPE, K depends on the length from %d tokens on",
            *(name, limit),
        )
        return None
    count = min(common_tokens(found.ids, ids), len(ids) - 1)
    return Note(found.identity, found.ids[:count], found.hits, found.used_s) if count else None


def _only_newer(identity: Identity, stored: Identity, differences: list[str]) -> bool:
    """Whether it may be only that releases of transformers write configurations differently."""
    return identity.release != stored.release and all(
        difference.startswith("config.") for difference in differences
    )
