"""Keys of tokenizer_config.json that change a text's tokens; the ids are those of transformers 5.24."""

import json
from pathlib import Path
from typing import Any

import pytest

from distillcache.cache_builder.build import build_cache
from distillcache.models.text.cache_tokenizer import cache_tokenizer
from distillcache.models.text.tokenizer import TextTokenizer, load_tokenizer
from distillcache.schemas.cache.segment import read_plan
from distillcache.schemas.errors import InputError
from distillcache.schemas.store.store import Store
from tests.conftest import build_config
from tests.models.text.test_tokenizer import byte_level, refused, save

EOS = {"eos_token": "<|end|>"}
TEXT = "a<|end|><think>"


def loaded(folder: Path, **config: Any) -> TextTokenizer:
    return load_tokenizer(save(byte_level(start=True), folder, tokenizer_config=EOS | config))


def test_special_tokens_are_split_where_the_config_says_so(tmp_path: Path) -> None:
    """A token that is not special is taken whole even then, and what the rule adds is added."""
    whole, split = loaded(tmp_path / "a"), loaded(tmp_path / "b", split_special_tokens=True)
    start, end, think = (whole.backend.token_to_id(each) for each in ("<|start|>", "<|end|>", "<think>"))
    assert whole.encode(TEXT) == [start, *whole.backend.encode("a", add_special_tokens=False).ids, end, think]
    spelled = [split.backend.token_to_id(letter) for letter in "a<|end|>"]
    assert split.encode(TEXT) == [start, *spelled, think]
    assert split.encode_documents([TEXT]) == [[*split.encode(TEXT), end]]
    assert [int(i) for run in split.encode_long_document(TEXT) for i in run] == [*split.encode(TEXT), end]
    assert split.encode_spans([TEXT], [[]])[0][0] == [*spelled, think]
    assert split.digest != whole.digest
    assert loaded(tmp_path / "c", split_special_tokens=False).digest == whole.digest


def test_a_cache_knows_the_tokenizer_that_split(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_bytes((teacher / "tokenizer.json").read_bytes())
    config = json.loads((teacher / "tokenizer_config.json").read_text()) | {"split_special_tokens": True}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    spec = build_config(tmp_path / "cache", teacher, corpus)
    build_cache(spec.model_copy(update={"data": spec.data.model_copy(update={"tokenizer": str(tokenizer)})}))
    store = Store(str(tmp_path / "cache"))
    plan = read_plan(store, "0000")
    assert plan is not None
    assert cache_tokenizer(store, plan).splits_special


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"split_special_tokens": "true"}, "true or false"),
        ({"split_special_tokens": None}, "true or false"),
        ({"add_prefix_space": True}, "add_prefix_space"),
    ],
)
def test_other_tokens_than_those_of_tokenizer_json_are_refused(config: dict[str, Any], named: str, tmp_path: Path):
    refused(save(byte_level(), tmp_path, tokenizer_config=EOS | config), "asks for other tokens", named)


@pytest.mark.parametrize(
    "config", [{"add_prefix_space": False}, {"add_prefix_space": None}, {"add_bos_token": True, "add_eos_token": True}]
)
def test_keys_that_change_nothing_are_no_reason_to_refuse(config: dict[str, Any], tmp_path: Path) -> None:
    assert loaded(tmp_path, **config).encode("a") == loaded(tmp_path).encode("a")


@pytest.mark.parametrize(("model_type", "is_refused"), [("mistral", True), ("llama", False), (None, True)])
def test_a_cut_that_was_mended_elsewhere(
    model_type: str | None, is_refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distillcache.models.text.tokenizer_settings.LARGE", 10)
    files: dict[str, Any] = {} if model_type is None else {"config": {"model_type": model_type}}
    folder = save(byte_level(), tmp_path, tokenizer_config=EOS | {"fix_mistral_regex": True}, **files)
    if is_refused:
        with pytest.raises(InputError, match="fix_mistral_regex"):
            load_tokenizer(folder)
    else:
        assert load_tokenizer(folder).eos_id == 0
