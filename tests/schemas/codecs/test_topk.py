"""The codec of recorded logits: what it keeps, and in which arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillcache.schemas.codecs import CodePart, TopK, get_topk_codec
from distillcache.schemas.errors import ConfigError


def example(dtype: str) -> TopK:
    values = -jnp.sort(-jax.random.normal(jax.random.key(0), (2, 3, 4)) * 9).astype(dtype)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 2**31 - 1, (2, 3, 4)), jnp.int32)
    return TopK(values, ids, jnp.asarray([[1.5, -2.25, 3e4], [0.0, 40.125, -7.0]], jnp.float32))


def test_parts() -> None:
    ids, logsumexp = CodePart("ids", "int32", 4), CodePart("logsumexp", "float32", 1)
    assert get_topk_codec(4, "bf16").parts(576) == (CodePart("codes", "uint16", 4, "bfloat16"), ids, logsumexp)
    assert get_topk_codec(4, "f32").parts(576) == (CodePart("codes", "float32", 4), ids, logsumexp)


@pytest.mark.parametrize(("stored", "computed"), [("f32", "float32"), ("f32", "bfloat16"), ("bf16", "bfloat16")])
def test_nothing_is_lost(stored: str, computed: str) -> None:
    codec, x = get_topk_codec(4, stored), example(computed)
    parts = codec.encode(x)
    assert {name: (part.shape, str(part.dtype)) for name, part in parts.items()} == {
        part.name: ((2, 3, part.width), part.dtype) for part in codec.parts(1)
    }
    found = codec.decode(jax.tree.map(np.asarray, parts))  # as a feed gives them
    assert [part.dtype for part in found] == [jnp.float32, jnp.int32, jnp.float32]
    jax.tree.map(np.testing.assert_array_equal, found, x._replace(values=x.values.astype(jnp.float32)))


def test_rounding_keeps_the_order() -> None:
    found = get_topk_codec(4, "bf16")
    values = found.decode(found.encode(example("float32"))).values
    assert (np.diff(values, axis=-1) <= 0).all()
    np.testing.assert_allclose(values, example("float32").values, rtol=2**-8)


def test_a_slot_is_encoded_like_any_other() -> None:
    codec, x = get_topk_codec(4, "f32"), example("float32")
    carry, parts = codec.encode_slot(codec.start((2, 3, 4)), x, 0)
    assert (carry, codec.first_slot(0), codec.name) == (None, 0, "f32")
    jax.tree.map(np.testing.assert_array_equal, codec.decode_slot(carry, parts, 0)[1], x)


def test_what_is_no_float_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"int8[\s\S]*bf16 or f32"):
        get_topk_codec(4, "int8")
