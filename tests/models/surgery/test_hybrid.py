"""Surgery on decoders whose blocks differ in their mixer: operations on heads concern blocks with attention alone."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flax import nnx

from distillcache.models.checkpoint import load_pretrained
from distillcache.models.config import BlockKind, ModelConfig, plan_layers
from distillcache.models.decoder import Decoder
from distillcache.models.surgery import changed_config, operate
from distillcache.schemas.config.student import SurgeryOp
from distillcache.schemas.errors import ConfigError
from tests.models.conftest import GOLDEN, randomized
from tests.models.layers.recurrent import test_short_conv
from tests.models.layers.recurrent.test_gated_delta import CONFIG, DELTA

HYBRID: ModelConfig = replace(CONFIG, family="qwen3_5_text")
RECURRENT, WITH_ATTENTION = (0, 2), 1
# Axes of heads, without that of the repeats.
QUERIES = {"q": 1, "o": 0, "gate": 1}
KEYS = {"k": 1, "v": 1}


def blocks_of(decoder: Decoder) -> list[dict[str, np.ndarray]]:
    """Every block's parameters by name below the block."""
    flat = {path: np.asarray(v.get_value()) for path, v in nnx.to_flat_state(nnx.state(decoder, nnx.Param))}
    return [
        {
            "/".join(map(str, path[4:])): value[repeat]
            for path, value in flat.items()
            if path[:4] == ("groups", group, "blocks", place)
        }
        for _, group, repeat, place in decoder.config.places()
    ]


@pytest.mark.parametrize(
    ("op", "queries", "keys"),
    [({"op": "query_heads", "to": 2}, [0, 1, 3, 4], [0, 1]), ({"op": "kv_heads", "to": 1}, [0, 1, 2], [0])],
    ids=str,
)
def test_heads_of_attention_alone_are_cut(op: dict[str, Any], queries: list[int], keys: list[int]):
    """Its gate goes with its queries."""
    teacher = randomized(Decoder(HYBRID))
    done = operate(teacher, [SurgeryOp.model_validate(op)])
    before, after = blocks_of(teacher), blocks_of(done.decoder)
    kept = queries if op["op"] == "query_heads" else keys
    assert done.kept == ([None, kept, None],)
    for block in RECURRENT:
        assert before[block].keys() == after[block].keys()
        for name, value in before[block].items():
            np.testing.assert_array_equal(after[block][name], value)
    for name, value in before[WITH_ATTENTION].items():
        part, _, own = name.partition("/")
        if part == "attention" and own in QUERIES:
            value = np.take(value, queries, QUERIES[own])
        if part == "attention" and own in KEYS:
            value = np.take(value, keys, KEYS[own])
        np.testing.assert_array_equal(after[WITH_ATTENTION][name], value, err_msg=name)


@pytest.mark.parametrize("by", ["index", "weight_norm"])
def test_value_heads_of_the_delta_rule_are_cut(by: str):
    """As many of each of the two key heads: the first, or those whose rows of the output projection are largest."""
    teacher = randomized(Decoder(HYBRID))
    done = operate(teacher, [SurgeryOp.model_validate({"op": "value_heads", "to": 2, "by": by})])
    assert done.decoder.config == replace(HYBRID, delta=replace(DELTA, value_heads=4))
    before, after = blocks_of(teacher), blocks_of(done.decoder)
    axes = {"v": 1, "z": 1, "alpha": 1, "beta": 1, "conv_v": 0, "a_log": 0, "dt_bias": 0, "o": 0}
    for block in RECURRENT:
        worth = np.square(before[block]["attention/o"]).sum(axis=(1, 2)).reshape(2, 3)
        best = np.sort(np.argsort(-worth, axis=1)[:, :2], axis=1) if by == "weight_norm" else np.array([[0, 1]] * 2)
        heads = np.add(best, [[0], [3]]).reshape(-1)
        assert done.kept[0][block] == heads.tolist()
        for name, value in before[block].items():
            axis = axes.get(name.removeprefix("attention/"))
            expected = value if axis is None else np.take(value, heads, axis)
            np.testing.assert_array_equal(after[block][name], expected, err_msg=name)
    assert done.kept[0][WITH_ATTENTION] is None
    for name, value in before[WITH_ATTENTION].items():
        np.testing.assert_array_equal(after[WITH_ATTENTION][name], value)


def test_the_stream_is_cut_in_every_block():
    teacher = randomized(Decoder(HYBRID))
    done = operate(teacher, [SurgeryOp(op="hidden_size", to=30, by="weight_norm")])
    assert done.decoder.config == replace(HYBRID, hidden_size=30)
    kept, recurrent = done.kept[0], blocks_of(teacher)[0]
    found = blocks_of(done.decoder)[0]
    for name, axis in {"q": 0, "z": 0, "alpha": 0, "beta": 0, "norm": 0, "o": 2}.items():
        np.testing.assert_array_equal(found[f"attention/{name}"], np.take(recurrent[f"attention/{name}"], kept, axis))
    for name in ("conv_q", "conv_v", "a_log", "dt_bias", "out_norm"):
        np.testing.assert_array_equal(found[f"attention/{name}"], recurrent[f"attention/{name}"])


