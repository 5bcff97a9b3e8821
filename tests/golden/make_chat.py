"""Golden chats: text, token ids and assistant masks from transformers' own `apply_chat_template`.

    python tests/golden/make_chat.py        (needs transformers and jinja2; written with transformers 5.23)

The templates are written for this test in the manner of three families, with `{% generation %}` blocks around what the
assistant says. The same templates without the blocks are the test's to derive: their masks must come out the same.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).parent / "chat"

SPECIAL = ("<|end|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|header|>", "<|/header|>", "<|turn|>")

# ChatML: a default system turn, thinking kept in the text, tools as JSON, an end of turn and a line break behind it.
CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=1) ~ '\\n' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
            {%- if message.reasoning_content is defined %}
                {{- '<think>' ~ message.reasoning_content ~ '</think>\\n' }}
            {%- endif %}
            {{- message.content if message.content is defined }}
            {%- for call in message.tool_calls or [] %}
                {{- '\\n<call>' ~ call.function | tojson ~ '</call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Headers around roles, BOS by its name, contents stripped, macros, namespaces and loop controls.
HEADERS = """\
{{- bos_token }}
{%- macro header(role) %}
    {{- '<|header|>' ~ role ~ '<|/header|>\\n\\n' }}
{%- endmacro %}
{%- set ns = namespace(seen=false) %}
{%- for message in messages %}
    {%- if message.role == 'note' %}{% continue %}{% endif %}
    {%- if not ns.seen and message.role == 'assistant' %}
        {{- raise_exception('A user speaks first.') }}
    {%- endif %}
    {%- set ns.seen = true %}
    {{- header(message.role) }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {{- message.content | trim + '<|turn|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content | trim + '<|turn|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- header('assistant') }}
{%- endif %}
"""

# [INST]: no header of the assistant's at all, statements on lines of their own, EOS behind every answer.
INST = """\
{{ bos_token }}{% for message in messages %}
    {% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}
"""

CHATS = {
    "two turns": [
        {"role": "user", "content": 'Hello <there> & "you"'},
        {"role": "assistant", "content": "  Hi, ünï😀  "},
        {"role": "user", "content": "More?"},
        {"role": "assistant", "content": "No.\n\n"},
    ],
    "ends with a question": [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three"},
    ],
    "nothing said": [{"role": "user", "content": "Alone"}],
    "two answers": [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": "first"},
        {"role": "assistant", "content": "second"},
    ],
}
WITH_SYSTEM = [{"role": "system", "content": "Système."}, *CHATS["two turns"]]
WITH_TOOLS = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "thinking": "look it up",
        "tool_calls": [{"type": "function", "function": {"name": "sky", "arguments": {"at": "<here>"}}}],
    },
    {"role": "tool", "content": "blue"},
    {"role": "assistant", "content": "It is blue."},
]
TOOLS = [{"type": "function", "function": {"name": "sky", "parameters": {"type": "object", "properties": {}}}}]


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return tokenizer


def answers(template: str, eos: str, chats: dict[str, dict]) -> dict[str, dict]:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), eos_token=eos, bos_token="<s>")
    found = {}
    for name, chat in chats.items():
        asked = {"chat_template": template, "tools": chat.get("tools")}
        encoded = tokenizer.apply_chat_template(
            chat["messages"], return_dict=True, return_assistant_tokens_mask=True, **asked
        )
        found[name] = {
            **chat,
            "text": tokenizer.apply_chat_template(chat["messages"], tokenize=False, **asked),
            "ids": encoded["input_ids"],
            "mask": "".join(map(str, encoded["assistant_masks"])),
        }
    return found


def main() -> None:
    plain = {name: {"messages": messages} for name, messages in CHATS.items()}
    families = {
        "chatml": (
            CHATML,
            "<|im_end|>",
            {**plain, "system": {"messages": WITH_SYSTEM}, "tools": {"messages": WITH_TOOLS, "tools": TOOLS}},
        ),
        "headers": (
            HEADERS,
            "<|end|>",
            {**plain, "system": {"messages": [*WITH_SYSTEM[:2], {"role": "note"}, *WITH_SYSTEM[2:]]}},
        ),
        "inst": (INST, "</s>", plain),
    }
    FOLDER.mkdir(exist_ok=True)
    byte_tokenizer().save(str(FOLDER / "tokenizer.json"), pretty=False)
    for name, (template, eos, chats) in families.items():
        content = {"template": template, "eos_token": eos, "chats": answers(template, eos, chats)}
        text = json.dumps(content, ensure_ascii=False, indent=1)
        (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
