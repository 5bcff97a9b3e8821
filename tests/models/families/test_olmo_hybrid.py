"""OLMo Hybrid: defaults, rotation, norms by mixer, files as transformers saves them, round trips, refusals.

Its numbers are in test_parity.py.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from distillcache.models.checkpoint import load_pretrained, save_pretrained
from distillcache.models.config import BlockKind, DeltaConfig, ModelConfig, RopeConfig, plan_layers
from distillcache.models.families import config_from_hf, config_to_hf
from distillcache.schemas.errors import CheckpointError
from tests.models.conftest import GOLDEN
from tests.models.test_checkpoint import assert_same_parameters

FILE = Path("model/config.json")
RAW = {
    "model_type": "olmo_hybrid",
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
}
DELTA, FULL = BlockKind(mixer="gated_delta"), BlockKind()
NO_POSITIONS = {"rope_parameters": {"rope_theta": None, "rope_type": "default"}}


def read(**changes: Any) -> ModelConfig:
    return config_from_hf(RAW | changes, FILE)


def test_what_a_short_config_means():
    found = read()
    assert found.kinds == (DELTA, DELTA, DELTA, FULL) * 2
    assert found.delta == DeltaConfig(6, 6, 6, 12, 4, doubled=True, norm_eps=1e-5)
    assert (found.norms, found.qk_norm, found.rope, found.norm_eps) == ("by_mixer", "full", RopeConfig(), 1e-6)
    assert [found.norms_of(kind) for kind in (DELTA, FULL)] == ["pre", "post"]
    assert read(num_hidden_layers=2).kinds == (DELTA, FULL)


def test_defaults_are_those_of_the_installed_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `parity`)")
    for changes in ({}, {"num_hidden_layers": 3}, NO_POSITIONS, {"rope_theta": None}, {"rope_theta": 7.0}):
        written = transformers.AutoConfig.for_model(**RAW | changes).to_dict()
        assert config_from_hf(written, FILE) == read(**changes)


@pytest.mark.parametrize(
    ("changes", "rotates"),
    [
        ({}, True),
        ({"rope_parameters": None}, True),
        ({"rope_theta": None}, False),
        ({"rope_parameters": None, "rope_theta": None}, False),
        ({"rope_parameters": {"rope_theta": None}}, False),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": None}, True),
    ],
    ids=str,
)
def test_a_base_of_null_means_no_positions(changes: dict[str, Any], rotates: bool):
    assert {kind.rotary for kind in read(**changes).kinds if kind.attends} == {rotates}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        NO_POSITIONS,
        {"linear_allow_neg_eigval": False, "linear_num_key_heads": 2, "attention_bias": True, "num_key_value_heads": 2},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}, "linear_value_head_dim": 5},
    ],
    ids=str,
)
def test_round_trip_is_exact(changes: dict[str, Any]):
    assert config_from_hf(config_to_hf(read(**changes), "float32"), FILE) == read(**changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layer_types": ["linear_attention"] * 8}, "both kinds"),
        ({"layer_types": ["sliding_attention"] * 8}, "layer_types"),
        ({"linear_num_value_heads": 5}, "linear_num_value_heads"),
        ({"linear_use_gate": False}, "linear_use_gate"),
        ({"sliding_window": 9}, "sliding_window"),
    ],
    ids=str,
)
def test_refusals_name_the_key(changes: dict[str, Any], named: str):
    with pytest.raises(CheckpointError) as caught:
        read(**changes)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layers": plan_layers([DELTA] * 2)}, "blocks of"),
        ({"layers": plan_layers([DELTA, FULL, replace(FULL, rotary=False)])}, "rotary=True"),
        ({"norms": "post"}, "norms of post"),
        ({"output_bias": True}, "some biases"),
    ],
    ids=str,
)
def test_what_no_config_says_is_not_exported(changes: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match="no config for this decoder") as caught:
        config_to_hf(replace(read(), **changes), "float32")
    assert named in caught.value.facts["found"]


def test_both_spellings_and_cuts_of_tensors_are_the_same(tmp_path: Path):
    """The golden model is as transformers saves it: other names of norms, convolutions in three equal tensors. An
    export has the names of its code, and a convolution for each projection, as the released files."""
    saved = load_file(GOLDEN / "olmo_hybrid/model.safetensors")
    assert saved["model.layers.0.linear_attn.v_conv1d.weight"].shape == (20, 1, 3)
    decoder = load_pretrained(GOLDEN / "olmo_hybrid")
    save_pretrained(decoder, tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert found["model.layers.0.linear_attn.v_conv1d.weight"].shape == (42, 1, 3)
    stem = "model.layers.0.linear_attn."
    ours, theirs = (np.concatenate([each[f"{stem}{n}_conv1d.weight"] for n in "qkv"]) for each in (found, saved))
    np.testing.assert_array_equal(ours, theirs)
    assert "model.layers.0.attention_layer_norm.weight" in saved
    assert_same_parameters(load_pretrained(tmp_path), decoder)
    del found[f"{stem}v_conv1d.weight"]
    save_file(found, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="v_conv1d"):
        load_pretrained(tmp_path)
