"""To a GPU and back: transfers whose memory is a GPU's, with copies that overlap the drive's work.

`cuda.py` makes links, `gpus.py` keeps the GPUs that they reach, `pipeline.py` cuts transfers into
segments, `planner.py` learns how large those should be.
"""

from __future__ import annotations

from spdk_kv.link.cuda import link_for, stream_of
from spdk_kv.link.gpus import GpuMemory, LinkedGpu, Links
from spdk_kv.link.pipeline import Pipeline

__all__ = ["GpuMemory", "LinkedGpu", "Links", "Pipeline", "link_for", "stream_of"]
