"""Writes docs/reference/model-families.md. Takes about a minute."""

from __future__ import annotations

import torch
import transformers

import spdk_kv
from integrations.transformers.families.decode import families, row_of
from integrations.transformers.families.page import PAGE, text_of

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
with spdk_kv.open("ram://", capacity="64 MiB") as store:
    rows = [row_of(store, *family) for family in families()]
wrong = [row for row in rows if row.verdict.startswith("wrong")]
for row in wrong:
    print(row)
PAGE.write_text(text_of(rows))
raise SystemExit(bool(wrong))
