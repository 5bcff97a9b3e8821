"""Gemma 4's text model: released configs, what transformers saves of them, defaults and refusals.

Its numbers are in test_parity.py.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from distillcache.models.checkpoint import load_pretrained
from distillcache.models.config import BlockInputs, BlockKind, ModelConfig, MoeConfig, RopeConfig, WideHeads
from distillcache.models.families import config_from_hf, config_to_hf
from distillcache.models.layers.rope import rope_tables
from distillcache.models.surgery import apply_surgery
from distillcache.schemas.config.student import SurgeryOp
from distillcache.schemas.errors import CheckpointError, ConfigError
from distillcache.trainer.step.stack import StudentStack
from tests.models.conftest import GOLDEN
from tests.models.test_checkpoint import assert_same_parameters

FILE = Path("model/config.json")
SLIDING, FULL = "sliding_attention", "full_attention"
SIZES = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_attention_heads": 8,
    "num_hidden_layers": 7,
}
# The text config of Gemma 4 31B as released, sizes made small.
RELEASED: dict[str, Any] = SIZES | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_k_eq_v": True,
    "enable_moe_block": False,
    "final_logit_softcapping": 30.0,
    "global_head_dim": 512,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size_per_layer_input": 0,
    "layer_types": [*[SLIDING] * 5, FULL, FULL],
    "max_position_embeddings": 262144,
    "model_type": "gemma4_text",
    "num_experts": None,
    "num_global_key_value_heads": 2,
    "num_key_value_heads": 4,
    "num_kv_shared_layers": 0,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
        SLIDING: {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": "vision",
    "use_double_wide_mlp": False,
    "vocab_size_per_layer_input": 262144,
}
EXPERTS = {"enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 14}

# Of E2B.
SMALL: dict[str, Any] = {
    "attention_k_eq_v": False,
    "hidden_size_per_layer_input": 5,
    "layer_types": [*[SLIDING, FULL] * 3, FULL],
    "num_kv_shared_layers": 4,
    "use_double_wide_mlp": True,
    "vocab_size_per_layer_input": 63,
}


def read(**changes: Any) -> ModelConfig:
    return config_from_hf({key: value for key, value in (RELEASED | changes).items() if value != "absent"}, FILE)


def of_blocks(**sizes: Any) -> dict[str, Any]:
    """The sizes of heads as transformers 5 saves them: numbers of deep decoders' blocks all have two digits."""
    own = {"global_head_dim": "absent", "num_global_key_value_heads": "absent"}
    return own | {"per_layer_config": {"05": sizes, "6": sizes}}


def test_released_config():
    found = read()
    local = BlockKind(512, local_rope=True)
    assert found.kinds == (*[local] * 5, BlockKind(wide=True), BlockKind(wide=True))
    assert (found.head_dim, found.num_kv_heads, found.wide) == (256, 4, WideHeads(2, 512, shared_values=True))
    assert found.rope == RopeConfig(1e6, "proportional", fraction=0.25)
    assert (found.local_rope, found.rope_dim) == (RopeConfig(1e4), 512)
    assert (found.norms, found.norm_product, found.qk_norm, found.value_norm) == ("both", "wide", "head", True)
    assert (found.attention_scale, found.embed_scale, found.block_scale) == (1.0, 8.0, True)
    assert (found.tie_embeddings, found.logits_softcap, found.activation) == (True, 30.0, "gelu_tanh")


def test_what_transformers_assumes():
    kept = (*SIZES, "model_type", "hidden_size_per_layer_input", "num_key_value_heads")
    changes = dict.fromkeys(RELEASED.keys() - set(kept), "absent")
    found = read(**changes)
    assert found.wide == WideHeads(4, 512)
    assert not found.has_joined_blocks
    assert [kind.wide for kind in found.kinds] == [*[False] * 5, True, True]  # the last one sees all
    assert (found.rope, found.local_rope) == (read().rope, read().local_rope)
    assert (found.logits_softcap, found.max_positions) == (None, 131072)
    assert read(attention_k_eq_v=False).wide == WideHeads(4, 512)  # only such models have other numbers of heads


def test_heads_as_transformers_saves_them():
    assert read(**of_blocks(head_dim=512, num_key_value_heads=2)) == read()
    assert read(**of_blocks(head_dim=512)).wide == WideHeads(4, 512, shared_values=True)


def test_experts():
    found = read(**EXPERTS)
    assert found.moe == MoeConfig(6, 2, 14, shared_size=40, apart=True)
    assert all(kind.moe for kind in found.kinds)


def test_blocks_that_take_over_keys_and_values():
    found = read(**SMALL)
    assert [kind.taken for kind in found.kinds] == [False] * 3 + [True] * 4
    assert [found.mlp_width(kind) for kind in found.kinds] == [40] * 3 + [80] * 4
    assert found.block_inputs == BlockInputs(63, 5)
    assert found.has_joined_blocks
    assert read(hidden_size_per_layer_input="absent").block_inputs == BlockInputs(262144, 256)  # as transformers has it
    assert not read(use_double_wide_mlp=True).wider_taken


