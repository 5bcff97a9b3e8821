"""Surgery keeps the teacher's numbers: what stays is equal, bit for bit, in every kind of stack; and is the right one.

The teachers are the small models of tests/golden: among them are blocks of several kinds in one stack, dense ones and
such with experts, windows, biases everywhere, norms of queries and keys, groups of experts, and shared experts.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array

from distillcache.models.checkpoint import load_pretrained
from distillcache.models.config import ModelConfig, plan_layers
from distillcache.models.decoder import Decoder
from distillcache.models.layers.mlp import Moe
from distillcache.models.surgery import Scores, apply_surgery, operate
from distillcache.schemas.config.student import SurgeryOp
from distillcache.schemas.errors import ConfigError
from tests.models.conftest import GOLDEN, randomized

HEADS = {"q": 2, "o": 1, "q_bias": 1, "k": 2, "v": 2, "k_bias": 1, "v_bias": 1}


def parameters(decoder: Decoder) -> dict[tuple, np.ndarray]:
    state = nnx.to_flat_state(nnx.state(decoder, nnx.Param))
    return {path: np.asarray(value.get_value()) for path, value in state}


def assert_kept(teacher: Decoder, student: Decoder, query: list[int], kv: list[int]) -> None:
    old, new = parameters(teacher), parameters(student)
    assert old.keys() == new.keys()
    for path, value in old.items():
        name = path[-1]
        if name in HEADS:
            value = np.take(value, query if name in ("q", "o", "q_bias") else kv, axis=HEADS[name])
        np.testing.assert_array_equal(new[path], value, err_msg=str(path))


def test_query_heads_are_the_first_of_each_group(tiny_biased: Decoder):
    student = apply_surgery(tiny_biased, [SurgeryOp(op="query_heads", to=2)])
    assert student.config == replace(tiny_biased.config, num_heads=4)
    assert_kept(tiny_biased, student, [0, 1, 3, 4], [0, 1])


def test_kv_heads_go_with_their_query_heads(tiny_biased: Decoder):
    student = apply_surgery(tiny_biased, [SurgeryOp(op="kv_heads", to=1)])
    assert student.config == replace(tiny_biased.config, num_heads=3, num_kv_heads=1)
    assert_kept(tiny_biased, student, [0, 1, 2], [0])


def test_operations_follow_each_other(tiny: Decoder):
    student = apply_surgery(tiny, [SurgeryOp(op="kv_heads", to=1), SurgeryOp(op="query_heads", to=2)])
    assert_kept(tiny, student, [0, 1], [0])
    assert apply_surgery(tiny, []) is tiny


def test_heads_whose_output_is_zero_go_first_by_weight_norm(tiny_config: ModelConfig):
    """Heads 0 and 4 add nothing; without them the model computes what it did."""
    teacher = randomized(Decoder(tiny_config))
    attention = teacher.groups[0].blocks[0].attention
    attention.o.set_value(attention.o[...].at[:, jnp.array([0, 4])].set(0.0))
    student = apply_surgery(teacher, [SurgeryOp(op="query_heads", to=2, by="weight_norm")])
    assert_kept(teacher, student, [1, 2, 3, 5], [0, 1])
    tokens = jnp.arange(9)[None]
    np.testing.assert_allclose(logits_of(student, tokens), logits_of(teacher, tokens), atol=1e-5)
    attention.o.set_value(attention.o[...].at[:, :3].set(0.0))
    assert_kept(teacher, apply_surgery(teacher, [SurgeryOp(op="kv_heads", to=1, by="weight_norm")]), [3, 4, 5], [1])


@pytest.mark.parametrize(
    ("op", "named"),
    [
        (SurgeryOp(op="query_heads", to=4), "1 to 3"),
        (SurgeryOp(op="kv_heads", to=3), "1 to 2"),
    ],
)
def test_refusals(tiny: Decoder, op: SurgeryOp, named: str):
    with pytest.raises(ConfigError) as caught:
        apply_surgery(tiny, [op])
    assert named in str(caught.value)


def test_one_query_head_a_group_points_to_kv_heads(tiny_config: ModelConfig):
    decoder = Decoder(replace(tiny_config, num_kv_heads=6))
    with pytest.raises(ConfigError, match="cannot be done") as caught:
        apply_surgery(decoder, [SurgeryOp(op="query_heads", to=1)])
    assert "kv_heads" in str(caught.value)


def test_a_student_that_could_not_be_exported_is_refused(tiny_config: ModelConfig):
    """5 heads do not divide 36, and the mistral config, which does not mind, has no biases."""
    decoder = Decoder(replace(tiny_config, num_kv_heads=6, qkv_bias=True, output_bias=True))
    with pytest.raises(ConfigError, match="could not be exported"):
        apply_surgery(decoder, [SurgeryOp(op="kv_heads", to=5)])


TEACHERS = ["llama_bias", "qwen2_moe", "qwen3_moe", "glm4_moe", "gpt_oss"]
# Which axis of a parameter of a block an operation may cut, without the axis of the repeats.
QUERIES = {"attention/q": 1, "attention/o": 0, "attention/q_bias": 0, "attention/sinks": 0}
KEYS = {"attention/k": 1, "attention/v": 1, "attention/k_bias": 0, "attention/v_bias": 0}
NEURONS = {"gate": 1, "up": 1, "down": 0, "gate_bias": 0, "up_bias": 0}
OF_EXPERTS = ("router_bias", "logit_bias", "gate", "up", "down", "gate_bias", "up_bias", "down_bias")
EXPERTS = {**dict.fromkeys(OF_EXPERTS, 0), "router": 1}
STREAM = {
    "attention/q": 0,
    "attention/k": 0,
    "attention/v": 0,
    "attention/o": 2,
    "attention/o_bias": 0,
    "attention/norm": 0,
    "mlp/norm": 0,
    "mlp/router": 0,
    "mlp/shared_gate": 0,
    "mlp/shared_up": 0,
    "mlp/shared_down": 1,
    "mlp/shared_router": 0,
}


@cache
def golden(name: str) -> Decoder:
    return load_pretrained(GOLDEN / name)


@nnx.jit
def logits_of(decoder: Decoder, tokens: Array) -> Any:
    return decoder(tokens).logits


def blocks_of(decoder: Decoder) -> list[dict[str, np.ndarray]]:
    """Every block's own parameters, in the order of the blocks."""
    found, values = [], parameters(decoder)
    for _, group, repeat, place in decoder.config.places():
        of_place = {path: value for path, value in values.items() if path[:4] == ("groups", group, "blocks", place)}
        found.append({"/".join(map(str, path[4:])): value[repeat] for path, value in of_place.items()})
    return found


