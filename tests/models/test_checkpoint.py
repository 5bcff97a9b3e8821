"""Checkpoints: exact round trips, sharding, atomic writes, digests, and damage that is named."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from distillcache.models.checkpoint import load_pretrained, read_config, save_pretrained, weights_digest
from distillcache.models.config import BlockKind, LayerGroup, ModelConfig
from distillcache.models.decoder import Decoder
from distillcache.schemas.errors import CheckpointError
from tests.models.conftest import GOLDEN, randomized


def assert_same_parameters(first: Decoder, second: Decoder) -> None:
    one, two = (dict(nnx.to_flat_state(nnx.state(x, nnx.Param))) for x in (first, second))
    assert one.keys() == two.keys()
    for path, value in one.items():
        assert value.get_value().dtype == two[path].get_value().dtype
        np.testing.assert_array_equal(value.get_value(), two[path].get_value(), err_msg=str(path))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint as transformers wrote it, in a place where it may be broken."""
    return Path(shutil.copytree(GOLDEN / "llama_bias", tmp_path / "model"))


def refused(path: Path | str, *named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(path)
    for text in (*named, "next"):
        assert text in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_exact(tiny_config: ModelConfig, dtype: str, tied: bool, tmp_path: Path):
    config = replace(tiny_config, tie_embeddings=tied, qkv_bias=True, output_bias=True)
    decoder = randomized(Decoder(config, dtype=dtype))
    save_pretrained(decoder, tmp_path / "out")
    loaded = load_pretrained(tmp_path / "out")
    assert loaded.config == config == read_config(tmp_path / "out")
    assert_same_parameters(decoder, loaded)
    assert load_pretrained(tmp_path / "out", "float32").embed[...].dtype == jnp.float32


def test_groups_and_patterns_keep_the_order_of_the_blocks(tiny_config: ModelConfig, tmp_path: Path):
    """Blocks of equal kinds may be grouped in any way; the file, read back as one group, computes the same."""
    kind = BlockKind()
    config = replace(tiny_config, layers=(LayerGroup((kind, kind), 2), LayerGroup((kind,), 1)))
    decoder = randomized(Decoder(config))
    save_pretrained(decoder, tmp_path / "out")
    tokens = jnp.arange(7)[None]
    loaded = load_pretrained(tmp_path / "out")
    assert loaded.config.layers == (LayerGroup((kind,), 5),)
    np.testing.assert_allclose(loaded(tokens).logits, decoder(tokens).logits, atol=1e-5)  # compiled differently


def test_shards_hold_what_one_file_holds(tiny: Decoder, tmp_path: Path):
    save_pretrained(tiny, tmp_path / "one")
    save_pretrained(tiny, tmp_path / "many", shard_bytes=20_000)
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(
        x.nbytes for x in load_file(tmp_path / "one/model.safetensors").values()
    )
    assert_same_parameters(load_pretrained(tmp_path / "many"), tiny)


def test_an_own_export_is_replaced_and_anything_else_is_not(tiny: Decoder, tiny_biased: Decoder, tmp_path: Path):
    target = tmp_path / "out"
    target.mkdir()
    save_pretrained(tiny, target)
    save_pretrained(tiny_biased, target)
    assert read_config(target).qkv_bias
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (target / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not made by an export"):
        save_pretrained(tiny, target)
    assert (target / "notes.txt").exists()
    with pytest.raises(CheckpointError, match="not made by an export"):
        save_pretrained(tiny, shutil.copytree(GOLDEN / "llama_bias", tmp_path / "foreign"))


def test_a_failed_save_leaves_nothing(tiny_config: ModelConfig, tmp_path: Path):
    mixed = Decoder(replace(tiny_config, layers=(LayerGroup((BlockKind(), BlockKind(3)), 1),)))
    with pytest.raises(CheckpointError, match="2 kinds of blocks"):
        save_pretrained(mixed, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_files_are_as_open_as_their_directory(tiny: Decoder, tmp_path: Path):
    save_pretrained(tiny, tmp_path / "out")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "out").stat().st_mode & 0o666}


def test_digest_follows_content_not_names(saved: Path, tmp_path: Path):
    digest = weights_digest(saved)
    assert len(digest) == 32
    assert weights_digest(shutil.copytree(saved, tmp_path / "copy")) == digest
    weights = saved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert weights_digest(saved) != digest
    content[-1] ^= 1
    weights.write_bytes(content)
    (saved / "config.json").write_text((saved / "config.json").read_text() + " ")
    assert weights_digest(saved) != digest


def test_known_buffers_and_a_stored_tied_head_are_left_out(tmp_path: Path):
    path = Path(shutil.copytree(GOLDEN / "llama_tied", tmp_path / "model"))
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, path / "model.safetensors")
    assert_same_parameters(load_pretrained(path), load_pretrained(GOLDEN / "llama_tied"))
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"] * 2}, path / "model.safetensors")
    refused(path, "tie_word_embeddings")


