"""What is asked: a document, a question to it, and what a right answer says."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Question:
    """A question to a document.

    Attributes:
        expected: What every right answer contains.
    """

    document: str
    text: str
    expected: str

    def prompt(self, tokenizer: Any) -> torch.Tensor:
        """Document and question, ``[1, tokens]``, in the words of the model's chat template; as
        plain text for a tokenizer of transformers without one."""
        import torch

        if tokenizer.chat_template is None:
            words = f"{self.document}\n\nQuestion: {self.text}\nAnswer:"
            return torch.tensor([tokenizer.encode(words)])
        words = tokenizer.apply_chat_template(
            [
                {"role": "system", "content": self.document},
                {"role": "user", "content": self.text},
            ],
            add_generation_prompt=True,
            tokenize=False,
        )
        # The template has written the special tokens already.
        return torch.tensor([tokenizer.encode(words, add_special_tokens=False)])


def shipped_question() -> Question:
    """The demo's own. One sentence in the middle of its document answers it."""
    return Question(
        document=(files("spdk_kv.demo.asking") / "document.txt").read_text(encoding="utf-8"),
        text="What is the access code of the power house? Answer in one short sentence.",
        expected="3805",
    )
