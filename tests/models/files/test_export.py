"""Exports into buckets: the bytes of a local one, whole or not to be taken for one."""

import json
from pathlib import Path
from typing import Any

import pytest

from distillcache.models.checkpoint import checkpoint_dtype, load_pretrained, save_pretrained
from distillcache.models.config import ModelConfig
from distillcache.models.decoder import Decoder
from distillcache.models.files import export
from distillcache.models.files.export import generation_ids
from distillcache.schemas.errors import CheckpointError, StorageError
from distillcache.schemas.store.path import ObjectPath
from distillcache.schemas.store.store import Store
from tests.conftest import byte_tokenizer
from tests.models.conftest import GOLDEN, upload
from tests.models.files.test_hf import tokenizer_folder
from tests.models.test_checkpoint import assert_same_parameters, refused
from tests.servers.fixtures import Bucket


@pytest.mark.parametrize("shard_bytes", [20_000, 10**9])
def test_equals_a_local_export_byte_for_byte(shard_bytes: int, tiny: Decoder, gcs: Bucket, tmp_path: Path):
    tokenizer, url = tokenizer_folder(tmp_path), f"{gcs.url}/out"
    save_pretrained(tiny, tmp_path / "out", tokenizer_from=tokenizer, shard_bytes=shard_bytes)
    gcs.server.clear_requests()
    save_pretrained(tiny, url, tokenizer_from=upload(tokenizer, f"{gcs.url}/tokenizer"), shard_bytes=shard_bytes)
    local = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert {key: Store(url).read(key) for key in sorted(local)} == local
    assert sorted(local) == Store(url).keys()
    assert all(gcs.server.count("write", f"out/{name}") == 1 for name in local)


def test_an_own_export_is_replaced_and_anything_else_is_not(tiny: Decoder, tiny_biased: Decoder, gcs: Bucket):
    url = f"{gcs.url}/out"
    save_pretrained(tiny, url, shard_bytes=20_000)
    save_pretrained(tiny_biased, url)
    assert_same_parameters(load_pretrained(url), tiny_biased)
    assert Store(url).keys() == ["config.json", "model.safetensors"]
    Store(url).write("notes/mine.txt", b"mine")
    with pytest.raises(CheckpointError, match="not made by an export"):
        save_pretrained(tiny, url)
    with pytest.raises(CheckpointError, match="not made by an export"):
        save_pretrained(tiny, upload(GOLDEN / "llama_bias", f"{gcs.url}/foreign"))


def test_a_replaced_export_is_named(
    tiny: Decoder, tiny_biased: Decoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be another student, or by now the teacher of a cache."""
    caplog.set_level("INFO", "distillcache")
    save_pretrained(tiny, tmp_path / "out")
    assert "replacing" not in caplog.text
    save_pretrained(tiny_biased, tmp_path / "out")
    assert f"replacing the earlier export in {tmp_path / 'out'}" in caplog.text


def test_a_stopped_export_is_no_checkpoint_and_the_next_one_finishes_it(
    tiny: Decoder, tiny_biased: Decoder, gcs: Bucket, monkeypatch: pytest.MonkeyPatch
):
    """Stopped before each of its writes in turn; an earlier export lay there."""
    url = f"{gcs.url}/out"
    write, left = ObjectPath.write_bytes, 0

    def stopping(self: ObjectPath, value: bytes) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise StorageError("stopped")
        write(self, value)

    monkeypatch.setattr(ObjectPath, "write_bytes", stopping)
    for writes in range(1, 12):
        left = 99
        save_pretrained(tiny, url)
        left = writes
        try:
            save_pretrained(tiny_biased, url, shard_bytes=20_000)
        except StorageError:
            refused(url, "config.json is missing", "run it again")
            continue
        break
    assert writes > 4
    assert_same_parameters(load_pretrained(url), tiny_biased)


def test_nothing_is_written_where_no_config_means_the_decoder(
    tiny: Decoder, gcs: Bucket, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> dict[str, object]:
        raise CheckpointError("no config")

    monkeypatch.setattr(export, "config_to_hf", refuse)
    with pytest.raises(CheckpointError, match="no config"):
        save_pretrained(tiny, f"{gcs.url}/out")
    assert Store(gcs.url).keys() == []


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"eos_token_id": [2, 7], "pad_token_id": 7}, {"eos_token_id": [2, 7], "pad_token_id": 7}),
        ({"eos_token_id": 2, "bos_token_id": 1}, {"eos_token_id": 2, "bos_token_id": 1}),
        ({"eos_token_id": [2, 99], "pad_token_id": 61, "bos_token_id": None}, {}),  # beyond the vocabulary
        ({"eos_token_id": "x", "pad_token_id": True, "temperature": 0.6}, {}),
        ([], {}),
    ],
)
def test_config_has_the_ids_of_the_generation_config(stated: Any, expected: dict[str, Any]):
    assert generation_ids({"generation_config.json": json.dumps(stated).encode()}, 61) == expected


def test_an_export_pads_and_stops_as_its_source(tiny: Decoder, tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    byte_tokenizer().save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5], "pad_token_id": 5}))
    save_pretrained(tiny, tmp_path / "out", tokenizer_from=source)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == ([0, 5], 5)
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == (
        source / "generation_config.json"
    ).read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_of_a_checkpoint_is_that_of_its_tensors(tiny_config: ModelConfig, dtype: str, tmp_path: Path):
    save_pretrained(Decoder(tiny_config, dtype=dtype), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text()) | {"torch_dtype": "float32", "dtype": "float32"}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert checkpoint_dtype(tmp_path / "out") == dtype


def test_packed_weights_are_exported_as_their_config_says(tmp_path: Path):
    config = json.loads((GOLDEN / "deepseek_v3" / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert checkpoint_dtype(tmp_path) == "bfloat16"
