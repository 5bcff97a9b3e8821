"""Configs of released checkpoints, as public repositories hold them, and what each gives; docs/models.md lists them.

published.json has for each: what it gives, its blocks, its parameters as we count them and in billions as its authors
do, the file that holds its config (repository, commit, path), and every key of it that may change the decoder, apart
from towers. A config may be `like` another, with what differs; lists of many blocks are runs. `tensors`: the digest of
the names in its index of safetensors, by their newest spelling, packed ones by what they become, without towers.
"""

import hashlib
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from distillcache.models.config import ModelConfig
from distillcache.models.decoder import abstract_decoder
from distillcache.models.families import config_from_hf, config_to_hf, layout_of
from distillcache.models.files.tensors import tensor_slots
from distillcache.schemas.errors import CheckpointError

FILE = Path("config.json")
PUBLISHED = {entry["name"]: entry for entry in json.loads(Path(__file__).with_name("published.json").read_text())}
LOADED = [name for name, entry in PUBLISHED.items() if "blocks" in entry]
REFUSED = [name for name in PUBLISHED if name not in LOADED]
DOCS = Path(__file__).parents[3] / "docs" / "models.md"
SAVED = {"do_sample": True, "min_length": 0, "forced_bos_token_id": None, "suppress_tokens": None, "top_k": 50}
SAVED |= {"bos_token_id": 1, "eos_token_id": [1, 2], "initializer_range": 0.02, "torch_dtype": "bfloat16"}


def published(name: str) -> dict[str, Any]:
    """The config of a checkpoint."""
    return _opened(_compact(name))


def _compact(name: str) -> dict[str, Any]:
    entry = PUBLISHED[name]
    return _merged(_compact(entry["like"]), entry["config"]) if "like" in entry else entry["config"]


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in base.items() if own.get(key) != "absent"}
    for key, value in own.items():
        inner = isinstance(value, dict) and isinstance(found.get(key), dict) and "runs" not in value
        if value != "absent":
            found[key] = _merged(found[key], value) if inner else value
    return found


def _opened(value: Any) -> Any:
    if isinstance(value, dict) and "runs" in value:
        return [entry for count, entry in value["runs"] for _ in range(count)] * value.get("times", 1)
    return {key: _opened(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _blocks(config: ModelConfig) -> str:
    """The number of blocks of each kind: their mixer, window or chunk, and whether they have experts."""
    found = Counter(
        " ".join(
            [kind.mixer]
            + [f"{kind.window}"] * (kind.window is not None)
            + [f"chunks {kind.chunk}"] * (kind.chunk is not None)
            + ["experts"] * kind.moe
        )
        for kind in config.kinds
    )
    return ", ".join(f"{count} {kind}" for kind, count in found.items())


@pytest.mark.parametrize("name", LOADED)
def test_a_published_config_is_read(name: str):
    entry, raw = PUBLISHED[name], published(name)
    found = config_from_hf(raw, FILE)
    text = raw.get("text_config", raw)
    assert _blocks(found) == entry["blocks"]
    assert (found.hidden_size, found.num_heads) == (
        text["hidden_size"],
        text.get("num_attention_heads", found.num_heads),
    )
    assert entry["gives"] == ("teacher only" if found.has_joined_blocks else "loads")
    assert config_from_hf(raw | SAVED | {"new_trick": None}, FILE) == found
    assert config_from_hf(config_to_hf(found, "bfloat16"), FILE).layers == found.layers


@pytest.mark.parametrize("name", [name for name in LOADED if "tensors" in PUBLISHED[name]])
def test_the_tensors_of_a_published_checkpoint_have_the_names_that_are_read(name: str):
    config = config_from_hf(published(name), FILE)
    names = sorted({slot.name for slot in tensor_slots(config, layout_of(config))})
    assert hashlib.sha256("\n".join(names).encode()).hexdigest().startswith(PUBLISHED[name]["tensors"])


@pytest.mark.parametrize("name", REFUSED)
def test_a_published_config_is_refused_by_name(name: str):
    with pytest.raises(CheckpointError) as error:
        config_from_hf(published(name), FILE)
    assert PUBLISHED[name]["says"] in str(error.value)


@pytest.mark.parametrize("name", LOADED)
def test_what_transformers_saves_of_a_published_config_means_the_same(name: str):
    """Of classes with defaults of their own: `save_pretrained` writes keys anew."""
    mapping = pytest.importorskip(
        "transformers", reason="transformers is not installed (extra `parity`)"
    ).CONFIG_MAPPING
    raw = published(name)
    if (
        raw["model_type"] not in mapping or raw["model_type"] == "kimi_k25"
    ):  # whose class wants sizes of its vision tower
        pytest.skip("transformers has no config of this model_type")
    saved = mapping[raw["model_type"]].from_dict(published(name)).to_json_string()
    assert without_mtp(config_from_hf(json.loads(saved), FILE)) == without_mtp(config_from_hf(raw, FILE))


def without_mtp(config: ModelConfig) -> ModelConfig:
    """The decoder alone: transformers drops some keys of what is left out."""
    return replace(config, mtp_layers=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADED)
def test_a_published_model_has_its_number_of_parameters(name: str):
    """The authors' number is rounded, and may count what is left out: multi-token prediction."""
    entry = PUBLISHED[name]
    shapes = jax.tree.leaves(abstract_decoder(config_from_hf(published(name), FILE))[1])
    assert sum(math.prod(leaf.shape) for leaf in shapes) == entry["parameters"]
    if "published" in entry:
        assert abs(entry["parameters"] / 1e9 / entry["published"] - 1) < 0.07


def _table() -> str:
    """The table of docs/models.md."""
    read: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    for name, entry in PUBLISHED.items():
        family, mark = published(name)["model_type"], " (teacher only)" if entry["gives"] == "teacher only" else ""
        if name in LOADED:
            read.setdefault(family, []).append(name + mark)
        else:
            why = "other families" if entry["says"] == family else f"`{entry['says']}`"
            refused.setdefault(why, []).append(name)
    rows = [f"| `{family}` | {', '.join(names)} |" for family, names in sorted(read.items())]
    rows += [f"| refused: {why} | {', '.join(names)} |" for why, names in sorted(refused.items())]
    return "\n".join(["| `model_type` | checkpoints |", "| --- | --- |", *rows])


def test_the_docs_list_what_published_checkpoints_give():
    assert _table() in DOCS.read_text()
