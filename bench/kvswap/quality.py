"""What a selector costs in answers, and what it reads."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from masked import LayerKV, MaskedModel, Trace
from tasks import Questions

from spdk_kv.sparse import Pool, Selector, Settings

POOLS = (1.0, 2.0, 4.0)


@dataclass
class Score:
    """Sums over the answers of one task. ``tokens`` are those that count."""

    answers: int = 0
    tokens: int = 0
    right: int = 0
    right_answers: int = 0
    kl: float = 0.0

    @property
    def accuracy(self) -> float:
        return self.right / max(self.tokens, 1)

    @property
    def mean_kl(self) -> float:
        return self.kl / max(self.tokens, 1)

    def add(self, other: Score) -> None:
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass
class Reads:
    """What a pool had to read in a trace, the first step of each left out: it fills the pool."""

    wanted: int = 0
    missed: int = 0
    row_steps: int = 0

    def add(self, other: Reads) -> None:
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def miss_rate(self) -> float:
        return self.missed / max(self.wanted, 1)

    def nbytes_per_token(self, group_nbytes: int) -> float:
        return self.missed * group_nbytes / max(self.row_steps, 1)


@dataclass
class Outcome:
    """One selector on one context."""

    score: Score
    reads: dict[float, Reads] = field(default_factory=dict)
    token_nbytes: float = 0.0


@dataclass
class Selected:
    """One selector at one share, over all texts."""

    settings: Settings
    token_nbytes: float
    scores: dict[str, Score] = field(default_factory=dict)
    reads: dict[float, Reads] = field(default_factory=dict)

    @property
    def pool(self) -> float:
        """The pool that it has by default, one of POOLS."""
        return self.settings.pool


@dataclass
class Totals:
    """Everything that was measured: per task without a selector, and per selector and share.

    ``token_nbytes``: bytes of K and V of a token of one layer on the drive.
    """

    token_nbytes: int = 0
    dense: dict[str, Score] = field(default_factory=dict)
    selected: dict[tuple[str, float], Selected] = field(default_factory=dict)

    def merge(self, other: Totals) -> None:
        """Adds what was measured of other texts."""
        self.token_nbytes = other.token_nbytes
        for task, score in other.dense.items():
            self.add_dense(task, score)
        for key, theirs in other.selected.items():
            one = self.selected.setdefault(key, Selected(theirs.settings, theirs.token_nbytes))
            for task, score in theirs.scores.items():
                one.scores.setdefault(task, Score()).add(score)
            for pool, found in theirs.reads.items():
                one.reads.setdefault(pool, Reads()).add(found)

    def add_dense(self, task: str, score: Score) -> None:
        self.dense.setdefault(task, Score()).add(score)

    def add(
        self, variant: str, share: float, task: str, settings: Settings, outcome: Outcome
    ) -> None:
        one = self.selected.setdefault((variant, share), Selected(settings, outcome.token_nbytes))
        one.scores.setdefault(task, Score()).add(outcome.score)
        for pool, found in outcome.reads.items():
            one.reads.setdefault(pool, Reads()).add(found)


def text_kv(
    model: MaskedModel, text: torch.Tensor, folder: Path
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """K and V of ``text``, computed once and kept in ``folder``."""
    digest = hashlib.sha256(text.numpy().tobytes()).hexdigest()[:16]
    path = folder / f"kv-{digest}.pt"
    if path.exists():
        found: list[tuple[torch.Tensor, torch.Tensor]] = torch.load(path, weights_only=True)
        return found
    made = model.prefill(text)
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(made, part)
    part.replace(path)
    return made


class Asking:
    """Questions under one selector after the other. ``dense``: the score without any."""

    def __init__(
        self,
        model: MaskedModel,
        text: list[tuple[torch.Tensor, torch.Tensor]],
        questions: Questions,
    ) -> None:
        """``text``: its K and V, see `text_kv`."""
        self._model, self._questions = model, questions
        model.load(text)
        model.ask(questions.prompts)
        self._kept = model.kept()
        logits = model.dense(questions.answers)
        self._dense = torch.log_softmax(logits[:, self._at].float(), dim=-1)
        self._right = questions.answers[:, 1:][:, self._at]
        self.dense = self._score(logits)
        self._selectors: dict[tuple[str, int | None], list[Selector]] = {}

    def run(self, settings: Settings) -> Outcome:
        selectors = self._known(settings)
        before = selectors[0].tokens
        self._model.back(self._kept)
        logits, trace = self._model.sparse(self._questions.answers, settings, selectors)
        for selector in selectors:
            selector.truncate(before)
        return Outcome(
            self._score(logits),
            {pool: reads(trace, settings, pool) for pool in POOLS},
            selectors[0].keys.token_nbytes,
        )

    @property
    def _at(self) -> list[int]:
        return [place - 1 for place in self._questions.scored]

    def _score(self, logits: torch.Tensor) -> Score:
        return self.score(torch.log_softmax(logits[:, self._at].float(), dim=-1))

    def score(self, found: torch.Tensor) -> Score:
        """What log-probabilities of the tokens that count, ``[rows, scored, vocabulary]``, are
        worth."""
        right = found.argmax(-1) == self._right
        kl = (self._dense.exp() * (self._dense - found)).sum()
        return Score(
            len(right), right.numel(), int(right.sum()), int(right.all(1).sum()), float(kl)
        )

    def _known(self, settings: Settings) -> list[Selector]:
        """Selectors that know the keys of text and questions, for each kind of keys made once."""
        kind = (settings.keys, settings.rank)
        if kind not in self._selectors:
            self._selectors.clear()
            self._selectors[kind] = [_selector(settings, layer) for layer in self._kept]
        for selector in self._selectors[kind]:
            selector.settings = settings
        return self._selectors[kind]


def _selector(settings: Settings, layer: LayerKV) -> Selector:
    """Knows the keys of the text, coded once for all rows, and of the questions."""
    assert layer.rows is not None
    made = Selector(settings)
    made.append(layer.text[0].transpose(0, 1)[None])
    made.reorder([0] * len(layer.rows[0]))
    made.append(layer.rows[0].transpose(1, 2))
    return made


def reads(trace: Trace, settings: Settings, multiple: float) -> Reads:
    """What a pool of ``multiple`` times the selection reads in ``trace``."""
    total = Reads()
    layers = len(trace.groups[0])
    for layer in range(layers):
        steps = [step[layer] for step in trace.groups]
        slots = max(int(settings.count * multiple), settings.count)
        pool = Pool(len(steps[0]), slots)
        for at, groups in enumerate(steps):
            for row, wanted in enumerate(groups):
                _, missing = pool.take(row, wanted)
                if at:
                    total.wanted += len(wanted)
                    total.missed += len(missing)
    total.row_steps = len(trace.groups[0][0]) * (len(trace.groups) - 1)
    return total
