"""The tier as vLLM's scheduler calls it: lookups from memory, and jobs that others carry out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from spdk_kv.errors import ClosedError
from spdk_kv.integrations.jobs import Finished, Jobs
from spdk_kv.integrations.vllm.asking import Asking
from spdk_kv.integrations.vllm.identity import Keys
from spdk_kv.integrations.vllm.options import TierOptions
from spdk_kv.integrations.vllm.pages import Pages
from spdk_kv.integrations.vllm.telling import Telling, definitions
from spdk_kv.integrations.vllm.waiting import Waiting

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Words:
    """Values and classes of vLLM's, by which a tier answers."""

    hit: Any
    miss: Any
    retry: Any
    result: Callable[..., Any]
    request: Callable[[], Any]
    stats: Callable[[], Any]
    gauge: Callable[..., Any]
    counter: Callable[..., Any]
    locality: Callable[[str], Any]


@dataclass(frozen=True, slots=True)
class _Job:
    """A job of vLLM's that is under way."""

    job_id: int
    keys: list[bytes]
    is_load: bool


class Tier:
    """What ``SecondaryTierManager`` asks of a tier. Beside it, ``host.py`` has vLLM's classes.

    All methods but ``drain_jobs`` and ``shutdown`` return at once, whatever the drive does. They
    are called under the lock of vLLM's manager, so never two at a time.
    """

    words: ClassVar[Words]
    locality: Any

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        **options: Any,
    ) -> None:
        """Opens the store, so it blocks on the drive.

        Args:
            offloading_spec: vLLM's.
            primary_kv_view: vLLM's CPU cache, ``(chunks, bytes)``. Held until :meth:`shutdown`.
            tier_type: The name of this class.
            backpressure_detector: vLLM's, or None.
            **options: The fields of :class:`~spdk_kv.integrations.vllm.options.TierOptions`.

        Raises:
            ValueError: An option is unknown, missing or makes no sense.
            StoreLocked: Another engine has the store open; the message names its PID.
            SpdkKvError: It cannot be opened for another reason (:func:`spdk_kv.open`).
        """
        wanted = TierOptions.of(options)
        super().__init__(  # type: ignore[call-arg]  # of vLLM's class
            offloading_spec, primary_kv_view, tier_type, backpressure_detector
        )
        if wanted.locality is not None:
            self.locality = self.words.locality(wanted.locality)
        self._rows: np.ndarray[Any, Any] | None = np.asarray(primary_kv_view)
        self._row_nbytes = self._rows.strides[0]
        self._keys = Keys(self.facts(offloading_spec, self._row_nbytes, wanted.opening.identity))
        self._under_way: dict[int, _Job] = {}
        self._over: list[Any] = []
        self._declined = 0
        self._waiting = Waiting(wanted.most_waiting_nbytes(self._rows.nbytes), wanted.patience_s)
        self.store = wanted.open(offloading_spec.config.parallel.data_parallel_index)
        try:
            self._telling = Telling(self.store.location)
            self._jobs = Jobs(self.store, workers=wanted.workers)
        except BaseException:  # or another try would find the store in use
            self.store.close()
            raise
        self._asking: Asking | None = None
        if wanted.opening.read_only:
            self._asking = Asking(self._look_up, wanted.patience_s)

    @classmethod
    def facts(cls, offloading_spec: Any, row_nbytes: int, identity: str) -> Mapping[str, Any]:
        """What must be the same for a block to be used again. May block on the model's disk."""
        raise NotImplementedError

    # -- lookups --------------------------------------------------------------------------------

    def lookup(self, key: bytes, req_context: Any) -> Any:
        """HIT where a load would find the block, else MISS: also where loads take too long. RETRY
        where the store is open read only, and was not asked yet."""
        if self._waiting.lookups_miss:
            return self.words.miss
        name = self._keys(key)
        if self._asking is None:
            return self.words.hit if name in self.store else self.words.miss
        found = self._asking.find(name, req_context.req_id)
        if found is None:
            return self.words.retry
        return self.words.hit if found else self.words.miss

    def touch(self, keys: Collection[bytes], req_context: Any) -> None:
        """Nothing, since vLLM (0.32 and 0.33) calls it nowhere: a block counts as used when it is
        loaded, or offered to be stored, also where it is stored already."""

    def _look_up(self, names: Sequence[str]) -> Future[list[bool]]:
        return self.store.run_in_background(
            lambda: [nbytes is not None for nbytes in self.store.sizes(names)]
        )

    def on_new_request(self, req_context: Any) -> Any:
        """No wishes: blocks are stored as they are computed."""
        return self.words.request()

    def on_request_finished(self, req_context: Any) -> None:
        """Forgets what was found out for it."""
        if self._asking is not None:
            self._asking.forget(req_context.req_id)

    # -- jobs -----------------------------------------------------------------------------------

    def submit_store(self, job_metadata: Any) -> None:
        """Writes blocks from now on, or declines to: the store is read only, or too much waits."""
        keys = list(job_metadata.keys)
        nbytes = len(keys) * self._row_nbytes
        if self.store.read_only or not self._waiting.may_store(nbytes):
            self._declined += len(keys)
            self._end_at_once(job_metadata.job_id, not keys)
        elif not keys:
            self._end_at_once(job_metadata.job_id, True)
        else:
            number = self._jobs.put(self._pages(keys, job_metadata), again=False)
            self._under_way[number] = _Job(job_metadata.job_id, keys, is_load=False)
            self._waiting.began_store(number, nbytes)

    def submit_load(self, job_metadata: Any) -> None:
        """Reads blocks from now on."""
        keys = list(job_metadata.keys)
        if not keys:
            self._end_at_once(job_metadata.job_id, True)
            return
        number = self._jobs.get(self._pages(keys, job_metadata))
        self._under_way[number] = _Job(job_metadata.job_id, keys, is_load=True)
        self._waiting.began_load(number, time.monotonic())

    def _pages(self, keys: list[bytes], job: Any) -> Pages:
        assert self._rows is not None, "no jobs come after shutdown"
        return Pages(self._keys, keys, self._rows, job.chunk_ids)

    def _end_at_once(self, job_id: int, success: bool) -> None:
        self._over.append(
            self.words.result(job_id=job_id, success=success, transfer_time=0.0, transfer_bytes=0)
        )

    def get_finished_jobs(self) -> Iterable[Any]:
        """The jobs that ended since the last call, each once."""
        now_s = time.monotonic()
        self._take_finished()
        if self._asking is not None:
            self._asking.take(now_s)
        self._waiting.look(now_s)
        over, self._over = self._over, []
        return over

    def _take_finished(self) -> None:
        for finished in self._jobs.finished():
            job = self._under_way.pop(finished.job)
            self._waiting.ended(finished.job)
            self._over.append(self._result(job, finished))

    def _result(self, job: _Job, finished: Finished) -> Any:
        success = all(finished.ok)
        loaded = None
        if job.is_load and not success:
            loaded = tuple(key for key, ok in zip(job.keys, finished.ok, strict=True) if ok)
            for key, ok in zip(job.keys, finished.ok, strict=True):
                if not ok:
                    self._forget(self._keys(key))
        return self.words.result(
            job_id=job.job_id,
            success=success,
            successful_keys=loaded or None,
            transfer_time=finished.seconds,
            transfer_bytes=finished.nbytes,
        )

    def _forget(self, name: str) -> None:
        """Makes lookups miss what could not be loaded: vLLM would ask for it for ever. It is
        computed and stored again."""
        if self._asking is not None:
            self._asking.missed(name)
            return
        with suppress(ClosedError):
            self.store.delete(name)

    def has_pending_work(self) -> bool:
        """Whether jobs are under way."""
        return bool(self._under_way or self._over)

    def on_schedule_end(self, context: Any) -> None:
        """Looks up what :meth:`lookup` could not tell."""
        if self._asking is not None:
            self._asking.begin(time.monotonic())

    def serve_external_requests(self, parent: Any) -> None:
        """Nothing: nobody else asks."""

    def take_events(self) -> Iterable[Any]:
        """None: what a store evicts is not announced."""
        return ()

    # -- metrics --------------------------------------------------------------------------------

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        """The metrics that :meth:`get_stats` fills."""
        return definitions(cls.words.gauge, cls.words.counter)

    def get_stats(self) -> Any:
        """What the store holds, evicted and found damaged, if that changed; else None."""
        held = {"declined": self._declined}
        if not self.store.read_only:  # where it would read all records
            held |= self.store.catalog.records.stats()
        return self._telling.tell(held, self.words.stats())

    @classmethod
    def config_info_keys(cls, tier_config: dict[str, Any]) -> tuple[str, ...]:
        """The labels of :meth:`config_info`."""
        return ("spdk_kv_location", "spdk_kv_engine")

    def config_info(self) -> Mapping[str, str]:
        """Where the store lies, and how its drive is reached."""
        values = (self.store.location, self.store.engine.name)
        return dict(zip(self.config_info_keys({}), values, strict=True))

    # -- the end --------------------------------------------------------------------------------

    def drain_jobs(self) -> None:
        """Blocks until every job has ended, as long as the drive takes; what became of them is told
        by the next :meth:`get_finished_jobs`. No memory of vLLM's is touched then."""
        self._jobs.drain()
        self._take_finished()

    def shutdown(self) -> None:
        """Ends the jobs under way (what was not begun fails), lets go of vLLM's memory and closes
        the store. May be called twice. Blocks as long as the drive takes: until then it may write
        to vLLM's memory, whatever vLLM does with it."""
        self._jobs.close()
        self._take_finished()
        self._rows = None
        try:
            self.store.close()
        except Exception:  # whatever it is: other tiers are to be shut down as well
            # vLLM's memory is free all the same, which is what it wants to know.
            log.exception("closing the store of the tier")
