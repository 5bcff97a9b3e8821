"""GGUF files, written here by `gguf.GGUFWriter` from HF checkpoints, against the load of those checkpoints."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from models.checkpoint import load_pretrained, read_config, save_pretrained, weights_digest
from models.config import ModelConfig, RopeConfig
from models.decoder import Decoder
from schemas.errors import CheckpointError
from tests.models.conftest import GOLDEN

BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """Row by row: row 2i of a head is the first half's row i, row 2i + 1 the second half's (llama.cpp's `permute`)."""
    width = len(weights) // heads
    order = [
        head * width + half * (width // 2) + i for head in range(heads) for i in range(width // 2) for half in (0, 1)
    ]
    return weights[order]


def metadata_of(config: ModelConfig) -> dict[str, Any]:
    return {
        "block_count": config.num_blocks,
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope.theta,
        "vocab_size": config.vocab_size,
    }


def write_gguf(
    checkpoint: Path,
    target: Path,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    changes: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    architecture: str = "llama",
) -> Path:
    """A checkpoint as llama.cpp's converter would write it; a change of None removes a key."""
    config = read_config(checkpoint)
    writer = gguf.GGUFWriter(target, architecture)
    add: dict[type, Callable[..., None]] = {
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        bool: writer.add_bool,
        list: writer.add_array,
    }
    for key, value in (metadata_of(config) | (changes or {})).items():
        if value is not None:
            add[type(value)](f"{architecture}.{key}", value)
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    for name, stored in load_file(checkpoint / "model.safetensors").items():
        stem, part = name.rsplit(".", 1)
        values = stored.astype(np.float32)
        if stem in TOP:
            stem = TOP[stem]
        else:
            _, _, layer, inner = stem.split(".", 3)
            if BLOCK[inner] in heads:
                values = permuted(values, heads[BLOCK[inner]])
            stem = f"blk.{layer}.{BLOCK[inner]}"
        if values.ndim == 1:
            writer.add_tensor(f"{stem}.{part}", values)
        else:
            writer.add_tensor(f"{stem}.{part}", gguf.quants.quantize(values, kind), raw_dtype=kind)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def refused(path: Path | str, *named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(path)
    for text in (Path(path).name, *named, "next"):
        assert text in str(caught.value)


@pytest.mark.parametrize("name", ["llama_tied", "llama_linear"])
def test_equals_the_load_of_the_hf_directory(name: str, tmp_path: Path):
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0} if name == "llama_linear" else {}
    path = write_gguf(GOLDEN / name, tmp_path / "model.gguf", changes=linear)
    expected, found = load_pretrained(GOLDEN / name, "float32"), load_pretrained(path)
    # The file does not say which activation: llama is silu for llama.cpp.
    assert found.config.rope == expected.config.rope
    tokens = load_file(GOLDEN / name / "expected.safetensors")["tokens"]
    out, theirs = (x(tokens, taps=("attn_out",)) for x in (found, expected))
    np.testing.assert_array_equal(out.taps["attn_out"][0], theirs.taps["attn_out"][0])
    if expected.config.activation == "silu":
        assert found.config == expected.config
        np.testing.assert_array_equal(out.logits, theirs.logits)


def test_biases_are_read_and_unpermuted(tmp_path: Path):
    found = load_pretrained(write_gguf(GOLDEN / "llama_bias", tmp_path / "model.gguf"))
    expected = load_pretrained(GOLDEN / "llama_bias")
    assert found.config.qkv_bias
    assert found.config.mlp_bias
    one, two = (x.groups[0].blocks[0].attention for x in (found, expected))
    np.testing.assert_array_equal(one.q_bias[...], two.q_bias[...])
    np.testing.assert_array_equal(one.k_bias[...], two.k_bias[...])


@pytest.fixture
def wide(tiny_config: ModelConfig, tmp_path: Path) -> Path:
    """A checkpoint whose rows are whole quantisation blocks of 32."""
    decoder = Decoder(replace(tiny_config, hidden_size=64, num_heads=4, intermediate_size=96, head_dim=16))
    save_pretrained(decoder, tmp_path / "wide")
    return tmp_path / "wide"


@pytest.mark.parametrize(("kind", "error"), [("Q8_0", 0.01), ("Q4_1", 0.2), ("F16", 1e-3), ("BF16", 1e-2)])
def test_quantised_tensors_are_near_their_source(kind: str, error: float, wide: Path, tmp_path: Path):
    path = write_gguf(wide, tmp_path / "model.gguf", kind=gguf.GGMLQuantizationType[kind])
    found, expected = load_pretrained(path), load_pretrained(wide)
    assert found.embed[...].dtype == jnp.float32  # norms are float32 in every GGUF
    for name in ("q", "k", "v", "o"):
        one, two = (np.asarray(getattr(x.groups[0].blocks[0].attention, name)[...]) for x in (found, expected))
        assert 0 < np.abs(one - two).max() < error * np.abs(two).max()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_divisors_are_recognised(factor: float, tmp_path: Path):
    theta, half = 500000.0, 4
    # Source: llama.cpp's `generate_extra_tensors`.
    divisors = []
    for i in range(half):
        wavelength = 2 * np.pi * theta ** (i / half)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        between = 1 / ((1 - smooth) / factor + smooth)
        divisors.append(1.0 if wavelength < 8192 / 4 else factor if wavelength > 8192 else between)
    changes = {"rope.freq_base": theta}
    extra = {"rope_freqs.weight": np.array(divisors, np.float32)}
    path = write_gguf(GOLDEN / "llama_linear", tmp_path / "model.gguf", changes=changes, extra=extra)
    assert read_config(path).rope == RopeConfig(theta, "llama3", factor, 8192)
    extra = {"rope_freqs.weight": np.array(divisors, np.float32) * 1.5}
    refused(write_gguf(GOLDEN / "llama_linear", path, changes=changes, extra=extra), "rope_freqs.weight")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"new_trick": 3}, "llama.new_trick"),
        ({"expert_count": 8}, "llama.expert_count"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "yarn"),
        ({"rope.dimension_count": 4}, "llama.rope.dimension_count"),
        ({"attention.head_count_kv": [2, 2, 1]}, "llama.attention.head_count_kv"),
        ({"block_count": None}, "llama.block_count"),
        ({"block_count": 2}, "model.layers.2"),
    ],
)
def test_refusals_name_the_key(changes: dict[str, Any], named: str, tmp_path: Path):
    refused(write_gguf(GOLDEN / "llama_linear", tmp_path / "model.gguf", changes=changes), named)


def test_other_architectures_and_unknown_tensors(tmp_path: Path):
    refused(write_gguf(GOLDEN / "llama_linear", tmp_path / "a.gguf", architecture="qwen2"), "qwen2")
    extra = {"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}
    refused(write_gguf(GOLDEN / "llama_linear", tmp_path / "b.gguf", extra=extra), "blk.0.attn_q_norm.weight")


def test_damaged_files(tmp_path: Path):
    path = write_gguf(GOLDEN / "llama_linear", tmp_path / "model.gguf")
    digest, content = weights_digest(path), path.read_bytes()
    for kept in (4, 30, 500, len(content) // 2, len(content) - 100):  # the last bytes may be padding
        path.write_bytes(content[:kept])
        refused(path, "truncated")
    path.write_bytes(b"\0" * 100)
    refused(path, "not a GGUF file")
    path.write_bytes(b"")
    refused(path, "not a GGUF file")
    path.write_bytes(content)
    assert weights_digest(path) == digest