@pytest.mark.parametrize("by", ["index", "weight_norm"])
def test_short_convolutions_keep_as_many_channels_as_the_stream_has_numbers(by: str):
    """Each block channels of its own, whole."""
    config = test_short_conv.CONFIG
    teacher = randomized(Decoder(config))
    done = operate(teacher, [SurgeryOp.model_validate({"op": "hidden_size", "to": 30, "by": by})])
    assert done.decoder.config == replace(config, hidden_size=30, short_conv=replace(config.short_conv, channels=30))
    before, after = blocks_of(teacher), blocks_of(done.decoder)
    for block in (0, 2):
        worth = np.square(before[block]["attention/o"]).sum(axis=(1, 2))
        channels = np.sort(np.argsort(-worth)[:30]) if by == "weight_norm" else np.arange(30)
        value = np.take(before[block]["attention/value"], channels, 1)
        np.testing.assert_array_equal(after[block]["attention/value"], np.take(value, done.kept[0], 0))
        for name in ("conv", "conv_bias", "in_gate_bias"):
            np.testing.assert_array_equal(
                after[block][f"attention/{name}"], before[block][f"attention/{name}"][channels]
            )
    heads = operate(teacher, [SurgeryOp(op="query_heads", to=2)])
    assert heads.kept == ([None, [0, 1, 3, 4], None],)


def test_blocks_of_either_kind_can_go():
    for dropped in ([1], [0, 2]):
        done = operate(Decoder(HYBRID), [SurgeryOp(op="drop_blocks", blocks=dropped)])
        left = [kind for at, kind in enumerate(HYBRID.kinds) if at not in dropped]
        assert done.decoder.config == replace(HYBRID, layers=plan_layers(left))


@pytest.mark.parametrize("op", [{"op": "query_heads", "to": 1}, {"op": "kv_heads", "to": 1}], ids=str)
def test_without_attention_there_are_no_heads_to_cut(op: dict[str, Any]):
    recurrent = replace(HYBRID, layers=plan_layers([BlockKind(mixer="gated_delta")] * 2))
    with pytest.raises(ConfigError, match="cannot be done") as caught:
        changed_config(recurrent, [SurgeryOp.model_validate(op)])
    assert caught.value.facts["found"] == "no block with attention"


def test_without_recurrent_blocks_there_are_no_value_heads_to_cut():
    plain = replace(HYBRID, layers=plan_layers([BlockKind()] * 2))
    for config in (plain, replace(plain, delta=None)):
        with pytest.raises(ConfigError, match="cannot be done") as caught:
            changed_config(config, [SurgeryOp(op="value_heads", to=1)])
        assert caught.value.facts["found"] == "no block with the gated delta rule or Mamba-2"
    with pytest.raises(ConfigError, match="cannot be done") as caught:
        changed_config(HYBRID, [SurgeryOp(op="value_heads", to=4)])
    assert "1 to 3" in str(caught.value)


def test_heads_of_mamba_are_cut_and_blocks_of_one_sublayer():
    """As many of each group of heads, by their rows of the output projection; then all else of a decoder whose blocks
    have a mixer or experts."""
    teacher = load_pretrained(GOLDEN / "nemotron_h_moe")
    config = teacher.config
    done = operate(teacher, [SurgeryOp.model_validate({"op": "value_heads", "to": 2, "by": "weight_norm"})])
    mamba = config.mamba_config
    assert done.decoder.config == replace(config, mamba=replace(mamba, heads=4))
    before, after = blocks_of(teacher)[0], blocks_of(done.decoder)[0]
    worth = np.square(before["attention/o"]).sum(axis=(1, 2)).reshape(2, 3)
    heads = np.add(np.sort(np.argsort(-worth, axis=1)[:, :2], axis=1), [[0], [3]])
    assert done.kept[0] == [heads.reshape(-1).tolist(), None, None, None]
    axes = {"v": 1, "z": 1, "alpha": 1, "conv_v": 0, "conv_v_bias": 0, "o": 0}
    axes |= dict.fromkeys(("a_log", "dt_bias", "skip", "out_norm"), 0)
    for name, value in before.items():
        axis = axes.get(name.removeprefix("attention/"))
        expected = value if axis is None else np.take(value, heads.reshape(-1), axis)
        np.testing.assert_array_equal(after[name], expected, err_msg=name)
    ops = [{"op": "hidden_size", "to": 30, "by": "weight_norm"}, {"op": "kv_heads", "to": 1}]
    ops += [{"op": "expert_width", "to": 5}, {"op": "drop_blocks", "blocks": [0, 1]}]
    found = operate(teacher, [SurgeryOp.model_validate(op) for op in ops]).decoder.config
    assert (found.hidden_size, found.num_kv_heads, found.moe_config.expert_size) == (30, 1, 5)
    assert (found.kinds, found.mamba) == (config.kinds[2:], None)
