"""Questions about a text of some thousand tokens whose answers are known: what is lost by reading
only a part of the text shows in them, and hardly anywhere else.

The text is documentation (this repository's own) with facts strewn among it. All questions of a
task have the same number of tokens, and so have their answers: they run as the rows of one batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]

NAMES = (
    *("Anna", "Boris", "Clara", "David", "Elena", "Frank", "Grace", "Henry", "Irene", "James"),
    *("Karen", "Laura", "Maria", "Nancy", "Oscar", "Peter", "Quinn", "Robert", "Sarah", "Thomas"),
    *("Ursula", "Victor", "Wendy", "Xavier", "Albert", "Bruno", "Carlos", "Diana", "Edward"),
    *("Felix", "George", "Hannah", "Isaac", "Julia", "Kevin", "Linda", "Martin", "Nathan"),
    *("Olivia", "Paul", "Rachel", "Simon", "Teresa", "Vincent", "Walter", "Alice", "Brian"),
    *("Carol", "Daniel", "Emma", "Fiona", "Gary", "Helen", "Ivan", "Jack", "Kate", "Louis"),
    *("Michael", "Nora", "Oliver", "Philip", "Rose", "Samuel", "Tina", "Adam", "Bella"),
)
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "white")
FRUIT = (
    *("apple", "banana", "cherry", "grape", "lemon", "mango", "melon", "orange", "peach", "pear"),
    *("plum", "fig", "olive", "berry", "lime", "coconut", "apricot", "tomato", "potato", "carrot"),
    *("onion", "garlic", "pepper", "bean", "corn", "rice", "bread", "cheese", "butter", "honey"),
    *("salt", "sugar"),
)
CODES, THINGS_OF_A_BOX = 60, 4


@dataclass(frozen=True)
class Piece:
    """Some words of an answer. ``counts``: whether their tokens are scored; then ``instead`` has
    words whose first token is as right as their own."""

    text: str
    counts: bool = False
    instead: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asked:
    """One question, and its answer in pieces."""

    question: str
    answer: tuple[Piece, ...]


@dataclass(frozen=True)
class Facts:
    """What a text says: a code of each name, and the things in each box."""

    codes: dict[str, str]
    boxes: dict[str, tuple[str, ...]]

    @property
    def sentences(self) -> list[str]:
        return [
            *(f"The secret code of {name} is {code}." for name, code in self.codes.items()),
            *(f"The {box} box has {thing}." for box, held in self.boxes.items() for thing in held),
        ]


@dataclass(frozen=True)
class Questions:
    """Of one task about one text.

    Attributes:
        prompts: int64 [rows, tokens], what follows on the text and is read as a prompt.
        answers: int64 [rows, tokens], what is forced token by token.
        scored: places in an answer that count.
        right: int64 [rows, scored, n]: tokens that are right there; -1 fills up.
    """

    prompts: torch.Tensor
    answers: torch.Tensor
    scored: tuple[int, ...]
    right: torch.Tensor


def make_facts(chance: random.Random) -> Facts:
    names = chance.sample(NAMES, CODES)
    things = chance.sample(FRUIT, len(COLOURS) * THINGS_OF_A_BOX)
    boxes = {box: tuple(things[number :: len(COLOURS)]) for number, box in enumerate(COLOURS)}
    return Facts({name: str(chance.randrange(1000, 10000)) for name in names}, boxes)


def one_code(facts: Facts, chance: random.Random) -> Asked:
    """Four digits at one place of the text."""
    name = chance.choice(sorted(facts.codes))
    return Asked(f"What is the secret code of {name}?", _code(facts, name))


def four_codes(facts: Facts, chance: random.Random) -> Asked:
    """Digits at four places, in one answer."""
    names = chance.sample(sorted(facts.codes), 4)
    pieces = [piece for name in names for piece in (*_code(facts, name), Piece(". "))]
    return Asked(f"What are the secret codes of {', '.join(names)}?", tuple(pieces))


def all_of_a_box(facts: Facts, chance: random.Random) -> Asked:
    """All entries of one kind, strewn over the text; each that was not named yet is right."""
    box = chance.choice(COLOURS)
    held = [f" {thing}" for thing in chance.sample(facts.boxes[box], THINGS_OF_A_BOX)]
    pieces: list[Piece] = []
    for at, thing in enumerate(held):
        words = Piece(f"The {box} box has")
        pieces += [words, Piece(thing, True, tuple(held[at + 1 :])), Piece(". ")]
    return Asked(f"Which things are in the {box} box?", tuple(pieces))


def _code(facts: Facts, name: str) -> tuple[Piece, ...]:
    return Piece(f"The secret code of {name} is "), Piece(facts.codes[name], True)


TASKS: dict[str, Callable[[Facts, random.Random], Asked]] = {
    "digits": one_code,
    "four codes": four_codes,
    "box": all_of_a_box,
}


class Text:
    """A text of about ``tokens`` tokens, and questions about it.

    Attributes:
        ids: int64 [tokens].
    """

    def __init__(self, tokenizer: Any, *, seed: int, tokens: int) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        chance = random.Random(f"text {seed}")
        self.facts = make_facts(chance)
        self._before, self._after = _around(tokenizer)
        prose = _among_documentation(tokenizer, self.facts.sentences, chance, tokens)
        self.ids = torch.tensor(_ids(tokenizer, self._before + prose))

    def questions(self, task: str, rows: int) -> Questions:
        """``rows`` questions of ``task`` of one length.

        Raises:
            ValueError: there are not so many.
        """
        chance = random.Random(f"{task} {self._seed}")
        found: dict[tuple[int, ...], list[Asked]] = {}
        for _ in range(40 * rows):
            one = TASKS[task](self.facts, chance)
            lengths = tuple(len(ids) for ids in (self._prompt(one), *self._pieces(one)))
            alike = found.setdefault(lengths, [])
            if one not in alike:
                alike.append(one)
            if len(alike) == rows:
                return self._batch(alike)
        raise ValueError(f"{task} has no {rows} questions of one length")

    def _batch(self, asked: list[Asked]) -> Questions:
        scored: list[int] = []
        at = 0
        for piece, ids in zip(asked[0].answer, self._pieces(asked[0]), strict=True):
            scored += range(at, at + len(ids)) if piece.counts else ()
            at += len(ids)
        rights = [self._right(one) for one in asked]
        most = max(len(place) for row in rights for place in row)
        filled = [[place + [-1] * (most - len(place)) for place in row] for row in rights]
        return Questions(
            torch.tensor([self._prompt(one) for one in asked]),
            torch.tensor([[i for ids in self._pieces(one) for i in ids] for one in asked]),
            tuple(scored),
            torch.tensor(filled),
        )

    def _right(self, asked: Asked) -> list[list[int]]:
        """Per place that counts, the tokens that are right."""
        found: list[list[int]] = []
        for piece, ids in zip(asked.answer, self._pieces(asked), strict=True):
            if piece.counts:
                others = [_ids(self._tokenizer, words)[0] for words in piece.instead]
                found += [[ids[0], *others], *([one] for one in ids[1:])]
        return found

    def _prompt(self, asked: Asked) -> list[int]:
        return _ids(self._tokenizer, f"\n\n{asked.question}{self._after}")

    def _pieces(self, asked: Asked) -> list[list[int]]:
        return [_ids(self._tokenizer, piece.text) for piece in asked.answer]


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


def _among_documentation(
    tokenizer: Any, facts: list[str], chance: random.Random, tokens: int
) -> str:
    """``facts`` in an order of chance, evenly among sentences of documentation."""
    prose = [
        " ".join(paragraph.split())
        for page in sorted((ROOT / "docs").rglob("*.md"))
        for paragraph in page.read_text(encoding="utf-8").split("\n\n")
        if paragraph[:1].isalpha()
    ]
    sentences = [f"{one.strip(' .')}." for text in prose for one in text.split(". ")]
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
