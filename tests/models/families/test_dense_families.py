"""config.json of Qwen 2 and 3, SmolLM3, OLMo 2 and 3, Granite and Phi-3 in and out: published spellings, refusals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distillcache.models.config import BlockKind, LayerGroup, ModelConfig, RopeConfig
from distillcache.models.families import config_from_hf, config_to_hf
from distillcache.schemas.errors import CheckpointError

FILE = Path("model/config.json")
# 32 query heads: all families' defaults of num_key_value_heads divide them.
SIZES = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_attention_heads": 32,
}
FAMILIES = ("qwen2", "qwen3", "smollm3", "olmo2", "olmo3", "granite", "phi3")
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "attention_factor": 1.2}
FULL, SLIDING = "full_attention", "sliding_attention"


def read(family: str, **changes: Any) -> ModelConfig:
    return config_from_hf(SIZES | {"model_type": family} | changes, FILE)


# What transformers 5.23 assumes: key/value heads, head width, longest position, epsilon, base of the rotation, ties.
DEFAULTS = {
    "qwen2": (32, 2, 32768, 1e-6, 1e4, False),
    "qwen3": (32, 128, 32768, 1e-6, 1e4, False),
    "smollm3": (4, 2, 32768, 1e-6, 2e6, True),
    "olmo2": (32, 2, 2048, 1e-5, 1e4, False),
    "olmo3": (32, 2, 2048, 1e-5, 5e5, False),
    "granite": (32, 2, 2048, 1e-6, 1e4, False),
    "phi3": (32, 2, 4096, 1e-5, 1e4, False),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults(family: str):
    config = read(family)
    found = (config.num_kv_heads, config.head_dim, config.max_positions, config.norm_eps, config.rope.theta)
    assert (*found, config.tie_embeddings) == DEFAULTS[family]
    olmo = family in ("olmo2", "olmo3")
    assert config.qk_norm == ("full" if olmo else "head" if family == "qwen3" else "none")
    assert config.norms == ("post" if olmo else "pre")
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (family == "qwen2", False, False)
    assert config.attention_scale == (1.0 if family == "granite" else None)
    assert {kind.window for kind in config.kinds} == ({None, 4096} if family == "olmo3" else {None})


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, {}) for family in FAMILIES),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 3}),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 3, "head_dim": 6}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 9, "no_rope_layer_interval": 2}),
        ("olmo2", {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("olmo3", {"rope_theta": 5e5, "rope_scaling": YARN, "sliding_window": 9}),
        ("granite", {"residual_multiplier": 0.22, "attention_multiplier": 0.0078125}),
        ("phi3", {"rope_scaling": {"type": "yarn", "short_factor": [1.5], "long_factor": [2.0]}}),
    ],
)
def test_defaults_are_those_of_the_installed_transformers(family: str, changes: dict[str, Any]):
    """The shortest config.json means what transformers writes out when it has read it."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `parity`)")
    short = SIZES | {"model_type": family} | changes
    written = transformers.AutoConfig.for_model(**short).to_dict()
    assert config_from_hf(written, FILE) == config_from_hf(short, FILE)


LONG = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 7.0]}
PHI4 = {"head_dim": 8, "hidden_size": 256, "partial_rotary_factor": 0.5, "rope_scaling": LONG | {"type": "longrope"}}
ROUND_TRIPS = [
    *(read(family) for family in FAMILIES),
    read("qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=2, tie_word_embeddings=True),
    read("qwen2", rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}),
    read("qwen2", head_dim=6, layer_types=[FULL] * 5),
    read("qwen3", use_sliding_window=True, layer_types=[FULL, SLIDING] * 2 + [FULL], attention_bias=True),
    read("smollm3", use_sliding_window=True, sliding_window=7, attention_bias=True, mlp_bias=True),
    read("smollm3", no_rope_layers=[0, 0, 1, 1, 0, 1, 1], tie_word_embeddings=False),
    read("olmo2", num_key_value_heads=8, attention_bias=True, hidden_act="gelu"),
    read("olmo3", layer_types=[SLIDING] * 4 + [FULL], sliding_window=7, rope_scaling=YARN, rope_theta=1e6),
    read("olmo3", layer_types=[FULL] * 5, sliding_window=2048),
    read("olmo3", rope_parameters={FULL: YARN | {"rope_theta": 9.0}, SLIDING: {"rope_theta": 7.0}}),
    read("granite", embedding_multiplier=12, residual_multiplier=0.22, attention_multiplier=0.1, logits_scaling=8.0),
    read("granite", attention_bias=True, mlp_bias=True, head_dim=4),
    read("phi3", sliding_window=2047, tie_word_embeddings=True, head_dim=10),
    read("phi3", **PHI4, max_position_embeddings=131072, sliding_window=262144),
    read("phi3", **PHI4 | {"rope_scaling": LONG | {"type": "su", "factor": 3.0, "attention_factor": 1.5}}),
]


