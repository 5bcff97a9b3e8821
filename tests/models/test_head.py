"""A model's end, apart from its blocks: the logits of the decoder itself, from a checkpoint or from bytes."""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distillcache.models.checkpoint import load_head, load_pretrained
from distillcache.models.config import ModelConfig
from distillcache.models.decoder import Decoder
from distillcache.models.head import OutputHead, head_of_decoder
from distillcache.schemas.errors import DamageError
from tests.conftest import TINY, save_teacher

KINDS: dict[str, dict[str, object]] = {
    "untied": {},
    "tied": {"tie_embeddings": True},
    "gemma": {"tie_embeddings": True, "norm_product": "offset", "logits_softcap": 3.0},
    "granite": {"logits_divisor": 7.0},
    "bailing": {"norm_head": True},
    "cohere": {"norm_product": "centred", "logits_divisor": 3.0},
}


def logits(head: OutputHead, stream: np.ndarray) -> np.ndarray:
    """The definition, in float64."""
    wide = stream.astype(np.float64)
    wide = wide - np.mean(wide, axis=-1, keepdims=True) if head.centred else wide
    wide /= np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + head.norm_eps)
    found = (wide * head.norm) @ head.weight.astype(np.float64).T / head.divisor
    return found if head.softcap is None else head.softcap * np.tanh(found / head.softcap)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_gives_the_logits_of_its_decoder(kind: str, dtype: str) -> None:
    config: ModelConfig = replace(TINY, **KINDS[kind])  # type: ignore[arg-type]
    decoder = Decoder(config, dtype=dtype, rngs=nnx.Rngs(0))
    decoder.final_norm = nnx.Param(jnp.linspace(-0.3, 0.8, config.hidden_size, dtype=dtype))
    head = head_of_decoder(decoder)
    head = OutputHead.from_bytes(head.to_bytes(), "here", config.hidden_size, config.vocab_size)
    assert head.weight.dtype == jnp.dtype(dtype)
    stream = np.random.default_rng(1).normal(size=(2, 5, config.hidden_size)).astype(np.float32)
    expected = np.asarray(decoder.logits(jnp.asarray(stream)), np.float32)
    close = 3e-6 if dtype == "float32" else 2e-2  # of bfloat16: the norm's and the product's roundings
    np.testing.assert_allclose(logits(head, stream), expected, rtol=close, atol=close)


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_gives_its_head_without_the_rest(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_teacher(tmp_path / "t", replace(TINY, tie_embeddings=tied))
    expected = head_of_decoder(load_pretrained(path, dtype="bfloat16"))
    read: list[str] = []
    from distillcache.models.files.hf import SafetensorsSource

    whole = SafetensorsSource.read
    monkeypatch.setattr(
        SafetensorsSource, "read", lambda self, name, box=None: read.append(name) or whole(self, name, box)
    )
    found = load_head(path, "bfloat16")
    assert sorted(read) == sorted(["model.norm.weight", "model.embed_tokens.weight" if tied else "lm_head.weight"])
    np.testing.assert_array_equal(found.weight, expected.weight)
    np.testing.assert_array_equal(found.norm, expected.norm)


def test_bytes_of_something_else_are_damage() -> None:
    head = head_of_decoder(Decoder(TINY, rngs=nnx.Rngs(0)))
    good = head.to_bytes()
    for data in (b"", good[:-1], good[:9] + b"x" + good[10:], b"\xff" * 40):
        with pytest.raises(DamageError):
            OutputHead.from_bytes(data, "here", TINY.hidden_size, TINY.vocab_size)
    with pytest.raises(DamageError, match="as the plan says"):
        OutputHead.from_bytes(good, "here", TINY.hidden_size, TINY.vocab_size + 1)
