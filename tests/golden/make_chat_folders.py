"""Golden tokenizer folders: chats by transformers, for each way in which a folder names a template or a token.

    python tests/golden/make_chat_folders.py        (needs transformers and jinja2; written with transformers 5.24)

Every case is a folder's files beside one tokenizer.json, a record, and transformers' text, token ids and assistant
mask of it, or `"error"` where it refuses. `<bos>`, `<eos>`, `<img>` and `<own>` are plain entries of the vocabulary:
only the files beside tokenizer.json say that they are special.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from make_chat import SPECIAL
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

FOLDER = Path(__file__).parent / "chat"
DECLARED = ("<bos>", "<eos>", "<img>", "<own>")

TURNS = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '<|end|>' }}{% endfor %}"
NAMED = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ image_token }}|" + TURNS
TOOLS = "{% for t in tools or [] %}{{ '\n' ~ (t | tojson) }}{% endfor %}" + TURNS
CALLS = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content ~ '<own>' }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)

HELLO = [{"role": "user", "content": "Hi <own>"}, {"role": "assistant", "content": "Ho"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": None}}}}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": None}}}]}
TEXT_CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]}
PLAIN = {"eos_token": "<eos>"}


def _template(**config: Any) -> dict[str, Any]:
    return {"tokenizer_config.json": {**PLAIN, **config}, "chat_template.jinja": NAMED}


def _token(content: str) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


def _decoded(content: str) -> dict[str, Any]:
    return {**_token(content), "special": True}


LIST = [{"name": "default", "template": "D" + TURNS}, {"name": "tool_use", "template": "U" + TOOLS}]
BY_NAME = {"default": "D" + TURNS, "tool_use": "U" + TOOLS}
CONFIG, JINJA, MORE = "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates"

# Name -> the folder's files, and the record's tools where it has some.
FOLDERS: dict[str, tuple[dict[str, Any], Any]] = {
    "config text": ({CONFIG: {**PLAIN, "chat_template": "C" + TURNS}}, None),
    "config text, tools": ({CONFIG: {**PLAIN, "chat_template": "C" + TOOLS}}, [TOOL]),
    "config list": ({CONFIG: {**PLAIN, "chat_template": LIST}}, None),
    "config list, tools": ({CONFIG: {**PLAIN, "chat_template": LIST}}, [TOOL]),
    "config mapping": ({CONFIG: {**PLAIN, "chat_template": BY_NAME}}, None),
    "config mapping, tools": ({CONFIG: {**PLAIN, "chat_template": BY_NAME}}, [TOOL]),
    "config mapping of tool_use": ({CONFIG: {**PLAIN, "chat_template": {"tool_use": "U" + TOOLS}}}, [TOOL]),
    "config mapping without default": ({CONFIG: {**PLAIN, "chat_template": {"tool_use": "U" + TOOLS}}}, None),
    "config null": ({CONFIG: {**PLAIN, "chat_template": None}}, None),
    "file over config": ({CONFIG: {**PLAIN, "chat_template": "C" + TURNS}, JINJA: "J" + TURNS}, None),
    "file over list, tools": ({CONFIG: {**PLAIN, "chat_template": LIST}, JINJA: "J" + TOOLS}, [TOOL]),
    "file and folder": ({CONFIG: PLAIN, JINJA: "J" + TURNS, f"{MORE}/tool_use.jinja": "A" + TOOLS}, None),
    "file and folder, tools": ({CONFIG: PLAIN, JINJA: "J" + TOOLS, f"{MORE}/tool_use.jinja": "A" + TOOLS}, [TOOL]),
    "file and folder's default": ({CONFIG: PLAIN, JINJA: "J" + TURNS, f"{MORE}/default.jinja": "A" + TURNS}, None),
    "folder's default alone": ({CONFIG: PLAIN, f"{MORE}/default.jinja": "A" + TURNS}, None),
    "folder's default over config": (
        {CONFIG: {**PLAIN, "chat_template": "C" + TURNS}, f"{MORE}/default.jinja": "A" + TURNS},
        None,
    ),
    "folder's tool_use over config": (
        {CONFIG: {**PLAIN, "chat_template": "C" + TURNS}, f"{MORE}/tool_use.jinja": "A" + TURNS},
        None,
    ),
    "folder of others": ({CONFIG: PLAIN, JINJA: "J" + TOOLS, f"{MORE}/rag.jinja": "R" + TOOLS}, [TOOL]),
    "empty file": ({CONFIG: {**PLAIN, "chat_template": "C" + TURNS}, JINJA: ""}, None),
    "map alone": ({**_template(), "special_tokens_map.json": {"bos_token": "<bos>", "eos_token": "<eos>"}}, None),
    "map of mappings": ({**_template(), "special_tokens_map.json": {"bos_token": _token("<bos>")}}, None),
    "map over config": ({**_template(bos_token="<own>"), "special_tokens_map.json": {"bos_token": "<bos>"}}, None),
    "map's null over config": ({**_template(pad_token="<own>"), "special_tokens_map.json": {"pad_token": None}}, None),
    "map beside a decoder": (
        {
            **_template(added_tokens_decoder={"256": _decoded("<bos>")}),
            "special_tokens_map.json": {"bos_token": "<bos>"},
        },
        None,
    ),
    "map strips": (
        {**_template(), "special_tokens_map.json": {"pad_token": {**_token("<own>"), "lstrip": True, "rstrip": True}}},
        None,
    ),
    "config strips": (_template(pad_token={"__type": "AddedToken", **_token("<own>"), "lstrip": True}), None),
    "config's image over the map's": (
        {**_template(image_token="<img>"), "special_tokens_map.json": {"image_token": "<own>"}},
        None,
    ),
    "map's image over the config's typed one": (
        {
            **_template(image_token={"__type": "AddedToken", **_token("<img>")}),
            "special_tokens_map.json": {"image_token": "<own>"},
        },
        None,
    ),
    "map names an image": ({**_template(), "special_tokens_map.json": {"image_token": "<img>"}}, None),
    "map's extra mapping": (
        {**_template(), "special_tokens_map.json": {"extra_special_tokens": {"image_token": "<img>"}}},
        None,
    ),
    "config's tokens": (_template(bos_token="<bos>", pad_token="<own>", image_token="<img>"), None),
    "config's typed tokens": (_template(bos_token={"__type": "AddedToken", **_token("<bos>")}), None),
    "config's nulls": (_template(bos_token=None, pad_token=None), None),
    "extra mapping": (_template(extra_special_tokens={"image_token": "<img>"}), None),
    "extra mapping over config": (_template(image_token="<own>", extra_special_tokens={"image_token": "<img>"}), None),
    "extra list": (_template(extra_special_tokens=["<img>", "<own>"]), None),
    "additional list": (_template(additional_special_tokens=["<own>"]), None),
    "decoder": (_template(added_tokens_decoder={"259": _decoded("<own>")}), None),
    "decoder of words": (_template(added_tokens_decoder={"259": {**_decoded("<own>"), "special": False}}), None),
    "bos and eos flags": (_template(bos_token="<bos>", add_bos_token=True, add_eos_token=True), None),
    "added_tokens.json": ({**_template(), "added_tokens.json": {"<own>": 259}}, None),
    "marks, declared in the map": (
        {CONFIG: PLAIN, JINJA: MARKED, "special_tokens_map.json": {"additional_special_tokens": ["<own>"]}},
        None,
    ),
    "marks, pad token": ({CONFIG: {**PLAIN, "pad_token": "<own>"}, JINJA: MARKED}, None),
}


def folder_tokenizer() -> Tokenizer:
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *DECLARED]
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return tokenizer


def write_folder(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def answer(files: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder_tokenizer().save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **files.get(CONFIG, {})}
        write_folder(folder, {**files, CONFIG: config})
        tokenizer = AutoTokenizer.from_pretrained(folder)
        asked = {"tools": record.get("tools")}
        try:
            text = tokenizer.apply_chat_template(record["messages"], tokenize=False, **asked)
        except (ValueError, TypeError):
            return {"error": True}
        encoded = tokenizer.apply_chat_template(
            record["messages"], return_dict=True, return_assistant_tokens_mask=True, **asked
        )
        mask = "".join(map(str, encoded["assistant_masks"]))
        return {"text": text, "ids": list(encoded["input_ids"]), "mask": mask}


def main() -> None:
    cases = []
    for name, (files, tools) in FOLDERS.items():
        record = {"messages": HELLO} if tools is None else {"messages": HELLO, "tools": tools}
        cases.append({"name": name, "files": files, "record": record, **answer(files, record)})
    records = {
        "nulls inside a call": {"messages": [HELLO[0], CALL]},
        "a call's arguments as text": {"messages": [HELLO[0], TEXT_CALL]},
        "nulls inside tools": {"messages": HELLO, "tools": [TOOL]},
        "a tool that is text": {"messages": HELLO, "tools": ["f"]},
        "tools that are one mapping": {"messages": HELLO, "tools": TOOL},
    }
    for name, record in records.items():
        files = {CONFIG: PLAIN, JINJA: TOOLS if "tools" in record else CALLS}
        cases.append({"name": name, "files": files, "record": record, **answer(files, record)})
    folder_tokenizer().save(str(FOLDER / "folder_tokenizer.json"), pretty=False)
    text = json.dumps(cases, ensure_ascii=False, indent=1)
    (FOLDER / "folders.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
