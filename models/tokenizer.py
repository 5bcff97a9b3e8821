"""The tokenizer that comes with a checkpoint: from a tokenizer.json, an HF directory or a GGUF file.

A *document* is what the tokenizer makes of a text by its own rule (its post-processor may put BOS in front), then
exactly one EOS. Which token is EOS is not part of tokenizer.json; it stands beside it, see `load_tokenizer`.

Truncation and padding that a tokenizer.json asks for are turned off: they would cut documents without a word.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash
from tokenizers import Tokenizer

from models.chat_template import ChatTemplate, chat_template_from, special_tokens_of
from models.gguf_tokenizer import gguf_tokenizer
from models.ggufs import is_gguf, metadata, open_gguf
from models.runs import hf_folder, numbered
from models.tensors import some
from schemas.errors import CheckpointError, InputError
from schemas.object_path import ObjectPath, Place, locate

TOKENIZER_JSON = "tokenizer.json"
# What a tokenizer consists of in an HF directory, and what an export copies.
TOKENIZER_FILES = (
    TOKENIZER_JSON,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True, eq=False)
class TextTokenizer:
    """A tokenizer with its end-of-document token.

    backend: the tokenizer proper; its post-processor is its own rule for BOS.
    eos_id: the token that ends a document.
    bos_id: the token that starts one, where the checkpoint names it. Whether it is put in front is the backend's rule.
    extras: more entries for tokenizer_config.json (chat template, padding token).
    chat: how it writes chats, where the checkpoint says so.
    """

    backend: Tokenizer
    eos_id: int
    bos_id: int | None = None
    extras: Mapping[str, Any] | None = None
    chat: ChatTemplate | None = None

    def __post_init__(self) -> None:
        self.backend.no_truncation()
        self.backend.no_padding()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text by the tokenizer's own rule: BOS, and EOS, only if its post-processor adds them."""
        return self.backend.encode(text).ids

    def encode_document(self, text: str) -> list[int]:
        """`encode`, then EOS, once: a tokenizer that adds EOS itself is not given a second one."""
        return self._end(self.encode(text))

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_document` of each text, on all cores."""
        return [self._end(encoding.ids) for encoding in self.backend.encode_batch_fast(list(texts))]

    def encode_spans(
        self, texts: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]]
    ) -> list[tuple[list[int], list[bool]]]:
        """The tokens of texts that spell their special tokens themselves, and which tokens reach into a span.

        Args:
            spans: of every text, `(start, end)` in characters.
        """
        encoded = self._verbatim.encode_batch(list(texts), add_special_tokens=False)
        return [
            (each.ids, [any(a < end and b > start for start, end in inside) for a, b in each.offsets])
            for each, inside in zip(encoded, spans, strict=True)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens, special ones spelled out."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def adds_eos(self) -> bool:
        """Whether the tokenizer's own rule ends a text with EOS. Asked of the empty text, which has none itself."""
        return self.backend.encode("").ids[-1:] == [self.eos_id]

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The special tokens as they are spelled in a text."""
        return tuple(token.content for token in self.backend.get_added_tokens_decoder().values() if token.special)

    @cached_property
    def _verbatim(self) -> Tokenizer:
        """The same without a post-processor, which adds nothing here, and takes spaces out of the tokens' offsets."""
        content = json.loads(self.to_json())
        return Tokenizer.from_str(json.dumps({**content, "post_processor": None}, ensure_ascii=False))

    @cached_property
    def vocab_size(self) -> int:
        """The highest id + 1: what a model's vocabulary must at least be."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def to_json(self) -> str:
        """The text of a tokenizer.json: the same for the same tokenizer, in every process."""
        return self.backend.to_str()

    @cached_property
    def digest(self) -> str:
        """xxh3-128, in hex, of what decides the tokens of a document: tokenizer.json, keys sorted, and the EOS id."""
        content = {"tokenizer": json.loads(self.to_json()), "eos_id": self.eos_id}
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return xxhash.xxh3_128_hexdigest(text.encode())

    def _end(self, ids: list[int]) -> list[int]:
        return ids if self.adds_eos else [*ids, self.eos_id]


def load_tokenizer(path: str | os.PathLike[str] | ObjectPath, eos_token: str | None = None) -> TextTokenizer:
    """The tokenizer of a tokenizer.json, an HF directory, a run or a .gguf file, on a local disk or in a bucket.

    EOS is `eos_token` where it is given; else, for a GGUF, the file's own; else what stands beside tokenizer.json:
    `eos_token` of tokenizer_config.json, then `eos_token_id` of generation_config.json and of config.json (the first
    of a list).
    """
    where = numbered(locate(path))
    if isinstance(where, Path) and not where.exists():
        raise InputError("no such tokenizer", {"path": path}, "name a tokenizer.json, HF directory or .gguf file")
    if _is_gguf(where):
        return _from_gguf(where, eos_token)
    file = hf_folder(where) / TOKENIZER_JSON if _is_folder(where) else where
    backend = _parse(file)
    eos_id, bos_id = _eos_id(backend, file, eos_token), _named_id(backend, file, "bos")
    return TextTokenizer(backend, eos_id, bos_id, chat=_chat_template(file))


def _is_gguf(place: Place) -> bool:
    return is_gguf(place) and place.suffix != ".json"


def _is_folder(place: Place) -> bool:
    """In a bucket: what is not called a .json file."""
    return place.is_dir() if isinstance(place, Path) else place.suffix != ".json"


def tokenizer_from_json(text: str, eos_id: int, bos_id: int | None = None) -> TextTokenizer:
    """The tokenizer that `TextTokenizer.to_json` wrote, where its EOS id is recorded elsewhere."""
    return TextTokenizer(Tokenizer.from_str(text), eos_id, bos_id)


def tokenizer_files(source: Place | TextTokenizer) -> tuple[dict[str, bytes], dict[str, int]]:
    """What an export has of a tokenizer.

    Files of an HF directory are taken as they are; a GGUF's are made from it.

    Returns: the files by name; `bos_token_id` and `eos_token_id` for the export's config.json, as far as they are
    known.
    """
    tokenizer = source if isinstance(source, TextTokenizer) else _for_export(source)
    files = {} if isinstance(source, TextTokenizer) else _files_of(source)
    if tokenizer is None:
        return files, {}
    ids = {"eos_token_id": tokenizer.eos_id}
    if tokenizer.bos_id is not None:
        ids = {"bos_token_id": tokenizer.bos_id, **ids}
    spelled = {key.removesuffix("_id"): tokenizer.backend.id_to_token(value) for key, value in ids.items()}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **spelled, "clean_up_tokenization_spaces": False}
    made = {
        TOKENIZER_JSON: tokenizer.to_json(),
        "tokenizer_config.json": json.dumps(config | dict(tokenizer.extras or {}), indent=2, ensure_ascii=False) + "\n",
        "generation_config.json": json.dumps(ids, indent=2) + "\n",
    }
    return {name: text.encode() for name, text in made.items()} | files, ids


def _for_export(source: Place) -> TextTokenizer | None:
    """None where the tokenizer has no EOS that we know of: its files are still worth copying."""
    try:
        return load_tokenizer(source)
    except _NoEos:
        return None


def _files_of(source: Place) -> dict[str, bytes]:
    """The files of an HF directory's tokenizer, or of those beside a tokenizer.json."""
    if _is_gguf(source):
        return {}
    file = hf_folder(source) / TOKENIZER_JSON if _is_folder(source) else source
    beside = [file.parent / name for name in TOKENIZER_FILES[1:]]
    return {TOKENIZER_JSON: file.read_bytes()} | {each.name: each.read_bytes() for each in beside if each.exists()}


class _NoEos(InputError):
    """A tokenizer without a known EOS: an error for reading text, none for copying files."""


def _parse(file: Place) -> Tokenizer:
    try:
        data = file.read_bytes()
    except FileNotFoundError as error:
        raise InputError(
            f"the directory has no {file.name}",
            {"directory": file.parent, "found": some(sorted(x.name for x in file.parent.iterdir())) or "nothing"},
            "save the tokenizer with transformers (AutoTokenizer.from_pretrained(...).save_pretrained(...))",
        ) from error
    try:
        return Tokenizer.from_str(data.decode())
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError(
            "this is not a tokenizer.json, or a damaged one",
            {"file": file, "bytes": len(data), "found": error},
            "name a tokenizer.json as the tokenizers library writes it",
        ) from error


def _eos_id(backend: Tokenizer, file: Place, eos_token: str | None) -> int:
    found = _token_id(backend, eos_token, "data.eos_token", file) if eos_token else _named_id(backend, file, "eos")
    if found is None:
        raise _NoEos(
            "the tokenizer does not say which token ends a document",
            {
                "file": file,
                "looked in": "tokenizer_config.json (eos_token), generation_config.json, config.json (eos_token_id)",
            },
            "set data.eos_token, for example to '<|endoftext|>'",
        )
    return found


def _named_id(backend: Tokenizer, file: Place, role: str) -> int | None:
    """The id of `eos` or `bos`, as the files beside a tokenizer.json name it."""
    config = file.parent / "tokenizer_config.json"
    token = _read_json(config).get(f"{role}_token")
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None:
        return _token_id(backend, token, f"{config.name} {role}_token", file)
    for name in ("generation_config.json", "config.json"):
        value = _read_json(file.parent / name).get(f"{role}_token_id")
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and not isinstance(value, bool):
            if backend.id_to_token(value) is None:
                raise InputError(
                    "a special token is not in the tokenizer's vocabulary",
                    {"file": file.parent / name, f"{role}_token_id": value, "tokenizer": file},
                    "name the tokenizer that belongs to this checkpoint",
                )
            return value
    return None


def _chat_template(file: Place) -> ChatTemplate | None:
    """The chat template beside a tokenizer.json: a file of its own goes before the entry of tokenizer_config.json."""
    config, beside = _read_json(file.parent / "tokenizer_config.json"), file.parent / "chat_template.jinja"
    text = beside.read_text(encoding="utf-8") if beside.exists() else None
    return chat_template_from(config, text, special_tokens_of(config))


def _token_id(backend: Tokenizer, token: object, origin: str, file: Place) -> int:
    found = backend.token_to_id(token) if isinstance(token, str) else None
    if found is None:
        raise InputError(
            "a special token is not in the tokenizer's vocabulary",
            {"tokenizer": file, origin: repr(token)},
            "name a token of this vocabulary in data.eos_token",
        )
    return found


def _read_json(file: Place) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise InputError(
            f"{file.name} cannot be read as JSON", {"file": file, "found": error}, "copy the file again"
        ) from error
    return value if isinstance(value, dict) else {}


def _from_gguf(file: Place, eos_token: str | None) -> TextTokenizer:
    try:
        reader = open_gguf(file)
    except CheckpointError as error:
        raise InputError(error.what, error.facts, error.next) from error
    backend, tokens, ids = gguf_tokenizer(reader, file)
    eos_id = ids["eos"] if eos_token is None else None
    names = {"pad_token": ids["padding"], "unk_token": ids["unknown"]}
    extras = {key: tokens[value] for key, value in names.items() if value is not None}
    template = metadata(reader, "tokenizer.chat_template")
    extras |= {} if template is None else {"chat_template": template}
    eos_id = eos_id if eos_id is not None else _eos_id(backend, file, eos_token)
    spelled = {"eos_token": tokens[eos_id], **({} if ids["bos"] is None else {"bos_token": tokens[ids["bos"]]})}
    chat = chat_template_from(extras, None, special_tokens_of(spelled | extras))
    return TextTokenizer(backend, eos_id, ids["bos"], extras, chat)
