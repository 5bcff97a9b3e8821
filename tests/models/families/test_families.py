"""config.json in and out: both spellings of transformers, defaults, round trips, and refusals that name the key."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distillcache.models.checkpoint import read_config
from distillcache.models.config import BlockKind, LayerGroup, ModelConfig, MoeConfig, RopeConfig
from distillcache.models.families import FAMILIES, config_from_hf, config_to_hf
from distillcache.schemas.errors import CheckpointError
from tests.models.conftest import GOLDEN

FILE = Path("model/config.json")
LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
}
MOE_FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe")
# 48 query heads: all families' defaults of num_key_value_heads divide them.
SIZES = LLAMA | {"hidden_size": 96, "num_attention_heads": 48, "num_hidden_layers": 4}


def read(**changes: Any) -> ModelConfig:
    return config_from_hf(LLAMA | changes, FILE)


def read_moe(family: str, **changes: Any) -> ModelConfig:
    return config_from_hf(SIZES | {"model_type": family} | changes, FILE)


def test_defaults_are_those_of_transformers():
    llama = read()
    assert (llama.num_kv_heads, llama.head_dim, llama.max_positions, llama.norm_eps) == (6, 8, 2048, 1e-6)
    assert llama.rope == RopeConfig()
    assert (llama.tie_embeddings, llama.qkv_bias, llama.mlp_bias) == (False, False, False)
    mistral = read(model_type="mistral", num_attention_heads=8)
    assert mistral.layers == (LayerGroup((BlockKind(window=4096),), 3),)
    assert (mistral.num_kv_heads, mistral.max_positions) == (8, 131072)
    assert read(model_type="mistral", num_attention_heads=8, sliding_window=None).layers[0].pattern == (BlockKind(),)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"rope_theta": 5e5}, RopeConfig(5e5)),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, RopeConfig(5e5)),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}, RopeConfig(kind="linear", factor=2.0)),
        (
            {"rope_scaling": {"rope_type": "dynamic", "type": "dynamic", "factor": 2}},
            RopeConfig(kind="dynamic", factor=2),
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                }
            },
            RopeConfig(kind="llama3", factor=8.0, original_max_positions=8192),
        ),
        (
            {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 512, "finetuned": True}},
            RopeConfig(1e4, "yarn", 4.0, original_max_positions=512),
        ),
        (
            {
                "rope_scaling": {
                    "type": "longrope",
                    "short_factor": [1, 1.5, 2, 3],
                    "long_factor": [2, 3.5, 4, 5],
                    "factor": 4,
                }
            },
            RopeConfig(
                kind="longrope",
                factor=4,
                original_max_positions=2048,
                short_factor=(1.0, 1.5, 2.0, 3.0),
                long_factor=(2.0, 3.5, 4.0, 5.0),
            ),
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "truncate": False}},
            RopeConfig(1e6, "yarn", 4.0, original_max_positions=2048, truncate=False),
        ),
    ],
)
def test_rope_in_both_spellings(found: dict[str, Any], expected: RopeConfig):
    assert read(**found).rope == expected


@pytest.mark.parametrize(
    ("name", "ours"),
    [("silu", "silu"), ("swish", "silu"), ("gelu", "gelu"), ("gelu_new", "gelu_tanh"), ("relu2", "relu2")],
)
def test_activations(name: str, ours: str):
    assert read(hidden_act=name).activation == ours


@pytest.mark.parametrize(
    "config",
    [
        read(),
        read(num_key_value_heads=2, head_dim=10, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        read(hidden_act="gelu_new", rms_norm_eps=1e-5, max_position_embeddings=100),
        read(model_type="mistral", num_key_value_heads=2, num_attention_heads=10, sliding_window=7),
        *(
            replace(read(), rope=rope)
            for rope in (
                RopeConfig(5e5),
                RopeConfig(kind="linear", factor=2.0),
                RopeConfig(kind="dynamic", factor=2.0),
                RopeConfig(5e5, "llama3", 32.0, 8192),
                RopeConfig(1e6, "yarn", 4.0, 512, attention_factor=1.5, truncate=False, beta_fast=16.0),
                RopeConfig(1e6, "yarn", 4.0, 512, mscale=0.7, mscale_all_dim=0.5),
            )
        ),
    ],
)
def test_round_trip_is_exact(config: ModelConfig):
    assert config_from_hf(config_to_hf(config, "float32"), FILE) == config


def test_keys_of_mirrors_and_old_files_change_nothing():
    """Unsloth's mirrors of gated checkpoints, Vicuna 16k, the first files of Llama 2."""
    keys = {"unsloth_fixed": True, "unsloth_version": "2025.3.19", "max_sequence_length": 16384, "max_length": 4096}
    assert read(**keys, _attn_implementation="eager") == read()


