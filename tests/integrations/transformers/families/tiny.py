"""Small configurations with random weights of whatever family transformers has."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from transformers import PreTrainedConfig

VOCABULARY = 96
LAYERS = 4
WINDOW = 8

# Field -> value, for whatever configuration has such a field with a number in it.
SMALL: dict[str, int] = {}
for value, names in (
    (
        VOCABULARY,
        "vocab_size decoder_vocab_size src_vocab_size tgt_vocab_size text_vocab_size "
        "vocab_size_per_layer_input audio_vocab_size n_vocab n_positions_vocab",
    ),
    (
        64,
        "hidden_size d_model n_embd dim embed_dim word_embed_proj_dim embedding_size emb_dim "
        "embed_size output_dim encoder_hidden_size decoder_hidden_size projection_dim "
        "out_hidden_size cross_attention_hidden_size rnn_hidden_size lru_width hidden_dim "
        "audio_hidden_size attention_hidden_size kv_channels state_size_dim encoder_embed_dim "
        "decoder_embed_dim",
    ),
    (
        96,
        "intermediate_size d_ff ffn_dim n_inner encoder_ffn_dim decoder_ffn_dim dim_feedforward "
        "moe_intermediate_size shared_expert_intermediate_size intermediate_size_mlp d_inner "
        "moe_shared_expert_intermediate_size ffn_hidden_size shared_intermediate_size "
        "feed_forward_dim block_ff_dim mlp_dim expert_ffn_hidden_size dense_intermediate_size "
        "expert_ffn_size ffn_config_hidden_size shared_expert_ffn_size",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers "
        "num_decoder_layers num_encoder_layers num_encoder_blocks depth enc_layers dec_layers "
        "encoder_num_layers decoder_num_layers num_attention_layers",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads "
        "decoder_attention_heads decoder_num_attention_heads encoder_num_attention_heads "
        "attention_heads num_experts n_routed_experts num_local_experts num_routed_experts "
        "moe_num_experts n_experts expert_num n_group_heads linear_num_value_heads mamba_n_heads "
        "mamba_num_heads linear_num_heads num_encoder_attention_heads num_decoder_attention_heads",
    ),
    (
        2,
        "num_key_value_heads n_kv_heads num_kv_heads encoder_num_key_value_heads "
        "decoder_num_key_value_heads num_experts_per_tok moe_topk moe_k top_k num_selected_experts "
        "num_global_key_value_heads linear_num_key_heads swa_num_key_value_heads moe_top_k "
        "num_experts_per_token first_k_dense_replace decoder_sparse_step",
    ),
    (
        16,
        "head_dim attention_head_dim v_head_dim qk_nope_head_dim linear_key_head_dim "
        "linear_value_head_dim d_kv global_head_dim q_lora_rank kv_lora_rank mamba_d_head "
        "mamba_head_dim ssm_state_size mamba_d_state state_size swa_head_dim index_head_dim "
        "hidden_size_per_layer_input mamba_d_ssm_head linear_head_dim",
    ),
    (8, "qk_rope_head_dim mamba_dt_rank laurel_rank patch_size chunk_size_feed time_step_rank"),
    (
        1,
        "n_group topk_group n_shared_experts num_shared_experts n_groups mamba_n_groups "
        "num_dense_layers kv_n_heads num_mem_blocks num_mtp_layers num_nextn_predict_layers",
    ),
    (
        WINDOW,
        "sliding_window attention_window_size attention_chunk_size sliding_window_size "
        "local_attention_window window_size attention_window local_window",
    ),
    (
        512,
        "max_position_embeddings n_positions max_seq_len n_ctx max_source_positions "
        "max_target_positions max_sequence_length seq_length",
    ),
    (32, "image_size chunk_size mamba_chunk_size rotary_dim_base"),
):
    SMALL.update(dict.fromkeys(names.split(), value))

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 1}


# Fields that are small where they are None, too.
EVEN_IF_NONE = {"head_dim", "num_key_value_heads", "topk_group", "n_group", "num_experts_per_tok"}


def shrunk(kind: type[PreTrainedConfig], extra: dict[str, Any] | None = None) -> PreTrainedConfig:
    """A configuration of ``kind`` with the fields of :data:`SMALL`, and ``extra`` on top."""
    extra = dict(extra or {})
    arguments: dict[str, Any] = {}
    defaults = _defaults(kind)
    for name, default in defaults.items():
        number = isinstance(default, int) and not isinstance(default, bool)
        if name in SMALL and (number or (default is None and name in EVEN_IF_NONE)):
            arguments[name] = SMALL[name]
        elif name.endswith(("_token_id", "_token_index")) and number and default >= VOCABULARY:
            arguments[name] = VOCABULARY - 1
        elif name == "initializer_range":
            # Far from uniform attention, so that a wrong key or value shows in the tokens.
            arguments[name] = 0.2
    if "kv_lora_rank" in defaults and "num_key_value_heads" in defaults:
        arguments["num_key_value_heads"] = SMALL["num_attention_heads"]
    arguments |= {name: value for name, value in IDS.items() if name in defaults}
    for name, sub in _parts(kind).items():
        arguments[name] = shrunk(sub, extra.pop(name, None))
    return kind(**arguments | extra)


def _parts(kind: type[PreTrainedConfig]) -> dict[str, type[PreTrainedConfig]]:
    """The configurations that one of ``kind`` is made of."""
    names = getattr(kind, "sub_configs", None) or {}
    if not names:
        return {}
    whole = kind()
    parts = {name: getattr(whole, name, None) for name in names}
    return {n: type(part) for n, part in parts.items() if isinstance(part, PreTrainedConfig)}


def _defaults(kind: type) -> dict[str, Any]:
    """The fields of a configuration and what they are by default."""
    if not dataclasses.is_dataclass(kind):
        return {n: p.default for n, p in inspect.signature(kind).parameters.items()}
    return {field.name: field.default for field in dataclasses.fields(kind)}
