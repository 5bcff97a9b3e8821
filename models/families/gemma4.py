"""Gemma 4, its text model: blocks that see all have wider heads than those with a window, and values without weights.

As in Gemma 3 norms lie before and after each sublayer, and windowed blocks rotate by a base of their own; norms
multiply by their weights as they are. Values are normed by head, scores are not scaled. Blocks that see all rotate the
first part of a wider head, at the frequencies of its whole width; in the larger models their values are their keys
before norm and rotation. A block's stream is multiplied by a number when it leaves. Experts work beside a dense MLP,
each with norms of their own, and the router has another.

In the small models (E2B, E4B) the last blocks take over keys and values of the last block of their kind that has some,
may have MLPs twice as wide, and every block has an input of its own, made of the token and of its embedding.

`gemma4` is the model with eyes and ears, of which the text model alone is read; it is exported as `gemma4_text`.

Source: HF transformers `configuration_gemma4`, `modeling_gemma4`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from distillcache.models.config import BlockInputs, BlockKind, ModelConfig, MoeConfig, RopeConfig, WideHeads
from distillcache.models.families.gemma import GLOBAL_THETA, LOCAL_THETA
from distillcache.models.families.reading.family import (
    Family,
    attention_tensors,
    common_fields,
    dense_tensors,
    fused_tensors,
    not_exportable,
)
from distillcache.models.families.reading.kinds import FULL, SLIDING, only_window
from distillcache.models.families.reading.multimodal import multimodal_layout, vision_language_family
from distillcache.models.families.reading.values import (
    EXPORTED_ACTIVATIONS,
    PARTIAL,
    Values,
    bad_value,
    rope_from_hf,
    rope_to_hf,
)
from distillcache.models.files.tensors import BlockTensor, Layout

PATTERN = 6  # of so many blocks the last sees all
PROPORTIONAL = "proportional"
ASSUMED = {
    SLIDING: {"rope_type": "default", "rope_theta": LOCAL_THETA},
    FULL: {"rope_type": PROPORTIONAL, PARTIAL: 0.25, "rope_theta": GLOBAL_THETA},
}
EMBEDDINGS = "hidden_size_per_layer_input"
INPUTS = [
    BlockTensor("per_layer_input_gate.weight", "mlp/block_gate", 1),
    BlockTensor("per_layer_projection.weight", "mlp/block_up", 1),
    BlockTensor("post_per_layer_input_norm.weight", "mlp/block_post_norm"),
]
OUTER = (
    ("model.embed_tokens_per_layer.weight", "block_embed", None),
    ("model.per_layer_model_projection.weight", "block_projection", 1),
    ("model.per_layer_projection_norm.weight", "block_norm", None),
)


def _read(values: Values) -> ModelConfig:
    types, moe = _types(values), _moe(values)
    window, own = values.size("sliding_window"), _blocks_with_keys(values, types)
    kinds = [
        BlockKind(window, local_rope=True, moe=moe is not None, taken=block >= own)
        if kind == SLIDING
        else BlockKind(wide=True, moe=moe is not None, taken=block >= own)
        for block, kind in enumerate(types)
    ]
    width = values.count(EMBEDDINGS)
    everywhere, local = _ropes(values)
    bias, hidden = values.flag("attention_bias"), values.size("hidden_size")
    return ModelConfig(
        **common_fields(values, kinds, activation="hidden_activation"),
        rope=everywhere,
        local_rope=local,
        wide=_wide(values, types),
        qk_norm="head",
        value_norm=True,
        attention_scale=1.0,
        qkv_bias=bias,
        output_bias=bias,
        norms="both",
        embed_scale=hidden**0.5,
        embed_scale_rounded=True,
        block_scale=True,
        block_inputs=BlockInputs(values.size("vocab_size_per_layer_input"), width) if width else None,
        wider_taken=values.flag("use_double_wide_mlp") and own < len(types),
        logits_softcap=values.number_or_none("final_logit_softcapping"),
        moe=moe,
        family="gemma4_text",
    )


def _types(values: Values) -> list[str]:
    """The kind of every block. The last one sees all, whatever a config says, as in transformers."""
    depth = values.size("num_hidden_layers")
    types = values.per_block("layer_types", (SLIDING, FULL), depth)
    found = types or [SLIDING if (block + 1) % PATTERN else FULL for block in range(depth)]
    return [*found[:-1], FULL]


def _blocks_with_keys(values: Values, types: list[str]) -> int:
    """The number of blocks, the first ones, that have keys and values of their own: of each kind one at least."""
    own = len(types) - values.count("num_kv_shared_layers")
    if own < 1 or set(types[:own]) != set(types):
        raise values.bad("num_kv_shared_layers", "fewer, so that a block of each kind has keys and values of its own")
    return own


def _wide(values: Values, types: list[str]) -> WideHeads:
    """The heads of blocks that see all: by keys of their own, or as transformers 5 saves it, by block."""
    heads, width = values.size("num_key_value_heads"), values.size("global_head_dim")
    same = values.flag("attention_k_eq_v")
    if same:
        heads = values.size_or_none("num_global_key_value_heads") or heads
    if (given := values["per_layer_config"]) is not None:
        found = _of_blocks(values, given, types)
        heads, width = found.get("num_key_value_heads", values.size("num_key_value_heads")), found["head_dim"]
    return WideHeads(heads, width, same)


def _of_blocks(values: Values, given: Any, types: list[str]) -> dict[str, int]:
    """Sizes that `per_layer_config` gives all blocks that see all, where they are the same and it gives others nothing
    but what the config does. Numbers of blocks are words, with zeros before them where others have more digits."""
    expected = "sizes of heads, the same for all blocks that see all"
    if not isinstance(given, Mapping) or not all(
        str(block).isdecimal() and isinstance(entry, Mapping) for block, entry in given.items()
    ):
        raise values.bad("per_layer_config", expected)
    plain = {key: values.size(key) for key in ("head_dim", "num_key_value_heads")}
    by_block = {int(block): {**plain, **entry} for block, entry in given.items()}
    found = {block: by_block.get(block, plain) for block in range(len(types))}
    wide = [entry for block, entry in found.items() if types[block] == FULL]
    narrow = [entry for block, entry in found.items() if types[block] == SLIDING]
    whole = all(isinstance(size, int) and not isinstance(size, bool) and 0 < size < 2**16 for size in wide[0].values())
    if by_block.keys() - found.keys() or wide[0].keys() != plain.keys() or not whole:
        raise values.bad("per_layer_config", expected)
    if any(entry != wide[0] for entry in wide) or any(entry != plain for entry in narrow):
        raise values.bad("per_layer_config", expected)
    return wide[0]


def _ropes(values: Values) -> tuple[RopeConfig, RopeConfig]:
    given = values["rope_parameters"] or ASSUMED
    if not isinstance(given, Mapping) or given.keys() != ASSUMED.keys():
        raise values.bad("rope_parameters", f"an object with an object for each of {FULL} and {SLIDING}")
    longest = values.size("max_position_embeddings")
    everywhere, local = (
        rope_from_hf({"rope_parameters": given[kind]}, longest, values.file, partial=True) for kind in (FULL, SLIDING)
    )
    for kind, rope in ((FULL, everywhere), (SLIDING, local)):
        if rope.fraction != 1 and rope.kind != PROPORTIONAL:
            raise bad_value(values.file, f"rope_parameters.{kind}.{PARTIAL}", rope.fraction, f"1, or {PROPORTIONAL}")
    return everywhere, local


def _moe(values: Values) -> MoeConfig | None:
    if not values.flag("enable_moe_block"):
        return None
    return MoeConfig(
        num_experts=values.size("num_experts"),
        top_k=values.size("top_k_experts"),
        expert_size=values.size("moe_intermediate_size"),
        shared_size=values.size("intermediate_size"),
        apart=True,
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    moe, wide, local = config.moe, config.wide, config.local_rope
    own = [replace(kind, taken=False) for kind in config.kinds]
    kinds = [
        BlockKind(wide=True, moe=kind.moe) if kind.wide else BlockKind(kind.window, local_rope=True, moe=kind.moe)
        for kind in own
    ]
    taken = [kind.taken for kind in config.kinds]
    found = {
        "blocks": (own, kinds),
        "blocks that take keys over": (taken, sorted(taken)),
        "last block": (config.kinds[-1].wide, True),
        "experts": (len({kind.moe for kind in kinds}), 1),
        "heads": (wide is None or local is None, False),
        "embed_scale": (config.embed_scale, config.hidden_size**0.5),
        "biases": ((config.qkv_bias, config.mlp_bias), (config.output_bias, False)),
        "dense MLP beside experts": (moe.shared_size if moe else config.intermediate_size, config.intermediate_size),
    }
    for name, (value, meant) in found.items():
        if value != meant:
            raise not_exportable(f"{name} {value}", str(meant), "export a decoder that a Gemma 4's config can say")
    if wide is None or local is None:
        raise ValueError("checked above")
    more = {"num_global_key_value_heads": wide.num_kv_heads} if wide.shared_values else {}
    if not wide.shared_values and wide.num_kv_heads != config.num_kv_heads:
        raise not_exportable("another number of KV heads in some blocks", "one", "use values that are keys")
    return {
        "hidden_activation": EXPORTED_ACTIVATIONS[config.activation],
        "layer_types": [FULL if kind.wide else SLIDING for kind in kinds],
        "sliding_window": only_window(kinds) or config.max_positions,
        "rope_parameters": {FULL: rope_to_hf(config.rope), SLIDING: rope_to_hf(local)},
        "attention_bias": config.qkv_bias,
        "global_head_dim": wide.head_dim,
        "attention_k_eq_v": wide.shared_values,
        **more,
        "final_logit_softcapping": config.logits_softcap,
        EMBEDDINGS: config.block_inputs.width if config.block_inputs else 0,
        "vocab_size_per_layer_input": config.block_inputs.vocab_size if config.block_inputs else config.vocab_size,
        "num_kv_shared_layers": sum(taken),
        "use_double_wide_mlp": config.wider_taken,
        "enable_moe_block": moe is not None,
        "num_experts": moe.num_experts if moe else None,
        "top_k_experts": moe.top_k if moe else None,
        "moe_intermediate_size": moe.expert_size if moe else None,
    }


def _layout(config: ModelConfig) -> Layout:
    norms = [
        BlockTensor("input_layernorm.weight", "attention/norm"),
        BlockTensor("post_attention_layernorm.weight", "attention/post_norm"),
        BlockTensor("pre_feedforward_layernorm.weight", "mlp/norm"),
        BlockTensor("post_feedforward_layernorm.weight", "mlp/post_norm"),
        BlockTensor("layer_scalar", "mlp/block_scale"),
    ]
    inputs = config.block_inputs is not None
    return Layout(
        lambda kind: [
            *norms,
            *_attention(config, kind),
            *(_experts(config) if kind.moe else dense_tensors(config)),
            *(INPUTS if inputs else []),
        ],
        # Files have keys and values of blocks that take them over, too, and no version reads them.
        foreign=tuple(
            f"model.layers.{block}.self_attn.{name}."
            for block, kind in enumerate(config.kinds)
            if kind.taken
            for name in ("k_proj", "v_proj", "k_norm", "v_norm")
        ),
        more=OUTER if inputs else (),
    )


def _attention(config: ModelConfig, kind: BlockKind) -> list[BlockTensor]:
    """List those of attention: where values are keys, none of values; where both are taken over, of neither."""
    missing = "kv" if kind.taken else "v" if config.values_are_keys(kind) else ""
    names = {f"attention/{name}{end}" for name in missing for end in ("", "_bias", "_norm")}
    return [tensor for tensor in attention_tensors(config) if tensor.path not in names]


def _experts(config: ModelConfig) -> list[BlockTensor]:
    """Beside the dense MLP, which is the shared expert here."""
    return [
        *(BlockTensor(f"mlp.{name}_proj.weight", f"mlp/shared_{name}", 1) for name in ("gate", "up", "down")),
        BlockTensor("router.proj.weight", "mlp/router", 1),
        BlockTensor("router.scale", "mlp/router_norm"),
        BlockTensor("router.per_expert_scale", "mlp/expert_scale"),
        *fused_tensors("experts.gate_up_proj", "experts.down_proj", config.moe_config.expert_size),
        BlockTensor("post_feedforward_layernorm_1.weight", "mlp/shared_post_norm"),
        BlockTensor("pre_feedforward_layernorm_2.weight", "mlp/expert_norm"),
        BlockTensor("post_feedforward_layernorm_2.weight", "mlp/expert_post_norm"),
    ]


GEMMA4_TEXT = Family(
    name="gemma4_text",
    architecture="Gemma4ForCausalLM",
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "max_position_embeddings": 131_072,
        "attention_bias": False,
        "sliding_window": 512,
        "layer_types": None,
        "final_logit_softcapping": None,
        "global_head_dim": 512,
        "num_global_key_value_heads": None,
        "attention_k_eq_v": False,
        "per_layer_config": None,
        EMBEDDINGS: 256,
        "vocab_size_per_layer_input": 262_144,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "enable_moe_block": False,
        "num_experts": None,
        "top_k_experts": None,
        "moe_intermediate_size": None,
    },
    read=_read,
    write=_write,
    layout=_layout,
    harmless=frozenset({"hidden_act", "expert_intermediate_size"}),  # transformers reads `hidden_activation` alone
    # Text sees what is before it, whatever pictures do.
    neutral={"use_bidirectional_attention": ("vision", False)},
    unwritten=frozenset({"rope_scaling", "rope_theta"}),  # they would take the place of `rope_parameters`
)
GEMMA4 = vision_language_family(
    "gemma4",
    "Gemma4ForConditionalGeneration",
    GEMMA4_TEXT,
    layout=lambda config: _without_ears(multimodal_layout(_layout(config))),
    harmless=frozenset(
        """audio_config audio_token_id boa_token_id boi_token_id eoa_token_id eoa_token_index eoi_token_id
        image_token_id video_token_id vision_config vision_soft_tokens_per_image""".split()  # noqa: SIM905 - as in keys.py
    ),
)


def _without_ears(layout: Layout) -> Layout:
    ears = tuple(f"model.{part}." for part in ("audio_tower", "embed_audio", "embed_vision"))
    return replace(layout, foreign=(*layout.foreign, *ears))