GENERATION_KEYS = """assistant_confidence_threshold assistant_early_exit bad_words_ids begin_suppress_tokens
    cache_implementation disable_compile diversity_penalty do_sample dola_layers early_stopping
    encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty
    force_words_ids forced_bos_token_id forced_decoder_ids forced_eos_token_id guidance_scale length_penalty low_memory
    max_length max_matching_ngram_size max_new_tokens max_time min_length min_new_tokens min_p no_repeat_ngram_size
    num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences output_logits
    output_scores penalty_alpha prefill_chunk_size prompt_lookup_num_tokens remove_invalid_values renormalize_logits
    repetition_penalty return_dict_in_generate return_legacy_cache sequence_bias stop_strings suppress_tokens
    target_lookbehind temperature token_healing top_h top_k top_p typical_p use_mambapy watermarking_config"""
CONFIG_KEYS = """_attn_implementation_autoset _commit_hash _name_or_path attn_implementation chunk_size_feed_forward
    decoder_start_token_id dtype finetuning_task gradient_checkpointing id2label label2id num_labels output_attentions
    prefix problem_type return_dict sep_token_id task_specific_params tf_legacy_loss tokenizer_class torch_dtype
    torchscript transformers_version unsloth_fixed unsloth_tokenizer_class use_bfloat16"""


@pytest.mark.parametrize("family", ["llama", "mistral", *MOE_FAMILIES])
def test_keys_of_generation_and_bookkeeping_are_never_a_reason_to_refuse(family: str):
    """With values that are no defaults: before transformers 5, save_pretrained left them in config.json."""
    found = dict.fromkeys(f"{GENERATION_KEYS} {CONFIG_KEYS}".split(), 7)
    assert read_moe(family, **found) == read_moe(family)


def test_every_key_of_the_installed_generation_config_is_known():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `parity`)")
    found = {key: 3 for key in transformers.GenerationConfig().to_dict() if not key.startswith("_")}
    assert read(**found) == read()


@pytest.mark.parametrize("family", ["llama", "mistral", "ministral", "granite", "olmo2", "gemma2", *MOE_FAMILIES])
def test_null_stands_for_the_default(family: str):
    """Under every switch and number, and under a key that is not known."""
    short = SIZES | {"num_key_value_heads": 48}
    expected = config_from_hf(short | {"model_type": family}, FILE)
    nulls = [key for key, default in FAMILIES[family].defaults.items() if isinstance(default, bool | float | str)]
    # Gemma 2's caps are off where they are null.
    nulls = [key for key in nulls if not key.endswith("softcapping")]
    for key in (*nulls, "max_position_embeddings", "rope_theta", "rope_scaling", "new_trick", "pruned_heads"):
        assert config_from_hf(short | {"model_type": family, key: None}, FILE) == expected, key


