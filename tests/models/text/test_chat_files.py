"""Chat templates and special tokens of tokenizer folders: golden values of transformers for each way to name them."""

import json
from pathlib import Path
from typing import Any

import pytest

from distillcache.cache_builder.text.chat import written_chats
from distillcache.models.text.tokenizer import load_tokenizer, tokenizer_files
from distillcache.schemas.config import DataConfig
from distillcache.schemas.errors import ConfigError, InputError
from distillcache.schemas.store.store import Store
from tests.servers.fixtures import Bucket

GOLDEN = Path(__file__).parents[2] / "golden" / "chat"
FOLDER_TOKENIZER = GOLDEN / "folder_tokenizer.json"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "folders.json").read_text())}
DATA = DataConfig(path="chats.jsonl", format="chat")


def write_folder(folder: Path, files: dict[str, Any]) -> Path:
    (folder / "tokenizer.json").write_bytes(FOLDER_TOKENIZER.read_bytes())
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_chat_is_what_transformers_makes_of_it(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    tokenizer = load_tokenizer(write_folder(tmp_path, case["files"]))
    if case.get("error"):
        with pytest.raises((InputError, ConfigError)):
            written_chats(case["record"], tokenizer, DATA, "here")
        return
    ((text, spans),) = written_chats(case["record"], tokenizer, DATA, "here")
    assert text == case["text"]
    ((ids, said),) = tokenizer.encode_spans([text], [spans])
    assert ids == case["ids"]
    if tokenizer.chat is not None and tokenizer.chat.marks_assistant(case["record"].get("tools")):
        assert "".join(map(str, map(int, said))) == case["mask"]


@pytest.mark.parametrize("name", ["file and folder, tools", "config mapping, tools", "map alone", "extra mapping"])
def test_an_exported_tokenizer_writes_the_same_chats(tmp_path: Path, name: str) -> None:
    case, target = CASES[name], tmp_path / "export"
    (tmp_path / "source").mkdir()
    files, _ = tokenizer_files(write_folder(tmp_path / "source", case["files"]))
    target.mkdir()
    for file, content in files.items():
        (target / file).write_bytes(content)
    ((text, _),) = written_chats(case["record"], load_tokenizer(target), DATA, "here")
    assert text == case["text"]


def test_a_processors_template_is_read_where_there_is_no_other(tmp_path: Path) -> None:
    config, turns = {"eos_token": "<eos>"}, CASES["config text"]["files"]["tokenizer_config.json"]["chat_template"]
    files: dict[str, Any] = {"tokenizer_config.json": config, "chat_template.json": {"chat_template": turns}}
    tokenizer = load_tokenizer(write_folder(tmp_path, files))
    assert written_chats(CASES["config text"]["record"], tokenizer, DATA, "here")[0][0] == CASES["config text"]["text"]


@pytest.mark.parametrize("entry", [3, [{"name": "default"}], {"default": 3}, ["text"]])
def test_an_entry_that_is_no_template_is_named(tmp_path: Path, entry: object) -> None:
    folder = write_folder(tmp_path, {"tokenizer_config.json": {"eos_token": "<eos>", "chat_template": entry}})
    with pytest.raises(InputError, match="is not a text"):
        load_tokenizer(folder)


def test_a_template_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"tokenizer_config.json": {"eos_token": "<eos>"}})
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match="a chat template cannot be read"):
        load_tokenizer(folder)


def test_a_declared_token_that_the_vocabulary_lacks_is_named_where_a_chat_has_it(tmp_path: Path) -> None:
    config = {"eos_token": "<eos>", "pad_token": "<lost>", "chat_template": "{{ messages[0].content }}"}
    tokenizer = load_tokenizer(write_folder(tmp_path, {"tokenizer_config.json": config}))
    assert written_chats({"messages": [{"role": "user", "content": "x"}]}, tokenizer, DATA, "here") == [("x", [])]
    with pytest.raises(InputError, match="<lost>"):
        written_chats({"messages": [{"role": "user", "content": "<lost>"}]}, tokenizer, DATA, "here")


def test_a_gguf_has_a_template_for_tools(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    for key, value in {"model": "gpt2", "pre": "smollm"}.items():
        writer.add_string(f"tokenizer.ggml.{key}", value)
    writer.add_array("tokenizer.ggml.tokens", ["<eos>", "D", "U"])
    writer.add_array("tokenizer.ggml.token_type", [3, 1, 1])
    writer.add_uint32("tokenizer.ggml.eos_token_id", 0)
    writer.add_chat_template([{"name": "default", "template": "D"}, {"name": "tool_use", "template": "U"}])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = load_tokenizer(tmp_path / "model.gguf")
    record = {"messages": [{"role": "user", "content": "x"}]}
    assert written_chats(record, tokenizer, DATA, "here") == [("D", [])]
    assert written_chats({**record, "tools": [{"name": "f"}]}, tokenizer, DATA, "here") == [("U", [])]


@pytest.mark.parametrize("name", ["file and folder, tools", "folder's default alone", "map alone"])
def test_a_folder_in_a_bucket_is_read_likewise(name: str, gcs: Bucket, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, CASES[name]["files"])
    store = Store(f"{gcs.url}/{name}".replace(" ", "_").replace(",", "").replace("'", ""))
    for file in folder.rglob("*.*"):
        store.write(str(file.relative_to(folder)), file.read_bytes())
    ((text, _),) = written_chats(CASES[name]["record"], load_tokenizer(store.url), DATA, "here")
    assert text == CASES[name]["text"]


@pytest.mark.parametrize(("flags", "kept"), [(None, True), ({}, True), ({"lstrip": True, "rstrip": True}, False)])
def test_a_token_declared_in_two_ways_is_found_as_the_config_says(
    flags: dict[str, bool] | None, kept: bool, tmp_path: Path
) -> None:
    """As in transformers 5.24: `added_tokens_decoder` counts. The spaces beside such a token stayed in the rows."""
    declared = json.loads(FOLDER_TOKENIZER.read_text())["added_tokens"]
    stored = next(each for each in declared if each["content"] == "<|end|>")
    config: dict[str, Any] = {"eos_token": "<|end|>", "chat_template": "{{ messages[0].content }}"}
    if flags is not None:
        config["added_tokens_decoder"] = {str(stored.pop("id")): {**stored, **flags}}
    tokenizer = load_tokenizer(write_folder(tmp_path, {"tokenizer_config.json": config}))
    spaced, tight = (ids for ids, _ in tokenizer.encode_spans(["x <|end|> x", "x<|end|>x"], [[], []]))
    assert (spaced != tight) is kept
    assert tokenizer.eos_id in tight
