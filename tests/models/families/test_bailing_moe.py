"""Bailing (Ling, Ring) against an oracle in NumPy: forward passes, exports to the byte, released configs, refusals."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from distillcache.models.checkpoint import fill_decoder, load_pretrained, read_config, save_pretrained
from distillcache.models.config import BlockKind, LayerGroup, ModelConfig, MoeConfig, RopeConfig
from distillcache.models.decoder import Decoder
from distillcache.models.families import config_from_hf, config_to_hf
from distillcache.models.files.hf import SafetensorsSource
from distillcache.schemas.errors import CheckpointError
from tests.models.conftest import GOLDEN
from tests.models.families.bailing_oracle import SECOND, Bailing, write_checkpoint

FILE = Path("model/config.json")
# Relative to the largest value. The decoder in float32 differs from the oracle by at most 1.3e-6 on these models.
TOLERANCE = 1e-5

# The config.json of Ling-lite-1.5 and Ling-mini-2.0 as released, sizes made small.
LITE = {
    "architectures": ["BailingMoeForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_bailing_moe.BailingMoeConfig"},
    "eos_token_id": 126081,
    "pad_token_id": 126081,
    "first_k_dense_replace": 0,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.006,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "model_type": "bailing_moe",
    "moe_intermediate_size": 14,
    "num_experts": 7,
    "num_shared_experts": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 6,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 600000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "use_cache": True,
    "use_bias": False,
    "use_qkv_bias": False,
    "vocab_size": 61,
    "output_router_logits": False,
    "embedding_dropout": 0.0,
    "norm_head": False,
    "norm_softmax": False,
    "output_dropout": 0.0,
}
MINI = {
    "architectures": [SECOND],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_bailing_moe_v2.BailingMoeV2Config"},
    "num_hidden_layers": 3,
    "hidden_size": 36,
    "intermediate_size": 40,
    "eos_token_id": 156892,
    "pad_token_id": 156892,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "model_type": "bailing_moe",
    "moe_intermediate_size": 14,
    "norm_topk_prob": True,
    "num_experts_per_tok": 3,
    "num_attention_heads": 6,
    "num_experts": 12,
    "num_key_value_heads": 2,
    "rope_theta": 600000,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.52.3",
    "use_bias": False,
    "use_rmsnorm": True,
    "rms_norm_eps": 1e-06,
    "head_dim": 10,
    "num_shared_experts": 1,
    "use_cache": True,
    "use_qkv_bias": False,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
    "vocab_size": 61,
    "partial_rotary_factor": 0.6,
    "router_dtype": "fp32",
    "moe_router_enable_expert_bias": True,
    "routed_scaling_factor": 2.5,
    "n_group": 4,
    "topk_group": 2,
    "use_qk_norm": True,
    "score_function": "sigmoid",
    "moe_shared_expert_intermediate_size": 14,
}
# A theta of 100 spreads the wavelengths over the 24 tokens; at 600,000 most of the angles would hardly move.
BIASED = {"use_bias": True, "use_qkv_bias": True, "rope_theta": 100}
MODELS: dict[str, dict[str, Any]] = {
    "first": LITE
    | BIASED
    | {"first_k_dense_replace": 1, "norm_head": True, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "first_plain": LITE | {"num_hidden_layers": 2, "norm_topk_prob": False, "num_shared_experts": None},
    "second": MINI
    | BIASED
    | {"num_hidden_layers": 4, "first_k_dense_replace": 2, "num_shared_experts": 2, "num_nextn_predict_layers": 1},
    # One expert for a token: its weight is its sigmoid. One group, no bias, whole heads rotated, no norms.
    "second_plain": MINI
    | {"num_hidden_layers": 2, "first_k_dense_replace": 0, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    | {"moe_router_enable_expert_bias": False, "partial_rotary_factor": 1.0, "use_qk_norm": False}
    | {"tie_word_embeddings": True, "rope_theta": 100},
}
DOCUMENTS = (13, 8)  # of the packed row, which has padding at its end
LENGTH = 24

CheckpointOf = Callable[[str], Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointOf:
    @cache
    def written(name: str) -> Path:
        directory = tmp_path_factory.mktemp("bailing") / name
        write_checkpoint(directory, MODELS[name], seed=list(MODELS).index(name))
        return directory

    return written


@pytest.fixture(scope="module")
def expected(checkpoint: CheckpointOf) -> Callable[[str], list[dict[str, np.ndarray]]]:
    """What the oracle finds in every document: two rows of one each, then those of the packed row."""

    @cache
    def found(name: str) -> list[dict[str, np.ndarray]]:
        oracle, rows = Bailing(checkpoint(name)), given_rows()
        last = np.split(rows["tokens"][2], np.cumsum(DOCUMENTS))[: len(DOCUMENTS)]
        return [oracle.document(tokens) for tokens in (*rows["tokens"][:2], *last)]

    return found


def given_rows() -> dict[str, np.ndarray]:
    padding = LENGTH - sum(DOCUMENTS)
    segments = np.repeat([*range(1, len(DOCUMENTS) + 1), 0], [*DOCUMENTS, padding])
    positions = np.concatenate([*map(np.arange, DOCUMENTS), np.zeros(padding, int)])
    whole = np.arange(LENGTH)
    return {
        "tokens": np.random.default_rng(0).integers(0, 61, (3, LENGTH)),
        "positions": np.stack([whole, whole, positions]),
        "segment_ids": np.stack([np.ones_like(whole), np.ones_like(whole), segments]),
    }


def decoder_of(directory: Path, way: str = "dense") -> Decoder:
    config = replace(read_config(directory), experts=way)
    return fill_decoder(config, SafetensorsSource(directory), jnp.dtype("float32"))


def worst_of(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("first", "dense"),
        ("first", "ragged"),
        ("first_plain", "dense"),
        ("second", "dense"),
        ("second", "ragged"),
        ("second_plain", "dense"),
    ],
)
def test_the_decoder_is_the_oracle(name: str, way: str, checkpoint: CheckpointOf, expected: Any):
    """Rows of one document, and a packed and padded row of two: each document as if it were alone."""
    decoder = decoder_of(checkpoint(name), way)
    out = jax.jit(lambda given: decoder(**given, taps=("attn_out", "resid"), router=True))(given_rows())
    assert out.router is not None
    values = {"logits": np.asarray(out.logits)[None], **{key: np.asarray(value) for key, value in out.taps.items()}}
    chosen = np.sort(out.router.ids, axis=-1)
    starts = [(0, 0), (1, 0), *((2, start) for start in np.cumsum((0, *DOCUMENTS[:-1])))]
    for (row, start), document in zip(starts, expected(name), strict=True):
        end = start + len(document["logits"])
        for key, value in values.items():
            oracle = document[key].reshape(value.shape[0], end - start, -1)
            assert worst_of(value[:, row, start:end], oracle) < TOLERANCE, key
        np.testing.assert_array_equal(chosen[:, row, start:end], document["experts"])


def test_glm_under_bailings_names(tmp_path: Path):
    """The second version computes what GLM does: transformers' values hold for the oracle and for our decoder."""
    glm = json.loads((GOLDEN / "glm4_moe/config.json").read_text())
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "first_k_dense_replace", "moe_intermediate_size", "n_group")
    names += ("topk_group", "num_experts_per_tok", "routed_scaling_factor", "rms_norm_eps", "max_position_embeddings")
    raw = MINI | {name: glm[name] for name in names} | {"use_qkv_bias": True, "rope_theta": 100.0}
    raw |= {"num_experts": 12, "num_shared_experts": 2, "partial_rotary_factor": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    save_file(renamed(load_file(GOLDEN / "glm4_moe/model.safetensors")), tmp_path / "model.safetensors")
    expected = load_file(GOLDEN / "glm4_moe/expected.safetensors")
    logits = decoder_of(tmp_path)(jnp.asarray(expected["tokens"])).logits
    assert worst_of(np.asarray(logits), expected["logits"]) < TOLERANCE
    oracle = Bailing(tmp_path)
    for row, tokens in enumerate(expected["tokens"]):
        found = oracle.document(tokens)
        assert worst_of(found["logits"], expected["logits"][row]) < TOLERANCE
        assert worst_of(found["resid"], expected["resid"][:, row]) < TOLERANCE
        np.testing.assert_array_equal(found["experts"], expected["experts"][:, row])


def renamed(glm: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = {}
    for name, value in glm.items():
        for kind in ("weight", "bias"):
            if name.endswith(f"self_attn.q_proj.{kind}"):
                parts = [glm[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                found[name.replace("self_attn.q_proj", "attention.query_key_value")] = np.concatenate(parts)
        if "self_attn" not in name:
            new = name.replace("e_score_correction_bias", "expert_bias").replace("embed_tokens", "word_embeddings")
            found[new] = value
        for theirs, ours in (("o_proj", "dense"), ("q_norm", "query_layernorm"), ("k_norm", "key_layernorm")):
            if f"self_attn.{theirs}" in name:
                found[name.replace(f"self_attn.{theirs}", f"attention.{ours}")] = value
    return found


@pytest.mark.parametrize("name", MODELS)
def test_an_export_has_the_same_tensors_to_the_byte(name: str, checkpoint: CheckpointOf, tmp_path: Path):
    """bfloat16 as in the file, biases of experts float32, and no tensors of multi-token prediction."""
    decoder = load_pretrained(checkpoint(name))
    save_pretrained(decoder, tmp_path / "out")
    mtp = f"model.layers.{MODELS[name]['num_hidden_layers']}."
    before = load_file(checkpoint(name) / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {key for key in before if not key.startswith(mtp)} == after.keys()
    for key, value in after.items():
        assert value.dtype == before[key].dtype == ("float32" if key.endswith("expert_bias") else "bfloat16")
        assert value.tobytes() == before[key].tobytes()
    again = load_pretrained(tmp_path / "out")
    assert again.config == replace(decoder.config, mtp_layers=0)
    for ours, theirs in zip(*(jax.tree.leaves(nnx.state(each)) for each in (decoder, again)), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "changes", [{"num_nextn_predict_layers": 0}, {"num_nextn_predict_layers": 1, "num_hidden_layers": 3}]
)
def test_only_the_stated_layers_of_multi_token_prediction_are_left_out(
    changes: dict[str, Any], checkpoint: CheckpointOf, tmp_path: Path
):
    """The file has 4 blocks and one such layer."""
    (tmp_path / "model.safetensors").hardlink_to(checkpoint("second") / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(MODELS["second"] | changes))
    with pytest.raises(CheckpointError, match="not those of its config") as caught:
        load_pretrained(tmp_path)
    assert "model.layers.4." in str(caught.value)


def read(version: dict[str, Any], **changes: Any) -> ModelConfig:
    raw = version | changes
    return config_from_hf({key: value for key, value in raw.items() if value != "absent"}, FILE)


def test_released_configs():
    lite = read(LITE)
    assert lite.moe == MoeConfig(7, 3, 14, 28)
    assert (lite.family, lite.head_dim, lite.qk_norm, lite.rope) == ("bailing_moe", 8, "none", RopeConfig(6e5))
    assert (lite.qkv_bias, lite.output_bias, lite.mlp_bias, lite.norm_head) == (False, False, False, False)
    assert lite.layers == (LayerGroup((BlockKind(moe=True),), 3),)
    mini = read(MINI)
    routing = {"scores": "sigmoid", "scaling": 2.5, "groups": 4, "groups_kept": 2, "float32_router": True}
    assert mini.moe == MoeConfig(12, 3, 14, 14, bias=True, native_bias=True, **routing)
    assert (mini.family, mini.qk_norm, mini.rope) == ("bailing_moe_v2", "head", RopeConfig(6e5, fraction=0.6))
    assert mini.layers == (LayerGroup((BlockKind(),), 1), LayerGroup((BlockKind(moe=True),), 2))
    assert read(MINI, model_type="bailing_moe_v2", architectures="absent") == mini
    # Ling-1T states the width instead of the share.
    assert read(MINI, partial_rotary_factor="absent", rotary_dim=6) == mini
    assert read(MINI, partial_rotary_factor="absent").rope.fraction == 1


@pytest.mark.parametrize(
    "config",
    [
        *(config_from_hf(raw, FILE) for raw in MODELS.values()),
        read(LITE, rope_scaling={"type": "dynamic", "factor": 2.0}, use_qkv_bias=True, norm_head=True),
        read(MINI, rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
        read(MINI, num_experts_per_tok=1, moe_router_enable_expert_bias=False, num_shared_experts=0),
    ],
)
def test_round_trip_is_exact(config: ModelConfig):
    raw = config_to_hf(config, "bfloat16")
    assert raw["model_type"] == "bailing_moe"  # both, as published
    assert config_from_hf(raw, FILE) == replace(config, mtp_layers=0)


@pytest.mark.parametrize(
    ("version", "changes", "named"),
    [
        (LITE, {"architectures": ["BailingMoeLinearForCausalLM"]}, "BailingMoeLinearForCausalLM"),
        (LITE, {"architectures": "absent"}, "several versions"),
        (LITE, {"num_key_value_heads": "absent"}, "num_key_value_heads"),
        (LITE, {"norm_softmax": True}, "norm_softmax"),
        (LITE, {"use_qk_norm": True}, "use_qk_norm"),
        (LITE, {"use_sliding_window": True}, "use_sliding_window"),
        (LITE, {"multi_gate": True}, "multi_gate"),
        (LITE, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LITE, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        (LITE, {"norm_head": True, "tie_word_embeddings": True}, "norm_head"),
        (LITE, {"moe_intermediate_size": "absent"}, "moe_intermediate_size"),
        (MINI, {"new_trick": 3}, "new_trick"),
        (MINI, {"score_function": "softmax"}, "score_function"),
        (MINI, {"router_dtype": "bf16"}, "router_dtype"),
        (MINI, {"norm_topk_prob": False}, "norm_topk_prob"),
        (MINI, {"norm_head": True}, "norm_head"),
        (MINI, {"use_bias": "absent"}, "use_bias"),
        (MINI, {"rope_theta": "absent"}, "rope_theta"),
        (MINI, {"rotary_dim": 8}, "rotary_dim"),
        (MINI, {"moe_shared_expert_intermediate_size": 15}, "moe_shared_expert_intermediate_size"),
        (MINI, {"n_group": 5}, "groups"),
        (MINI, {"topk_group": 0}, "topk_group"),
        (MINI, {"num_experts_per_tok": 7}, "can choose from"),
        (MINI, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
)
def test_refusals_name_the_key(version: dict[str, Any], changes: dict[str, Any], named: str):
    with pytest.raises(CheckpointError) as caught:
        read(version, **changes)
    assert named in str(caught.value)
    assert str(FILE) in str(caught.value)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (replace(read(MINI), layers=(LayerGroup((BlockKind(), BlockKind(4, moe=True)), 2),)), "2 kinds of blocks"),
        (replace(read(LITE), layers=(LayerGroup((BlockKind(moe=True), BlockKind()), 1),)), "2 kinds of blocks"),
        (replace(read(LITE), moe=replace(read(LITE).moe_config, shared_size=15)), "shared expert of 15"),
        (replace(read(LITE), rope=RopeConfig(kind="yarn", factor=2.0)), "yarn"),
        (replace(read(MINI), moe=replace(read(MINI).moe_config, renormalise=False)), "not renormalised"),
    ],
)
def test_what_the_configs_cannot_say_is_not_exported(config: ModelConfig, found: str):
    with pytest.raises(CheckpointError, match="no config for this decoder") as caught:
        config_to_hf(config, "float32")
    assert found in str(caught.value)
