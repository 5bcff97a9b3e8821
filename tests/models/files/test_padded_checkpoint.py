"""Checkpoints with more rows in embedding and head than the config has ids: those rows are left out."""

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from distillcache.models.checkpoint import load_pretrained, save_pretrained
from distillcache.models.config import ModelConfig
from distillcache.models.decoder import Decoder
from distillcache.models.files.packed import without_padding
from distillcache.models.files.tensors import Layout, whole
from distillcache.schemas.errors import CheckpointError
from tests.models.conftest import randomized, upload
from tests.models.files.test_packed import Stored
from tests.models.test_checkpoint import assert_same_parameters
from tests.servers.fixtures import Bucket

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def with_rows(plain: Path, more: int, names: tuple[str, ...]) -> Path:
    """The checkpoint with `more` rows in these matrices (fewer, if negative); new ones hold NaN: none is to be read."""
    target = plain.parent / "padded"
    target.mkdir()
    (target / "config.json").write_bytes((plain / "config.json").read_bytes())
    tensors = load_file(plain / "model.safetensors")
    for name in names:
        old = tensors[name]
        rows = np.full((max(more, 0), old.shape[1]), np.nan, old.dtype)
        tensors[name] = np.concatenate([old[: len(old) + min(more, 0)], rows])
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("tied", "names"),
    [(True, (EMBED,)), (False, (EMBED, HEAD)), (False, (EMBED,)), (False, (HEAD,))],
    ids=["tied", "both", "embedding alone", "head alone"],
)
def test_rows_behind_the_vocabulary_are_left_out(
    tied: bool, names: tuple[str, ...], tiny_config: ModelConfig, tmp_path: Path, console: pytest.CaptureFixture[str]
):
    decoder = randomized(Decoder(replace(tiny_config, tie_embeddings=tied)))
    save_pretrained(decoder, tmp_path / "plain")
    loaded = load_pretrained(with_rows(tmp_path / "plain", 3, names))
    said = console.readouterr().err
    assert said.count("note: ") == 1
    for name in names:
        assert f"{name} has 64 rows" in said
    assert_same_parameters(decoder, loaded)
    tokens = jnp.arange(61)[None]
    np.testing.assert_array_equal(loaded(tokens).logits, decoder(tokens).logits)
    save_pretrained(loaded, tmp_path / "export")
    exported, plain = (load_file(tmp_path / each / "model.safetensors") for each in ("export", "plain"))
    assert exported.keys() == plain.keys()
    for name, value in plain.items():
        np.testing.assert_array_equal(exported[name], value)
    assert json.loads((tmp_path / "export/config.json").read_text())["vocab_size"] == 61


def test_a_file_in_a_bucket_is_cut_as_a_local_one_is(tiny: Decoder, gcs: Bucket, tmp_path: Path):
    save_pretrained(tiny, tmp_path / "plain")
    padded = with_rows(tmp_path / "plain", 3, (EMBED,) if tiny.config.tie_embeddings else (EMBED, HEAD))
    assert_same_parameters(tiny, load_pretrained(upload(padded, f"{gcs.url}/padded")))


@pytest.mark.parametrize("head_padded", [False, True])
def test_a_tied_head_that_is_stored_too_is_compared_without_padding(
    head_padded: bool, tiny_config: ModelConfig, tmp_path: Path
):
    decoder = randomized(Decoder(replace(tiny_config, tie_embeddings=True)))
    save_pretrained(decoder, tmp_path / "plain")
    tensors = load_file(tmp_path / "plain/model.safetensors")
    save_file(tensors | {HEAD: tensors[EMBED].copy()}, tmp_path / "plain/model.safetensors", {"format": "pt"})
    padded = with_rows(tmp_path / "plain", 3, (EMBED, HEAD) if head_padded else (EMBED,))
    assert_same_parameters(decoder, load_pretrained(padded))


def test_fewer_rows_are_refused_with_both_sizes(tiny: Decoder, tmp_path: Path):
    save_pretrained(tiny, tmp_path / "plain")
    names = (EMBED,) if tiny.config.tie_embeddings else (EMBED, HEAD)
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(with_rows(tmp_path / "plain", -4, names))
    for text in (EMBED, "[57, ", "[61, ", "set vocab_size to 57"):
        assert text in str(caught.value)


def test_padding_is_not_read_and_other_shapes_stay(tiny_config: ModelConfig):
    hidden = tiny_config.hidden_size
    tensors = {"embed": np.zeros((70, hidden), np.float32), "head": np.zeros((70, hidden + 1), np.float32)}
    source = Stored(tensors)
    cut = without_padding(source, Layout(lambda kind: [], embed="embed", head="head"), tiny_config)
    assert cut.shapes == {"embed": (61, hidden), "head": (70, hidden + 1)}
    assert cut.read("embed").shape == (61, hidden)
    assert source.got == [("embed", whole((61, hidden)))]
