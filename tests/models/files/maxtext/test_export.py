"""Exports for MaxText: read back, and in the tree that MaxText's own converter makes of the HF export."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from distillcache.models.checkpoint import load_pretrained, save_pretrained
from distillcache.models.config import BlockKind, LayerGroup, ModelConfig
from distillcache.models.decoder import Decoder
from distillcache.models.files.maxtext import export
from distillcache.models.files.maxtext.export import maxtext_tree, save_maxtext
from distillcache.models.text.tokenizer import load_tokenizer
from distillcache.schemas.errors import CheckpointError, ConfigError
from tests.models.conftest import GOLDEN
from tests.models.files.maxtext.test_checkpoint import FAMILIES, maxtext_params
from tests.models.files.test_hf import tokenizer_folder
from tests.models.test_checkpoint import assert_same_parameters


@pytest.mark.parametrize("name", FAMILIES)  # most of them are slow
def test_the_tree_is_that_of_maxtexts_converter(name: str):
    decoder = load_pretrained(GOLDEN / name, dtype="float32")
    tree = maxtext_tree(decoder)["params"]["params"]
    found = {".".join(part.key for part in path): value for path, value in jax.tree.leaves_with_path(tree)}
    expected = maxtext_params(GOLDEN / name)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], np.asarray(value, np.float32), rtol=1e-6, err_msg=key)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_is_read_back(dtype: str, tiny_config: ModelConfig, tmp_path: Path):
    decoder = Decoder(replace(tiny_config, head_dim=16, tie_embeddings=True), dtype=dtype)  # the root of 16 is exact
    save_maxtext(decoder, tmp_path / "out", tokenizer_from=tokenizer_folder(tmp_path))
    assert_same_parameters(load_pretrained(tmp_path / "out"), decoder)
    assert load_tokenizer(tmp_path / "out").digest == load_tokenizer(tmp_path / "tokenizer").digest
    with pytest.raises(CheckpointError, match="target of an export exists"):
        save_maxtext(decoder, tmp_path / "out")


def test_what_maxtext_has_not_is_refused(tiny_config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(CheckpointError, match="no equivalent of some"):
        save_maxtext(Decoder(replace(tiny_config, mlp_bias=True, qkv_bias=True, output_bias=True)), tmp_path / "biased")
    with pytest.raises(CheckpointError, match="is not supported"):
        save_maxtext(load_pretrained(GOLDEN / "olmoe"), tmp_path / "olmoe")
    with pytest.raises(CheckpointError, match="not written"):
        save_maxtext(load_pretrained(GOLDEN / "gemma2"), tmp_path / "gemma")
    with pytest.raises(ConfigError, match="local disk"):
        save_maxtext(Decoder(tiny_config), "gs://bucket/out")
    kinds = (LayerGroup((BlockKind(moe=True),), 1), LayerGroup((BlockKind(),), 1))
    moe = load_pretrained(GOLDEN / "qwen3_moe_plain").config
    with pytest.raises(CheckpointError, match="one kind only"):
        save_maxtext(Decoder(replace(moe, layers=kinds)), tmp_path / "mixed")

    def missing(*_: object) -> None:
        raise ConfigError("writing MaxText's checkpoints needs Orbax", {}, "install it")

    monkeypatch.setattr(export, "_write_orbax", missing)
    with pytest.raises(ConfigError, match="needs Orbax"):
        save_maxtext(Decoder(tiny_config), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save_pretrained(Decoder(tiny_config), tmp_path / "out")