def test_such_a_model_is_no_student():
    decoder = load_pretrained(GOLDEN / "gemma4_text_shared")
    with pytest.raises(ConfigError, match="cannot be a student"):
        StudentStack(decoder)
    with pytest.raises(ConfigError, match="more than the stream"):
        apply_surgery(decoder, [SurgeryOp(op="mlp_width", to=3)])


def test_files_may_have_keys_that_no_block_reads(tmp_path: Path):
    """As the published ones of E2B and E4B; others are unknown."""
    folder = GOLDEN / "gemma4_text_shared"
    stored = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    unread = {
        f"model.layers.4.self_attn.{name}.weight": np.ones(3, np.float32) for name in ("k_proj", "v_proj", "k_norm")
    }
    save_file(stored | unread, tmp_path / "model.safetensors")
    assert_same_parameters(load_pretrained(tmp_path), load_pretrained(folder))
    save_file(
        stored | {"model.layers.4.self_attn.x_proj.weight": np.ones(3, np.float32)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match="x_proj"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        read(),
        read(**EXPERTS, tie_word_embeddings=False, attention_bias=True),
        read(attention_k_eq_v=False, layer_types=[FULL] * 7, final_logit_softcapping=None),
        read(**SMALL),
        read(**SMALL | EXPERTS | {"use_double_wide_mlp": False}),
        read(layer_types=[*[SLIDING, FULL] * 3, FULL], num_global_key_value_heads=8, hidden_activation="silu"),
    ],
)
def test_round_trip_is_exact(config: ModelConfig):
    assert config_from_hf(config_to_hf(config, "float32"), FILE) == config


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_kv_shared_layers": 7}, "num_kv_shared_layers"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers"),  # none that sees all has keys
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"new_trick": 3}, "new_trick"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_parameters"),
        ({"rope_parameters": RELEASED["rope_parameters"] | {SLIDING: {"partial_rotary_factor": 0.5}}}, "proportional"),
        ({"per_layer_config": {"5": {"head_dim": 512}}}, "per_layer_config"),
        ({"per_layer_config": {"0": {"head_dim": 512}}}, "per_layer_config"),
        ({"per_layer_config": {"full_attention": {"head_dim": 512}}}, "per_layer_config"),
        (of_blocks(head_dim=512, intermediate_size=3), "per_layer_config"),
        (of_blocks(head_dim="512"), "per_layer_config"),
        ({"num_global_key_value_heads": 3}, "do not divide"),
        (EXPERTS | {"top_k_experts": 9}, "more experts than"),
        (EXPERTS | {"num_experts": None}, "num_experts"),
    ],
)
def test_refusals_name_the_key(changes: dict[str, Any], named: str):
    with pytest.raises(CheckpointError) as caught:
        read(**changes)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"embed_scale": 7.0},
        {"qkv_bias": True},
        {"layers": read().layers[:1]},
        {"wide": WideHeads(2, 512)},
        {"wide": None},
        {"moe": replace(read(**EXPERTS).moe_config, shared_size=3)},
    ],
    ids=str,
)
def test_what_the_config_cannot_say_is_not_exported(changes: dict[str, Any]):
    with pytest.raises(CheckpointError, match="no config for this decoder"):
        config_to_hf(replace(read(), **changes), "float32")


def test_the_model_with_eyes_and_ears():
    outer = {"model_type": "gemma4", "text_config": RELEASED, "vision_config": {}, "audio_config": None}
    found = config_from_hf(outer, FILE)
    assert found == replace(read(), family="gemma4")
    assert config_from_hf(config_to_hf(found, "float32"), FILE) == read()


def test_proportional_rotation():
    """Of a head of 8 numbers half is rotated: two pairs of four, at the frequencies of the whole head."""
    rope = RopeConfig(100.0, "proportional", 2.0, fraction=0.5)
    cos, sin = rope_tables(rope, 8, jnp.array([[3]]), 64)
    angles = 3 / 2 * 100.0 ** -np.array([0.0, 0.25])
    expected = np.concatenate([angles, [0, 0], angles, [0, 0]])
    np.testing.assert_allclose(cos[0, 0, 0], np.cos(expected), rtol=1e-6)
    np.testing.assert_allclose(sin[0, 0, 0], np.sin(expected), atol=1e-6)


@pytest.mark.parametrize("op", [{"op": "query_heads", "to": 1}, {"op": "kv_heads", "to": 1}], ids=str)
def test_heads_of_two_widths_are_not_cut(op: dict[str, Any]):
    with pytest.raises(ConfigError, match="heads of two widths"):
        apply_surgery(load_pretrained(GOLDEN / "gemma4_text"), [SurgeryOp.model_validate(op)])