@pytest.mark.parametrize("old", ["su", "yarn"])
def test_phi3s_old_names_may_stay_beside_the_new_one(old: str):
    """As transformers 5 writes out a file of before 4.43."""
    expected = read("phi3", **PHI4)
    both = LONG | {"rope_type": "longrope", "type": old}
    assert read("phi3", **PHI4 | {"rope_scaling": both}) == expected
    assert read("phi3", **PHI4 | {"rope_scaling": LONG | {"type": old}, "rope_parameters": both}) == expected
    with pytest.raises(CheckpointError, match="the same as rope_type beside it"):
        read("phi3", **PHI4 | {"rope_scaling": LONG | {"rope_type": "longrope", "type": "linear"}})


@pytest.mark.parametrize("config", ROUND_TRIPS)
def test_round_trip_is_exact(config: ModelConfig):
    raw = config_to_hf(config, "float32")
    assert raw["model_type"] == config.family
    assert config_from_hf(raw, FILE) == config


def test_windows_and_blocks_without_positions():
    def windows(family: str, **changes: Any) -> list[int | None]:
        return [kind.window for kind in read(family, **changes).kinds]

    for family in ("qwen2", "qwen3"):
        assert windows(family, use_sliding_window=True, max_window_layers=3) == [None] * 3 + [4096] * 2
        assert windows(family, sliding_window=7, max_window_layers=0) == [None] * 5  # not in use
    assert [kind.rotary for kind in read("smollm3").kinds] == [True, True, True, False, True]
    sliding = read("smollm3", use_sliding_window=True, sliding_window=3, no_rope_layers=[0, 1, 1, 0, 1])
    assert sliding.kinds[0] == sliding.kinds[3] == BlockKind(3, rotary=False)
    assert sliding.kinds[1] == BlockKind()
    assert windows("phi3", sliding_window=9) == [9] * 5
    olmo = read("olmo3", rope_scaling=YARN)
    assert [kind.window for kind in olmo.kinds] == [4096, 4096, 4096, None, 4096]
    assert [kind.local_rope for kind in olmo.kinds] == [True, True, True, False, True]
    assert (olmo.rope.kind, olmo.local_rope) == ("yarn", RopeConfig(5e5))


def test_longrope_as_it_is_published():
    """Phi-4-mini: the factor is that of the two lengths, and three keys are all that transformers 4 allows."""
    config = read("phi3", **PHI4, max_position_embeddings=131072)
    expected = RopeConfig(
        kind="longrope", factor=32.0, original_max_positions=4096, fraction=0.5, short_factor=(1.0, 1.5),
        long_factor=(2.0, 7.0),
    )  # fmt: skip
    assert config.rope == expected
    raw = config_to_hf(config, "bfloat16")
    assert raw["rope_scaling"] == LONG | {"type": "longrope"}
    assert (raw["original_max_position_embeddings"], raw["partial_rotary_factor"]) == (4096, 0.5)
    harmless = {"embd_pdrop": 0.0, "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False}
    assert read("phi3", **PHI4, max_position_embeddings=131072, **harmless) == config


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"new_trick": 3}, "new_trick"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_act": "tanh"}, "hidden_act"),
        ({"num_key_value_heads": 5}, "do not divide"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_type|rope_scaling"),
    ],
)
def test_refusals_of_every_family(family: str, changes: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=named) as caught:
        read(family, **changes)
    assert str(FILE) in str(caught.value)


