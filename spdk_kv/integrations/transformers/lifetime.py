"""The first and the last moment of a stream's sequence."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import torch

from spdk_kv.errors import SpdkKvError
from spdk_kv.sequence import Sequence

log = logging.getLogger(__name__)


def outside_inference(make: Callable[[], Sequence]) -> Sequence:
    # A tensor made in inference mode cannot be changed outside it, and a sequence's tails live
    # longer than one call of the model.
    with torch.inference_mode(False):
        return make()


def delete_in_thread(sequence: Sequence) -> None:
    """Deletes the sequence of a stream that was dropped without :meth:`LayerStream.release`."""
    # The garbage collector may run in a thread that holds the store's locks.
    threading.Thread(target=_delete, args=(sequence,), name="spdk_kv-delete", daemon=True).start()


def _delete(sequence: Sequence) -> None:
    try:
        sequence.delete()
    except SpdkKvError as error:
        log.debug("deleting %s: %s", sequence.name, error)
