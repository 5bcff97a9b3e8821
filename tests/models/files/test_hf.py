"""HF directories in buckets: the same decoder, tokenizer and digest as on a local disk, and errors as plain."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from distillcache.models.checkpoint import load_pretrained, read_config, save_pretrained, weights_digest
from distillcache.models.config import ModelConfig
from distillcache.models.decoder import Decoder
from distillcache.models.files import fill, ranges
from distillcache.models.files.safetensors import open_remote
from distillcache.models.files.tensors import WEIGHTS_NAME
from distillcache.models.mesh.sharding import make_mesh
from distillcache.models.text.tokenizer import load_tokenizer
from distillcache.schemas.config.teacher import TeacherMeshConfig
from distillcache.schemas.errors import CheckpointError, InputError
from distillcache.schemas.store.path import ObjectPath, locate
from distillcache.schemas.store.store import Store
from tests.conftest import byte_tokenizer
from tests.models.conftest import GOLDEN, upload
from tests.models.files.test_fill import only
from tests.models.test_checkpoint import assert_same_parameters, refused
from tests.servers.fixtures import Bucket


@pytest.fixture
def remote(gcs: Bucket) -> str:
    """A checkpoint as transformers wrote it, in a bucket where it may be broken."""
    return upload(GOLDEN / "llama_bias", f"{gcs.url}/deep/model")


@pytest.mark.parametrize("name", ["llama_bias", "mixtral", "llama4"])
def test_equals_the_local_load(name: str, gcs: Bucket, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranges, "CHUNK_BYTES", 1000)  # so that tensors are fetched in several requests
    url = upload(GOLDEN / name, f"{gcs.url}/model")
    assert read_config(url) == read_config(GOLDEN / name)
    assert_same_parameters(load_pretrained(url), load_pretrained(GOLDEN / name))
    assert weights_digest(url) == weights_digest(GOLDEN / name)


@pytest.mark.slow
def test_s3_shards_and_a_tokenizer(s3: Bucket, tiny: Decoder, tmp_path: Path):
    save_pretrained(tiny, tmp_path / "many", tokenizer_from=tokenizer_folder(tmp_path), shard_bytes=20_000)
    url = upload(tmp_path / "many", f"{s3.url}/many")
    assert_same_parameters(load_pretrained(url), tiny)
    assert weights_digest(url) == weights_digest(tmp_path / "many")
    assert load_tokenizer(url).digest == load_tokenizer(tmp_path / "many").digest
    refused(f"{s3.url}/other", "config.json is missing", "check the names")


@pytest.mark.slow
def test_a_tenth_of_the_requests_going_wrong_changes_nothing(gcs: Bucket, tiny: Decoder, tmp_path: Path):
    save_pretrained(tiny, tmp_path / "many", shard_bytes=20_000)
    url = upload(tmp_path / "many", f"{gcs.url}/many")
    kinds = ["503", "429", "reset", "lost", "cut", "short"]
    with gcs.server.faults(share=0.1, seed=3, kinds=kinds):
        assert_same_parameters(load_pretrained(url), tiny)
        assert weights_digest(url) == weights_digest(tmp_path / "many")
        save_pretrained(tiny, f"{gcs.url}/again", shard_bytes=20_000)
    assert weights_digest(f"{gcs.url}/again") == weights_digest(url)


def tokenizer_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return folder


def test_a_tokenizer_in_a_bucket(gcs: Bucket, tmp_path: Path):
    folder = tokenizer_folder(tmp_path)
    url = upload(folder, f"{gcs.url}/tokenizer")
    assert load_tokenizer(url).digest == load_tokenizer(f"{url}/tokenizer.json").digest == load_tokenizer(folder).digest
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        load_tokenizer(f"{gcs.url}/elsewhere")


def test_every_byte_of_the_weights_is_read_once_by_a_load_and_once_by_the_digest(remote: str, gcs: Bucket):
    size = (GOLDEN / "llama_bias" / WEIGHTS_NAME).stat().st_size
    gcs.server.clear_requests()
    load_pretrained(remote)
    weights_digest(remote)
    once = gcs.server.requests()["body_bytes"]["read"]
    weights_digest(remote)  # known by the generations of its files
    again = gcs.server.requests()["body_bytes"]["read"] - once
    assert 2 * size < once < 2 * size + 20_000
    assert again < 20_000


def test_of_a_mesh_the_rows_that_a_process_holds_are_fetched(
    gcs: Bucket, tiny_config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Along `tensor`, halves of all matrices but `o` and `down`, which are cut across their rows and come whole."""
    config = replace(tiny_config, hidden_size=64, intermediate_size=96, vocab_size=512, num_heads=8)
    save_pretrained(Decoder(config), tmp_path / "model")
    url, mesh = upload(tmp_path / "model", f"{gcs.url}/model"), make_mesh(TeacherMeshConfig(tensor=2))
    only([1], monkeypatch)
    monkeypatch.setattr(fill.jax, "make_array_from_callback", lambda shape, *_: jnp.zeros(shape))  # half is not there
    read = []
    for where in (None, mesh):
        gcs.server.clear_requests()
        load_pretrained(url, mesh=where)
        read.append(gcs.server.requests()["body_bytes"]["read"])
    weights = 4 * sum(value.size for value in jax.tree.leaves(nnx.state(Decoder(config), nnx.Param)))
    whole_ones = 4 * 3 * 64 * (8 * 8 + 96)
    assert weights < read[0] < weights + 20_000
    assert abs(read[1] - (weights + whole_ones) / 2) < 20_000