@pytest.mark.parametrize("stated", [False, True, None])
def test_the_bias_of_qwen2_is_no_setting(stated: bool | None):
    """transformers' code does not read the key: the biases are there whatever it says."""
    assert read("qwen2", attention_bias=stated) == read("qwen2")


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("qwen2", {"layer_types": [SLIDING] * 5}, "no sliding_window in use"),
        ("qwen2", {"layer_types": [FULL] * 4}, "layer_types"),
        ("qwen2", {"use_sliding_window": 1}, "use_sliding_window"),
        ("qwen2", {"use_mrope": True}, "use_mrope"),
        ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias"),
        ("qwen3", {"head_dim": None}, "head_dim"),
        ("qwen3", {"max_window_layers": "3"}, "max_window_layers"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("smollm3", {"no_rope_layers": [2] * 5}, "no_rope_layers"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval"),
        ("smollm3", {"layer_types": [SLIDING] * 5, "sliding_window": 4}, "no sliding_window in use"),
        ("olmo2", {"sliding_window": 4}, "sliding_window"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv"),
        ("olmo3", {"sliding_window": None}, "sliding_window"),
        ("olmo3", {"rope_parameters": {"chunked_attention": {}}}, "chunked_attention"),
        ("granite", {"logits_scaling": 0}, "logits_scaling"),
        ("granite", {"residual_multiplier": "0.2"}, "residual_multiplier"),
        ("granite", {"num_local_experts": 8}, "num_local_experts"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "default or longrope"),
        ("phi3", {"rope_scaling": LONG | {"type": "longrope"}}, "2 ?"),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "long_factor"),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": ["1"], "long_factor": [1]}}, "short_factor"),
        ("phi3", {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0],
                                   "original_max_position_embeddings": 9}}, "4096, as beside it"),
        ("phi3", {"full_attn_mod": 2}, "full_attn_mod"),
        ("phi3", {"attention_bias": True}, "attention_bias"),
        ("phi3", {"partial_rotary_factor": 0.3}, "even head width"),
    ],
)  # fmt: skip
def test_refusals_of_a_family(family: str, changes: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=named):
        read(family, **changes)


def test_a_cut_phi_that_its_config_cannot_say_is_written_as_a_mistral():
    whole = read("phi3", rope_scaling=LONG | {"type": "longrope"}, hidden_size=128, sliding_window=9)
    assert config_to_hf(whole, "float32")["model_type"] == "phi3"
    cut = replace(whole, num_heads=16, num_kv_heads=16)
    raw = config_to_hf(cut, "float32")
    assert raw["model_type"] == "mistral"
    assert config_from_hf(raw, FILE) == replace(cut, family="mistral")


def with_kinds(family: str, *kinds: BlockKind) -> ModelConfig:
    return replace(read(family), layers=(LayerGroup(kinds, 1),))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (with_kinds("qwen2", BlockKind(4), BlockKind(5)), "windows of"),
        (with_kinds("qwen2", BlockKind(rotary=False)), "rotary=False"),
        (with_kinds("qwen3", BlockKind(moe=True)), "moe=True"),
        (replace(read("qwen2"), qkv_bias=False), "without the latter"),
        (replace(read("qwen2"), output_bias=True), "without the latter"),
        (replace(read("qwen3"), mlp_bias=True), "biases of the MLP"),
        (with_kinds("smollm3", BlockKind(chunk=4)), "chunk=4"),
        (replace(read("smollm3"), qkv_bias=True), "all or none"),
        (with_kinds("olmo2", BlockKind(4)), "window=4"),
        (with_kinds("olmo3", BlockKind(4), BlockKind()), "local rotation"),
        (with_kinds("granite", BlockKind(), BlockKind(4)), "2 kinds"),
        (with_kinds("phi3", BlockKind(chunk=4)), "chunk=4"),
        (replace(read("phi3"), qkv_bias=True), "biases"),
        (replace(read("phi3"), rope=RopeConfig(kind="linear", factor=2.0)), "linear"),
        (replace(read("phi3", **PHI4), num_heads=16, num_kv_heads=16), "keep all query heads"),
    ],
)
def test_decoders_that_no_config_can_say(config: ModelConfig, named: str):
    with pytest.raises(CheckpointError, match="no config for this decoder") as caught:
        config_to_hf(config, "float32")
    assert named in str(caught.value)
