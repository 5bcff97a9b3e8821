"""Gemma 1, 2 and 3: released configs, defaults, refusals, and the language model inside a multimodal one.

Their numbers are in test_parity.py.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from distillcache.models.checkpoint import load_pretrained, read_config, save_pretrained
from distillcache.models.config import BlockKind, ModelConfig, RopeConfig
from distillcache.models.decoder import Decoder
from distillcache.models.describe import attention_norms
from distillcache.models.families import config_from_hf, config_to_hf
from distillcache.schemas.errors import CheckpointError
from tests.models.conftest import GOLDEN

FILE = Path("model/config.json")
SLIDING, FULL = "sliding_attention", "full_attention"
SIZES = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
}
# The config of Gemma 7B as released, sizes made small.
GEMMA = SIZES | {
    "model_type": "gemma",
    "architectures": ["GemmaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_activation": None,
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.38.0.dev0",
    "use_cache": True,
}
# The config of Gemma 2 9B as released, sizes made small.
GEMMA2 = SIZES | {
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "sliding_window_size": 4096,
    "torch_dtype": "float32",
    "transformers_version": "4.42.0.dev0",
    "use_cache": True,
}
# Of Gemma 3 1B, as first released.
GEMMA3_TEXT = {key: value for key, value in GEMMA2.items() if key not in ("hidden_act", "sliding_window_size")} | {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "max_position_embeddings": 32768,
    "num_hidden_layers": 7,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
}
# Of Gemma 3 4B: what the text config does not say is as in the smallest.
GEMMA3 = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 64,
        "intermediate_size": 40,
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}


def read(raw: dict[str, Any], **changes: Any) -> ModelConfig:
    return config_from_hf({key: value for key, value in (raw | changes).items() if value != "absent"}, FILE)


def local(window: int) -> BlockKind:
    return BlockKind(window, local_rope=True)


def test_gemma():
    """Its gelu is the tanh approximation, however a file says it; a later key, which says so, changes nothing."""
    found = read(GEMMA)
    kept = (*SIZES, "model_type", "num_key_value_heads")
    assert found == read(GEMMA, **dict.fromkeys(set(GEMMA) - set(kept), "absent"))
    assert found == read(GEMMA, hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh")
    assert found.kinds == (BlockKind(),) * 4
    assert (found.norms, found.norm_product, found.attention_scale) == ("pre", "offset", None)
    assert (found.embed_scale, found.embed_scale_rounded, found.activation) == (8.0, True, "gelu_tanh")
    assert (found.head_dim, found.tie_embeddings, found.qkv_bias, found.rope) == (256, True, False, RopeConfig())
    assert read(GEMMA, num_key_value_heads="absent", num_attention_heads=16).num_kv_heads == 16


def test_gemma2():
    found = read(GEMMA2)
    assert found == read(GEMMA2, **dict.fromkeys(set(GEMMA2) - set(SIZES) - {"model_type"}, "absent"))
    assert found.kinds == (BlockKind(4096), BlockKind()) * 2
    assert (found.attention_softcap, found.logits_softcap, found.attention_scale) == (50.0, 30.0, 1 / 16)
    assert (found.norms, found.norm_product) == ("both", "offset")
    assert (found.embed_scale, found.activation) == (8.0, "gelu_tanh")
    assert (found.tie_embeddings, found.qkv_bias, found.rope) == (True, False, RopeConfig())


def test_gemma3_text():
    found = read(GEMMA3_TEXT)
    assert found.kinds == (*[local(512)] * 5, BlockKind(), local(512))
    assert (found.rope, found.local_rope) == (RopeConfig(1e6), RopeConfig(1e4))
    assert (found.qk_norm, found.attention_softcap, found.logits_softcap) == ("head", None, None)
    new = {SLIDING: {"rope_theta": 10000.0, "rope_type": "default"}, FULL: {"rope_theta": 1e6, "rope_type": "default"}}
    old = dict.fromkeys(("rope_theta", "rope_local_base_freq", "rope_scaling"), "absent")
    types = [SLIDING] * 5 + [FULL, SLIDING]
    assert read(GEMMA3_TEXT, **old, rope_parameters=new, sliding_window_pattern="absent", layer_types=types) == found
    assert read(GEMMA3_TEXT, **old) == found  # the bases are those that are assumed
    assert read(GEMMA3_TEXT, sliding_window_pattern=2).kinds == (local(512), BlockKind()) * 3 + (local(512),)


def test_gemma3():
    found = read(GEMMA3)
    assert (found.family, found.vocab_size, found.num_heads, found.num_kv_heads) == ("gemma3", 262208, 8, 4)
    assert (found.head_dim, found.max_positions, found.tie_embeddings) == (256, 131072, True)
    assert found.rope == RopeConfig(1e6, "linear", 8.0)
    assert found.local_rope == RopeConfig(1e4)  # no scaling
    assert found.kinds == (*[local(1024)] * 5, BlockKind(), local(1024))
    assert not read(GEMMA3, tie_word_embeddings=False).tie_embeddings


@pytest.mark.parametrize(
    "config",
    [
        read(GEMMA),
        read(GEMMA, attention_bias=True, tie_word_embeddings=False, hidden_act="silu", num_key_value_heads=1),
        read(GEMMA2),
        read(GEMMA2, attn_logit_softcapping=None, attention_bias=True, tie_word_embeddings=False),
        read(GEMMA2, layer_types=[FULL] * 4, query_pre_attn_scalar=144),
        read(GEMMA3_TEXT, rope_scaling={"rope_type": "linear", "factor": 8.0}, final_logit_softcapping=30.0),
        read(GEMMA3_TEXT, layer_types=[FULL] * 7, hidden_activation="silu", query_pre_attn_scalar=168),
    ],
)
def test_round_trip_is_exact(config: ModelConfig):
    raw = config_to_hf(config, "float32")
    assert config_from_hf(raw, FILE) == config
    if config.family != "gemma":
        assert raw["sliding_window"]  # transformers makes that mask also where no block uses it


@pytest.mark.parametrize(
    ("raw", "changes", "named"),
    [
        (GEMMA, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA, {"hidden_activation": "gelu"}, "hidden_activation"),
        (GEMMA, {"sliding_window": 4096}, "sliding_window"),
        (GEMMA, {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar"),
        (GEMMA2, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA2, {"sliding_window_pattern": 6}, "sliding_window_pattern"),
        (GEMMA2, {"sliding_window": None, "layer_types": [SLIDING] * 4}, "sliding_window"),
        (GEMMA2, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        (GEMMA2, {"hidden_activation": "tanh"}, "hidden_activation"),
        (GEMMA2, {"final_logit_softcapping": -1.0}, "final_logit_softcapping"),
        (GEMMA2, {"mlp_bias": True}, "mlp_bias"),
        (GEMMA2, {"rope_local_base_freq": 1e4}, "rope_local_base_freq"),
        (GEMMA3_TEXT, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA3_TEXT, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (GEMMA3_TEXT, {"sliding_window_pattern": 0}, "sliding_window_pattern"),
        (GEMMA3_TEXT, {"rope_parameters": {"rope_type": "default"}}, "rope_parameters"),
        (GEMMA3_TEXT, {"rope_parameters": {"chunked_attention": {}}}, "chunked_attention"),
        (GEMMA3_TEXT, {"rope_local_base_freq": "10000"}, "rope_theta"),
        (GEMMA3, {"text_config": None}, "text_config"),
        (GEMMA3, {"hidden_size": 64}, "hidden_size"),
        (GEMMA3, {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, "tie_word_embeddings"),
        (GEMMA3, {"text_config": {"model_type": "gemma2"}}, "text_config"),
        (GEMMA3, {"audio_config": {}}, "audio_config"),
    ],
)
def test_refusals_name_the_key(raw: dict[str, Any], changes: dict[str, Any], named: str):
    with pytest.raises(CheckpointError) as caught:
        read(raw, **changes)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "changes"),
    [
        (GEMMA, {"embed_scale": 7.0}),
        (GEMMA, {"activation": "gelu"}),
        (GEMMA, {"layers": read(GEMMA2, layer_types=[SLIDING] * 4).layers}),
        (GEMMA2, {"embed_scale": 7.0}),
        (GEMMA2, {"attention_scale": 0.3}),
        (GEMMA2, {"num_heads": 5}),
        (GEMMA2, {"qkv_bias": True}),
        (GEMMA3_TEXT, {"local_rope": None}),
        (GEMMA3_TEXT, {"layers": read(GEMMA2).layers}),
    ],
)
def test_what_the_config_cannot_say_is_not_exported(raw: dict[str, Any], changes: dict[str, Any]):
    with pytest.raises(CheckpointError, match="no config for this decoder"):
        config_to_hf(replace(read(raw), **changes), "float32")


def test_embeddings_are_scaled_in_their_own_dtype():
    """The root of 42 is 6.4807; the bfloat16 next to it is 6.46875, and transformers multiplies by that."""
    decoder = load_pretrained(GOLDEN / "gemma2")
    tokens = jnp.arange(7)[None]
    rounded = np.asarray(decoder.embed[...][tokens], np.float32) * np.float32(6.46875)
    np.testing.assert_array_equal(decoder.embed_tokens(tokens), jnp.asarray(rounded, jnp.bfloat16))


def test_the_norms_of_a_cache_are_whole_factors():
    decoder = load_pretrained(GOLDEN / "gemma3_text", jnp.float32)
    stored = load_file(GOLDEN / "gemma3_text" / "model.safetensors")["model.layers.1.input_layernorm.weight"]
    np.testing.assert_array_equal(attention_norms(decoder)["attention_norm"][1], stored.astype(np.float32) + 1)


def parameters(decoder: Decoder) -> dict[Any, np.ndarray]:
    return {path: np.asarray(value.get_value()) for path, value in nnx.to_flat_state(nnx.state(decoder))}


@pytest.mark.parametrize("spelling", ["language_model.", "model.language_model."])
def test_the_language_model_inside_a_multimodal_one(spelling: str, tmp_path: Path):
    """In the names of both generations of files, with an untied head."""
    raw = json.loads((GOLDEN / "gemma2_uncapped" / "config.json").read_text())
    tensors = load_file(GOLDEN / "gemma2_uncapped" / "model.safetensors")
    norms = {f"model.layers.{n}.self_attn.{q}_norm.weight": np.zeros(8, np.float32) for n in (0, 1) for q in "qk"}
    (tmp_path / "alone").mkdir()
    raw |= {"model_type": "gemma3_text", "rope_parameters": None}
    (tmp_path / "alone" / "config.json").write_text(json.dumps(raw))
    save_file(tensors | norms, tmp_path / "alone" / "model.safetensors")
    old = spelling == "language_model."
    inside = {
        f"{spelling}{name}" if old else name.replace("model.", spelling): tensor
        for name, tensor in (tensors | norms).items()
    }
    foreign = "vision_tower.a" if old else "model.multi_modal_projector.a"
    save_file(inside | {foreign: np.ones((3, 2))}, tmp_path / "model.safetensors")
    outer = {"model_type": "gemma3", "text_config": raw, "tie_word_embeddings": False, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    found, text = load_pretrained(tmp_path), load_pretrained(tmp_path / "alone")
    assert found.config == replace(text.config, family="gemma3")
    jax.tree.map(np.testing.assert_array_equal, parameters(found), parameters(text))
    save_pretrained(found, tmp_path / "export")
    assert read_config(tmp_path / "export") == text.config
    assert json.loads((tmp_path / "export" / "config.json").read_text())["architectures"] == ["Gemma3ForCausalLM"]


def test_an_unknown_tensor_is_refused(tmp_path: Path):
    tensors = load_file(GOLDEN / "gemma3" / "model.safetensors")
    (tmp_path / "config.json").write_bytes((GOLDEN / "gemma3" / "config.json").read_bytes())
    save_file(tensors | {"audio_tower.a": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)unknown.*audio_tower\.a"):
        load_pretrained(tmp_path)
