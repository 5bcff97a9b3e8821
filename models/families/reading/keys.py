"""Keys of a `config.json` that never make it unusable: bookkeeping and redundant keys.

Source: `PretrainedConfig` and `GenerationConfig` of HF transformers, versions 4.0 to 5.24: before version 5,
`save_pretrained` left every generation setting that was not the default in config.json.
"""

from collections.abc import Callable, Mapping
from typing import Any

from distillcache.models.config import ModelConfig

# `PretrainedConfig`'s own, initialisation, dropout and auxiliary losses (training only), `pretraining_tp` (slices the
# same matrix products), labels of heads that a language model lacks, and which kernels compute it.
BOOKKEEPING = """_attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _experts_implementation _flash_attn_2_enabled _name_or_path _pre_quantization_dtype architectures
    attention_dropout attn_dropout attn_implementation attn_pdrop auto_map aux_loss_alpha base_model_ep_plan
    base_model_pp_plan base_model_tp_plan bos_token bos_token_id chunk_size_feed_forward classifier_dropout
    decoder_start_token_id distillcache_source_dtype dtype embd_pdrop embedding_dropout eos_token eos_token_id
    experts_implementation finetuning_task flash_attention fsdp generation_config gradient_checkpointing
    hidden_dropout hidden_dropout_prob id2label initializer_range is_llama_config keys_to_ignore_at_inference
    label2id language loss_type max_batch_size max_sequence_length model_max_length model_name model_type
    name_or_path neftune_noise_alpha num_labels output_attentions output_dropout output_hidden_states output_past
    output_router_logits pad_token pad_token_id prefix pretraining_tp problem_type producer resid_pdrop
    return_dict router_aux_loss_coef router_z_loss_coef sep_token_id seq_length task_specific_params
    tf_legacy_loss tokenizer_class tokenizer_name torch_compile torch_dtype torchscript transformers.js_config
    transformers_version transformers_weights unk_token_id use_bfloat16 use_cache use_flash_attention
    use_flash_attention_2 use_flash_attn use_return_dict xla_device"""
GENERATION = """assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight assistant_lookbehind
    bad_words_ids begin_suppress_tokens cache_config cache_implementation compile_config constraints
    continuous_batching_config disable_compile diversity_penalty do_sample dola_layers early_stopping
    encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty
    force_words_ids forced_bos_token_id forced_decoder_ids forced_eos_token_id guidance_scale is_assistant
    length_penalty low_memory max_cache_len max_length max_matching_ngram_size max_new_tokens max_time min_length
    min_new_tokens min_p no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups
    num_beams num_return_sequences output_logits output_scores penalty_alpha prefill_chunk_size
    prompt_lookup_num_tokens remove_invalid_values renormalize_logits repetition_penalty return_dict_in_generate
    return_legacy_cache sequence_bias speculation_type stop_strings suppress_tokens target_lookbehind temperature
    token_healing top_h top_k top_p typical_p use_mambapy use_mtp watermarking_config"""
HARMLESS_KEYS = frozenset(f"{BOOKKEEPING} {GENERATION}".split())
HARMLESS_PREFIXES = ("unsloth_", "_unsloth_")  # who made the mirror, and with what

# Keys that would change the forward pass, with the values under which they do not; null is one of them for every key.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "is_causal": (True,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "layer_types": (),
    "partial_rotary_factor": (1,),
    "pruned_heads": ({},),
    "quantization_config": (),
    "rope_interleaved": (False,),
    "tie_encoder_decoder": (False,),
    "use_bidirectional_attention": (False,),
}


LINEAR = "linear_attention"  # of recurrent blocks, in `layer_types`


def _types(config: ModelConfig) -> list[str]:
    """`layer_types` as transformers has it."""
    return [
        LINEAR
        if kind.mixer == "gated_delta"
        else "sliding_attention"
        if kind.window is not None
        else "full_attention"
        if kind.chunk is None
        else "chunked_attention"
        for kind in config.kinds
    ]


def _window(config: ModelConfig) -> int | None:
    """The window of all blocks; -1, which no config says, where they differ."""
    windows = {kind.window for kind in config.kinds}
    return windows.pop() if len(windows) == 1 else -1


def _shared(config: ModelConfig) -> int:
    return config.moe.shared_size if config.moe is not None else 0


# Keys that not every family reads, and what the decoder that was read says of them: a family whose code has no such
# switch may still state what is so.
STATED: Mapping[str, Callable[[ModelConfig], Any]] = {
    "attention_bias": lambda config: config.qkv_bias if config.qkv_bias == config.output_bias else None,
    "attention_out_bias": lambda config: config.output_bias,
    "head_dim": lambda config: config.head_dim,
    "layer_types": _types,
    "lm_head_bias": lambda config: False,
    "mlp_bias": lambda config: config.mlp_bias,
    "mlp_layer_types": lambda config: ["sparse" if kind.moe else "dense" for kind in config.kinds],
    "num_shared_experts": lambda config: _shared(config) and None,
    "n_shared_experts": lambda config: _shared(config) and None,
    "o_bias": lambda config: config.output_bias,
    "qk_layernorm": lambda config: config.has_qk_norms,
    "qk_norm": lambda config: config.has_qk_norms,
    "qkv_bias": lambda config: config.qkv_bias,
    "shared_expert_intermediate_size": _shared,
    "sliding_window": _window,
    "use_bias": lambda config: config.qkv_bias or config.output_bias or config.mlp_bias,
    "use_qk_norm": lambda config: config.has_qk_norms,
    "use_qkv_bias": lambda config: config.qkv_bias,
    "use_sliding_window": lambda config: any(kind.window is not None for kind in config.kinds),
}


def is_harmless(key: str) -> bool:
    """Tell whether no model's forward pass depends on this key."""
    return key in HARMLESS_KEYS or key.startswith(HARMLESS_PREFIXES)
