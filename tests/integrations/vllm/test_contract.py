"""Our tier takes every call that vLLM's contract allows, as it was recorded, and as it is here."""

from __future__ import annotations

import subprocess
import sys

import pytest

from integrations.signatures import accepts
from integrations.vllm.record import VERSIONS, recorded, recorded_now
from spdk_kv.integrations.vllm.tier import Tier


@pytest.mark.parametrize("version", VERSIONS)
def test_every_call_is_taken(version):
    assert accepts(Tier, recorded(version)["SecondaryTierManager"]) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_results_and_jobs_have_the_fields_that_are_used(version):
    result = {p["name"] for p in recorded(version)["JobResult"]["__init__"]}
    assert {"job_id", "success", "successful_keys", "transfer_time", "transfer_bytes"} <= result
    job = {p["name"] for p in recorded(version)["TransferJob"]["__init__"]}
    assert {"job_id", "keys", "chunk_ids"} <= job


def test_the_contract_is_the_recorded_one():
    vllm = pytest.importorskip("vllm", reason="vLLM is not installed (tests/integrations/vllm)")
    version = ".".join(vllm.__version__.split(".")[:2])
    assert version in VERSIONS, f"vLLM {version} was not tried: python -m integrations.vllm.record"
    assert recorded_now() == recorded(version)


def test_without_vllm_everything_else_can_be_imported():
    program = "import sys, spdk_kv, spdk_kv.integrations.vllm.tier; print('vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
