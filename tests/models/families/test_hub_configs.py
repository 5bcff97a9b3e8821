"""Configs of released checkpoints that published.json lacks: sizes, and every key that may be a reason to refuse.

Retyped from the documentation of classes and models where no source stands beside them.
"""

from pathlib import Path
from typing import Any

import pytest

from distillcache.models.families import config_from_hf
from distillcache.schemas.errors import CheckpointError

FILE = Path("config.json")
QWEN = {"hidden_act": "silu", "initializer_range": 0.02, "use_cache": True, "attention_dropout": 0.0}
MOE = QWEN | {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "output_router_logits": False}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
MLA_YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
DEEPSEEK = {
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
}
VISION = {"hidden_size": 1024, "model_type": "pixtral", "num_hidden_layers": 24, "image_size": 1540, "patch_size": 14}


def sizes(vocab: int, hidden: int, inner: int, depth: int, heads: int, kv: int, positions: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-6,
        "torch_dtype": "bfloat16",
    }


EYES = {
    "image_token_index": 10,
    "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu",
    "spatial_merge_size": 2,
    "vision_feature_layer": -1,
    "vision_config": VISION,
}
GROWING = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 16.0,
    "llama_4_scaling_beta": 0.1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 16384,
    "rope_theta": 1000000.0,
    "rope_type": "yarn",
    "type": "yarn",
}
STATIC_FP8 = {
    "activation_scheme": "static",
    "dequantize": False,
    "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    "quant_method": "fp8",
    "weight_block_size": None,
}
INT4 = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": 32,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}
QWEN3_CODER = sizes(151936, 2048, 5472, 48, 32, 4, 262144) | MOE
# name -> model_type, and the rest.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2.5-VL's text": ("qwen2", sizes(152064, 3584, 18944, 28, 28, 4, 128000) | {"use_mrope": False}),
    "Qwen3-Coder-30B-A3B": (
        "qwen3_moe",
        QWEN3_CODER
        | {"head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
        | {"qkv_bias": False, "shared_expert_intermediate_size": 0, "use_qk_norm": True, "max_window_layers": 28},
    ),
    "Llama-3.2-1B": (
        "llama",
        sizes(128256, 2048, 8192, 16, 32, 8, 131072)
        | {"head_dim": 64, "rope_scaling": LLAMA3 | {"factor": 32.0}, "tie_word_embeddings": True}
        | {"unsloth_fixed": True, "unsloth_version": "2024.9", "pad_token_id": 128004},
    ),
    "vicuna-7b": ("llama", sizes(32000, 4096, 11008, 32, 32, 32, 4096) | {"max_sequence_length": 2048}),
    "Mistral-7B-v0.1": ("mistral", sizes(32000, 4096, 14336, 32, 32, 8, 32768) | {"sliding_window": 4096}),
    "Mistral-Nemo": (
        "mistral",
        sizes(131072, 5120, 14336, 40, 32, 8, 1024000) | {"head_dim": 128, "sliding_window": None, "rope_theta": 1e6},
    ),
    "Ministral-8B": (
        "ministral",
        sizes(131072, 4096, 12288, 36, 32, 8, 32768)
        | {"head_dim": 128, "sliding_window": 32768, "rope_theta": 1e8}
        | {"layer_types": (["full_attention"] + ["sliding_attention"] * 3) * 9},
    ),
    "Ministral-8B, as mistral": (
        "mistral",
        sizes(131072, 4096, 12288, 36, 32, 8, 32768) | {"head_dim": 128, "sliding_window": 32768, "rope_theta": 1e8},
    ),
    "Mistral-Small-3.1": (
        "mistral3",
        {
            "image_token_index": 10,
            "multimodal_projector_bias": False,
            "projector_hidden_act": "gelu",
            "spatial_merge_size": 2,
            "vision_feature_layer": -1,
            "torch_dtype": "bfloat16",
            "vision_config": VISION,
            "text_config": sizes(131072, 5120, 32768, 40, 32, 8, 131072)
            | {"model_type": "mistral", "head_dim": 128, "rope_theta": 1e9, "sliding_window": None},
        },
    ),
    "Ministral-3-8B": (
        "mistral3",
        EYES
        | {
            "text_config": sizes(131072, 4096, 14336, 34, 32, 8, 262144)
            | {"model_type": "ministral3", "head_dim": 128, "sliding_window": None, "rope_parameters": GROWING}
            | {"attention_dropout": 0.0, "tie_word_embeddings": False}
        },
    ),
    "Ministral-3-8B-Instruct": (
        "mistral3",
        EYES
        | {"quantization_config": STATIC_FP8}
        | {
            "text_config": sizes(131072, 4096, 14336, 34, 32, 8, 262144)
            | {"model_type": "ministral3", "head_dim": 128, "sliding_window": None, "rope_parameters": GROWING}
        },
    ),
    "Mistral-Small-4": (
        "mistral3",
        EYES
        | {
            "text_config": sizes(131072, 4096, 12288, 36, 32, 32, 1048576)
            | {"model_type": "mistral4", "kv_lora_rank": 256, "q_lora_rank": 1024, "qk_head_dim": 128}
            | {"qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 128, "head_dim": 128}
            | {"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "n_routed_experts": 128}
            | {"n_shared_experts": 1, "num_experts_per_tok": 4, "moe_intermediate_size": 2048}
            | {"norm_topk_prob": True, "routed_scaling_factor": 1.0, "rope_interleave": True}
            | {
                "rope_parameters": GROWING
                | {"factor": 128.0, "original_max_position_embeddings": 8192, "rope_theta": 10000.0}
                | {"partial_rotary_factor": 0.5}
            }
        },
    ),
    "Kimi-K2-Thinking": (
        "kimi_k2",
        sizes(163840, 7168, 18432, 61, 64, 64, 262144)
        | DEEPSEEK
        | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_routed_experts": 384}
        | {"num_nextn_predict_layers": 0, "routed_scaling_factor": 2.827, "rope_theta": 50000.0}
        | {"rope_scaling": MLA_YARN | {"factor": 64.0}, "quantization_config": INT4},
    ),
    "GLM-4.5-Air": (
        "glm4_moe",
        sizes(151552, 4096, 10944, 46, 96, 8, 131072)
        | {"head_dim": 128, "attention_bias": True, "partial_rotary_factor": 0.5, "use_qk_norm": False}
        | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_routed_experts": 128, "n_shared_experts": 1}
        | {"moe_intermediate_size": 1408, "num_experts_per_tok": 8, "norm_topk_prob": True},
    ),
}
# LFM2: keys as tests of other readers hold them (jhqxxx/aha, tests/config_tests.rs); the rest, and GraniteMoE, retyped
# from the documentation of the configuration classes and of the models.
SHORT_CONV = {
    "norm_eps": 1e-5,
    "conv_L_cache": 3,
    "conv_bias": False,
    "tie_word_embeddings": True,
    "eos_token_id": 7,
}
LFM2 = SHORT_CONV | {
    "architectures": ["Lfm2ForCausalLM"],
    "block_auto_adjust_ff_dim": True,
    "block_ffn_dim_multiplier": 1.0,
    "block_mlp_init_scale": 1.0,
    "block_multiple_of": 256,
    "block_norm_eps": 1e-5,
    "block_out_init_scale": 1.0,
    "block_use_swiglu": True,
    "block_use_xavier_init": True,
    "conv_use_xavier_init": True,
    "tie_embedding": True,
    "use_pos_enc": True,
}
LFM2_MOE = SHORT_CONV | {
    "moe_intermediate_size": 1792,
    "norm_topk_prob": True,
    "num_dense_layers": 2,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 1.0,
    "use_expert_bias": True,
    "layer_types": ["full_attention" if block in (2, 6, 10, 14, 18, 21) else "conv" for block in range(24)],
}


def without_eps(*given: int) -> dict[str, Any]:
    return {key: value for key, value in sizes(*given).items() if key != "rms_norm_eps"}


CONFIGS |= {
    "granite-3.0-1b-a400m": (
        "granitemoe",
        sizes(49155, 1024, 512, 24, 16, 8, 4096)
        | {"attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "logits_scaling": 6.0}
        | {"residual_multiplier": 0.22, "num_local_experts": 32, "num_experts_per_tok": 8, "rope_theta": 10000}
        | {"output_router_logits": False, "router_aux_loss_coef": 0.0, "rope_scaling": None, "attention_bias": False},
    ),
    "granite-3.1-3b-a800m": (
        "granitemoe",
        sizes(49155, 1536, 512, 32, 24, 8, 131072)
        | {"attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "logits_scaling": 6.0}
        | {"residual_multiplier": 0.22, "num_local_experts": 40, "num_experts_per_tok": 8, "rope_theta": 1e7},
    ),
    "LFM2.5-230M": (
        "lfm2",
        without_eps(65536, 1024, 2560, 3, 16, 8, 128000)
        | LFM2
        | {"block_auto_adjust_ff_dim": False, "block_dim": 1024, "block_ff_dim": 2560, "conv_dim": 1024}
        | {"layer_types": ["conv", "conv", "full_attention"], "dtype": "bfloat16"}
        | {"rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}},
    ),
    "LFM2.5-8B-A1B": (
        "lfm2_moe",
        without_eps(124928, 2048, 7168, 24, 32, 8, 128000)
        | LFM2_MOE
        | {"rope_parameters": {"rope_theta": 5000000.0, "rope_type": "default"}, "rope_theta": 5000000.0},
    ),
}
# Sizes and switches as tests of other readers hold them, the rest retyped from the documentation of the configuration
# classes.
STRETCHED = {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
HUNYUAN = {
    "attention_bias": False,
    "attention_head_dim": 128,
    "eod_token_id": 127967,
    "mlp_bias": False,
    "rms_norm_eps": 1e-5,
    "rope_scaling": STRETCHED | {"type": "dynamic"},
    "rope_theta": 10000.0,
    "use_cla": False,
    "use_qk_norm": True,
}
CONFIGS |= {
    "Seed-OSS-36B-Base": (
        "seed_oss",
        sizes(155136, 5120, 27648, 64, 80, 8, 524288)
        | {"attention_bias": True, "residual_dropout": 0.1}
        | {"rope_parameters": {"rope_theta": 10000000.0, "rope_type": "default"}},
    ),
    "ERNIE-4.5-0.3B-PT": (
        "ernie4_5",
        sizes(103424, 1024, 3072, 18, 16, 2, 131072)
        | {"architectures": ["Ernie4_5_ForCausalLM"], "head_dim": 128, "use_bias": False, "rope_theta": 500000}
        | {"tie_word_embeddings": True, "auto_map": {"AutoConfig": "configuration_ernie4_5.Ernie4_5_Config"}},
    ),
    "ERNIE-4.5-0.3B-Base-PT": (
        "ernie4_5",
        sizes(103424, 1024, 3072, 18, 16, 2, 131072)
        | {"head_dim": 128, "use_bias": False, "rope_scaling": None, "rope_theta": 500000.0, "pad_token_id": 0},
    ),
    "ERNIE-4.5-21B-A3B-PT": (
        "ernie4_5_moe",
        sizes(103424, 2560, 12288, 28, 20, 4, 131072)
        | {"head_dim": 128, "moe_num_experts": 64, "moe_num_shared_experts": 2, "moe_k": 6, "moe_layer_interval": 1}
        | {"moe_intermediate_size": 1536, "moe_layer_start_index": 1, "moe_layer_end_index": 27, "use_bias": False}
        | {"moe_capacity": [64, 64, 64], "moe_gate": "topk", "moe_use_aux_free": True, "num_nextn_predict_layers": 1},
    ),
    "ERNIE-4.5-300B-A47B-PT": (
        "ernie4_5_moe",
        sizes(103424, 8192, 28672, 54, 64, 8, 131072)
        | {"moe_num_experts": 64, "moe_num_shared_experts": 0, "moe_k": 8, "tie_word_embeddings": False}
        | {"moe_intermediate_size": 3584, "moe_layer_start_index": 3, "moe_layer_end_index": None, "head_dim": None},
    ),
    "Hunyuan-7B-Instruct": ("hunyuan_v1_dense", sizes(128167, 4096, 14336, 32, 32, 8, 262144) | HUNYUAN),
    "Hunyuan-MT-7B": (
        "hunyuan_v1_dense",
        sizes(128256, 4096, 14336, 32, 32, 8, 32768)
        | HUNYUAN
        | {"head_dim": 128, "cla_share_factor": 2, "num_experts": 1, "moe_topk": 1, "use_mixed_mlp_moe": False},
    ),
    "Hunyuan-A13B-Instruct": (
        "hunyuan_v1_moe",
        sizes(128167, 4096, 3072, 32, 32, 8, 32768)
        | HUNYUAN
        | {"num_experts": 64, "moe_topk": [8] * 32, "num_shared_expert": [1] * 32, "tie_word_embeddings": True}
        | {"moe_intermediate_size": [3072] * 32, "use_mixed_mlp_moe": True, "norm_topk_prob": True},
    ),
    "Hunyuan-A13B as transformers 5 saves it": (
        "hunyuan_v1_moe",
        sizes(128167, 4096, 3072, 32, 32, 8, 32768)
        | {"head_dim": 128, "num_experts": 64, "moe_topk": 8, "output_router_logits": False}
        | {"rope_parameters": STRETCHED | {"rope_type": "dynamic", "rope_theta": 10000.0}},
    ),
    "Apertus-70B-2509 as transformers 5 saves it": (
        "apertus",
        sizes(131072, 8192, 43008, 80, 64, 8, 65536)
        | {"hidden_act": "xielu", "attention_bias": False, "rope_parameters": LLAMA3 | {"rope_theta": 12000000.0}},
    ),
    "c4ai-command-r7b-12-2024": (
        "cohere2",
        without_eps(256000, 4096, 14336, 32, 32, 8, 8192)
        | {"layer_norm_eps": 1e-5, "head_dim": 128, "hidden_act": "silu", "logit_scale": 0.25}
        | {"sliding_window": 4096, "sliding_window_pattern": 4, "layer_switch": 4, "rope_theta": 50000}
        | {"order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj", "rotary_pct": 1.0}
        | {"use_embedding_sharing": True, "use_gated_activation": True, "use_parallel_block": True}
        | {"use_parallel_embedding": False, "use_qk_norm": False, "cache_implementation": "hybrid"},
    ),
    "c4ai-command-a-03-2025": (
        "cohere2",
        without_eps(256000, 12288, 36864, 64, 96, 8, 131072)
        | {"layer_norm_eps": 1e-5, "logit_scale": 0.25, "tie_word_embeddings": True}
        | {"sliding_window": 4096, "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 16}
        | {"rope_parameters": {"rope_theta": 50000, "rope_type": "default"}, "attention_bias": False},
    ),
    "dots.llm1.base": (
        "dots1",
        sizes(152064, 4096, 10944, 62, 32, 32, 32768)
        | {"first_k_dense_replace": 1, "moe_intermediate_size": 1408, "n_routed_experts": 128, "n_shared_experts": 2}
        | {"num_experts_per_tok": 6, "norm_topk_prob": True, "n_group": 1, "topk_group": 1, "rope_scaling": None}
        | {"sliding_window": None, "use_sliding_window": False, "layer_types": ["full_attention"] * 62},
    ),
    "Solar-Open-100B": (
        "solar_open",
        sizes(196608, 4096, 10240, 48, 64, 8, 131072)
        | {"head_dim": 128, "moe_intermediate_size": 1280, "n_routed_experts": 128, "n_shared_experts": 1}
        | {"num_experts_per_tok": 8, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "partial_rotary_factor": 1.0}
        | {"first_k_dense_replace": 0, "rope_theta": 1000000, "tie_word_embeddings": False}
        | {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 65536}},
    ),
    "FlexOlmo-7x7B-1T": (
        "flex_olmo",
        sizes(100352, 4096, 11008, 32, 32, 32, 4096)
        | {"num_experts": 7, "num_experts_per_tok": 5, "norm_topk_prob": False, "rope_theta": 500000}
        | {"router_aux_loss_coef": 0.01, "output_router_logits": False, "attention_bias": False},
    ),
    "Flex-reddit-2x7B-1T": (
        "flex_olmo",
        sizes(100352, 4096, 11008, 32, 32, 32, 4096)
        | {"num_experts": 2, "num_experts_per_tok": 2, "rope_theta": 500000, "tie_word_embeddings": False},
    ),
}
# GLM and MiniMax: keys as public repositories hold them. GLM-4.7-Flash: a test of vLLM (its config for Transformers 4);
# MiniMax M2: notes and tests on quantising it. GLM-4: retyped from the documentation of the models.
GLM4 = QWEN | {"attention_bias": True, "head_dim": 128, "partial_rotary_factor": 0.5, "pad_token_id": 151329}
MLA_DEEPSEEK = {key: value for key, value in DEEPSEEK.items() if key not in ("auto_map", "quantization_config")}
MINIMAX = {
    "attn_type_list": [1] * 62,
    "auto_map": {"AutoConfig": "configuration_minimax_m2.MiniMaxM2Config"},
    "head_dim": 128,
    "hidden_act": "silu",
    "mtp_transformer_layers": 1,
    "num_experts_per_tok": 8,
    "num_local_experts": 256,
    "num_mtp_modules": 3,
    "qk_norm_type": "per_layer",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "float8_e4m3fn",
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rope_theta": 5000000,
    "rotary_dim": 64,
    "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
    "use_mtp": True,
    "use_qk_norm": True,
    "use_routing_bias": True,
}
CONFIGS |= {
    "GLM-4-9B-0414": (
        "glm4",
        sizes(151552, 4096, 13696, 40, 32, 2, 32768) | GLM4 | {"rms_norm_eps": 1e-05, "rope_theta": 10000.0},
    ),
    "GLM-4-32B-0414": (
        "glm4",
        sizes(151552, 6144, 23040, 61, 48, 2, 32768) | GLM4 | {"attention_bias": False, "rope_theta": 10000.0},
    ),
    "GLM-4.7-Flash": (
        "glm4_moe_lite",
        sizes(154880, 2048, 10240, 47, 20, 20, 202752)
        | {key: value for key, value in MLA_DEEPSEEK.items() if key not in ("scoring_func", "ep_size")}
        | {"attention_bias": False, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 768}
        | {"moe_intermediate_size": 1536, "n_routed_experts": 64, "num_experts_per_tok": 4, "qk_nope_head_dim": 192}
        | {"num_nextn_predict_layers": 1, "partial_rotary_factor": 1.0, "rope_scaling": None, "rope_theta": 1000000}
        | {"routed_scaling_factor": 1.8, "v_head_dim": 256, "rms_norm_eps": 1e-05},
    ),
    "MiniMax-M2": ("minimax_m2", sizes(200064, 3072, 1536, 62, 48, 8, 196608) | MINIMAX),
    "MiniMax-M2.7": ("minimax_m2", sizes(200064, 3072, 1536, 62, 48, 8, 204800) | MINIMAX),
}
# Granite 4: the sizes of its micro are those inside granite-4.0-3b-vision's config (a test that quotes it); of the
# others what the models' pages say. Nemotron Nano 2: as vLLM's plugin for VoiceChat has it. Falcon-H1 0.5B:
# NVIDIA-NeMo/Megatron-Bridge, tests/unit_tests/models/falcon_h1/test_falcon_h1_bridge.py; 7B: keys of a test that sizes
# mlx-community's copy. Bamba: ids of blocks as other readers' tests have them, the rest from the configuration class's
# documentation.
GRANITE4 = {
    "attention_bias": False,
    "attention_multiplier": 0.015625,
    "embedding_multiplier": 12,
    "initializer_range": 0.1,
    "mamba_chunk_size": 256,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 128,
    "mamba_proj_bias": False,
    "normalization_function": "rmsnorm",
    "output_router_logits": False,
    "residual_multiplier": 0.22,
    "rope_scaling": None,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": True,
}
NEMOTRON = {
    "attention_bias": False,
    "chunk_size": 128,
    "conv_kernel": 4,
    "expand": 2,
    "head_dim": 128,
    "hidden_dropout": 0.0,
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "mamba_ssm_cache_dtype": "float32",
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "n_groups": 8,
    "num_logits_to_keep": 1,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "sliding_window": None,
    "ssm_state_size": 128,
    "time_step_floor": 0.0001,
    "time_step_limit": [0.0, float("inf")],
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "use_bias": False,
    "use_conv_bias": True,
    "use_mamba_kernels": True,
}
CONFIGS |= {
    "granite-4.0-micro": (
        "granitemoehybrid",
        sizes(100352, 2560, 8192, 40, 40, 8, 131072)
        | GRANITE4
        | {"layer_types": ["attention"] * 40, "logits_scaling": 10, "mamba_d_head": 40, "mamba_d_state": 256}
        | {"num_experts_per_tok": 0, "num_local_experts": 0, "position_embedding_type": "rope", "rope_theta": 10000000}
        | {"shared_intermediate_size": 8192},
    ),
    "granite-4.0-h-small": (
        "granitemoehybrid",
        sizes(100352, 4096, 768, 40, 32, 8, 131072)
        | GRANITE4
        | {"layer_types": ["attention" if block % 10 == 5 else "mamba" for block in range(40)], "logits_scaling": 16}
        | {"mamba_d_head": 64, "mamba_d_state": 128, "num_experts_per_tok": 10, "num_local_experts": 72}
        | {"position_embedding_type": "nope", "rope_theta": 10000, "shared_intermediate_size": 1536},
    ),
    "Nemotron-Nano-9B-v2": (
        "nemotron_h",
        without_eps(131072, 4480, 15680, 56, 40, 8, 131072)
        | NEMOTRON
        | {"rms_norm_eps": 1e-5, "layer_norm_epsilon": 1e-5, "mamba_head_dim": 80, "mamba_num_heads": 128}
        | {"hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"},
    ),
    "Falcon-H1-0.5B": (
        "falcon_h1",
        sizes(32784, 1024, 2048, 36, 8, 2, 16384)
        | {"attention_bias": False, "attention_in_multiplier": 1.0, "attention_out_multiplier": 0.9375}
        | {"attn_layer_indices": None, "embedding_multiplier": 5.656854249492381, "head_dim": 64}
        | {"key_multiplier": 0.39062499999999994, "lm_head_multiplier": 0.0390625, "mamba_chunk_size": 128}
        | {"mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_ssm": 1536, "mamba_d_state": 128}
        | {"mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 24, "mamba_norm_before_gate": False}
        | {"mamba_proj_bias": False, "mamba_rms_norm": False, "mamba_use_mlp": True, "mlp_bias": False}
        | {"mlp_multipliers": [0.8838834764831844, 0.5859375], "projectors_bias": False, "rope_scaling": None}
        | {"rope_theta": 100000000000.0, "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.23570226039551587}
        | {"ssm_multipliers": [0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738]},
    ),
    "Falcon-H1-7B": (
        "falcon_h1",
        sizes(130048, 3072, 12288, 44, 12, 2, 262144)
        | {"attn_layer_indices": None, "head_dim": 128, "key_multiplier": 0.02, "mamba_d_conv": 4, "mamba_d_head": 128}
        | {"mamba_d_ssm": 3072, "mamba_d_state": 256, "mamba_n_groups": 2, "mamba_n_heads": 24, "mamba_use_mlp": True}
        | {"rope_theta": 100000000000.0, "tie_word_embeddings": False},
    ),
    "Bamba-9B-v2": (
        "bamba",
        sizes(128256, 4096, 14336, 32, 32, 8, 262144)
        | {"attention_bias": False, "attn_layer_indices": [9, 18, 27], "attn_rotary_emb": 64, "mamba_chunk_size": 256}
        | {"mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_expand": 2}
        | {"mamba_n_groups": 1, "mamba_n_heads": 128, "mamba_proj_bias": False, "mlp_bias": False}
        | {"num_logits_to_keep": 1, "partial_rotary_factor": 0.5, "rope_scaling": None, "z_loss_coefficient": 0.0}
        | {"tie_word_embeddings": False},
    ),
    "Bamba-9B as transformers 5 saves it": (
        "bamba",
        sizes(128256, 4096, 14336, 32, 32, 8, 262144)
        | {"attn_layer_indices": [9, 18, 27], "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_heads": 128}
        | {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 10000.0, "rope_type": "default"}},
    ),
}
# OLMo Hybrid: keys as the converters of allenai/OLMo-core and transformers write them, sizes of allenai/open-instruct,
# open_instruct/test_hybrid_layer_speed_gpu.py, the base's null of its pull request 1822, that of the other model of
# ml-explore/mlx-lm, pull request 1023.
OLMO_HYBRID = sizes(100352, 3840, 11008, 32, 30, 30, 65536) | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 8,
    "linear_allow_neg_eigval": True,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 96,
    "linear_num_key_heads": 30,
    "linear_num_value_heads": 30,
    "linear_value_head_dim": 192,
    "pad_token_id": 100277,
    "tie_word_embeddings": False,
    "use_cache": True,
}
CONFIGS |= {
    "Olmo-Hybrid-7B": ("olmo_hybrid", OLMO_HYBRID | {"rope_parameters": {"rope_theta": None}}),
    "Olmo-Hybrid-Instruct-SFT-7B": (
        "olmo_hybrid",
        OLMO_HYBRID | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "linear_use_gate": True},
    ),
}
# Kimi Linear: the config.json of Firworks/Kimi-Linear-48B-A3B-Instruct-nvfp4 without its quantization; the same as
# transformers 5.24 writes it.
KIMI_LINEAR = {
    "hidden_act": "silu",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 1024,
    "num_attention_heads": 32,
    "num_hidden_layers": 27,
    "num_key_value_heads": 32,
    "pad_token_id": 163839,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "routed_scaling_factor": 2.446,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "v_head_dim": 128,
    "vocab_size": 163840,
    "model_max_length": 1048576,
    "moe_renormalize": True,
    "num_expert_group": 1,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_shared_experts": 1,
}
KIMI_FULL = [4, 8, 12, 16, 20, 24, 27]
CONFIGS |= {
    "Kimi-Linear-48B-A3B-Instruct": (
        "kimi_linear",
        KIMI_LINEAR
        | {
            "auto_map": {"AutoConfig": "configuration_kimi.KimiLinearConfig"},
            "first_k_dense_replace": 1,
            "head_dim": 72,
        }
        | {"linear_attn_config": {"full_attn_layers": KIMI_FULL, "head_dim": 128, "num_heads": 32}}
        | {"mla_use_nope": True, "moe_layer_freq": 1, "moe_router_activation_func": "sigmoid", "rope_scaling": None}
        | {"num_nextn_predict_layers": 0, "rope_theta": 10000.0, "use_grouped_topk": True, "dtype": "bfloat16"},
    ),
    "Kimi-Linear-48B-A3B-Base as transformers 5 saves it": (
        "kimi_linear",
        KIMI_LINEAR
        | {"head_dim": 64, "linear_conv_kernel_dim": 4, "linear_head_dim": 128, "linear_num_heads": 32}
        | {"layer_types": ["full_attention" if at in KIMI_FULL else "linear_attention" for at in range(1, 28)]}
        | {"mlp_layer_types": ["dense"] + ["sparse"] * 26, "qk_head_dim": 192, "attention_bias": False},
    ),
}
CONFIGS["Kimi-Linear-48B-A3B-Instruct"][1]["linear_attn_config"] |= {
    "kda_layers": [at for at in range(1, 28) if at not in KIMI_FULL],
    "short_conv_kernel_size": 4,
}
GENERATION = {"do_sample": True, "min_length": 0, "forced_bos_token_id": None, "suppress_tokens": None, "top_k": 50}


@pytest.mark.parametrize("name", CONFIGS)
def test_is_read_and_keys_of_saving_change_nothing(name: str):
    family, raw = CONFIGS[name]
    raw = raw | {"model_type": family, "transformers_version": "4.57.0", "bos_token_id": 1, "eos_token_id": 2}
    found = config_from_hf(raw, FILE)
    text = raw.get("text_config", raw)
    assert found.num_blocks == text["num_hidden_layers"]
    assert found.hidden_size == text["hidden_size"]
    assert found.family == ("deepseek_v3" if family == "kimi_k2" else family)
    assert config_from_hf(raw | GENERATION | {"new_trick": None}, FILE) == found


def test_olmo3_as_transformers_5_saves_it():
    """By the kinds of blocks; in its first versions, the parameters of those that see all, alone."""
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "attention_factor": 1.2}
    base = sizes(100278, 4096, 11008, 32, 32, 32, 65536) | {"model_type": "olmo3", "sliding_window": 4096}
    old = config_from_hf(base | {"rope_scaling": yarn, "rope_theta": 500000}, FILE)
    typed = {
        "full_attention": yarn | {"rope_theta": 500000},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
    }
    assert config_from_hf(base | {"rope_parameters": typed}, FILE) == old
    assert config_from_hf(base | {"rope_parameters": yarn | {"rope_theta": 500000}}, FILE) == old
    assert config_from_hf(base | {"rope_parameters": yarn | {"rope_theta": 500000} | typed}, FILE) == old


@pytest.mark.parametrize(
    "more",
    [
        {"is_causal": True, "use_bidirectional_attention": False},
        {"torch_compile": False, "neftune_noise_alpha": 5.0, "max_batch_size": 1, "seq_length": 4096},
        {"aux_loss_alpha": 0.001},
    ],
    ids=str,
)
def test_keys_of_training_change_nothing(more: dict[str, Any]):
    family, raw = CONFIGS["GLM-4.5-Air"]
    raw = raw | {"model_type": family}
    assert config_from_hf(raw | more, FILE) == config_from_hf(raw, FILE)


def test_a_switch_of_null_is_off_where_transformers_asks_for_its_truth():
    family, raw = CONFIGS["GLM-4.5-Air"]
    raw = raw | {"model_type": family}
    assert config_from_hf(raw | {"norm_topk_prob": None}, FILE) == config_from_hf(raw | {"norm_topk_prob": False}, FILE)
    with pytest.raises(CheckpointError, match="is_causal"):
        config_from_hf(raw | {"is_causal": False}, FILE)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "float-quantized"},
        {"format": None},
        {"config_groups": {}},
        {"config_groups": {"group_0": INT4["config_groups"]["group_0"] | {"input_activations": {"num_bits": 8}}}},
        *(
            {"config_groups": {"group_0": {"weights": INT4["config_groups"]["group_0"]["weights"] | other}}}
            for other in (
                {"num_bits": 8},
                {"symmetric": False},
                {"actorder": "group"},
                {"new": 3},
                {"group_size": None},
            )
        ),
    ],
    ids=str,
)
def test_other_packings_of_compressed_tensors_are_refused(changes: dict[str, Any]):
    family, raw = CONFIGS["Kimi-K2-Thinking"]
    with pytest.raises(CheckpointError, match="is quantised"):
        config_from_hf(raw | {"model_type": family, "quantization_config": INT4 | changes}, FILE)
