"""The demo's result, for people and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spdk_kv.demo.lines import readable, wrapped
from spdk_kv.terminal import console
from spdk_kv.units import GIB, format_nbytes

if TYPE_CHECKING:
    from spdk_kv.demo.generation import Generation
    from spdk_kv.demo.model import DemoModel
    from spdk_kv.types import KVShape

_TEXT_CHARACTERS = 60


@dataclass(frozen=True)
class Report:
    """Both runs, and what went to and came from the drive.

    Attributes:
        kv_nbytes: K and V of all tokens in all layers.
        written_nbytes, read_nbytes: what the store wrote and read.
        cached_read_nbytes: the part of ``read_nbytes`` that came through the page cache.
    """

    chosen: DemoModel
    parameters: int
    shape: KVShape
    prompt_tokens: int
    memory: Generation
    offloaded: Generation
    kv_nbytes: int
    resident_layers: int
    prefetch_hits: int
    read_wait_s: float
    written_nbytes: int
    read_nbytes: int
    cached_read_nbytes: int
    engine: str
    location: str
    temporary: bool

    @property
    def tokens_equal(self) -> bool:
        return self.memory.tokens == self.offloaded.tokens

    @property
    def equal_tokens(self) -> int:
        """The number of tokens before the first that differs."""
        pairs = zip(self.memory.tokens, self.offloaded.tokens, strict=False)
        return next(
            (number for number, (ours, theirs) in enumerate(pairs) if ours != theirs),
            min(len(self.memory.tokens), len(self.offloaded.tokens)),
        )

    @property
    def read_gib_s(self) -> float:
        """Bytes read per second of decoding, from the drive and the page cache together."""
        seconds = self.offloaded.decode_s
        return self.read_nbytes / GIB / seconds if seconds > 0 else 0.0

    @property
    def resident_kv_nbytes(self) -> int:
        """The most K and V in memory at once while they were offloaded."""
        return self.kv_nbytes // self.shape.layers * self.resident_layers

    def fields(self) -> dict[str, Any]:
        """The JSON object: bytes, seconds, tokens per second, GiB per second."""
        return {
            "tokens_equal": self.tokens_equal,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.offloaded.tokens),
            "tokens_per_s_memory": self.memory.tokens_per_s,
            "tokens_per_s_offloaded": self.offloaded.tokens_per_s,
            "prompt_s_memory": self.memory.prompt_s,
            "prompt_s_offloaded": self.offloaded.prompt_s,
            "kv_nbytes": self.kv_nbytes,
            "resident_kv_nbytes": self.resident_kv_nbytes,
            "written_nbytes": self.written_nbytes,
            "read_nbytes": self.read_nbytes,
            "cached_read_nbytes": self.cached_read_nbytes,
            "read_gib_s": self.read_gib_s,
            "read_wait_s": self.read_wait_s,
            "prefetch_hits": self.prefetch_hits,
            "peak_rss_nbytes": max(self.memory.peak_rss_nbytes, self.offloaded.peak_rss_nbytes),
            "peak_rss_nbytes_memory": self.memory.peak_rss_nbytes,
            "peak_rss_nbytes_offloaded": self.offloaded.peak_rss_nbytes,
            "engine": self.engine,
            "location": self.location,
            "text_memory": self.chosen.tokenizer.decode(self.memory.tokens),
            "text_offloaded": self.chosen.tokenizer.decode(self.offloaded.tokens),
        }


def print_report(report: Report) -> None:
    """Prints the report: the same lines on a terminal, where they are coloured, and in a pipe."""
    out = console()

    def line(text: str = "", style: str = "") -> None:
        # The columns are narrower than any terminal, and long text is wrapped below.
        out.print(text, style=style or None, markup=False, soft_wrap=True)

    memory, offloaded, shape = report.memory, report.offloaded, report.shape
    place = "a temporary folder" if report.temporary else report.location
    line("One text, continued twice: KV cache in memory, then on the drive", "bold")
    line()
    line(f"  model   {report.chosen.label}: {report.parameters / 1e6:.0f} M parameters,")
    line(f"          {shape.layers} layers, {shape.kv_heads} KV heads of {shape.head_dim}")
    line(f"  tokens  {report.prompt_tokens} in the prompt, {len(offloaded.tokens)} new")
    line(f"  store   {place}, engine {report.engine}")
    line()
    line(_row("", "in memory", "on the drive"), "bold")
    line(_row("reading the prompt", f"{memory.prompt_s:.2f} s", f"{offloaded.prompt_s:.2f} s"))
    speeds = [f"{run.tokens_per_s:.1f} tokens/s" for run in (memory, offloaded)]
    line(_row("decoding", *speeds))
    sizes = [format_nbytes(nbytes) for nbytes in (report.kv_nbytes, report.resident_kv_nbytes)]
    layers = f"({report.resident_layers} of {shape.layers} layers)"
    line(_row("KV cache in memory", sizes[0], f"{sizes[1]} {layers}"))
    peaks = [format_nbytes(run.peak_rss_nbytes) for run in (memory, offloaded)]
    line(_row("peak of the whole process", *peaks))
    line()
    line(
        wrapped(
            f"  {format_nbytes(report.written_nbytes)} of K/V were written to the drive, and "
            f"{format_nbytes(report.read_nbytes)} were read back at {report.read_gib_s:.2f} GiB/s, "
            f"{format_nbytes(report.cached_read_nbytes)} of it through the page cache. For every "
            "new token each layer needs all of its K/V, which is read while the layer before it "
            f"computes. In all, decoding waited {report.read_wait_s:.2f} s for reads."
        )
    )
    if offloaded.tokens_per_s > memory.tokens_per_s:
        line(
            wrapped(
                "  In memory it was slower because transformers copies the whole cache to append a "
                "token."
            )
        )
    line()
    for label, run in (("in memory", memory), ("on the drive", offloaded)):
        line(f"  {label:<13} {_shortened(report.chosen.tokenizer.decode(run.tokens))}", "cyan")
    line()
    if report.tokens_equal:
        line(f"  All {len(offloaded.tokens)} tokens are equal.", "bold green")
    else:
        line(f"  The tokens differ after the first {report.equal_tokens}.", "bold red")
    if not report.chosen.trained:
        line(
            wrapped(
                "  The text is gibberish because the weights are random. `python -m "
                "spdk_kv.demo.fetch` brings a small model that speaks, `--model PATH` runs "
                "another."
            ),
            "dim",
        )


def _row(label: str, memory: str, offloaded: str) -> str:
    return f"  {label:<26} {memory:<16} {offloaded}".rstrip()


def _shortened(text: str) -> str:
    shown = readable(text)
    return shown if len(shown) <= _TEXT_CHARACTERS else f"{shown[: _TEXT_CHARACTERS - 1]}…"
