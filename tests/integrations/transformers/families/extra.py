"""What small configurations of some families need beside small numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# For a head_dim of 16.
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
WITH_SECTIONS: dict[str, Any] = {"text_config": {"rope_parameters": SECTIONS}}
VISION_WITH_SECTIONS = [
    "cosmos3_edge",
    "glm46v",
    "glm4v",
    "glm4v_moe",
    "glm_ocr",
    "glmga",
    "paddleocr_vl",
    "qwen2_5_vl",
    "qwen2_vl",
]
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
ALTERNATING = ["linear_attention", "full_attention"] * 2

EXTRA: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "glm46v",
            "glm4v",
            "glm4v_moe",
            "glm_ocr",
            "glmga",
            "paddleocr_vl",
            "qwen2_5_vl",
            "qwen2_vl",
            "cosmos3_edge",
            "hy_v4_vl",
            "ernie4_5_vl_moe",
        ),
        WITH_SECTIONS,
    ),
    "cohere_compass_text": {"rope_parameters": {"full_attention": PLAIN_ROPE}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": PLAIN_ROPE}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2}},
    "xmod": {"default_language": "en_XX"},
    "gemma3n": {
        "text_config": {
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 2,
        }
    },
    "t5": {"decoder_start_token_id": 1},
    "udop": {"decoder_start_token_id": 1},
    "whisper": {"max_source_positions": 32},
    "bailing_hybrid": {"layer_group_size": 2, "n_group": 1, "topk_group": 1, "head_dim": 16},
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 4},
    "codegen": {"rotary_dim": 8},
    "deepseek_v2": {"n_group": 1, "topk_group": 1},
    "dots1": {"first_k_dense_replace": 4},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ALTERNATING, "mamba_n_heads": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ALTERNATING},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 2,
    },
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "hybrid", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
}


# Families with cross-attention that do not call themselves encoder-decoders.
CROSS_ATTENTION = {"blip"}


def _mel(frames: int, field: str = "num_mel_bins") -> Any:
    """Inputs of a model that hears ``frames`` of a spectrum."""

    def inputs(config: Any) -> dict[str, torch.Tensor]:
        return {"input_features": torch.randn(2, getattr(config, field), frames)}

    return inputs


def _image(field: str = "pixel_values", channels: int = 3, size: int = 32) -> Any:
    """Inputs of a model that sees one image per row, and reads."""

    def inputs(config: Any) -> dict[str, torch.Tensor]:
        ids = torch.randint(4, 90, (2, 5))
        return {field: torch.randn(2, channels, size, size), "input_ids": ids}

    return inputs


def _picture(config: Any) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def _sound(samples: int) -> Any:
    return lambda config: {"input_values": torch.randn(2, samples)}


INPUTS: dict[str, Callable[[Any], dict[str, torch.Tensor]]] = {
    "whisper": _mel(64),
    "blip": _image(),
    "blip-2": _image(),
    "instructblip": _image(),
    "vision-encoder-decoder": _picture,
    "speech-encoder-decoder": _sound(4000),
    "moonshine": _sound(4000),
    "moonshine_streaming": _sound(4000),
    "speecht5": _sound(4000),
    "speech_to_text": lambda config: {
        "input_features": torch.randn(2, 40, config.input_feat_per_channel)
    },
    "pix2struct": lambda config: {
        "flattened_patches": torch.randn(2, 9, config.vision_config.patch_embed_hidden_size + 2),
        "attention_mask": torch.ones(2, 9),
    },
    "canary": lambda config: {"input_features": torch.randn(2, 64, 80)},
    "cohere_asr": lambda config: {"input_features": torch.randn(2, 64, 80)},
}
