"""To a GPU and back: transfers whose memory is a GPU's, in chunks, copies beside the drive's work.

`gpus.py` finds the GPUs that are reached, `pipeline.py` is one transfer, `planner.py` sizes chunks.
"""

from __future__ import annotations

from spdk_kv.link.gpus import DeviceMemory, LinkedDevice, Links
from spdk_kv.link.pipeline import Pipeline, link_for, stream_of

__all__ = ["DeviceMemory", "LinkedDevice", "Links", "Pipeline", "link_for", "stream_of"]
