"""Checkpoints of others: weights that are not finite, headers that lie about sizes, JSON that is none."""

import contextlib
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from distillcache.models.checkpoint import load_pretrained
from distillcache.models.families import config_from_hf
from distillcache.models.files.fill import count_non_finite
from distillcache.models.files.hf import read_json
from distillcache.models.files.maxtext.orbax import OrbaxArrays
from distillcache.models.files.safetensors import MappedSafetensors
from distillcache.schemas.errors import CheckpointError
from tests.models.conftest import GOLDEN
from tests.models.test_checkpoint import assert_same_parameters, refused


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "llama_tied", tmp_path / "model"))


def rewrite(folder: Path, change: Any) -> None:
    tensors = {name: value.copy() for name, value in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@given(st.lists(st.sampled_from([0.0, -1.5, 3e38, 1e-40, np.nan, np.inf, -np.inf]), max_size=20), st.booleans())
def test_counts_what_numpy_counts(values: list[float], wide: bool):
    for kind in (np.float32, ml_dtypes.bfloat16, np.float64) if wide else (np.float32, ml_dtypes.bfloat16):
        found = np.array(values, kind)
        assert count_non_finite(found) == np.count_nonzero(~np.isfinite(found.astype(np.float64)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
def test_weights_that_are_not_finite_are_named_and_counted(saved: Path, name: str, bad: float):
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors[name].reshape(-1)[[0, 5, 9]] = bad

    rewrite(saved, spoil)
    size = load_file(saved / "model.safetensors")[name].size
    refused(saved, "not finite", name, f"3 of {size:,} numbers are NaN or infinite")


def test_numbers_beyond_a_narrower_dtype_are_no_damage(saved: Path):
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.norm.weight"][3] = 1e6

    rewrite(saved, spoil)
    assert load_pretrained(saved, jnp.float32) is not None
    with pytest.raises(CheckpointError, match="too large for the dtype"):
        load_pretrained(saved, jnp.float16)


def test_a_tied_checkpoint_that_stores_the_head_alone(saved: Path):
    expected = load_pretrained(saved)
    rewrite(saved, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    assert_same_parameters(load_pretrained(saved), expected)


def test_a_tied_checkpoint_without_either(saved: Path):
    rewrite(saved, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    refused(saved, "missing", "model.embed_tokens.weight")


def test_an_untied_checkpoint_without_its_head_is_told_of_the_switch(saved: Path):
    config = json.loads((saved / "config.json").read_text()) | {"tie_word_embeddings": False}
    (saved / "config.json").write_text(json.dumps(config))
    refused(saved, "missing", "lm_head.weight", "set tie_word_embeddings to true")


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS: list[Any] = [
    {"x": F32 | {"shape": [2**40]}},
    {"x": F32 | {"shape": [2**40, 0, 2]}},
    {"x": F32 | {"shape": [-2, -1]}},
    {"x": F32 | {"shape": [2.0]}},
    {"x": F32 | {"shape": [True, 2]}},
    {"x": F32 | {"shape": "2"}},
    {"x": F32 | {"shape": [1] * 70 + [2]}},
    {"x": F32 | {"data_offsets": [0, 2**62]}},
    {"x": F32 | {"data_offsets": [-8, 0]}},
    {"x": F32 | {"data_offsets": [8, 0]}},
    {"x": F32 | {"data_offsets": [0.0, 8.0]}},
    {"x": F32 | {"data_offsets": [0, 10**30]}},
    {"x": F32 | {"data_offsets": [0]}},
    {"x": F32, "y": F32},
    {"x": F32 | {"dtype": ["F32"]}},
    {"x": None},
    [],
    3,
]


@pytest.mark.parametrize("header", HEADERS, ids=str)
def test_headers_that_lie(header: Any, tmp_path: Path):
    text = json.dumps(header).encode()
    check_refused(tmp_path, struct.pack("<Q", len(text)) + text + bytes(8))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**9) + b"{}",
        struct.pack("<Q", 4) + b"\xff\xfe{}",
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        struct.pack("<Q", 20_014) + b'{"x":{"shape":' + b"9" * 20_000,
        struct.pack("<Q", 16) + b'{"x": 1, "x": 2}',
    ],
    ids=["empty", "short", "2^63", "1e9", "no UTF-8", "nested", "digits", "twice"],
)
def test_files_that_are_no_safetensors(data: bytes, tmp_path: Path):
    check_refused(tmp_path, data)


def check_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged, truncated or not a safetensors file"):
        MappedSafetensors(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[1]",
        b"\xff{}",
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b'{"hidden_size": ' + b"9" * 10_000 + b"}",
        b'{"model_type": "llama", "model_type": "qwen2"}',
    ],
    ids=["empty", "list", "no UTF-8", "nested list", "nested object", "digits", "twice"],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_no_config(saved: Path, name: str, text: bytes):
    if name != "config.json":
        (saved / "model.safetensors").unlink()
    (saved / name).write_bytes(text)
    refused(saved, name)


def test_a_key_that_stands_twice_with_one_value_is_read(saved: Path):
    text = (saved / "config.json").read_text().strip()
    (saved / "config.json").write_text(text.removesuffix("}") + ', "model_type": "llama"}')
    assert load_pretrained(saved) is not None


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/../../b", "..", ""])
def test_an_index_names_no_file_outside_its_folder(saved: Path, name: str):
    (saved / "model.safetensors").rename(saved.parent / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": name}, "metadata": {"total_size": 2**70}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(saved, "outside its folder")


WRONG: list[Any] = ["x", [], {}, True, -1, 1.5, 2**70, 10**400, float("nan"), float("inf"), [[]], {"a": None}]


@pytest.mark.parametrize(
    "name", ["llama_llama3", "gemma3", "deepseek_v3", "olmo3", "qwen2_moe", "llama4", "gpt_oss", "phi3"]
)
def test_any_value_under_any_key_ends_in_an_error_of_ours(name: str, tmp_path: Path):
    """Or is read, where it is harmless."""
    raw = json.loads((GOLDEN / name / "config.json").read_text())
    for place in (raw, raw.get("text_config", {}), raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}):
        for key in list(place):
            before = place[key]
            for value in WRONG:
                place[key] = value
                with contextlib.suppress(CheckpointError):
                    config_from_hf(raw, tmp_path / "config.json")
            place[key] = before


@pytest.mark.parametrize("keys", [["a/../../b"], ["a", "../../b"], [".."], ["/etc"], [""]])
def test_names_of_an_orbax_checkpoint_lead_nowhere_else(keys: list[str], tmp_path: Path):
    leaf = {"key_metadata": [{"key": key} for key in keys], "value_metadata": {}}
    (tmp_path / "_METADATA").write_text(json.dumps({"tree_metadata": {"leaf": leaf}}))
    with pytest.raises(CheckpointError, match="not an Orbax checkpoint"):
        OrbaxArrays(tmp_path)


@pytest.mark.parametrize("text", ["[" * 200_000, "3", "{}", '{"tree_metadata": 3}', '{"tree_metadata": {"a": {}}}'])
def test_metadata_that_is_no_orbax_tree(text: str, tmp_path: Path):
    (tmp_path / "_METADATA").write_text(text)
    with pytest.raises(CheckpointError, match="not an Orbax checkpoint"):
        OrbaxArrays(tmp_path)


def test_a_nan_is_no_key_given_twice(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"factor": NaN}')
    assert list(read_json(tmp_path / "config.json")) == ["factor"]