def assert_blocks(found: list[dict[str, np.ndarray]], expected: list[dict[str, np.ndarray]]) -> None:
    assert len(found) == len(expected)
    for at, (here, there) in enumerate(zip(found, expected, strict=True)):
        assert here.keys() == there.keys()
        for name, value in there.items():
            np.testing.assert_array_equal(here[name], value, err_msg=f"block {at}: {name}")


def taken(block: dict[str, np.ndarray], axes: dict[str, int], kept: Any) -> dict[str, np.ndarray]:
    return {name: np.take(value, kept, axes[name]) if name in axes else value for name, value in block.items()}


def random_scores(decoder: Decoder, seed: int = 0) -> Scores:
    rng, config = np.random.default_rng(seed), decoder.config
    return Scores(
        tuple(
            {
                "H": rng.random(config.num_heads),
                **(
                    {"E": rng.random(config.moe_config.num_experts)}
                    if kind.moe
                    else {"F": rng.random(config.intermediate_size)}
                ),
            }
            for kind in config.kinds
        ),
        rng.random(config.hidden_size),
    )


@pytest.mark.parametrize("by", ["index", "importance"])
@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("op", ["query_heads", "kv_heads", "mlp_width", "experts", "hidden_size"])
def test_only_what_is_cut_changes(name: str, op: str, by: str):
    """In every block by itself: what `kept` names is there, in its old order, and all else as it was."""
    teacher = golden(name)
    config = teacher.config
    sizes = {"query_heads": 2, "kv_heads": 1, "mlp_width": 17, "experts": 4, "hidden_size": 30}
    sizes |= {"hidden_size": 30 if name != "llama_bias" else 24, "experts": 8 if name == "glm4_moe" else 4}
    if (op == "experts" and config.moe is None) or (op == "mlp_width" and all(kind.moe for kind in config.kinds)):
        pytest.skip("nothing to cut")
    done = operate(teacher, [SurgeryOp.model_validate({"op": op, "to": sizes[op], "by": by})], random_scores(teacher))
    expected, kept = [], done.kept[0]
    for at, (block, kind) in enumerate(zip(blocks_of(teacher), config.kinds, strict=True)):
        own = kept if op == "hidden_size" else kept[at]
        if op == "hidden_size":
            shift = int(kind.moe)  # the axis of the experts
            gated = {"mlp/gate": shift, "mlp/up": shift, "mlp/down": shift + 1, "mlp/down_bias": shift}
            axes = STREAM | gated
        elif op == "query_heads":
            full = {"attention/q_norm": 0} if config.qk_norm == "full" else {}
            axes = QUERIES | full
        elif op == "kv_heads":
            group = config.num_heads // config.num_kv_heads
            block = taken(block, QUERIES, [group * head + each for head in own for each in range(group)])
            axes = KEYS
        else:
            moved = (NEURONS if op == "mlp_width" else EXPERTS) if kind.moe == (op == "experts") else {}
            axes = {f"mlp/{name}": axis for name, axis in moved.items()}
        assert own is None or own == sorted(set(own))
        expected.append(taken(block, axes, own) if own is not None else block)
    assert_blocks(blocks_of(done.decoder), expected)
    outer = {"embed": 1, "final_norm": 0, "head": 0} if op == "hidden_size" else {}
    for path, value in parameters(teacher).items():
        if len(path) == 1:
            wanted = np.take(value, kept, outer[path[0]]) if outer else value
            np.testing.assert_array_equal(parameters(done.decoder)[path], wanted)