@pytest.mark.parametrize(
    ("family", "stated"),
    [
        # Qwen3-Coder-30B-A3B-Instruct
        ("qwen3_moe", {"qkv_bias": False, "shared_expert_intermediate_size": 0, "use_qk_norm": True}),
        ("qwen3_moe", {"layer_types": ["full_attention"] * 4, "mlp_layer_types": ["sparse"] * 4}),
        ("llama", {"layer_types": ["full_attention"] * 4, "qkv_bias": False, "use_sliding_window": False}),
        ("mistral", {"layer_types": ["sliding_attention"] * 4, "attention_bias": False}),
        ("mixtral", {"layer_types": ["full_attention"] * 4, "mlp_bias": False, "lm_head_bias": False}),
        ("olmoe", {"use_qk_norm": True, "shared_expert_intermediate_size": None}),
        ("qwen2", {"qkv_bias": True, "attention_out_bias": False, "num_key_value_heads": None}),
        ("gpt_oss", {"qkv_bias": True}),
    ],
)
def test_keys_that_state_what_is_so_anyway(family: str, stated: dict[str, Any]):
    heads = {"num_key_value_heads": None} if family == "qwen2" else {}
    assert read_moe(family, **stated) == read_moe(family, **heads)


def test_a_llama_that_llama_configs_cannot_say_is_written_as_a_mistral():
    odd = replace(read(), num_heads=5, num_kv_heads=1, head_dim=8)
    raw = config_to_hf(odd, "float32")
    assert (raw["model_type"], raw["sliding_window"]) == ("mistral", None)
    assert config_from_hf(raw, FILE) == replace(odd, family="mistral")
    with pytest.raises(CheckpointError, match="no config for this decoder"):
        config_to_hf(replace(odd, qkv_bias=True, output_bias=True), "float32")


def test_mixed_blocks_cannot_be_exported():
    mixed = replace(read(), layers=(LayerGroup((BlockKind(), BlockKind(4)), 2),))
    with pytest.raises(CheckpointError, match="2 kinds of blocks"):
        config_to_hf(mixed, "float32")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"new_trick": 3}, "new_trick"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"sliding_window": 9}, "sliding_window"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"num_hidden_layers": 10_000_000}, "at most 2000"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"vocab_size": 2**40}, "vocab_size"),
        ({"hidden_size": 10**400}, "hidden_size"),
        ({"head_dim": 2**33}, "head_dim"),
        ({"max_position_embeddings": 2**40}, "max_position_embeddings"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ({"qk_norm": True}, "qk_norm"),
        ({"lm_head_bias": True}, "lm_head_bias"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}, "beta_fast"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "from 1e-06"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2**40}}, "from 1e-06"),
        ({"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2.0}}, "rope_scaling.type"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": float("nan")}}, "factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0.5}}, "whole"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": 1.0}, "above 1"),
        ({"rope_theta": 1e300}, "rope_theta"),
        (
            {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "rope_parameters.rope_theta",
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope_scaling.rope",
        ),
        ({"rms_norm_eps": 1e-60}, "float32"),
        ({"rms_norm_eps": 1e300}, "float32"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "original_max_position_embeddings"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 0}}, "beta_fast"),
        ({"rope_scaling": [2.0]}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"factor": 4.0}}, "disagree"),
        ({"hidden_act": "tanh"}, "hidden_act"),
        ({"vocab_size": None}, "vocab_size"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"num_key_value_heads": 4}, "do not divide"),
        ({"head_dim": 7}, "even head width"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias"),
    ],
)
def test_refusals_name_the_key(changes: dict[str, Any], named: str):
    with pytest.raises(CheckpointError) as caught:
        read(**changes)
    message = str(caught.value)
    assert named in message
    assert str(FILE) in message
    assert "next" in message


