"""docs/reference/model-families.md: every family of the installed transformers and its verdict."""

from __future__ import annotations

import re
from pathlib import Path

import transformers

from integrations.transformers.families.decode import Row
from support.places import ROOT

PAGE: Path = ROOT / "docs/reference/model-families.md"
COMMAND = "cd tests && ../.venv/bin/python -m integrations.transformers.families"

_HEAD = """# Families of models

Made by a run with transformers {version}: of every family that generates text a small model with
random weights decoded greedily, two rows at a time, with `DynamicCache` and with `OffloadedKVCache`
(for an encoder-decoder, within an `EncoderDecoderCache`). Bit-equal are those whose tokens and
logits were all the same to the last bit. Make this page anew:

```sh
{command}
```

| | families |
|---|---|
| bit-equal | {equal} |
| refused | {refused} |
| not tried | {untried} |

## Bit-equal

K/V is on the drive. States of linear attention, Mamba and convolution, and indexes of sparse
attention stay in memory, where `DynamicCache` has them; a cache with `name=` stores them when it is
closed, and at flushes. Of an encoder-decoder the decoder's self-attention is on the drive.

| family | class | its layers keep |
|---|---|---|
"""
_REFUSED = """
## Refused

`ShapeMismatch` says so when the cache is made.

| family | class | reason |
|---|---|---|
"""
_UNTRIED = """
## Not tried

No small model of these could be built by rule, or `DynamicCache` does not run it on the inputs that
were made. Their text models are mostly families above.

"""
_VERSION = re.compile(r"Made by a run with transformers (\S+):")
_LINE = re.compile(r"^\| `([^`]+)` \| `([^`]+)` \| (.*) \|$", re.MULTILINE)
_NAME = re.compile(r"`([^`]+)` \(`([^`]+)`\)")


def text_of(rows: list[Row]) -> str:
    """The whole page."""
    equal = [row for row in rows if row.verdict == "bit-equal"]
    refused = [row for row in rows if row.verdict.startswith("refused")]
    untried = [row for row in rows if row.verdict.startswith("not tried")]
    head = _HEAD.format(
        version=transformers.__version__,
        command=COMMAND,
        equal=len(equal),
        refused=len(refused),
        untried=len(untried),
    )
    names = ", ".join(f"`{row.model_type}` (`{row.model}`)" for row in untried)
    return (
        head
        + "".join(f"| `{row.model_type}` | `{row.model}` | {row.layers} |\n" for row in equal)
        + _REFUSED
        + "".join(f"| `{row.model_type}` | `{row.model}` | {_reason(row)} |\n" for row in refused)
        + _UNTRIED
        + names
        + ".\n"
    )


def told() -> tuple[str, dict[tuple[str, str], str]]:
    """The page's release of transformers, and what it says of each family and class: what the
    layers keep, why it is refused, or ``not tried``."""
    text = PAGE.read_text()
    version = _VERSION.search(text)
    assert version is not None
    found = {(m[1], m[2]): m[3] for m in _LINE.finditer(text)}
    untried = text[text.index("## Not tried") :]
    return version[1], found | {(m[1], m[2]): "not tried" for m in _NAME.finditer(untried)}


def line_of(row: Row) -> str:
    """What :func:`told` has for the row, if the page is right."""
    if row.verdict == "bit-equal":
        return row.layers
    if row.verdict.startswith("refused"):
        return _reason(row)
    return "not tried" if row.verdict.startswith("not tried") else row.verdict


def _reason(row: Row) -> str:
    return re.sub(r"^refused: ", "", row.verdict).replace("|", "/")
