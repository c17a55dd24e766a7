"""Links to CUDA GPUs: made once per GPU and process, their speed measured."""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING

from spdk_kv._native.link.cuda import CudaLink
from spdk_kv._native.memory import Region
from spdk_kv.units import GIB, MIB

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_links: dict[tuple[int, int], CudaLink] = {}
_links_lock = threading.Lock()


def link_for(device: torch.device | str | int) -> tuple[CudaLink | None, str]:
    """The link to a torch device, or None and why there is none.

    The first call for a GPU takes some tens of milliseconds.
    """
    import torch

    device = torch.device(device)
    if device.type != "cuda":
        return None, f"{device} is no CUDA device"
    if torch.version.cuda is None:
        return None, "this build of torch is without CUDA"
    if not torch.cuda.is_available():
        return None, "torch finds no usable GPU"
    ordinal = torch.cuda.current_device() if device.index is None else device.index
    with _links_lock:
        key = (os.getpid(), ordinal)
        if key not in _links:
            torch.cuda.init()  # type: ignore[no-untyped-call]
            try:
                _links[key] = measured(CudaLink(ordinal))
            except OSError as refused:
                return None, str(refused)
        return _links[key], ""


def measured(link: CudaLink) -> CudaLink:
    """``link``, its speed measured if that works; without it copies are polled more often than
    needed."""
    memory = Region(4 * MIB)
    try:
        held = link.register(memory)  # until this returns
        link.measure(memory)
    except OSError as refused:
        log.info("the speed of the link to GPU %d is not known: %s", link.ordinal, refused)
    else:
        del held
        log.info(
            "GPU %d, %s: %.1f GiB/s to it, %.1f GiB/s from it in copies of 1 MiB",
            link.ordinal,
            link.device_name,
            MIB / GIB / max(link.copy_time_s(MIB), 1e-9),
            MIB / GIB / max(link.copy_time_s(MIB, False), 1e-9),
        )
    return link


def stream_of(device: torch.device | str | int) -> int:
    """The handle of torch's current stream on ``device``, for a transfer's ``stream``."""
    import torch

    return int(torch.cuda.current_stream(device).cuda_stream)
