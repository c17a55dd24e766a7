"""docs/reference/model-families.md is what a run gives: every family is bit-equal or refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import transformers

import spdk_kv
from integrations.transformers.families.decode import families, row_of
from integrations.transformers.families.page import COMMAND, line_of, told
from spdk_kv.store import KVStore
from support.rounds import LONG

VERSION, TOLD = told()
# Any family counts; each is in the long suite, and one in so many here.
ONE_IN = 1 if LONG else 6

pytestmark = pytest.mark.skipif(
    transformers.__version__ != VERSION, reason=f"the page is of transformers {VERSION}"
)


@pytest.fixture(scope="module")
def memory() -> Iterator[KVStore]:
    with spdk_kv.open("ram://", capacity="64 MiB") as store:
        yield store


def test_page_has_every_family() -> None:
    assert list(TOLD) == sorted(TOLD, key=list(TOLD).index)
    assert set(TOLD) == set(families())


@pytest.mark.parametrize("part", range(4))
def test_page_says_what_happens(memory: KVStore, part: int) -> None:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    chosen = [family for number, family in enumerate(families()) if number % ONE_IN == 0]
    wrong = []
    for family in chosen[part::4]:
        row = row_of(memory, *family)
        missing = "ImportError" in row.verdict or "ModuleNotFoundError" in row.verdict
        if line_of(row) != TOLD[family] and not missing and "not tried" not in TOLD[family]:
            wrong.append(f"{row} is told as: {TOLD[family]}")
        if row.verdict.startswith("wrong"):
            wrong.append(str(row))
    transformers.logging.set_verbosity(verbosity)
    assert not wrong, "\n".join([*wrong, f"Make the page anew: {COMMAND}"])
