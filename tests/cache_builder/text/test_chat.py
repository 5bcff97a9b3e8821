"""Chats to tokens and masks: transformers' golden values, turns found by prefixes, rows, and what is refused."""

import json
import pickle
import re
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distillcache.cache_builder.prepare import prepare_rows
from distillcache.cache_builder.text.chat import written_chats
from distillcache.cache_builder.text.digest import inputs_digest
from distillcache.cache_builder.text.document import Document
from distillcache.cache_builder.text.documents import documents
from distillcache.cache_builder.text.packing import BEGINS, COUNTED
from distillcache.cache_builder.text.skipped import Skipped
from distillcache.cache_builder.text.tokenise import token_arrays
from distillcache.models.text import template_worker
from distillcache.models.text.tokenizer import TextTokenizer, load_tokenizer
from distillcache.schemas.config import DataConfig, PrepareConfig
from distillcache.schemas.errors import ConfigError, InputError, PlanMismatchError, RecordError
from distillcache.schemas.format.rows import RowReader
from distillcache.schemas.store.store import Store
from distillcache.trainer.losses import counted_predictions

GOLDEN = Path(__file__).parents[2] / "golden" / "chat"
FAMILIES = {name: json.loads((GOLDEN / f"{name}.json").read_text()) for name in ("chatml", "headers", "inst")}
CASES = [(family, chat) for family, golden in FAMILIES.items() for chat in golden["chats"]]
CHATML = FAMILIES["chatml"]["template"]
HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def without_blocks(template: str) -> str:
    """The template with blocks that mark nothing."""
    return re.sub(r"generation( -?%|%)", r"if true\1", template.replace("endgeneration", "endif"))