# What transformers 5.23 assumes: query heads, key/value heads, longest position, epsilon, base of the rotation, and
# the mixture.
MOE_DEFAULTS = {
    "mixtral": (8, 131072, 1e-5, 1e6, MoeConfig(8, 2, 40)),
    "qwen2_moe": (
        16,
        32768,
        1e-6,
        1e4,
        MoeConfig(60, 4, 1408, shared_size=5632, shared_gate=True, renormalise=False),
    ),
    "qwen3_moe": (4, 32768, 1e-6, 1e4, MoeConfig(128, 8, 768, renormalise=False)),
    "olmoe": (48, 4096, 1e-5, 1e4, MoeConfig(64, 8, 40, renormalise=False)),
    "granitemoe": (48, 2048, 1e-6, 1e4, MoeConfig(8, 2, 40)),
}


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_defaults_of_mixtures(family: str):
    config = read_moe(family)
    found = (config.num_kv_heads, config.max_positions, config.norm_eps, config.rope.theta, config.moe)
    assert found == MOE_DEFAULTS[family]
    assert config.layers == (LayerGroup((BlockKind(moe=True),), 4),)
    assert (config.head_dim, config.activation, config.tie_embeddings, config.clip_qkv) == (2, "silu", False, None)
    assert (config.qkv_bias, config.output_bias) == (family == "qwen2_moe", False)
    assert config.qk_norm == {"qwen3_moe": "head", "olmoe": "full"}.get(family, "none")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, {}) for family in ("llama", "mistral", *MOE_FAMILIES)),
        ("mixtral", {"sliding_window": 9, "head_dim": 6}),
        ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 3}),
        ("qwen2_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [3]}),
        ("qwen3_moe", {"use_sliding_window": True, "decoder_sparse_step": 3}),
    ],
)
def test_defaults_are_those_of_the_installed_transformers(family: str, changes: dict[str, Any]):
    """The shortest config.json means what transformers writes out when it has read it."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `parity`)")
    short = SIZES | {"model_type": family} | changes
    written = transformers.AutoConfig.for_model(**short).to_dict()
    assert config_from_hf(written, FILE) == config_from_hf(short, FILE)


MOE_ROUND_TRIPS = [
    read_moe("mixtral", sliding_window=7, head_dim=6, router_jitter_noise=0.1, num_local_experts=5),
    read_moe("qwen2_moe", decoder_sparse_step=2, qkv_bias=False, norm_topk_prob=True, tie_word_embeddings=True),
    read_moe("qwen2_moe", use_sliding_window=True, sliding_window=3, max_window_layers=3, mlp_only_layers=[1]),
    read_moe("qwen3_moe", use_sliding_window=True, sliding_window=3, mlp_only_layers=[0, 1], head_dim=10),
    read_moe("qwen3_moe", decoder_sparse_step=4, attention_bias=True, norm_topk_prob=True, hidden_act="gelu"),
    read_moe("olmoe", clip_qkv=8.5, num_key_value_heads=6, attention_bias=True, norm_topk_prob=True),
    *(read_moe(family) for family in MOE_FAMILIES),
    *(read_config(file.parent) for file in sorted(GOLDEN.glob("*/config.json"))),
]


@pytest.mark.parametrize("config", MOE_ROUND_TRIPS)
def test_round_trip_of_mixtures_is_exact(config: ModelConfig):
    raw = config_to_hf(config, "float32")
    # Layers of multi-token prediction are left out of an export.
    assert config_from_hf(raw, FILE) == replace(config, family=raw["model_type"], mtp_layers=0)


def test_blocks_of_mixtures():
    dense, sparse = BlockKind(), BlockKind(moe=True)
    assert read_moe("qwen3_moe", decoder_sparse_step=2).kinds == (dense, sparse, dense, sparse)
    assert read_moe("qwen2_moe", decoder_sparse_step=2, mlp_only_layers=[1]).kinds == (dense, dense, dense, sparse)
    assert read_moe("qwen3_moe", mlp_only_layers=[0]).layers == (LayerGroup((dense,), 1), LayerGroup((sparse,), 3))
    windows = [kind.window for kind in read_moe("qwen2_moe", use_sliding_window=True, sliding_window=9).kinds]
    assert windows == [9, None, 9, None]
    types = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    windows = [kind.window for kind in read_moe("qwen2_moe", use_sliding_window=True, layer_types=types).kinds]
    assert windows == [None, None, 4096, None]
    assert {kind.window for kind in read_moe("qwen3_moe", use_sliding_window=True).kinds} == {4096}
    assert {kind.window for kind in read_moe("qwen3_moe", sliding_window=7).kinds} == {None}


def test_number_of_experts_in_both_spellings():
    assert read_moe("mixtral", num_experts=5).moe_config.num_experts == 5
    for family in ("qwen3_moe", "olmoe"):
        assert read_moe(family, num_local_experts=9).moe_config.num_experts == 9
        assert read_moe(family, num_local_experts=9, num_experts=9).moe_config.num_experts == 9


@pytest.mark.parametrize("family", MOE_FAMILIES)
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"new_trick": 3}, "new_trick"),
        ({"expert_capacity": 1.25}, "expert_capacity"),
        ({"n_shared_experts": 1}, "n_shared_experts"),
        ({"num_experts": 9, "num_local_experts": 12}, "num_"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"num_experts_per_tok": 200}, "more experts than"),
        ({"num_key_value_heads": 5}, "do not divide"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
    ],
)
def test_refusals_of_mixtures(family: str, changes: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=named) as caught:
        read_moe(family, **changes)
    assert str(FILE) in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("mixtral", {"num_local_experts": "8"}, "num_local_experts"),
        ("mixtral", {"attention_bias": True}, "attention_bias"),
        ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("mixtral", {"router_jitter_noise": -0.1}, "router_jitter_noise"),
        ("qwen2_moe", {"num_local_experts": 60}, "num_local_experts"),  # no alias here: transformers does not read it
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size"),
        ("qwen2_moe", {"layer_types": ["full_attention"]}, "layer_types"),
        ("qwen2_moe", {"layer_types": ["sliding_attention"] * 4}, "no sliding_window in use"),
        ("qwen3_moe", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ("qwen3_moe", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("qwen3_moe", {"qkv_bias": True}, "qkv_bias"),
        ("qwen3_moe", {"use_qk_norm": False}, "use_qk_norm"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size"),
        ("qwen3_moe", {"mlp_only_layers": [0], "mlp_layer_types": ["sparse"] * 4}, "mlp_layer_types"),
        ("qwen3_moe", {"mlp_only_layers": [4]}, "mlp_only_layers"),
        ("qwen3_moe", {"mlp_only_layers": 2}, "mlp_only_layers"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("qwen3_moe", {"num_experts": 0}, "num_experts"),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob"),
        ("olmoe", {"clip_qkv": 0}, "clip_qkv"),
        ("olmoe", {"head_dim": 4}, "head_dim"),
        ("olmoe", {"hidden_size": 100}, "num_attention_heads"),
        ("olmoe", {"sliding_window": 4}, "sliding_window"),
        ("olmoe", {"moe_intermediate_size": 4}, "moe_intermediate_size"),
    ],
)
def test_refusals_of_a_family(family: str, changes: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=named):
        read_moe(family, **changes)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (replace(read_moe("olmoe"), num_heads=24, num_kv_heads=24), "24 query heads of 2, hidden size 96"),
        (replace(read_moe("olmoe"), layers=(LayerGroup((BlockKind(4, moe=True),), 4),)), "no window"),
        (
            replace(read_moe("mixtral"), layers=(LayerGroup((BlockKind(4, moe=True), BlockKind(moe=True)), 2),)),
            "2 kinds",
        ),
        (replace(read_moe("qwen3_moe"), layers=(LayerGroup((BlockKind(4), BlockKind(moe=True)), 2),)), "some blocks"),
        (replace(read_moe("qwen2_moe"), layers=(LayerGroup((BlockKind(4), BlockKind(5)), 2),)), "windows of"),
    ],
)
def test_decoders_that_no_config_can_say(config: ModelConfig, named: str):
    with pytest.raises(CheckpointError, match=named):
        config_to_hf(config, "float32")
