"""The numbers of stores as metrics of prometheus-client."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from spdk_kv.errors import ClosedError, EngineUnavailable, SpdkKvError
from spdk_kv.metrics import names
from spdk_kv.metrics.names import PREFIX, Number
from spdk_kv.metrics.sample import OPERATIONS, Sample
from spdk_kv.metrics.times import cumulated

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

log = logging.getLogger(__name__)

# These are told before they happened first, so that a rate shows the first one.
_ALWAYS = ("read", "write")


class Sampled(Protocol):
    """An open store."""

    @property
    def location(self) -> str: ...
    def sample(self) -> Sample: ...


def prometheus() -> Any:
    """The module prometheus_client. EngineUnavailable, with the command, where it is missing."""
    try:
        import prometheus_client
    except ImportError as missing:
        raise EngineUnavailable(
            f"metrics need prometheus-client ({missing}): pip install prometheus-client"
        ) from missing
    return prometheus_client


class Registration:
    """A store whose numbers a registry has; :func:`register` makes it.

    ``name``: the value of the label ``store``.
    """

    def __init__(self, name: str, take: Callable[[], Sample], collector: Stores) -> None:
        self.name = name
        self._take = take
        self._collector = collector

    def sample(self) -> Sample | None:
        """The store's numbers; None, and it is registered no more, once the store is closed."""
        try:
            return self._take()
        except (ClosedError, ReferenceError):
            self.unregister()
        except SpdkKvError:
            # One store that fails must not take the numbers of the others away.
            log.exception("the numbers of %s are left out", self.name)
        return None

    def unregister(self) -> None:
        """Takes the store out of the registry. May be called twice."""
        self._collector.remove(self)


class Stores:
    """Collects the numbers of stores of this process for one registry. Thread-safe.

    One collector for all of them: in the exposition a metric is described once.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = weakref.ref(registry)
        self._lock = threading.Lock()
        self._registrations: list[Registration] = []

    def add(self, name: str, take: Callable[[], Sample]) -> Registration:
        with self._lock:
            taken = {registration.name for registration in self._registrations}
            number, unique = 1, name
            while unique in taken:
                number += 1
                unique = f"{name} #{number}"
            registration = Registration(unique, take, self)
            self._registrations.append(registration)
            is_first = len(self._registrations) == 1
        registry = self._registry()
        if is_first and registry is not None:
            try:
                registry.register(self)
            except BaseException:
                with self._lock:
                    self._registrations.remove(registration)
                raise
        return registration

    def remove(self, registration: Registration) -> None:
        with self._lock:
            if registration not in self._registrations:
                return
            self._registrations.remove(registration)
            is_last = not self._registrations
        registry = self._registry()
        if is_last and registry is not None:
            registry.unregister(self)

    def describe(self) -> list[Metric]:
        """Names and kinds, without values: a registry looks for conflicts with them."""
        return list(families(()))

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            registrations = list(self._registrations)
        samples = [(each, each.sample()) for each in registrations]
        with self._lock:  # without those that turned out to be closed
            left = [(each.name, it) for each, it in samples if each in self._registrations]
        yield from families(left)


_collectors: weakref.WeakKeyDictionary[CollectorRegistry, Stores] = weakref.WeakKeyDictionary()
_collectors_lock = threading.Lock()


def register(
    store: Sampled, registry: CollectorRegistry | None = None, *, name: str | None = None
) -> Registration:
    """Gives the numbers of ``store`` to ``registry``, read whenever that is asked for them.

    Costs nothing between two scrapes. Does not block, and does not keep the store alive; once it is
    closed it is registered no more. In a child after fork it has no numbers.

    Args:
        store: an open store, wherever it is: ``ram://`` and ``null://`` as well.
        registry: of prometheus-client; None is ``prometheus_client.REGISTRY``, which a process
            exports that has an endpoint already.
        name: the value of the label ``store``. None is the store's URI; another store of this
            registry with the same one gets a number.

    Returns:
        The registration, for whoever wants to end it before the store is closed.

    Raises:
        EngineUnavailable: prometheus-client is not installed.
        ClosedError: The store is closed.
        ValueError: The registry has other metrics with these names.
    """
    client = prometheus()
    if registry is None:
        registry = client.REGISTRY
    store.sample()
    reference = weakref.ref(store)

    def take() -> Sample:
        alive = reference()
        if alive is None:
            raise ClosedError("the store is gone")
        return alive.sample()

    with _collectors_lock:
        collector = _collectors.get(registry)
        if collector is None:
            collector = _collectors[registry] = Stores(registry)
        return collector.add(name or store.location, take)


class Published:
    """A collector of what other processes tell. ``read``: for each store its name, and the sample
    or None where nobody tells one."""

    def __init__(self, read: Callable[[], Iterable[tuple[str, Sample | None]]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        yield from families(list(self._read()))


def families(stores: Iterable[tuple[str, Sample | None]]) -> Iterator[Metric]:
    """The metrics of ``stores``: (value of the label, sample)."""
    from prometheus_client import core

    stores = list(stores)
    samples = [(name, sample) for name, sample in stores if sample is not None]
    up = _family(core, names.UP, names.STORE_LABELS)
    for name, sample in stores:
        up.add_metric([name], int(sample is not None))
    yield up
    for number in names.HELD:
        # A store with a single path has no budget, for instance.
        having = [(name, each) for name, each in samples if number.field in each.held]
        family = _family(core, number, names.STORE_LABELS)
        for name, sample in having:
            family.add_metric([name], sample.held[number.field] / number.per)
        yield family
    whole = [((name,), sample) for name, sample in samples]
    for number in names.PROCESS:
        yield _plain(core, number, names.STORE_LABELS, whole)
    paths = [((name, way), path) for name, each in samples for way, path in each.paths.items()]
    engines = core.InfoMetricFamily(
        PREFIX + names.ENGINE.name, names.ENGINE.help, labels=names.PATH_LABELS
    )
    for labels, path in paths:
        engines.add_metric(labels, {"engine": path.engine})
    yield engines
    for number in names.PATH:
        yield _plain(core, number, names.PATH_LABELS, paths)
    operations = [
        ((*of_path, op), path.ops[op])
        for of_path, path in paths
        for op in OPERATIONS
        if op in _ALWAYS or path.ops[op].transfers
    ]
    for number in names.OPERATION:
        if number.kind == "histogram":
            yield _histogram(core, number, names.OPERATION_LABELS, operations)
        else:
            yield _plain(core, number, names.OPERATION_LABELS, operations)


def _family(core: Any, number: Number, labels: Sequence[str]) -> Any:
    kinds = {
        "counter": core.CounterMetricFamily,
        "gauge": core.GaugeMetricFamily,
        "histogram": core.HistogramMetricFamily,
    }
    return kinds[number.kind](PREFIX + number.name, number.help, labels=labels)


def _plain(
    core: Any, number: Number, labels: Sequence[str], rows: Iterable[tuple[Sequence[str], Any]]
) -> Any:
    """``rows``: values of the labels, and what has the number as a field."""
    family = _family(core, number, labels)
    for values, having in rows:
        family.add_metric(values, getattr(having, number.field) / number.per)
    return family


def _histogram(
    core: Any, number: Number, labels: Sequence[str], rows: Iterable[tuple[Sequence[str], Any]]
) -> Any:
    family = _family(core, number, labels)
    for values, having in rows:
        total = getattr(having, names.SUMS[number.field])
        buckets = [
            ("+Inf" if bound is None else repr(bound / number.per), count)
            for bound, count in cumulated(getattr(having, number.field))
        ]
        family.add_metric(values, buckets, total / number.per)
    return family
