"""A whole engine of vLLM's on the CPU, with a tiny random model; run as a program by the tests.

    python engine.py make MODEL              writes the model
    python engine.py run MODEL TIER          answers, with a tier of this JSON ("null": no tier)

It answers prompts as they come: a line of JSON in, a list of lists of token ids; a line out, with
the ids that each goes on with, and what the tier did. Between two lines nothing is under way, and
what was stored is durable.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

TOKENS = 12
BLOCK = 32


def make(folder: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def run(model: str, tier: dict[str, object] | None) -> None:
    # In this process, so that a signal ends everything, and the tier can be asked.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Results only; vLLM prints to the other.
    answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    connector = None
    if tier is not None:
        connector = KVTransferConfig(
            kv_connector="OffloadingConnector",
            kv_role="kv_both",
            kv_connector_extra_config={
                "spec_name": "CpuTieringSpec",
                "spec_module_path": "integrations.vllm.cpu_spec",
                "cpu_bytes_to_use": 32 << 20,
                "secondary_tiers": [tier],
            },
        )
    engine = LLM(
        model=model,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=2048,
        block_size=BLOCK,
        enable_prefix_caching=True,
        kv_transfer_config=connector,
        seed=0,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=TOKENS, detokenize=False, ignore_eos=True)
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    manager = scheduler.connector.connector_scheduler.manager if tier is not None else None
    for line in sys.stdin:
        prompts = [{"prompt_token_ids": ids} for ids in json.loads(line)]
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        told: dict[str, object] = {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "cached": [output.num_cached_tokens for output in outputs],
        }
        if manager is not None:
            (ours,) = manager.secondary_tiers
            manager._process_finished_jobs()
            ours.drain_jobs()
            manager._process_finished_jobs()
            ours.store.flush()
            told["stats"] = {
                name: ours.store.stats()[name] for name in ("hits", "blobs", "corruptions")
            }
        answers.write(json.dumps(told) + "\n")
        answers.flush()


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(sys.argv[2])
    else:
        run(sys.argv[2], json.loads(sys.argv[3]))