def test_file_urls_are_local(tmp_path: Path):
    assert weights_digest(f"file://{GOLDEN / 'mixtral'}") == weights_digest(GOLDEN / "mixtral")


@pytest.mark.parametrize("kept", [0, 5, 1000, -1])
def test_truncated_weights(remote: str, kept: int):
    store = Store(remote)
    content = store.read(WEIGHTS_NAME)
    assert content is not None
    store.write(WEIGHTS_NAME, content[:kept])
    refused(remote, WEIGHTS_NAME, "truncated")
    with pytest.raises(CheckpointError, match="truncated"):
        weights_digest(remote)
    store.write(WEIGHTS_NAME, content + b"more")
    refused(remote, WEIGHTS_NAME, "longer than")


def test_a_header_that_lies_is_refused(remote: str):
    store = Store(remote)
    for change in ({"shape": [1]}, {"data_offsets": [0, 7]}, {"data_offsets": [3]}):
        tensors = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **change}}
        header = json.dumps(tensors).encode()
        store.write(WEIGHTS_NAME, len(header).to_bytes(8, "little") + header + bytes(8))
        refused(remote, WEIGHTS_NAME, "truncated")
    store.write(WEIGHTS_NAME, b"\xff" * 100)
    refused(remote, "a header of")


def test_a_file_that_is_replaced_while_it_is_read_is_refused(remote: str):
    path = locate(f"{remote}/{WEIGHTS_NAME}")
    assert isinstance(path, ObjectPath)
    header, data = open_remote(path), path.read_bytes()
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="replaced while it was read"):
        header.file.read(0, 8)


def test_missing_parts_say_what_to_do(remote: str, gcs: Bucket, tiny: Decoder, tmp_path: Path):
    store = Store(remote)
    refused(f"{gcs.url}/other", "config.json is missing", "check the names of bucket and folder")
    refused(f"{gcs.url}/other/model.gguf", "no such checkpoint")
    content = store.read(WEIGHTS_NAME)
    store.delete(WEIGHTS_NAME)
    store.write("pytorch_model.bin", content or b"")
    refused(remote, "no safetensors weights", "save_pretrained")
    store.write("config.json", b"{")
    refused(remote, "JSON", "config.json")
    save_pretrained(tiny, tmp_path / "many", shard_bytes=20_000)
    many = upload(tmp_path / "many", f"{gcs.url}/many")
    shard = Store(many).keys("model-")[1]
    Store(many).delete(shard)
    refused(many, "shards of the checkpoint are missing", shard)


def test_local_directories_are_listed_once(tmp_path: Path):
    """A shard below the directory is found as well."""
    folder = Path(shutil.copytree(GOLDEN / "llama_bias", tmp_path / "model"))
    (folder / "part").mkdir()
    (folder / WEIGHTS_NAME).rename(folder / "part" / "a.safetensors")
    names = load_file(folder / "part" / "a.safetensors")
    index = {"weight_map": dict.fromkeys(names, "part/a.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found, expected = load_pretrained(folder), load_pretrained(GOLDEN / "llama_bias")
    np.testing.assert_array_equal(found.embed[...], expected.embed[...])