def test_mixed_dtypes_lose_nothing(saved: Path):
    tensors = load_file(saved / "model.safetensors")
    save_file(
        {k: v if "norm" in k else v.astype(jnp.bfloat16) for k, v in tensors.items()}, saved / "model.safetensors"
    )
    assert load_pretrained(saved).embed[...].dtype == jnp.float32


def test_tensors_that_do_not_fit_are_listed(saved: Path):
    tensors = load_file(saved / "model.safetensors")
    tensors["model.layers.9.extra"] = tensors.pop("model.layers.1.mlp.up_proj.bias")
    tensors["model.norm.weight"] = np.ones(35, np.float32)
    save_file(tensors, saved / "model.safetensors")
    refused(saved, "model.layers.9.extra", "model.layers.1.mlp.up_proj.bias", "[35], expected [36]")


def test_integers_are_refused(saved: Path):
    tensors = load_file(saved / "model.safetensors")
    tensors["model.norm.weight"] = np.ones(36, np.int8)
    save_file(tensors, saved / "model.safetensors")
    refused(saved, "I8 (model.norm.weight)")


@pytest.mark.parametrize("kept", [0, 5, 1000, -1])
def test_truncated_weights(saved: Path, kept: int):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    refused(saved, "model.safetensors", "truncated")


def test_missing_parts_say_what_to_do(saved: Path, tmp_path: Path):
    refused(tmp_path / "nothing", "no such checkpoint")
    weights = saved / "model.safetensors"
    weights.rename(saved / "pytorch_model.bin")
    refused(saved, "no safetensors weights", "save_pretrained")
    (saved / "pytorch_model.bin").rename(saved / "teacher.gguf")
    refused(saved, "name the file itself", "teacher.gguf")
    (saved / "config.json").write_text("{")
    refused(saved, "JSON", "config.json")
    (saved / "config.json").write_text("[]")
    refused(saved, "not a JSON object")
    (saved / "config.json").unlink()
    refused(saved, "config.json is missing")


def test_missing_shards_are_named(tiny: Decoder, tmp_path: Path):
    target = tmp_path / "many"
    save_pretrained(tiny, target, shard_bytes=20_000)
    shards = sorted(target.glob("model-*"))
    content = shards[1].read_bytes()
    shards[1].unlink()
    refused(target, "shards of the checkpoint are missing", shards[1].name)
    shards[1].write_bytes(shards[0].read_bytes())
    refused(target, "stored twice")
    shards[1].write_bytes(content)
    index = target / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"] | {"a": shards[0].name}}))
    refused(target, "do not hold what their index lists", "a")
    index.write_text("{}")
    refused(target, "no weight_map")


def test_transformers_4_and_5_spell_the_dtype_for_themselves(tiny: Decoder, tmp_path: Path):
    save_pretrained(tiny, tmp_path / "out")
    raw = json.loads((tmp_path / "out/config.json").read_text())
    assert raw["dtype"] == raw["torch_dtype"] == "float32"
