"""GGUF files in a bucket against the same files on a local disk."""

from dataclasses import replace
from pathlib import Path

import gguf
import pytest

from distillcache.models.checkpoint import load_pretrained, read_config, save_pretrained, weights_digest
from distillcache.models.config import BlockKind, LayerGroup, ModelConfig, MoeConfig
from distillcache.models.decoder import Decoder
from distillcache.models.files.gguf import remote
from distillcache.models.text.tokenizer import load_tokenizer
from distillcache.schemas.store.store import Store
from tests.models.conftest import GOLDEN
from tests.models.files.gguf.test_file import parts_of, refused, write_gguf
from tests.models.files.gguf.test_translated import CASE_OF, folder_of, written
from tests.models.test_checkpoint import assert_same_parameters
from tests.models.text.test_tokenizer import write_gguf as write_tokenizer_gguf
from tests.servers.fixtures import Bucket


def uploaded(file: Path, gcs: Bucket) -> str:
    Store(gcs.url).write(file.name, file.read_bytes())
    return f"{gcs.url}/{file.name}"


@pytest.mark.parametrize("first_bytes", [100, 2**24])
def test_equals_the_local_load(first_bytes: int, gcs: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A header that is longer than expected is read in steps."""
    monkeypatch.setattr(remote, "FIRST_BYTES", first_bytes)
    kind = gguf.GGMLQuantizationType.F16
    path = write_gguf(GOLDEN / "llama_linear", tmp_path / "model.gguf", kind=kind)
    url = uploaded(path, gcs)
    assert read_config(url) == read_config(path)
    assert_same_parameters(load_pretrained(url), load_pretrained(path))
    assert weights_digest(url) == weights_digest(path)


def test_experts_are_read_one_by_one(gcs: Bucket, tiny_config: ModelConfig, tmp_path: Path):
    moe = MoeConfig(num_experts=3, top_k=2, expert_size=14)
    layers = (LayerGroup((BlockKind(moe=True),), 1),)
    save_pretrained(
        Decoder(replace(tiny_config, family="qwen3_moe", qk_norm="head", moe=moe, layers=layers)), tmp_path / "hf"
    )
    path = write_gguf(tmp_path / "hf", tmp_path / "model.gguf", architecture="qwen3moe")
    assert_same_parameters(load_pretrained(uploaded(path, gcs)), load_pretrained(path))


def test_tensors_that_are_made_of_others(gcs: Bucket, tmp_path: Path):
    """Their parts are fetched ahead, as are experts."""
    case = CASE_OF["qwen3_next"]
    path = written(case, folder_of(case, tmp_path / "hf"), tmp_path / "model.gguf")
    assert_same_parameters(load_pretrained(uploaded(path, gcs)), load_pretrained(path))


def test_a_model_in_parts(gcs: Bucket, tmp_path: Path):
    write_gguf(GOLDEN / "llama_linear", tmp_path / "model.gguf", split_max_tensors=12)
    parts = parts_of(tmp_path / "model.gguf")
    urls = [uploaded(part, gcs) for part in parts]
    assert len(urls) == 3
    assert_same_parameters(load_pretrained(urls[0]), load_pretrained(parts[0]))
    assert weights_digest(urls[0]) == weights_digest(parts[0])
    Store(gcs.url).delete(parts[2].name)
    refused(urls[0], parts[2].name, "missing")


def test_its_tokenizer(gcs: Bucket, tmp_path: Path):
    path = write_tokenizer_gguf(tmp_path / "tokenizer.gguf")
    assert load_tokenizer(uploaded(path, gcs)).digest == load_tokenizer(path).digest


def test_damaged_files(gcs: Bucket, tmp_path: Path):
    path = write_gguf(GOLDEN / "llama_linear", tmp_path / "model.gguf")
    url, content = uploaded(path, gcs), path.read_bytes()
    for kept in (4, 500, len(content) - 100):
        Store(gcs.url).write("model.gguf", content[:kept])
        refused(url, "truncated")
    Store(gcs.url).write("model.gguf", b"\0" * 100)
    refused(url, "not a GGUF file")
    Store(gcs.url).delete("model.gguf")
    refused(url, "no such checkpoint")
