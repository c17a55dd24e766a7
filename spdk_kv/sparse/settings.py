"""What can be chosen about reading a part, as one value that a file can hold."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

KeysName = Literal["codes", "lowrank", "exact"]
Predictor = Literal["next_norm", "this_norm", "previous"]
Aggregation = Literal["softmax_max", "mean"]

# What each selector sets; everything else is as Settings has it by default.
_PRESETS: dict[str, dict[str, Any]] = {
    "codes": {},
    # As the code of KVSwap (arXiv 2511.11907) was released: one score for all heads by their mean,
    # the norm of the layer before, no sinks, and nothing reused but the last step's set.
    "kvswap": {
        "keys": "lowrank",
        "predictor": "this_norm",
        "aggregation": "mean",
        "sinks": 0,
        "recent": 0,
        "pool": 1.0,
    },
    "exact": {"keys": "exact"},
    "lowrank": {"keys": "lowrank"},
    "previous": {"predictor": "previous"},
}


@dataclass(frozen=True)
class Settings:
    """How a decode step chooses the tokens that it attends to, and what stays in memory.

    Attributes:
        selector: name of the preset that these settings began with, see `presets`.
        tokens: tokens attended to per step, layer and batch row among those on the drive, sinks
            included: a multiple of ``group_tokens``.
        group_tokens: tokens that are chosen and read together, 4 to 64.
        keys: what is kept of the keys in memory to score them: 2-bit ``codes``, a ``lowrank``
            projection, or the ``exact`` keys (to compare with; as large as K itself).
        predictor: what stands for the query of a layer while the layer before it is computed:
            its hidden state through the norm and query projection of the layer itself
            (``next_norm``), through the norm of the layer before (``this_norm``), or the query of
            the ``previous`` step.
        aggregation: one score of a group out of those of its tokens and all heads: the largest
            log-probability that any head gives (``softmax_max``), or the ``mean`` over the heads.
        sinks: so many first tokens are always attended to, as whole groups.
        recent: so many newest tokens stay in memory and are always attended to, as well as an
            unfinished group.
        pool: groups that stay resident, in multiples of ``tokens``.
        rank: of the low-rank projection; None: an eighth of kv_heads * head_dim.
        correction: fetch what the true query asks for where the coverage (see
            `Selector.coverage`) of what was read is below this share; None: never.

    Raises:
        ValueError: names the setting, and what it may be.
    """

    selector: str = "codes"
    tokens: int = 256
    group_tokens: int = 4
    keys: KeysName = "codes"
    predictor: Predictor = "next_norm"
    aggregation: Aggregation = "softmax_max"
    sinks: int = 4
    recent: int = 128
    pool: float = 2.0
    rank: int | None = None
    correction: float | None = None

    def __post_init__(self) -> None:
        _one_of("selector", self.selector, tuple(_PRESETS))
        _one_of("keys", self.keys, get_args(KeysName))
        _one_of("predictor", self.predictor, get_args(Predictor))
        _one_of("aggregation", self.aggregation, get_args(Aggregation))
        _whole("group_tokens", self.group_tokens, at_least=4)
        _check("group_tokens", self.group_tokens, "at most 64", self.group_tokens <= 64)
        _whole("tokens", self.tokens, at_least=self.group_tokens)
        multiple = self.tokens % self.group_tokens == 0
        _check("tokens", self.tokens, f"a multiple of group_tokens ({self.group_tokens})", multiple)
        _whole("sinks", self.sinks, at_least=0)
        room = self.sinks <= self.tokens
        _check("sinks", self.sinks, f"at most tokens ({self.tokens})", room)
        _whole("recent", self.recent, at_least=0)
        _number("pool", self.pool, "a number of at least 1", lambda pool: pool >= 1)
        if self.rank is not None:
            _whole("rank", self.rank, at_least=1)
        if self.correction is not None:
            share = "a share from 0 to 1, or None"
            _number("correction", self.correction, share, lambda found: 0 <= found <= 1)

    @property
    def count(self) -> int:
        """Groups attended to per step, layer and batch row."""
        return self.tokens // self.group_tokens

    @property
    def slots(self) -> int:
        """Groups that stay resident per layer and batch row."""
        return max(self.count, int(self.count * self.pool))

    def whole_groups(self, tokens: int) -> int:
        """Groups that are chosen among when a sequence holds ``tokens``: those that are whole and
        older than the newest ``recent`` tokens."""
        return max(tokens - self.recent, 0) // self.group_tokens

    def to_json(self) -> str:
        """These settings as a JSON object with a member per field."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """The settings in ``text``; fields that it leaves out are as its ``selector`` has them.

        Raises:
            ValueError: not a JSON object, an unknown field, or a value that does not fit; names it.
        """
        try:
            found = json.loads(text)
        except ValueError as wrong:
            raise ValueError(f"settings are not JSON: {wrong}") from None
        if not isinstance(found, dict):
            raise ValueError(f"settings are a JSON object, not {type(found).__name__}")
        unknown = sorted(set(found) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown settings: {', '.join(unknown)}")
        name = found.pop("selector", cls.selector)
        return preset(name, **found)


def preset(selector: str, **changes: Any) -> Settings:
    """The settings that are called ``selector``, with ``changes``.

    Raises:
        ValueError: there is no such selector, or a change does not fit.
    """
    _one_of("selector", selector, tuple(_PRESETS))
    return Settings(**{"selector": selector, **_PRESETS[selector], **changes})


def presets() -> tuple[str, ...]:
    """The names that `preset` takes."""
    return tuple(_PRESETS)


def _one_of(name: str, found: object, allowed: tuple[str, ...]) -> None:
    _check(name, found, f"one of {', '.join(allowed)}", found in allowed)


def _whole(name: str, found: object, *, at_least: int) -> None:
    fits = isinstance(found, int) and not isinstance(found, bool) and found >= at_least
    _check(name, found, f"a whole number of at least {at_least}", fits)


def _number(name: str, found: object, what: str, fits: Any) -> None:
    number = isinstance(found, int | float) and not isinstance(found, bool)
    _check(name, found, what, number and math.isfinite(found) and fits(found))  # type: ignore[arg-type]


def _check(name: str, found: object, what: str, fits: bool) -> None:
    if not fits:
        raise ValueError(f"{name} is {what}, not {found!r}")
