"""Kimi Linear: both spellings of its config, round trips, refusals, forms of files, surgery, adapters, FLOPs.

Its numbers are in test_parity.py and layers/recurrent/test_delta_rule.py.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from distillcache.models.adapters import sides
from distillcache.models.checkpoint import load_pretrained, read_config, save_pretrained
from distillcache.models.config import BlockKind, DeltaConfig, LatentConfig, ModelConfig, plan_layers
from distillcache.models.families import config_from_hf, config_to_hf
from distillcache.models.mesh.sharding import RULES
from distillcache.models.surgery import apply_surgery
from distillcache.models.surgery.parts import KIMI_AXES
from distillcache.schemas.config.student import SurgeryOp
from distillcache.schemas.errors import CheckpointError
from distillcache.trainer.step.flops import step_flops
from distillcache.trainer.step.parameters import all_parameters
from tests.models.conftest import GOLDEN
from tests.models.test_checkpoint import assert_same_parameters

FILE = Path("model/config.json")
# As released, sizes made small.
RAW = {
    "model_type": "kimi_linear",
    "first_k_dense_replace": 1,
    "head_dim": 72,
    "hidden_act": "silu",
    "hidden_size": 36,
    "intermediate_size": 40,
    "kv_lora_rank": 12,
    "linear_attn_config": {
        "full_attn_layers": [4, 5],
        "head_dim": 6,
        "kda_layers": [1, 2, 3],
        "num_heads": 4,
        "short_conv_kernel_size": 3,
    },
    "mla_use_nope": True,
    "model_max_length": 1048576,
    "moe_intermediate_size": 10,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "num_attention_heads": 3,
    "num_expert_group": 1,
    "num_experts": 6,
    "num_experts_per_token": 2,
    "num_hidden_layers": 5,
    "num_key_value_heads": 3,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.446,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_grouped_topk": True,
    "v_head_dim": 7,
    "vocab_size": 61,
}
KDA, FULL = BlockKind(mixer="gated_delta"), BlockKind(rotary=False)
SHORT = {key: RAW[key] for key in ("model_type", "vocab_size", "hidden_size", "intermediate_size")}
SHORT |= {"num_hidden_layers": 9, "num_attention_heads": 2, "num_key_value_heads": 2}


def with_experts(kind: BlockKind) -> BlockKind:
    return replace(kind, moe=True)


def read(raw: dict[str, Any] = RAW, **changes: Any) -> ModelConfig:
    return config_from_hf(raw | changes, FILE)


def test_what_a_released_config_means():
    found = read()
    assert found.kinds == (KDA, with_experts(KDA), with_experts(KDA), with_experts(FULL), with_experts(FULL))
    assert found.delta == DeltaConfig(4, 4, 6, 6, 3, by_channel=True)
    assert found.latent == LatentConfig(None, 12, 8, 4, 7)
    assert (found.head_dim, found.attention_scale, found.max_positions) == (12, 12**-0.5, 1048576)
    moe = found.moe_config
    assert (moe.num_experts, moe.top_k, moe.shared_size, moe.scores, moe.scaling) == (6, 2, 10, "sigmoid", 2.446)


def test_defaults_are_those_of_the_installed_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `parity`)")
    for raw in ({key: value for key, value in RAW.items() if key != "rope_scaling"}, SHORT):
        assert config_from_hf(transformers.AutoConfig.for_model(**raw).to_dict(), FILE) == read(raw)
    assert [at for at, kind in enumerate(read(SHORT).kinds) if kind.attends] == [4, 8]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": 10, "attention_bias": True, "num_expert_group": 2, "moe_renormalize": False},
        {"mlp_layer_types": ["sparse", "dense", "dense", "sparse", "dense"], "num_shared_experts": 2},
    ],
    ids=str,
)
def test_round_trip_is_exact(changes: dict[str, Any]):
    assert config_from_hf(config_to_hf(read(**changes), "float32"), FILE) == read(**changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"linear_attn_config": RAW["linear_attn_config"] | {"gate_lower_bound": -5.0}}, "gate_lower_bound"),
        ({"linear_attn_config": RAW["linear_attn_config"] | {"kda_layers": [1, 2]}}, "kda_layers"),
        ({"linear_attn_config": [1]}, "linear_attn_config"),
        ({"mla_use_nope": False}, "mla_use_nope"),
        ({"moe_router_activation_func": "softmax"}, "moe_router_activation_func"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"attn_res_block_size": 12}, "attn_res_block_size"),
        ({"num_experts_per_tok": 3}, "num_experts_per_tok"),
    ],
    ids=str,
)
def test_refusals_name_the_key(changes: dict[str, Any], named: str):
    """Also the keys of Kimi K3's text model, which says that it is of this family."""
    with pytest.raises(CheckpointError) as caught:
        read(**changes)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layers": plan_layers([KDA, with_experts(BlockKind())])}, "rotary=True"),
        ({"delta": DeltaConfig(4, 4, 6, 6, 3)}, "by_channel=False"),
        ({"tie_embeddings": True}, "tied"),
    ],
    ids=str,
)
def test_what_no_config_says_is_not_exported(changes: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match="no config for this decoder") as caught:
        config_to_hf(replace(read(), **changes), "float32")
    assert named in caught.value.facts["found"]


