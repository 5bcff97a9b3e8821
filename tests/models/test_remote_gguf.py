"""GGUF files in a bucket against the same files on a local disk."""

from pathlib import Path

import gguf
import pytest

from models import remote_gguf
from models.checkpoint import load_pretrained, read_config, weights_digest
from models.tokenizer import load_tokenizer
from schemas.storage import Store
from tests.models.conftest import GOLDEN
from tests.models.test_checkpoint import assert_same_parameters
from tests.models.test_ggufs import refused, write_gguf
from tests.models.test_tokenizer import write_gguf as write_tokenizer_gguf
from tests.servers.fixtures import Bucket


def uploaded(file: Path, gcs: Bucket) -> str:
    Store(gcs.url).write(file.name, file.read_bytes())
    return f"{gcs.url}/{file.name}"


@pytest.mark.parametrize("first_bytes", [100, 2**24])
def test_equals_the_local_load(first_bytes: int, gcs: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A header that is longer than expected is read in steps."""
    monkeypatch.setattr(remote_gguf, "FIRST_BYTES", first_bytes)
    kind = gguf.GGMLQuantizationType.F16
    path = write_gguf(GOLDEN / "llama_linear", tmp_path / "model.gguf", kind=kind)
    url = uploaded(path, gcs)
    assert read_config(url) == read_config(path)
    assert_same_parameters(load_pretrained(url), load_pretrained(path))
    assert weights_digest(url) == weights_digest(path)


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
