"""The tokenizer that comes with a checkpoint: from a tokenizer.json, an HF directory or a GGUF file.

A *document* is what the tokenizer makes of a text by its own rule (its post-processor may put BOS in front), then
exactly one EOS. Which token is EOS is not part of tokenizer.json; it stands beside it, see `load_tokenizer`.

Truncation and padding that a tokenizer.json asks for are turned off: they would cut documents without a word.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from tokenizers import AddedToken, Tokenizer

from distillcache.models.files.foreign import LFS_STEP, is_lfs_pointer, step_for_missing_path
from distillcache.models.files.gguf.file import is_gguf, metadata, open_gguf
from distillcache.models.files.gguf.tokenizer import gguf_tokenizer
from distillcache.models.files.runs import hf_folder, numbered
from distillcache.models.files.tensors import some
from distillcache.models.text.chat_files import (
    PROCESSOR_TEMPLATE,
    SPECIAL_TOKENS_MAP,
    TEMPLATE_FILE,
    TOKENIZER_CONFIG,
    chosen_template,
    content_of,
    folder_template,
    named_templates,
    read_settings,
    special_tokens_of,
    template_files,
)
from distillcache.models.text.chat_template import ChatTemplate
from distillcache.models.text.long_text import NoCommonTokens, token_runs
from distillcache.models.text.tokenizer_settings import splits_special
from distillcache.schemas.errors import CheckpointError, InputError
from distillcache.schemas.runtime.library_log import is_panic, without_library_log
from distillcache.schemas.store.path import Location, ObjectPath, locate

TOKENIZER_JSON = "tokenizer.json"
# What a tokenizer consists of in an HF directory, and what an export copies.
TOKENIZER_FILES = (
    TOKENIZER_JSON,
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS_MAP,
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    TEMPLATE_FILE,
    PROCESSOR_TEMPLATE,
    "generation_config.json",
)
# Ids up to here are accepted whatever the file's size; beyond, an id must not exceed the bytes that could list its
# vocabulary. The tokenizers library allocates by the highest id: 4 bytes for each.
FREE_IDS = 1 << 20
MOST_GROWTH = 256  # of a text by replacements; known tokenizers have 1 or 3
MOST_ID = 2**31 - 1  # tokens are int32


@dataclass(frozen=True, eq=False)
class TextTokenizer:
    """A tokenizer with its end-of-document token.

    backend: the tokenizer proper; its post-processor is its own rule for BOS.
    eos_id: the token that ends a document.
    bos_id: the token that starts one, where the checkpoint names it. Whether it is put in front is the backend's rule.
    extras: more entries for tokenizer_config.json (chat template, padding token).
    chat: how it writes chats, where the checkpoint says so.
    splits_special: special tokens that a text spells are cut as any other text (`split_special_tokens`).
    """

    backend: Tokenizer
    eos_id: int
    bos_id: int | None = None
    extras: Mapping[str, Any] | None = None
    chat: ChatTemplate | None = None
    splits_special: bool = False

    def __post_init__(self) -> None:
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = self.splits_special

    def encode(self, text: str) -> list[int]:
        """The tokens of a text by the tokenizer's own rule: BOS, and EOS, only if its post-processor adds them."""
        return self.backend.encode(text).ids

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, then EOS, once: a tokenizer that adds EOS itself is not given a second one.

        On all cores.
        """
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

    def encode_long_document(self, text: str) -> Iterator[np.ndarray]:
        """A text's tokens, as of `encode_documents`, in chunks, int32 [n], in memory that does not grow with the text.

        Raises:
            NoCommonTokens: it cannot be done by windows (long_text.py).
        """
        before, after = self._rule
        for number, run in enumerate(token_runs(self._bare, text)):
            yield run.ids if number else np.concatenate([before, run.ids])
        yield after

    def encode_long_spans(self, text: str, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """`encode_spans` of one text in chunks: int32 [n], and bool [n]. Raises as `encode_long_document` does."""
        places = np.array(sorted(span for span in spans if span[0] < span[1]), np.int64).reshape(-1, 2)
        for run in token_runs(self._verbatim, text):
            first = np.searchsorted(
                places[:, 1], run.begins, side="right"
            )  # of each token: the first span not yet over
            starts = np.append(places[:, 0], len(text) + 1)[first]
            yield run.ids, starts < run.ends

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens, special ones spelled out."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def adds_eos(self) -> bool:
        """Return whether the tokenizer's own rule ends a text with EOS. Asked of the empty text, which has none
        itself.
        """
        return self.backend.encode("").ids[-1:] == [self.eos_id]

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The special tokens as they are spelled in a text."""
        own = (token.content for token in self.backend.get_added_tokens_decoder().values() if token.special)
        declared = () if self.chat is None else self.chat.whole_tokens
        return (*own, *(token["content"] for token in declared if token.get("special")))

    @cached_property
    def _bare(self) -> Tokenizer:
        """The backend without its post-processor."""
        content = json.loads(self.to_json())
        backend = Tokenizer.from_str(json.dumps({**content, "post_processor": None}, ensure_ascii=False))
        backend.encode_special_tokens = self.splits_special
        return backend

    @cached_property
    def _rule(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that stand in front of and behind those of a document, int32."""
        encoding = self.backend.encode("a")
        added = np.array(encoding.special_tokens_mask, bool)
        ids, text = np.array(self._end(encoding.ids), np.int32), np.flatnonzero(~added)
        if not text.size:
            raise NoCommonTokens("the tokenizer makes no token of a letter")
        return ids[: text[0]], ids[text[-1] + 1 :]

    @cached_property
    def _verbatim(self) -> Tokenizer:
        """The same without a post-processor, which adds nothing here, and takes spaces out of the tokens' offsets."""
        backend = Tokenizer.from_str(self._bare.to_str())
        backend.encode_special_tokens = self.splits_special
        if self.chat is not None:
            backend.add_tokens([AddedToken(**token) for token in self.chat.whole_tokens])
        return backend

    @cached_property
    def vocab_size(self) -> int:
        """The highest id + 1: the minimum size of a model's vocabulary."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def to_json(self) -> str:
        """The text of a tokenizer.json: the same for the same tokenizer, in every process."""
        return self.backend.to_str()

    @cached_property
    def digest(self) -> str:
        """xxh3-128, in hex, of everything that determines the tokens of a document: tokenizer.json, keys sorted,
        the EOS id, and whether special tokens are cut.
        """
        content = {"tokenizer": json.loads(self.to_json()), "eos_id": self.eos_id}
        content |= {"split_special_tokens": True} if self.splits_special else {}
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return xxhash.xxh3_128_hexdigest(text.encode())

    def _end(self, ids: list[int]) -> list[int]:
        return ids if self.adds_eos else [*ids, self.eos_id]


def load_tokenizer(path: str | os.PathLike[str] | ObjectPath, eos_token: str | None = None) -> TextTokenizer:
    """The tokenizer of a tokenizer.json, an HF directory, a run or a .gguf file, on a local disk or in a bucket.

    EOS is `eos_token` where it is given; else, for a GGUF, the file's own; else what stands beside tokenizer.json:
    `eos_token` of tokenizer_config.json and special_tokens_map.json (`chat_files.py` says which counts), then
    `eos_token_id` of generation_config.json and of config.json (the first of a list).
    """
    where = numbered(locate(path))
    if isinstance(where, Path) and not where.exists():
        step = step_for_missing_path(where, "name a tokenizer.json, HF directory or .gguf file")
        raise InputError("no such tokenizer", {"path": path}, step)
    if _is_gguf(where):
        return _from_gguf(where, eos_token)
    file = hf_folder(where) / TOKENIZER_JSON if _is_folder(where) else where
    backend = _parse(file)
    eos_id, bos_id = _eos_id(backend, file, eos_token), _named_id(backend, file, "bos")
    splits = splits_special(file.parent, backend)
    return TextTokenizer(backend, eos_id, bos_id, chat=folder_template(file.parent, backend), splits_special=splits)


def _is_gguf(place: Location) -> bool:
    return is_gguf(place) and place.suffix != ".json"


def _is_folder(place: Location) -> bool:
    """In a bucket: what is not called a .json file."""
    return place.is_dir() if isinstance(place, Path) else place.suffix != ".json"


def tokenizer_from_json(
    text: str, eos_id: int, bos_id: int | None = None, *, splits_special: bool = False
) -> TextTokenizer:
    """The tokenizer that `TextTokenizer.to_json` wrote, where its EOS id is recorded elsewhere."""
    return TextTokenizer(Tokenizer.from_str(text), eos_id, bos_id, splits_special=splits_special)


def tokenizer_files(source: Location | TextTokenizer) -> tuple[dict[str, bytes], dict[str, int]]:
    """Return the tokenizer files of an export.

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


def _for_export(source: Location) -> TextTokenizer | None:
    """None where the tokenizer has no EOS that we know of: its files are still worth copying."""
    try:
        return load_tokenizer(source)
    except _NoEos:
        return None


def _files_of(source: Location) -> dict[str, bytes]:
    """The files of an HF directory's tokenizer, or of those beside a tokenizer.json."""
    if _is_gguf(source):
        return {}
    file = hf_folder(source) / TOKENIZER_JSON if _is_folder(source) else source
    beside = [file.parent / name for name in TOKENIZER_FILES[1:]]
    found = {TOKENIZER_JSON: file.read_bytes()} | {each.name: each.read_bytes() for each in beside if each.exists()}
    templates = template_files(file.parent)
    if templates.keys() - {"default"}:  # an export has no folders: named templates go into the config, as a list
        named = [{"name": name, "template": each.read_text(encoding="utf-8")} for name, each in templates.items()]
        config = read_settings(file.parent / TOKENIZER_CONFIG) | {"chat_template": named}
        found[TOKENIZER_CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        found.pop(TEMPLATE_FILE, None)
    return found


class _NoEos(InputError):
    """A tokenizer without a known EOS: an error for reading text, none for copying files."""


def _parse(file: Location) -> Tokenizer:
    try:
        data = file.read_bytes()
    except FileNotFoundError as error:
        names = sorted(each.name for each in file.parent.iterdir())
        raise InputError(
            f"the directory has no {file.name}",
            {"directory": file.parent, "found": some(names) or "nothing"},
            _other_kind(names) or SAVE_IT,
        ) from error
    except OSError as error:
        raise InputError(
            "the tokenizer cannot be read",
            {"file": file, "cause": error},
            "check that it is a file and that you may read it",
        ) from error
    _check_content(data, file)
    try:
        with without_library_log():
            backend = Tokenizer.from_str(data.decode())
            _check_own_tokens(backend, file)
        return backend
    except InputError:
        raise
    except BaseException as error:  # tokenizers raises plain Exception; its Rust part panics over damaged tables
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise InputError(
            "this is not a tokenizer.json, or a damaged one",
            {"file": file, "bytes": len(data), "found": error},
            _kind_of_bytes(data) or "name a tokenizer.json as the tokenizers library writes it",
        ) from error


def _check_content(data: bytes, file: Location) -> None:
    """Refuse a tokenizer.json that would take memory without bound, or give ids that its vocabulary lacks."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return  # the library says what is wrong
    content = content if isinstance(content, dict) else {}
    model, added = content.get("model"), content.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids = [*(vocab.values() if isinstance(vocab, dict) else ())]
    if len({each for each in ids if isinstance(each, int)}) < len(ids) and all(isinstance(each, int) for each in ids):
        raise _damaged("two tokens of a vocabulary have one id", {"file": file, "tokens": len(ids)})
    ids += [token.get("id") for token in (added if isinstance(added, list) else ()) if isinstance(token, dict)]
    _check_ids(ids, len(data), file)
    _check_growth(content.get("normalizer"), file)
    for part in _parts(content.get("post_processor"), "processors"):
        _check_post_processor(part, file)


def _check_ids(ids: Sequence[object], size: int, file: Location) -> None:
    """Refuse ids far beyond what the file can list, before the tokenizers library allocates an array up to them."""
    highest = max((each for each in ids if isinstance(each, int)), default=0)
    most = min(max(FREE_IDS, size), MOST_ID)
    if highest > most:
        raise _damaged(
            "a token's id is beyond any vocabulary that the tokenizer's file could hold",
            {"file": file, "bytes": size, "id": highest, "expected": f"{most} or less"},
        )


def _check_growth(normalizer: object, file: Location) -> None:
    """Refuse replacements that make a text many times as long: four of `a` by a hundred make 100 MB of one letter."""
    growth = 1
    for part in _parts(normalizer, "normalizers"):
        content = part.get("content")
        if part.get("type") == "Replace" and isinstance(content, str):
            growth *= max(1, len(content))
    if growth > MOST_GROWTH:
        raise _damaged(
            "a tokenizer's replacements make texts many times as long",
            {"file": file, "found": f"{growth:,} times", "expected": f"{MOST_GROWTH} times at most"},
        )


def _check_post_processor(part: Mapping[str, Any], file: Location) -> None:
    """Refuse a rule that leaves a text out or repeats it."""
    if part.get("type") != "TemplateProcessing" or not isinstance(part.get("single"), list):
        return
    texts = sum(isinstance(piece, dict) and "Sequence" in piece for piece in part["single"])
    if texts != 1:
        raise _damaged(
            "a tokenizer's post-processor does not write a text once",
            {"file": file, "found": f"{texts} times", "expected": "once (one Sequence in post_processor.single)"},
        )


def _check_own_tokens(backend: Tokenizer, file: Location) -> None:
    """Refuse tokens of the post-processor that the vocabulary lacks: a model has no rows for them."""
    unknown = [each for each in backend.encode("").ids if each > MOST_ID or backend.id_to_token(each) is None]
    if unknown:
        raise _damaged(
            "a tokenizer's post-processor adds a token that its vocabulary lacks", {"file": file, "id": unknown[0]}
        )


def _parts(value: object, name: str) -> Iterator[Mapping[str, Any]]:
    """A normalizer's or post-processor's steps: itself, or those of its `Sequence`, which may hold others."""
    left = [value]
    while left:
        each = left.pop()
        if isinstance(each, dict) and each.get("type") == "Sequence" and isinstance(each.get(name), list):
            left += each[name]
        elif isinstance(each, dict):
            yield each


def _damaged(what: str, facts: Mapping[str, object]) -> InputError:
    return InputError(what, facts, "copy the file again from its source")


SAVE_IT = "save the tokenizer with transformers (AutoTokenizer.from_pretrained(...).save_pretrained(...))"


def _other_kind(names: Sequence[str]) -> str | None:
    """The next step where a folder holds a tokenizer of another kind."""
    if "tekken.json" in names:
        return _KINDS["tekken"]
    if any(name.endswith((".tiktoken", "tiktoken.model")) for name in names):
        return _KINDS["tiktoken"]
    if any(name in names for name in ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")):
        return _KINDS["sentencepiece"]
    return None


def _kind_of_file(file: Location) -> str | None:
    """The same of a file of any name. In a bucket the name alone tells."""
    if not isinstance(file, Path):
        return _other_kind([file.name])
    try:
        with file.open("rb") as stream:
            return _kind_of_bytes(stream.read(1 << 16))
    except OSError:
        return None  # the caller's own error says it


def _kind_of_bytes(data: bytes) -> str | None:
    """The next step where a file holds a tokenizer of another kind: by its content, since any name is given to any."""
    if is_lfs_pointer(data):
        return LFS_STEP
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data[:4096]):
        return _KINDS["tiktoken"]
    if data[:1] == b"\n" and b"\x00" in data[:4096]:
        return _KINDS["sentencepiece"]
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if isinstance(content, dict) and isinstance(content.get("vocab"), list) and "config" in content:
        return _KINDS["tekken"]
    if isinstance(content, dict) and {"tokenizer_class", "chat_template", "eos_token"} & content.keys():
        return "this is a tokenizer's settings: name the tokenizer.json beside it, or the folder"
    if isinstance(content, dict) and content and all(isinstance(each, int) for each in content.values()):
        return f"this is a vocabulary alone (vocab.json): {SAVE_IT}"
    return None


# Kind -> the next step. Only tokenizer.json and GGUF are read.
_KINDS = {
    "tekken": "this is Mistral's own tokenizer (tekken.json), which is not read: take tokenizer.json from the model's "
    "Hugging Face folder, or " + SAVE_IT,
    "tiktoken": "this is a tiktoken vocabulary, which does not say how text is cut: " + SAVE_IT,
    "sentencepiece": "this is a SentencePiece model: " + SAVE_IT,
}


def _eos_id(backend: Tokenizer, file: Location, eos_token: str | None) -> int:
    found = _token_id(backend, eos_token, "data.eos_token", file) if eos_token else _named_id(backend, file, "eos")
    if found is None:
        raise _NoEos(
            "the tokenizer does not say which token ends a document",
            {
                "file": file,
                "looked in": "tokenizer_config.json, special_tokens_map.json (eos_token), generation_config.json, "
                "config.json (eos_token_id)",
            },
            "set data.eos_token, for example to '<|endoftext|>'",
        )
    return found


def _named_id(backend: Tokenizer, file: Location, role: str) -> int | None:
    """The id of `eos` or `bos`, as the files beside a tokenizer.json name it."""
    token = special_tokens_of(file.parent).get(f"{role}_token")
    if role == "bos" and token and backend.token_to_id(token) is None:
        return None  # no text has it; a chat that writes it is refused (`ChatTemplate.unknown_tokens`)
    if token:
        names = f"{TOKENIZER_CONFIG} or {SPECIAL_TOKENS_MAP}"
        return _token_id(backend, token, f"{names} {role}_token", file)
    for name in ("generation_config.json", "config.json"):
        value = read_settings(file.parent / name).get(f"{role}_token_id")
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and not isinstance(value, bool):
            if not 0 <= value <= MOST_ID or backend.id_to_token(value) is None:
                raise InputError(
                    "a special token is not in the tokenizer's vocabulary",
                    {"file": file.parent / name, f"{role}_token_id": value, "tokenizer": file},
                    "name the tokenizer that belongs to this checkpoint",
                )
            return value
    return None


def _token_id(backend: Tokenizer, token: object, origin: str, file: Location) -> int:
    found = backend.token_to_id(token) if isinstance(token, str) else None
    if found is None:
        raise InputError(
            "a special token is not in the tokenizer's vocabulary",
            {"tokenizer": file, origin: repr(token)},
            "name a token of this vocabulary in data.eos_token",
        )
    return found


def _from_gguf(file: Location, eos_token: str | None) -> TextTokenizer:
    try:
        reader = open_gguf(file)
    except CheckpointError as error:
        raise InputError(error.what, error.facts, _kind_of_file(file) or error.next) from error
    backend, tokens, ids = gguf_tokenizer(reader, file)
    eos_id = ids["eos"] if eos_token is None else None
    names = {"pad_token": ids["padding"], "unk_token": ids["unknown"]}
    extras = {key: tokens[value] for key, value in names.items() if value is not None}
    template, for_tools = (metadata(reader, f"tokenizer.chat_template{end}") for end in ("", ".tool_use"))
    named = {name: each for name, each in (("default", template), ("tool_use", for_tools)) if each is not None}
    as_list = [{"name": name, "template": each} for name, each in named.items()]
    extras |= {} if not named else {"chat_template": template if for_tools is None else as_list}
    eos_id = eos_id if eos_id is not None else _eos_id(backend, file, eos_token)
    spelled = {"eos_token": tokens[eos_id], **({} if ids["bos"] is None else {"bos_token": tokens[ids["bos"]]})}
    config = spelled | extras
    names = {name: token for name in config if name.endswith("_token") and (token := content_of(config[name]))}
    chat = chosen_template(named_templates(config.get("chat_template"), file), names, config)
    return TextTokenizer(backend, eos_id, ids["bos"], extras, chat)
