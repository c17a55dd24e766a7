"""Questions about a text of some thousand tokens whose answers are known: what is lost by reading
only a part of the text shows in them, and hardly anywhere else.

The text is the handbook that the demo asks about, with facts strewn among it. All questions of a
task have the same number of tokens, and so have their answers: they run as the rows of one batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from spdk_kv.demo import asking

NOUNS = (
    *("falcon", "tiger", "river", "castle", "garden", "piano", "wagon", "mirror", "ladder"),
    *("candle", "bridge", "forest", "harbor", "island", "jungle", "kettle", "lantern", "meadow"),
    *("needle", "ocean", "palace", "rabbit", "saddle", "temple", "umbrella", "valley", "window"),
    *("yacht", "zebra", "anchor", "basket", "camera", "dragon", "engine", "feather", "guitar"),
    *("hammer", "insect", "jacket", "kitten", "lemon", "monkey", "nest", "orchid", "parrot"),
    *("queen", "rocket", "spider", "turtle", "violin", "walnut", "beaver", "carpet", "donkey"),
    *("eagle", "fossil", "goblet", "helmet", "jewel", "knight"),
)
HANDBOOK = Path(asking.__file__).with_name("document.txt")
_EXAMPLES = 2
_ASKED, _OPENING, _QUOTED = 8, 16, 12  # tokens


@dataclass(frozen=True)
class Piece:
    """Some tokens of an answer, and whether they count."""

    ids: tuple[int, ...]
    counts: bool = False


@dataclass(frozen=True)
class Asked:
    """One question, all that follows on the text as a prompt, and its answer in pieces."""

    prompt: tuple[int, ...]
    answer: tuple[Piece, ...]


@dataclass(frozen=True)
class Questions:
    """Of one task about one text.

    Attributes:
        prompts: int64 [rows, tokens], what follows on the text and is read as a prompt.
        answers: int64 [rows, tokens], what is forced token by token.
        scored: places in an answer that count.
    """

    prompts: torch.Tensor
    answers: torch.Tensor
    scored: tuple[int, ...]


class Text:
    """A text of about ``tokens`` tokens, a handbook with orders in it. Their digits follow right on
    a word: that is what a model of this size can look up.

    Attributes:
        ids: int64 [tokens].
        codes: the orders in it: the word that each begins with, and its digits.
    """

    def __init__(self, tokenizer: Any, *, seed: int, tokens: int) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        chance = random.Random(f"text {seed}")
        self.codes = {noun: str(chance.randrange(1000, 10000)) for noun in NOUNS}
        self._before, self._after = _around(tokenizer)
        facts = [self._order(word) for word in self.codes]
        prose = _among_prose(tokenizer, facts, chance, tokens)
        self.ids = torch.tensor(_ids(tokenizer, self._before + prose))
        end = _ids(tokenizer, ".")[0]
        ends = [at for at, token in enumerate(self.ids.tolist()) if token == end]
        length = _OPENING + _QUOTED
        self._within = [
            begin
            for last, following in pairwise(ends)
            for begin in range(last + 1, following - length + 1)
        ]

    def questions(self, task: str, rows: int) -> Questions:
        """``rows`` questions of ``task``, all of one length and none like another.

        Raises:
            ValueError: there are not so many.
        """
        chance = random.Random(f"{task} {self._seed}")
        found: dict[tuple[int, ...], list[Asked]] = {}
        for _ in range(40 * rows):
            one = TASKS[task](self, chance)
            lengths = (len(one.prompt), *(len(piece.ids) for piece in one.answer))
            alike = found.setdefault(lengths, [])
            if one not in alike:
                alike.append(one)
            if len(alike) == rows:
                return _batch(alike)
        raise ValueError(f"{task} has no {rows} questions of one length")

    def one_order(self, chance: random.Random) -> Asked:
        """Four digits at one place of the text."""
        return self._orders(chance, 1)

    def four_orders(self, chance: random.Random) -> Asked:
        """Digits at four places, in one answer."""
        return self._orders(chance, 4)

    def quote(self, chance: random.Random) -> Asked:
        """Some tokens of one sentence as they stand there, each at a place of its own. (What comes
        after a sentence, even a model that sees the whole text often gets wrong.)

        The question has less of what comes before them than the answer has: where both end alike,
        a model goes on with the question.
        """
        begin = chance.choice(self._within)
        opening, quoted = (
            tuple(self.ids[begin + at : begin + at + size].tolist())
            for at, size in ((0, _OPENING), (_OPENING, _QUOTED))
        )
        asked = self._of('\n\nQuote the text that goes on after "'), self._of(f'".{self._after}')
        prompt = (*asked[0], *opening[:_ASKED], *asked[1])
        return Asked(prompt, (Piece(opening), Piece(quoted, counts=True)))

    def _orders(self, chance: random.Random, count: int) -> Asked:
        """The prompt has the beginning of the answer, two other orders: without an example a small
        model words it as it likes, and is then wrong whatever it found."""
        words = chance.sample(sorted(self.codes), _EXAMPLES + count)
        examples = " ".join(self._order(word) for word in words[:_EXAMPLES])
        asked = "\n\nWrite the order numbers as they are in the text."
        pieces: list[Piece] = []
        for word in words[_EXAMPLES:]:
            pieces += [
                Piece(self._of(f" Order {word}")),
                Piece(self._of(self.codes[word]), counts=True),
                Piece(self._of(" was sent.")),
            ]
        return Asked(self._of(f"{asked}{self._after}{examples}"), tuple(pieces))

    def _order(self, word: str) -> str:
        return f"Order {word}{self.codes[word]} was sent."

    def _of(self, text: str) -> tuple[int, ...]:
        return tuple(_ids(self._tokenizer, text))


TASKS: dict[str, Callable[[Text, random.Random], Asked]] = {
    "digits": Text.one_order,
    "four orders": Text.four_orders,
    "quote": Text.quote,
}


def _batch(asked: list[Asked]) -> Questions:
    scored: list[int] = []
    at = 0
    for piece in asked[0].answer:
        scored += range(at, at + len(piece.ids)) if piece.counts else ()
        at += len(piece.ids)
    return Questions(
        torch.tensor([one.prompt for one in asked]),
        torch.tensor([[i for piece in one.answer for i in piece.ids] for one in asked]),
        tuple(scored),
    )


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _around(tokenizer: Any) -> tuple[str, str]:
    """What a chat with this model has before and after the user's words."""
    if not getattr(tokenizer, "chat_template", None):
        return "", "\nAnswer: "
    mark = "@@words@@"
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
    )
    before, _, after = whole.partition(mark)
    return before, after


def _among_prose(tokenizer: Any, facts: list[str], chance: random.Random, tokens: int) -> str:
    """``facts`` in an order of chance, evenly among sentences of the handbook."""
    prose = [" ".join(each.split()) for each in HANDBOOK.read_text("utf-8").split("\n\n")]
    sentences = [f"{one.rstrip('.')}." for text in prose for one in text.split(". ")]
    sentences = [one for one in sentences if len(one) > 30]
    begin = chance.randrange(len(sentences))
    sentences = sentences[begin:] + sentences[:begin]
    chance.shuffle(facts)
    room = tokens - len(_ids(tokenizer, " ".join(facts)))
    filler: list[str] = []
    for sentence in sentences:
        room -= len(_ids(tokenizer, f" {sentence}"))
        if room < 0:
            break
        filler.append(sentence)
    lines = [(at, sentence) for at, sentence in enumerate(filler)]
    lines += [(chance.uniform(0, len(filler)), fact) for fact in facts]
    return "Read this text.\n\n" + " ".join(line for _, line in sorted(lines))
