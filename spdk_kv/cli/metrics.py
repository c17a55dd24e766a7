"""``spdk-kv metrics``: what stores count, for Prometheus, from outside their processes."""

from __future__ import annotations

import signal
import threading
from typing import Any

import click

from spdk_kv.cli.watched import index_dir_option, watch
from spdk_kv.metrics import Published, Sample, prometheus
from spdk_kv.terminal import CommandFailed


@click.command()
@click.argument("locations", metavar="URI...", nargs=-1, required=True)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    help="Serve them at this TCP port (0: any that is free) instead of printing them.",
)
@click.option(
    "--address", default="127.0.0.1", show_default=True, help="The address to serve them at."
)
@index_dir_option
def metrics(
    locations: tuple[str, ...], port: int | None, address: str, index_dir: str | None
) -> None:
    """Export what the stores at each URI count, for Prometheus.

    The stores are not opened: the processes that have them open write down what they count once a
    second. With --port this runs until it is ended; it may be started before them, and before
    there are stores: spdk_kv_up says which of them tell something.

    Without --port the metrics are printed once, as Prometheus and the text file collector of its
    node exporter read them. Needs prometheus-client: pip install prometheus-client.
    """
    client = prometheus()
    stores = watch(locations, index_dir, must_exist=port is None)

    def read() -> list[tuple[str, Sample | None]]:
        seen = [(watched.name, watched.look().reading) for watched in stores]
        return [(name, None if found is None else found.sample) for name, found in seen]

    registry = client.CollectorRegistry()
    registry.register(Published(read))
    if port is None:
        click.echo(client.generate_latest(registry).decode(), nl=False)
        return
    _serve(client, registry, address, port)


def _serve(client: Any, registry: Any, address: str, port: int) -> None:
    stop = threading.Event()
    # As services are stopped; Ctrl-C is for people.
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        server, thread = client.start_http_server(port, addr=address, registry=registry)
    except OSError as refused:
        raise CommandFailed(f"cannot serve at {address}:{port}: {refused.strerror}") from refused
    click.echo(f"http://{address}:{server.server_port}/metrics", err=True)
    try:
        stop.wait()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
