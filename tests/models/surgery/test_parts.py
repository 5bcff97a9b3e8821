"""Taken apart and put together a decoder is the same; parts that do not fit are all named."""

from dataclasses import replace

import numpy as np
import pytest
from flax import nnx

from distillcache.models.checkpoint import load_pretrained
from distillcache.models.surgery import add_router_bias
from distillcache.models.surgery.parts import axes_of, put_together, take_apart
from distillcache.schemas.errors import CheckpointError, ConfigError
from tests.models.conftest import GOLDEN
from tests.models.test_checkpoint import assert_same_parameters


@pytest.mark.parametrize("name", ["qwen2_moe", "glm4_moe", "llama_tied", "qwen3_next"])
def test_there_and_back(name: str):
    decoder = load_pretrained(GOLDEN / name, "bfloat16")
    assert_same_parameters(put_together(take_apart(decoder)), decoder)


def test_every_parameter_that_does_not_fit_is_named():
    parts = take_apart(load_pretrained(GOLDEN / "llama_bias"))
    blocks = [dict(block) for block in parts.blocks]
    for block in blocks:
        block["mlp/up"] = block["mlp/up"][:, :7]
        block["mlp/extra"] = block.pop("mlp/norm")
    blocks[1]["attention/q"] = blocks[1]["attention/q"][:5]
    with pytest.raises(CheckpointError, match="not those of its config") as caught:
        put_together(replace(parts, blocks=tuple(blocks)))
    place = "groups/0/blocks/0"
    assert caught.value.facts.keys() == {
        f"{place}/mlp/norm is missing",
        f"{place}/mlp/extra is unknown",
        f"{place}/mlp/up",
        f"{place}/attention/q",
    }
    assert caught.value.facts[f"{place}/mlp/up"] == "found [3, 36, 7], expected [3, 36, 40]"


def test_an_unknown_parameter_is_not_cut_blindly():
    config = load_pretrained(GOLDEN / "llama_bias").config
    for name, shape in (("attention/other", (36,)), ("attention/q", (36, 6, 9))):
        with pytest.raises(ConfigError, match="does not know this parameter"):
            axes_of(name, shape, config, config.kinds[0])


def test_router_biases_begin_at_zero():
    decoder = load_pretrained(GOLDEN / "qwen3_moe")
    biased = add_router_bias(decoder)
    assert biased.config.moe_config.bias
    for path, value in nnx.to_flat_state(nnx.state(biased, nnx.Param)):
        if path[-1] == "router_bias":
            assert not np.asarray(value.get_value()).any()
    assert add_router_bias(biased) is biased
