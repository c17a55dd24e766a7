"""The answers to the question, for people and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spdk_kv.demo.lines import readable, wrapped
from spdk_kv.terminal import console
from spdk_kv.units import format_nbytes

if TYPE_CHECKING:
    from spdk_kv.demo.asking.question import Question
    from spdk_kv.demo.asking.run import Answer, Asked
    from spdk_kv.demo.model import DemoModel


@dataclass(frozen=True)
class Answers:
    """All answers to one question.

    Attributes:
        parameters: of the model.
        prompt_tokens: tokens of document and question.
        asked: what came of it. The answers of exact ways have to be equal to the first.
    """

    chosen: DemoModel
    parameters: int
    question: Question
    prompt_tokens: int
    asked: Asked
    engine: str
    location: str
    temporary: bool

    @property
    def answers(self) -> Sequence[Answer]:
        return self.asked.answers

    @property
    def tokens_equal(self) -> bool:
        """Whether all exact ways gave the tokens of the first."""
        return all(self.equal(answer) for answer in self.answers if answer.way.exact)

    def equal(self, answer: Answer) -> bool:
        return answer.generation.tokens == self.answers[0].generation.tokens

    def text(self, answer: Answer) -> str:
        tokenizer: Any = self.chosen.tokenizer
        text: str = tokenizer.decode(answer.generation.tokens, skip_special_tokens=True)
        return text.strip()

    def right(self, answer: Answer) -> bool:
        return self.question.expected in self.text(answer)

    def fields(self) -> dict[str, Any]:
        """The JSON object: bytes, seconds, tokens per second."""
        return {
            "model": self.chosen.label,
            "question": self.question.text,
            "expected": self.question.expected,
            "tokens_equal": self.tokens_equal,
            "prompt_tokens": self.prompt_tokens,
            "prompt_s": self.asked.prompt_s,
            "engine": self.engine,
            "location": self.location,
            "left_out": self.asked.left_out,
            "answers": [self._fields(answer) for answer in self.answers],
        }

    def _fields(self, answer: Answer) -> dict[str, Any]:
        return {
            "way": answer.way.name,
            "text": self.text(answer),
            "right": self.right(answer),
            "tokens_equal": self.equal(answer),
            "new_tokens": len(answer.generation.tokens),
            "tokens_per_s": answer.generation.tokens_per_s,
            "resident_kv_nbytes": answer.resident_nbytes,
            "read_nbytes_per_token": answer.read_nbytes_per_token,
        }


def print_answers(found: Answers) -> None:
    """Prints the answers: the same lines on a terminal, where they are coloured, and in a pipe."""
    out = console()

    def line(text: str = "", style: str = "") -> None:
        out.print(text, style=style or None, markup=False, soft_wrap=True)

    line("One question, answered with the KV cache in different places", "bold")
    line()
    for text in _head(found):
        line(text)
    line()
    for number, text in enumerate(_table(found.answers)):
        line(text, "" if number else "bold")
    line()
    for answer in found.answers:
        line(wrapped(f"  {answer.way.name:<16} {readable(found.text(answer))}", " " * 19), "cyan")
    line()
    _print_notes(found, line)
    line()
    _print_verdict(found, line)


def _head(found: Answers) -> Iterator[str]:
    place = "a temporary folder" if found.temporary else found.location
    yield f"  model     {found.chosen.label}, {found.parameters / 1e6:.0f} M parameters"
    yield f"  prompt    {found.prompt_tokens} tokens: a document, and a question to it"
    yield wrapped(f"  question  {found.question.text}", " " * 12)
    yield f"  store     {place}, engine {found.engine}"


def _table(answers: Sequence[Answer]) -> Iterator[str]:
    def row(label: str, cells: Iterator[str]) -> str:
        return f"  {label:<20} {' '.join(f'{cell:<16}' for cell in cells)}".rstrip()

    yield row("", (answer.way.name for answer in answers))
    yield row("decoding", (f"{a.generation.tokens_per_s:.1f} tokens/s" for a in answers))
    yield row("K/V in memory", (format_nbytes(answer.resident_nbytes) for answer in answers))
    yield row("K/V read per token", (_per_token(answer) for answer in answers))


def _per_token(answer: Answer) -> str:
    return format_nbytes(answer.read_nbytes_per_token) if answer.read_nbytes else "none"


def _print_notes(found: Answers, line: Callable[..., None]) -> None:
    prompt_s = found.asked.prompt_s
    if prompt_s is None:
        line("  Each computed the prompt itself.")
    else:
        line(
            wrapped(
                f"  The prompt was computed once, in {prompt_s:.1f} s, and each was given a "
                "copy of its K/V."
            )
        )
    for reason in found.asked.left_out:
        line(wrapped(f"  Not served: {readable(reason)}"))
    first, *others = (answer.generation.tokens_per_s for answer in found.answers)
    if any(speed > first for speed in others):
        line(
            wrapped(
                "  In memory it was slower because transformers copies the whole cache to append a "
                "token."
            )
        )


def _print_verdict(found: Answers, line: Callable[..., None]) -> None:
    def names(kept: Callable[[Answer], bool]) -> str:
        return ", ".join(answer.way.name for answer in found.answers if not kept(answer))

    if others := names(found.equal):
        style = "bold yellow" if found.tokens_equal else "bold red"
        line(f"  Not the tokens that came in memory: {others}.", style)
    else:
        line(f"  The tokens of all {len(found.answers)} answers are equal.", "bold green")
    if wrong := names(found.right):
        line(f"  The document says {found.question.expected}. Wrong: {wrong}.", "bold yellow")
    else:
        line(f"  The document says {found.question.expected}: all are right.", "bold green")
