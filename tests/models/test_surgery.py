"""Surgery keeps the teacher's numbers: kept heads and untouched parts are equal, bit for bit."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.config import ModelConfig
from models.decoder import Decoder
from models.surgery import apply_surgery
from schemas.errors import ConfigError
from schemas.train_config import SurgeryOp
from tests.models.conftest import randomized

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
    np.testing.assert_allclose(student(tokens).logits, teacher(tokens).logits, atol=1e-5)
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