def test_the_highest_scores_stay_in_every_group():
    """Experts of GLM are chosen by group, so each group keeps as many; heads likewise within their KV group."""
    teacher = golden("glm4_moe")
    scores = random_scores(teacher, 1)
    ops = [SurgeryOp(op="experts", to=8, by="importance"), SurgeryOp(op="query_heads", to=1, by="importance")]
    done = operate(teacher, ops, scores)
    groups, group = teacher.config.moe_config.groups, teacher.config.num_heads // teacher.config.num_kv_heads
    for at, kind in enumerate(teacher.config.kinds):
        heads = scores.blocks[at]["H"].reshape(-1, group)
        assert done.kept[1][at] == [number * group + int(row.argmax()) for number, row in enumerate(heads)]
        if kind.moe:
            experts, size = scores.blocks[at]["E"].reshape(groups, -1), 8 // groups
            best = [np.sort(np.argsort(-row)[:size]) + number * experts.shape[1] for number, row in enumerate(experts)]
            assert done.kept[0][at] == np.concatenate(best).tolist()
    assert done.decoder.config.moe_config.groups == groups


def test_scores_follow_what_was_cut_before():
    """KV heads go by the queries that are left, in the blocks that are left."""
    teacher = golden("qwen3_moe")
    scores = Scores(
        tuple({"H": np.array([9.0, 1, 1, 3, 3, 3]) + 10 * (at == 2), "F": np.zeros(40)} for at in range(6)),
        np.zeros(36),
    )
    ops = [{"op": "drop_blocks", "blocks": [0, 1]}, {"op": "query_heads", "to": 2, "by": "importance"}]
    ops.append({"op": "kv_heads", "to": 1, "by": "importance"})
    done = operate(teacher, [SurgeryOp.model_validate(op) for op in ops], scores)
    assert done.kept == ([2, 3, 4, 5], [[0, 1, 3, 4]] * 4, [[0]] * 4)


def test_what_adds_nothing_goes_first_by_weight_norm():
    """Without it the model computes what it did."""
    teacher = nnx.clone(golden("qwen3_moe"))
    tokens = jnp.arange(9)[None]
    for group in teacher.groups:
        for block in group.blocks:
            down = block.mlp.down
            gone = jnp.array([0, 3]) if isinstance(block.mlp, Moe) else jnp.arange(0, 40, 5)
            down.set_value(down[...].at[:, gone].set(0.0))
            if isinstance(block.mlp, Moe):  # no token goes where nothing is
                block.mlp.router.set_value(block.mlp.router[...].at[..., jnp.array([0, 3])].set(0.0))
    student = apply_surgery(teacher, [SurgeryOp(op="mlp_width", to=32, by="weight_norm")])
    assert student.config.intermediate_size == 32
    np.testing.assert_allclose(logits_of(student, tokens), logits_of(teacher, tokens), atol=1e-5)
    done = operate(teacher, [SurgeryOp(op="experts", to=5, by="weight_norm")])
    assert done.kept[0] == [[1, 2, 4, 5, 6] if kind.moe else None for kind in teacher.config.kinds]


def test_narrower_experts_keep_their_own_neurons():
    teacher = golden("mixtral")
    done = operate(teacher, [SurgeryOp(op="expert_width", to=9, by="weight_norm")])
    assert done.decoder.config.moe_config.expert_size == 9
    for old, new, kept in zip(blocks_of(teacher), blocks_of(done.decoder), done.kept[0], strict=True):
        for expert, places in enumerate(kept):
            norms = np.linalg.norm(old["mlp/down"][expert], axis=1)
            assert set(places) == set(np.argsort(-norms)[:9].tolist())
            np.testing.assert_array_equal(new["mlp/down"][expert], old["mlp/down"][expert][places])
            np.testing.assert_array_equal(new["mlp/gate"][expert], old["mlp/gate"][expert][:, places])


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe", "glm4_moe"])
def test_dropped_blocks_leave_the_others_with_their_kinds(name: str):
    """Windows, experts and all: the plan of the layers is made anew."""
    teacher = golden(name)
    student = apply_surgery(teacher, [SurgeryOp(op="drop_blocks", blocks=[0, 2])])
    kept = [block for block in range(teacher.config.num_blocks) if block not in (0, 2)]
    assert student.config.kinds == tuple(teacher.config.kinds[block] for block in kept)
    assert student.config.layers == plan_layers(student.config.kinds)
    assert_blocks(blocks_of(student), [blocks_of(teacher)[block] for block in kept])