def test_an_export_has_the_names_of_the_released_files(tmp_path: Path):
    """Transformers saves a dense MLP under the name of experts. All its other names are the released ones."""
    saved = load_file(GOLDEN / "kimi_linear/model.safetensors")
    decoder = load_pretrained(GOLDEN / "kimi_linear")
    save_pretrained(decoder, tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    renamed = {f"model.layers.0.block_sparse_moe.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert saved.keys() - found.keys() == renamed
    assert found.keys() - saved.keys() == {name.replace("block_sparse_moe", "mlp") for name in renamed}
    for name in found.keys() & saved.keys():
        np.testing.assert_array_equal(found[name].astype(np.float32), saved[name].astype(np.float32), err_msg=name)
    assert found["model.layers.0.self_attn.A_log"].shape == (1, 1, 4, 1)
    assert_same_parameters(load_pretrained(tmp_path), decoder)
    more = {"model.layers.3.self_attn.A_log": found["model.layers.0.self_attn.A_log"]}
    save_file(found | more, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.3"):
        load_pretrained(tmp_path)


def test_heads_of_either_mixer_and_the_stream_are_cut(tmp_path: Path):
    """A head that adds nothing is the one that goes: the stream is as before."""
    decoder = load_pretrained(GOLDEN / "kimi_linear", jnp.float32)
    for block in (decoder.groups[0].blocks[0], decoder.groups[0].blocks[2]):
        block.attention.o[...] = block.attention.o[...].at[:, 2].set(0)
    tokens = jnp.arange(24)[None]
    cut = apply_surgery(decoder, [SurgeryOp(op="value_heads", to=3, by="weight_norm")])
    np.testing.assert_allclose(cut(tokens).logits, decoder(tokens).logits, rtol=0, atol=5e-5)
    small = apply_surgery(cut, [SurgeryOp(op="hidden_size", to=24), SurgeryOp(op="kv_heads", to=2)])
    assert small.config.delta == replace(decoder.config.delta_config, key_heads=3, value_heads=3)
    save_pretrained(small, tmp_path)
    assert_same_parameters(load_pretrained(tmp_path, jnp.float32), small)


def test_parameters_have_places_adapters_and_flops():
    config = read_config(GOLDEN / "kimi_linear")
    given = all_parameters(load_pretrained(GOLDEN / "kimi_linear", jnp.float32))
    first = {
        name.rsplit("/", 1)[-1]: value for name, value in given.items() if name.startswith("groups/0/blocks/0/att")
    }
    assert first.keys() <= KIMI_AXES.keys()
    assert {name for name in first if f"attention/{name}" in RULES} == first.keys() - {"norm", "out_norm"}
    able = {name for name, value in first.items() if sides(f"attention/{name}", value.shape)}
    assert able == {"q", "k", "v", "o", "decay_a", "decay_b", "gate_a", "gate_b"}
    longer = step_flops(config, given, 10, 20) - step_flops(config, given, 10, 10)
    assert longer == 60 * 3 * (14 + 7) / 2 * 10  # of the block with attention: three heads, 14 and 7 wide
