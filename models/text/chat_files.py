"""The chat template and the special tokens that the files of a tokenizer's folder name.

Which file counts where two differ follows transformers 5.24 (`PreTrainedTokenizerBase.from_pretrained`):

    chat_template.jinja, additional_chat_templates/NAME.jinja    before `chat_template` of tokenizer_config.json, whole
    special_tokens_map.json                                      over tokenizer_config.json, unless that has
                                                                 `added_tokens_decoder`
    extra_special_tokens of the config, where it is a mapping    names for templates, such as `image_token`

`chat_template.json`, which processors have, is read where there is nothing else.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from distillcache.models.files.foreign import LFS_STEP, is_lfs_pointer
from distillcache.models.text.chat_template import ChatTemplate
from distillcache.schemas.errors import InputError
from distillcache.schemas.store.path import Location

TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
TEMPLATE_FILE, TEMPLATE_FOLDER, PROCESSOR_TEMPLATE = (
    "chat_template.jinja",
    "additional_chat_templates",
    "chat_template.json",
)
_STANDARD = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("extra_special_tokens", "additional_special_tokens")
_NAMED = {"name", "template"}
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def folder_template(folder: Location, backend: Tokenizer) -> ChatTemplate | None:
    """The chat template beside a tokenizer.json; None where there is none.

    Raises:
        InputError: a file that cannot be read, or an entry that is no template.
    """
    config = read_settings(folder / TOKENIZER_CONFIG)
    named = _template_files(folder) or named_templates(config.get("chat_template"), folder / TOKENIZER_CONFIG)
    if not named:
        file = folder / PROCESSOR_TEMPLATE
        named = named_templates(read_settings(file).get("chat_template"), file)
    return chosen_template(named, special_tokens_of(folder), config, *_declared_tokens(folder, backend))


def chosen_template(
    named: Mapping[str, str],
    tokens: Mapping[str, str],
    config: Mapping[str, Any],
    whole: tuple[Mapping[str, Any], ...] = (),
    unknown: tuple[str, ...] = (),
) -> ChatTemplate | None:
    """The template of chats, and the one of chats with tools, with what they can name.

    Args:
        named: name -> template.
        tokens: all special tokens by name.
        config: tokenizer_config.json.
        whole, unknown: as of `ChatTemplate`.
    """
    source, tool_source = named.get("default"), named.get("tool_use")
    if source is None and tool_source is None:
        return None
    # What a template does not mention cannot change its text: it stays out of the digest.
    text = f"{source}{tool_source}"
    shown = {
        name: token
        for name, token in tokens.items()
        if name in text or (name in _STANDARD and content_of(config.get(name)) == token)
    }
    return ChatTemplate(source, tool_source, shown, whole, unknown)


def named_templates(entry: object, file: Location) -> dict[str, str]:
    """The templates of a `chat_template` entry: a text, a list of `{"name", "template"}`, or a mapping by name."""
    if entry is None:
        return {}
    if isinstance(entry, str):
        return {"default": entry}
    if isinstance(entry, list) and all(
        isinstance(each, dict) and {"name", "template"} <= each.keys() for each in entry
    ):
        entry = {str(each["name"]): each["template"] for each in entry}
    if isinstance(entry, dict) and all(isinstance(each, str) for each in entry.values()):
        return entry
    raise InputError(
        "the tokenizer's chat template is not a text",
        {"file": file, "chat_template": repr(entry)[:80], "expected": "a template, or templates by name"},
        "copy the file again from its source",
    )


def special_tokens_of(folder: Location) -> dict[str, str]:
    """Every special token by the name that templates and settings give it."""
    spelled = {name: content_of(token) for name, token in _named_tokens(folder).items()}
    return {name: token for name, token in spelled.items() if token is not None}


def _named_tokens(folder: Location) -> dict[str, Any]:
    """Name -> token as it is stored, a text or its settings.

    Names beyond the standard ones (`image_token`) that the config spells out count before those of the map.
    """
    config = read_settings(folder / TOKENIZER_CONFIG)
    legacy = {} if "added_tokens_decoder" in config else read_settings(folder / SPECIAL_TOKENS_MAP)
    named = {name: token for name, token in config.items() if name.endswith("_token")}
    own = {name: token for name, token in named.items() if name not in _STANDARD and isinstance(token, str)}
    places = [(config, "model_specific_special_tokens"), (config, "extra_special_tokens")]
    for settings, name in [*places, (legacy, "extra_special_tokens")]:
        own |= settings[name] if isinstance(settings.get(name), dict) else {}
    return {**named, **legacy, **own}


def content_of(token: object) -> str | None:
    """Return the text of a token, from its text or its settings; None for anything else."""
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else None


def _declared_tokens(folder: Location, backend: Tokenizer) -> tuple[tuple[dict[str, Any], ...], tuple[str, ...]]:
    """Tokens that are declared beside tokenizer.json alone: those in its vocabulary, and those that it lacks.

    One that `added_tokens_decoder` declares in another way than tokenizer.json counts as declared there, as in
    transformers: whether it takes the spaces beside it, for instance.
    """
    added = {token.content: _ways(token) for token in backend.get_added_tokens_decoder().values()}
    decoder = read_settings(folder / TOKENIZER_CONFIG).get("added_tokens_decoder")
    again = {content_of(entry) for entry in decoder.values()} if isinstance(decoder, dict) else set()
    new = {
        content: token
        for content, token in _declarations(folder).items()
        if content not in added or (content in again and _ways(AddedToken(**token)) != added[content])
    }
    whole = tuple(token for content, token in new.items() if backend.token_to_id(content) is not None)
    return whole, tuple(content for content in new if backend.token_to_id(content) is None)


def _ways(token: AddedToken) -> tuple[bool, ...]:
    """The flags that decide how a token is found in a text."""
    return token.lstrip, token.rstrip, token.single_word, token.normalized


def _declarations(folder: Location) -> dict[str, dict[str, Any]]:
    """Collect token text -> settings from all files beside tokenizer.json; the last declaration counts."""
    config = read_settings(folder / TOKENIZER_CONFIG)
    decoder = config.get("added_tokens_decoder")
    legacy = {} if decoder is not None else read_settings(folder / SPECIAL_TOKENS_MAP)
    lists = [each.get(name) for each in (config, legacy) for name in _LISTS]
    named = _named_tokens(folder)
    ordered = [named.get(name) for name in _STANDARD] + [
        token for name, token in named.items() if name not in _STANDARD
    ]
    listed = [*ordered, *(token for each in lists if isinstance(each, list) for token in each)]
    declared = {content: _special(token, content) for token in listed if (content := content_of(token))}
    if decoder is None:
        for content in read_settings(folder / ADDED_TOKENS):
            declared.setdefault(content, {"content": content, "special": False, "normalized": True})
    for entry in decoder.values() if isinstance(decoder, dict) else ():
        content = content_of(entry)
        if content:
            declared[content] = {"content": content, **{name: bool(entry[name]) for name in _FLAGS if name in entry}}
    return declared


def _special(token: object, content: str) -> dict[str, Any]:
    flags = {name: bool(token[name]) for name in _FLAGS if name in token} if isinstance(token, Mapping) else {}
    return {"content": content, "normalized": False, **flags, "special": True}


def _template_files(folder: Location) -> dict[str, str]:
    """Name -> template, of the files that hold one each."""
    return {name: _read_text(file) for name, file in template_files(folder).items()}


def template_files(folder: Location) -> dict[str, Location]:
    """Name -> file, of the templates that lie in files of their own."""
    beside, more = folder / TEMPLATE_FILE, folder / TEMPLATE_FOLDER
    found = {"default": beside} if beside.exists() else {}
    # Of a bucket's folder only the listing tells whether it is there.
    there = more.is_dir() if isinstance(more, Path) else True
    for file in sorted(more.iterdir(), key=str) if there else ():
        if file.name.endswith(".jinja"):
            found[file.name.removesuffix(".jinja")] = file
    return found


def _read_text(file: Location) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(
            "a chat template cannot be read", {"file": file, "cause": error}, "copy the file again"
        ) from error
    if is_lfs_pointer(text.encode()):  # a template without a tag would be every chat's whole text
        raise InputError("a chat template was not downloaded", {"file": file}, LFS_STEP)
    return text


def read_settings(file: Location) -> dict[str, Any]:
    """A JSON object beside a tokenizer.json; empty where there is no such file.

    Raises:
        InputError: the file holds something else.
    """
    try:
        text = file.read_text(encoding="utf-8")
        if is_lfs_pointer(text.encode()):
            raise InputError(f"{file.name} was not downloaded", {"file": file}, LFS_STEP)
        value = json.loads(text)
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(
            f"{file.name} cannot be read as JSON", {"file": file, "found": error}, "copy the file again"
        ) from error
    return value if isinstance(value, dict) else {}