def chat_tokenizer(folder: Path, template: str | None, eos: str = "<|im_end|>", **config: Any) -> TextTokenizer:
    """The golden tokenizer with this template, from an HF directory."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_bytes((GOLDEN / "tokenizer.json").read_bytes())
    named = {"eos_token": eos, "bos_token": {"content": "<s>", "special": True}, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder)


def write_chats(path: Path, *chats: object) -> DataConfig:
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return DataConfig(path=str(path), format="chat", row_tokens=64, eval_rows=0)


def encoded(data: DataConfig, tokenizer: TextTokenizer) -> list[tuple[list[int], str]]:
    """Ids and mask of every chat."""
    found = token_arrays(documents(data, tokenizer), tokenizer)
    arrays = [array for array in found if not isinstance(array, Skipped)]
    assert all((array["marks"] & BEGINS).tolist() == [1] + [0] * (array.size - 1) for array in arrays)
    masks = ["".join("1" if mark else "0" for mark in array["marks"] & COUNTED) for array in arrays]
    return [(array["token"].tolist(), mask) for array, mask in zip(arrays, masks, strict=True)]


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize(("family", "chat"), CASES)
def test_tokens_and_masks_are_those_of_transformers(tmp_path: Path, family: str, chat: str, blocks: bool) -> None:
    golden, expected = FAMILIES[family], FAMILIES[family]["chats"][chat]
    template = golden["template"] if blocks else without_blocks(golden["template"])
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", template, golden["eos_token"])
    assert tokenizer.chat is not None
    assert tokenizer.chat.marks_assistant() == blocks
    data = write_chats(tmp_path / "chats.jsonl", {"messages": expected["messages"], "tools": expected.get("tools")})
    assert written_chats(expected, tokenizer, data, "here")[0][0] == expected["text"]
    assert encoded(data, tokenizer) == [(expected["ids"], expected["mask"])]


TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Nothing"},
]


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("field", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}], ids=str)
def test_turns_that_are_not_to_be_learnt(tmp_path: Path, blocks: bool, field: dict[str, Any]) -> None:
    """They are written as they were, and the run of targets that was theirs is gone."""
    template = CHATML if blocks else without_blocks(CHATML)
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", template)
    kept = dict.fromkeys(field, 1)
    chats = [
        [message | (kept if message["role"] == "assistant" else {}) for message in TURNS],
        [message | (field if number in (0, 1) else {}) for number, message in enumerate(TURNS)],
        [message | field for message in TURNS],
    ]
    data = write_chats(tmp_path / "chats.jsonl", *({"messages": chat} for chat in [TURNS, *chats]))
    plain, all_kept, second, none = encoded(data, tokenizer)
    assert all_kept == plain
    assert {ids == plain[0] for ids, _ in (second, none)} == {True}
    first, last = re.finditer("1+", plain[1])
    assert second[1] == "0" * last.start() + plain[1][last.start() :]
    assert first.end() < last.start()
    assert set(none[1]) == {"0"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weight": 0.5}, "learnt or not"),
        ({"weight": "0"}, "learnt or not"),
        ({"train": 2}, "learnt or not"),
        ({"function_call": {"name": "f", "arguments": "{}"}}, "tool_calls"),
        ({"refusal": "No."}, "refusal"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 3, "train": False}]}, "train_detail"),
    ],
    ids=str,
)
def test_fields_that_were_ignored_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", CHATML)
    data = DataConfig(path="chats.jsonl", format="chat")
    nulls = dict.fromkeys(changes)
    assert written_chats({"messages": [TURNS[0], TURNS[1] | nulls]}, tokenizer, data, "here")
    with pytest.raises(RecordError, match=said) as caught:
        written_chats({"messages": [TURNS[0], TURNS[1] | changes]}, tokenizer, data, "here")
    assert caught.value.facts["field"] == next(iter(changes))
    with pytest.raises(RecordError, match="only what the assistant says"):
        written_chats({"messages": [TURNS[0] | {"weight": 1}, TURNS[1]]}, tokenizer, data, "here")


def test_the_mask_reaches_the_trainer_target_by_target(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", CHATML)
    chats = [FAMILIES["chatml"]["chats"][name] for name in ("two turns", "system", "nothing said", "two answers")]
    data = write_chats(tmp_path / "chats.jsonl", *({"messages": chat["messages"]} for chat in chats))
    index = prepare_rows(PrepareConfig(out=str(tmp_path / "rows"), data=data), tokenizer=tokenizer)
    rows = list(RowReader(Store(str(tmp_path / "rows"))))
    tokens, said, segments = (
        np.concatenate([getattr(row, name) for row in rows]) for name in ("tokens", "loss_mask", "segment_ids")
    )
    assert index.documents == 4
    assert tokens[: index.tokens].tolist() == [token for chat in chats for token in chat["ids"]]
    assert "".join("01"[mark] for mark in said[: index.tokens].astype(int)) == "".join(chat["mask"] for chat in chats)
    assert not said[index.tokens :].any()
    counted = np.asarray(counted_predictions(segments.reshape(-1, 64), said.reshape(-1, 64))).reshape(-1)
    for place in range(index.tokens - 1):  # a prediction counts where its target is said, in its own part of a chat
        same = segments[place + 1] == segments[place] and (place + 1) % 64 != 0
        assert counted[place] == (same and said[place + 1])


def test_white_space_behind_a_turns_end_is_not_said(tmp_path: Path) -> None:
    turns, prompt = "{{ m.role }}: {{ m.content }}\n", "{% if add_generation_prompt %}assistant: {% endif %}"
    open_ended = "{% for m in messages %}" + turns + "{% endfor %}" + prompt
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", open_ended)
    ((_, mask),) = encoded(write_chats(tmp_path / "a.jsonl", {"messages": HELLO}), tokenizer)
    assert mask == "0" * len("user: Hi\nassistant: ") + "1" * len(
        "Ho\n"
    )  # no token closes this turn but its line's end
    closed = chat_tokenizer(tmp_path / "closed", open_ended.replace("}}\n", "}}<|turn|>\n"))
    ((_, mask),) = encoded(write_chats(tmp_path / "a.jsonl", {"messages": HELLO}), closed)
    assert mask.endswith("1110")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages | length }}{% for m in messages %}{{ m.content * 2 }}{% endfor %}", "writes a chat differently"),
        ("{{ messages[-1].content }}{% for m in messages %}{{ m.content }}{% endfor %}", "writes a chat differently"),
        ("{{ raise_exception('not these') }}", "not these"),
        ("{{ messages[7].content.upper() }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% for m in messages %}", "cannot be read"),
    ],
)
def test_a_template_that_cannot_serve_is_named(tmp_path: Path, template: str, message: str) -> None:
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", template)
    data = write_chats(tmp_path / "chats.jsonl", {"messages": [*HELLO, *HELLO]})
    with pytest.raises(InputError) as caught:
        encoded(data, tokenizer)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "record",
    [
        {"text": "no chat"},
        {"messages": []},
        {"messages": "Hi"},
        {"messages": [{"content": "of nobody"}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": True}]},
        {"messages": [{"role": "user", "content": ["text", 5]}]},
        {"messages": [{"role": "user", "content": "\ufdd0"}]},
        {"messages": [{"role": "user", "content": "\ud800"}]},
    ],
)
def test_a_line_without_a_chat_is_named(tmp_path: Path, record: object) -> None:
    data = write_chats(tmp_path / "chats.jsonl", {"messages": HELLO}, record)
    with pytest.raises(InputError) as caught:
        encoded(data, chat_tokenizer(tmp_path / "tokenizer", CHATML))
    assert f"{tmp_path}/chats.jsonl:2" in str(caught.value)


def test_the_date_is_the_configs(tmp_path: Path) -> None:
    template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", template)
    data = write_chats(tmp_path / "chats.jsonl", {"messages": HELLO})
    with pytest.raises(ConfigError, match="must not depend on the day"):
        encoded(data, tokenizer)
    ((ids, _),) = encoded(data.model_copy(update={"chat_date": date(2025, 1, 31)}), tokenizer)
    assert tokenizer.decode(ids) == "31 Jan 2025HiHo"


def test_the_template_is_part_of_what_the_rows_are_of(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", CHATML)
    data = write_chats(tmp_path / "chats.jsonl", {"messages": HELLO})
    config = PrepareConfig(out=str(tmp_path / "rows"), data=data)
    index = prepare_rows(config, tokenizer=tokenizer)
    assert prepare_rows(config, tokenizer=pickle.loads(pickle.dumps(tokenizer))) == index
    other = chat_tokenizer(tmp_path / "other", CHATML.replace("Be brief.", "Be long."))
    assert other.digest == tokenizer.digest  # the same teacher's tokenizer
    assert inputs_digest(data, other) != inputs_digest(data, tokenizer)
    with pytest.raises(PlanMismatchError) as caught:
        prepare_rows(config, tokenizer=other)
    assert "the text's digest" in caught.value.facts


def test_where_the_template_is_looked_for(tmp_path: Path) -> None:
    both = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    named = chat_tokenizer(tmp_path / "named", None, chat_template=both).chat
    assert named is not None
    assert named.render(HELLO)[0] == "plain"
    assert named.render(HELLO, tools=[{}])[0] == "tools"
    file = chat_tokenizer(tmp_path / "file", "of the file", chat_template="of the config").chat
    assert file is not None
    assert file.render(HELLO)[0] == "of the file"
    assert file.special_tokens == {"eos_token": "<|im_end|>", "bos_token": "<s>"}
    data = write_chats(tmp_path / "chats.jsonl", {"messages": HELLO})
    with pytest.raises(ConfigError, match="no chat template"):
        encoded(data, chat_tokenizer(tmp_path / "none", None))
    with pytest.raises(InputError) as caught:
        list(documents(data.model_copy(update={"format": "auto"})))
    assert caught.value.next.startswith("set data.format to chat")


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "string"}}}}}
WITH_TOOLS = "{% for t in tools or [] %}{{ t | tojson ~ '\n' }}{% endfor %}{{ messages | length }}"


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)], json.dumps([json.dumps(TOOL)])])
def test_tools_may_be_json_text(tmp_path: Path, tools: object) -> None:
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", WITH_TOOLS + "{% generation %}{% endgeneration %}")
    data = write_chats(tmp_path / "chats.jsonl")
    ((text, _),) = written_chats({"messages": HELLO, "tools": tools}, tokenizer, data, "here")
    assert text == json.dumps(TOOL) + "\n2"


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def test_a_chat_that_is_nested_too_deep_is_refused(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", "{{ messages | length }}{% generation %}{% endgeneration %}")
    data = write_chats(tmp_path / "a.jsonl")
    flat, deep = ({"messages": [{"role": "user", "content": nested(depth)}]} for depth in (100, 5000))
    assert written_chats(flat, tokenizer, data, "here") == [("1", [])]
    with pytest.raises(InputError, match="nested too deep"):
        written_chats(deep, tokenizer, data, "here")
    assert written_chats(flat, tokenizer, data, "here") == [("1", [])]


@pytest.mark.parametrize("tools", [None, [], "[]", "", " ", "null"])
def test_no_tools_are_none(tmp_path: Path, tools: object) -> None:
    template = "{{ 'some' if tools is not none else 'none' }}{% generation %}{% endgeneration %}"
    data, tokenizer = write_chats(tmp_path / "chats.jsonl"), chat_tokenizer(tmp_path / "tokenizer", template)
    assert written_chats({"messages": HELLO, "tools": tools}, tokenizer, data, "here") == [("none", [])]


@pytest.mark.parametrize("tools", [TOOL, json.dumps(TOOL), "f", ["f"], [3], 3, "[", [[TOOL]], '["\\ufdd0"]'])
def test_tools_that_are_none_are_refused(tmp_path: Path, tools: object) -> None:
    data, tokenizer = write_chats(tmp_path / "chats.jsonl"), chat_tokenizer(tmp_path / "tokenizer", WITH_TOOLS)
    with pytest.raises(InputError, match="here"):
        written_chats({"messages": HELLO, "tools": tools}, tokenizer, data, "here")


def test_fields_that_a_table_adds_are_not_written(tmp_path: Path) -> None:
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    call = [{"function": {"name": "f", "arguments": {"x": "1", "list": ["a", None]}}}]
    other = [{"function": {"name": "g", "arguments": {"y": 2}}}]
    record = {
        "messages": [*HELLO, {"role": "assistant", "content": "", "tool_calls": [*call, *other]}],
        "tools": [TOOL, {"function": {"name": "g", "parameters": {"properties": {"y": {"type": "int"}}}}}],
    }
    template = (
        "{{ tools | tojson }}{% for m in messages %}{{ m | tojson }}{% endfor %}{% generation %}{% endgeneration %}"
    )
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", template)
    data = write_chats(tmp_path / "a.jsonl", record)
    pq.write_table(pa.Table.from_pylist([record, {**record, "tools": None}]), tmp_path / "a.parquet")
    of_table = documents(data.model_copy(update={"path": str(tmp_path / "a.parquet")}), tokenizer)
    texts = [
        each.text for found in (of_table, documents(data, tokenizer)) for each in found if isinstance(each, Document)
    ]
    assert len(texts) == 3
    assert sorted(texts[0]) == sorted(texts[2])  # fields in the table's own order
    assert "null" not in texts[0].replace('["a", null]', "")


# In the manner of Qwen3: only the turns behind the last question keep their thinking, the last always has some.
QWEN = """\
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {{- '<|im_start|>' ~ m.role ~ '\\n' }}
    {%- set said = m.content %}
    {%- if m.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if '</think>' in said %}
            {%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set said = said.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\\n' ~ thought ~ '\\n</think>\\n\\n' }}
        {%- endif %}
    {%- endif %}
    {{- said ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""


def said(texts: list[tuple[str, list[tuple[int, int]]]]) -> list[list[str]]:
    return [[text[start:end] for start, end in spans] for text, spans in texts]


def test_turns_that_are_rewritten_later_are_examples_of_their_own(tmp_path: Path) -> None:
    chat = [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nuno"},
        {"role": "user", "content": "Two"},
        {"role": "assistant", "content": "<think>\nlook\n</think>\n\ncall"},
        {"role": "tool", "content": "two"},
        {"role": "assistant", "content": "dos"},
    ]
    data, tokenizer = write_chats(tmp_path / "a.jsonl", {"messages": chat}), chat_tokenizer(tmp_path / "tok", QWEN)
    texts = written_chats({"messages": chat}, tokenizer, data, "here")
    assert said(texts) == [
        ["<think>\nhm\n</think>\n\nuno<|im_end|>"],
        ["<think>\nlook\n</think>\n\ncall<|im_end|>", "<think>\n\n</think>\n\ndos<|im_end|>"],
    ]
    assert tokenizer.chat is not None
    for (text, _), end in zip(texts, (2, 6), strict=True):  # each is what the model would have seen
        assert text == tokenizer.chat.render(chat[:end])[0]
    assert "hm" not in texts[1][0]
    assert [mask.count("1") > 0 for _, mask in encoded(data, tokenizer)] == [True, True]


def test_a_chat_may_begin_with_the_assistant(tmp_path: Path) -> None:
    chat = [{"role": "assistant", "content": "hello"}, *HELLO]
    data = write_chats(tmp_path / "a.jsonl", {"messages": chat})
    first = "{% if messages[0].role == 'system' %}S{% endif %}"
    turns = "{% for m in messages %}{{ '<|header|>' ~ m.role ~ '\n' ~ m.content ~ '<|turn|>' }}{% endfor %}"
    prompt = "{% if add_generation_prompt %}{{ '<|header|>assistant\n' }}{% endif %}"
    for number, template in enumerate([first + turns + prompt, turns + prompt, first + turns]):
        tokenizer = chat_tokenizer(tmp_path / f"tok{number}", template)
        ((text, spans),) = written_chats({"messages": chat}, tokenizer, data, "here")
        assert tokenizer.chat is not None
        assert text == tokenizer.chat.render(chat)[0]
        ends = ["hello<|turn|>", "Ho<|turn|>"]
        assert [turn[-len(end) :] for turn, end in zip(said([(text, spans)])[0], ends, strict=True)] == ends
        if prompt in template:
            assert said([(text, spans)]) == [ends]


def test_a_prompt_that_opens_thinking_is_no_obstacle(tmp_path: Path) -> None:
    turns = "{% for m in messages %}{{ '<|header|>' ~ m.role ~ '<|/header|>' ~ m.content ~ '<|turn|>' }}{% endfor %}"
    prompt = "{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|><think>\n' }}{% endif %}"
    chat = [*HELLO, {"role": "user", "content": "More"}, {"role": "assistant", "content": "<b>"}]
    data, tokenizer = write_chats(tmp_path / "a.jsonl"), chat_tokenizer(tmp_path / "tok", turns + prompt)
    assert said(written_chats({"messages": chat}, tokenizer, data, "here")) == [["Ho<|turn|>", "<b><|turn|>"]]


# In the manner of DeepSeek R1: the prompt opens the thinking, which finished turns are written without.
R1 = (
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' ~ m.content }}{% else %}"
    "{{ '<|Assistant|>' ~ m.content.split('</think>')[-1] ~ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
# In the manner of Mistral 7B v0.3: the system message stands in the last question, while that is the last message.
MISTRAL = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' ~ (system ~ '\n\n' if loop.last and system) ~ m.content ~ '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' ~ m.content ~ '</s>' }}{% endif %}{% endfor %}"
)
# In the manner of Zephyr: the prompt is written by the loop over messages, so an empty chat has none.
ZEPHYR = (
    "{% for m in messages %}{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ '</s>\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
# Each turn says how many there are: all of a chat is written otherwise once it goes on.
COUNTED_TURNS = "{{ messages | length }}{% for m in messages %}{{ m.role ~ ':' ~ m.content ~ '</s>' }}{% endfor %}"
TWO_ANSWERS = [*HELLO, {"role": "assistant", "content": "Hu"}]
SYSTEM = [{"role": "system", "content": "Be"}, *HELLO]


@pytest.mark.parametrize(
    ("template", "chat", "turns"),
    [
        (QWEN, TWO_ANSWERS, [["<think>\n\n</think>\n\nHo<|im_end|>"], ["<think>\n\n</think>\n\nHu<|im_end|>"]]),
        (R1, [*HELLO, *HELLO], [["Ho</s>", "Ho</s>"]]),
        (R1, [HELLO[0], {"role": "assistant", "content": "<think>hm</think><tool>"}], [["<tool></s>"]]),
        (R1, [HELLO[1], *HELLO], [["Ho</s>", "Ho</s>"]]),
        (MISTRAL, SYSTEM, [["Ho</s>"]]),
        (MISTRAL, [*SYSTEM, *HELLO], [["Ho</s>", "Ho</s>"]]),
        (ZEPHYR, [HELLO[1], *HELLO], [["Ho</s>", "Ho</s>"]]),
        (COUNTED_TURNS, [*HELLO, *HELLO], [["Ho</s>"], ["Ho</s>"]]),
    ],
)
def test_turns_are_found_in_what_the_template_writes(
    tmp_path: Path, template: str, chat: list[dict[str, str]], turns: list[list[str]]
) -> None:
    data, tokenizer = write_chats(tmp_path / "a.jsonl"), chat_tokenizer(tmp_path / "tok", template)
    texts = written_chats({"messages": chat}, tokenizer, data, "here")
    found = said(texts)
    assert [[turn.split("assistant:")[-1] for turn in each] for each in found] == turns
    assert tokenizer.chat is not None
    assert texts[-1][0] == tokenizer.chat.render(chat)[0]  # what transformers writes of the chat


SHOWN = "{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"
CALLS = [{"function": {"name": "f", "arguments": {"x": 1}}}]


def answer(**more: object) -> dict[str, list[dict[str, object]]]:
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", **more}]}


def test_messages_and_calls_may_be_json_text(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path / "tok", SHOWN)
    plain = answer(tool_calls=CALLS)
    chats = [
        plain,
        {"messages": json.dumps(plain["messages"])},
        answer(tool_calls=json.dumps(CALLS)),
        answer(tool_calls=[json.dumps(each) for each in CALLS]),
    ]
    data = write_chats(tmp_path / "a.jsonl", *chats)
    texts = {document.text for document in documents(data, tokenizer) if isinstance(document, Document)}
    assert texts == {"Hi" + json.dumps(CALLS)}


@pytest.mark.parametrize(
    ("record", "message", "field"),
    [
        (answer(tool_calls=CALLS[0]), "not a list of calls", None),
        (answer(tool_calls="f"), "not a list of calls", None),
        (answer(tool_calls=[None]), "not a list of calls", None),
        (answer(tool_calls=[["f"]]), "not a list of calls", None),
        (answer(tool_calls='[{"a": 1, "a": 2}]'), "twice", "messages[1].tool_calls: a"),
        ({"messages": HELLO, "tools": '[{"a": {"b": 1, "b": 2}}]'}, "twice", "tools: b"),
        (answer(tool_calls=[{"function": {"arguments": {"x": date(2025, 1, 1)}}}]), "neither text nor number", None),
        (answer(content=b"Ho"), "neither text nor number", "messages[1].content"),
        (answer(content=[{"type": "text", "text": "Ho"}]), "contents that are not text", None),
        (answer(content={"text": "Ho"}), "contents that are not text", None),
        (answer(content=["Ho"]), "contents that are not text", None),
        (answer(content=[{"type": "image_url", "image_url": {"url": "a"}}]), "more than text", None),
        (answer(content=[{"type": "input_audio", "text": "Ho"}]), "more than text", None),
        (answer(content=[{"image": "a", "text": None}]), "more than text", None),
    ],
)
def test_what_no_text_can_be_made_of_is_refused(tmp_path: Path, record: Any, message: str, field: str | None) -> None:
    tokenizer = chat_tokenizer(tmp_path / "tok", SHOWN)
    with pytest.raises(RecordError, match=message) as caught:
        written_chats(record, tokenizer, DataConfig(path="a", format="chat"), "here")
    assert caught.value.facts["line"] == "here"
    assert field is None or caught.value.facts["field"] == field


def test_parts_are_written_by_templates_that_know_them_and_never_left_out(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": " Ho "}, {"type": "text", "text": "Hu", "image": None}]
    knows = "{% for m in messages %}{% for p in m.content %}{{ p.text | trim }}{% endfor %}{% endfor %}"
    drops = "{% for m in messages %}{{ m.role }}{{ m.content if m.content is string }}{% endfor %}"
    chat, data = {"messages": [{"role": "user", "content": parts}]}, DataConfig(path="a", format="chat")
    ((text, _),) = written_chats(chat, chat_tokenizer(tmp_path / "knows", knows), data, "here")
    assert text == "HoHu"
    with pytest.raises(RecordError, match="contents that are not text"):
        written_chats(chat, chat_tokenizer(tmp_path / "drops", drops), data, "here")
    lines = write_chats(tmp_path / "a.jsonl", {"messages": HELLO})
    with pytest.raises(RecordError, match="writes nothing"):
        list(documents(lines, chat_tokenizer(tmp_path / "none", "{# nothing #}")))


def test_the_fields_of_sharegpt_are_recognised(tmp_path: Path) -> None:
    record = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
    with pytest.raises(RecordError, match="has no chat") as caught:
        written_chats(record, chat_tokenizer(tmp_path / "tok", SHOWN), DataConfig(path="a", format="chat"), "here")
    assert "assistant for gpt" in caught.value.next


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ('{"messages": [{"role": "user", "role": "system", "content": "a"}]}', "role"),
        ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "content"),
        ('{"messages": [{"role": "user", "content": "a", "x": {"y": 1, "\\u0079": 2}}]}', "y"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": [{"a": 1, "a": 2}]}', "a"),
        ('{"messages": [], "m\\u0065ssages": [{"role": "user", "content": "a"}]}', "messages"),
        ('{"messages": [{"role": "user", "content": "a"}], "x": {"y": 1, "y": 2}}', None),
    ],
)
def test_a_field_that_is_given_twice_inside_a_chat_is_refused(tmp_path: Path, line: str, field: str | None) -> None:
    data, tokenizer = write_chats(tmp_path / "a.jsonl"), chat_tokenizer(tmp_path / "tok", SHOWN)
    (tmp_path / "a.jsonl").write_text(line + "\n")
    if field is None:  # it is in a field that nobody reads
        assert len(list(documents(data, tokenizer))) == 1
        return
    with pytest.raises(RecordError, match="twice") as caught:
        list(documents(data, tokenizer))
    assert caught.value.facts["field"] == field


def test_a_long_chat_takes_few_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts that its turns are found by are written by one: a round trip for each would take most of the time."""
    asked: list[dict[str, Any]] = []
    real = template_worker.PROCESS.ask
    monkeypatch.setattr(template_worker.PROCESS, "ask", lambda request: (asked.append(request), real(request))[1])
    tokenizer = chat_tokenizer(tmp_path, "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")  # fmt: skip
    turns = [{"role": role, "content": f"{number}"} for number in range(40) for role in ("user", "assistant")]
    ((text, spans),) = written_chats({"messages": turns}, tokenizer, DataConfig(path="x", format="chat"), "here")
    assert [text[start:end] for start, end in spans] == [f"{number}<|im_end|>" for number in range(40)]
    assert len(asked) <= 4
