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

import gguf
import xxhash
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from models.chat_template import ChatTemplate, chat_template_from, special_tokens_of
from models.ggufs import is_gguf, metadata, open_gguf
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

# GGUF token types (llama.h, llama_token_type).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# How the text is cut before the merges, by `tokenizer.ggml.pre`.
# Source: llama.cpp `llama-vocab.cpp`; the same cuts as in the tokenizer.json of SmolLM2, StarCoder, GPT-2,
# Llama 3 and Mistral Nemo.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {"llama-bpe": LLAMA3_SPLIT, "llama3": LLAMA3_SPLIT, "llama-v3": LLAMA3_SPLIT, "tekken": TEKKEN_SPLIT}
DIGITS_APART = ("smollm", "starcoder")
KNOWN_PRE = ("gpt-2", *DIGITS_APART, *SPLITS)


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
    """The tokenizer of a tokenizer.json, an HF directory or a .gguf file, on a local disk or in a bucket.

    EOS is `eos_token` where it is given; else, for a GGUF, the file's own; else what stands beside tokenizer.json:
    `eos_token` of tokenizer_config.json, then `eos_token_id` of generation_config.json and of config.json (the first
    of a list).
    """
    where = locate(path)
    if isinstance(where, Path) and not where.exists():
        raise InputError("no such tokenizer", {"path": path}, "name a tokenizer.json, HF directory or .gguf file")
    if _is_gguf(where):
        return _from_gguf(where, eos_token)
    file = where / TOKENIZER_JSON if _is_folder(where) else where
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
    file = source / TOKENIZER_JSON if _is_folder(source) else source
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
    tokens, types = _gguf_vocabulary(reader, file)
    model = metadata(reader, "tokenizer.ggml.model")
    if model == "gpt2":
        backend = _byte_level(reader, tokens, file)
    elif model == "llama":
        backend = _sentencepiece(reader, tokens, types, file)
    else:
        raise InputError(
            "this GGUF tokenizer is not supported",
            {"file": file, "tokenizer.ggml.model": model, "supported": "gpt2, llama"},
            "set data.tokenizer to the model's tokenizer.json",
        )
    # A special token goes through the text whole; a user-defined one as well, but it is text when decoded.
    backend.add_special_tokens(
        [AddedToken(t, normalized=False) for t, k in zip(tokens, types, strict=True) if k == CONTROL]
    )
    backend.add_tokens(
        [AddedToken(t, normalized=False) for t, k in zip(tokens, types, strict=True) if k == USER_DEFINED]
    )
    ids = {role: _gguf_special(reader, tokens, role, file) for role in ("bos", "eos", "padding", "unknown")}
    backend.post_processor = _gguf_post_processor(reader, tokens, ids, file)  # pyright: ignore[reportAttributeAccessIssue]
    eos_id = ids["eos"] if eos_token is None else None
    names = {"pad_token": ids["padding"], "unk_token": ids["unknown"]}
    extras = {key: tokens[value] for key, value in names.items() if value is not None}
    template = metadata(reader, "tokenizer.chat_template")
    extras |= {} if template is None else {"chat_template": template}
    eos_id = eos_id if eos_id is not None else _eos_id(backend, file, eos_token)
    spelled = {"eos_token": tokens[eos_id], **({} if ids["bos"] is None else {"bos_token": tokens[ids["bos"]]})}
    chat = chat_template_from(extras, None, special_tokens_of(spelled | extras))
    return TextTokenizer(backend, eos_id, ids["bos"], extras, chat)


def _gguf_vocabulary(reader: gguf.GGUFReader, file: Place) -> tuple[list[str], list[int]]:
    tokens = metadata(reader, "tokenizer.ggml.tokens")
    if not tokens:
        raise InputError("the GGUF file has no tokenizer", {"file": file}, "set data.tokenizer to a tokenizer.json")
    types = metadata(reader, "tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise InputError(
            "the GGUF file's vocabulary is inconsistent",
            {"file": file, "tokens": len(tokens), "token types": len(types)},
            "set data.tokenizer to the model's tokenizer.json",
        )
    return tokens, types


def _gguf_special(reader: gguf.GGUFReader, tokens: list[str], role: str, file: Place) -> int | None:
    key = f"tokenizer.ggml.{role}_token_id"
    found = metadata(reader, key)
    if found is not None and not 0 <= found < len(tokens):
        raise InputError(
            "a special token is not in the tokenizer's vocabulary",
            {"file": file, key: found, "vocabulary": len(tokens)},
            "set data.tokenizer to the model's tokenizer.json",
        )
    return found


def _byte_level(reader: gguf.GGUFReader, tokens: list[str], file: Place) -> Tokenizer:
    """Byte-level BPE: GPT-2's alphabet of 256 printable characters, cut as `tokenizer.ggml.pre` says."""
    pre = metadata(reader, "tokenizer.ggml.pre")
    if pre not in KNOWN_PRE:
        raise InputError(
            "the GGUF file's way of cutting text before tokenising is not known",
            {"file": file, "tokenizer.ggml.pre": pre, "known": ", ".join(KNOWN_PRE)},
            "set data.tokenizer to the model's tokenizer.json",
        )
    merges = [_merge(text) for text in metadata(reader, "tokenizer.ggml.merges", [])]
    vocab = {token: index for index, token in enumerate(tokens)}
    # Llama 3 and Tekken take a whole piece that is in the vocabulary without asking the merges.
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in SPLITS))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in SPLITS)
    first = []
    if pre in SPLITS:
        first = [pre_tokenizers.Split(Regex(SPLITS[pre]), behavior="isolated")]
    elif pre in DIGITS_APART:
        first = [pre_tokenizers.Digits(individual_digits=True)]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def _merge(text: str) -> tuple[str, str]:
    """Two pieces joined by a space; the first character may be a space itself."""
    cut = text.find(" ", 1)
    return text[:cut], text[cut + 1 :]


def _sentencepiece(reader: gguf.GGUFReader, tokens: list[str], types: list[int], file: Place) -> Tokenizer:
    """SentencePiece BPE: spaces are `▁`, unknown characters become bytes, the merges follow from the scores."""
    scores = metadata(reader, "tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise InputError(
            "the GGUF file's vocabulary has no scores",
            {"file": file, "tokens": len(tokens), "scores": 0 if scores is None else len(scores)},
            "set data.tokenizer to the model's tokenizer.json",
        )
    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    merges = merges_from_scores(tokens, types, scores)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = metadata(reader, "tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = (  # pyright: ignore[reportAttributeAccessIssue]
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    )
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def merges_from_scores(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges that a SentencePiece vocabulary implies: every piece from every two pieces, best score first.

    Source: HF transformers `convert_slow_tokenizer.generate_merges`; of splits of one piece, the longest left part
    goes first.
    """
    pieces = {t: s for t, k, s in zip(tokens, types, scores, strict=True) if k in (NORMAL, USER_DEFINED)}
    found = [
        (-score, -cut, piece[:cut], piece[cut:])
        for piece, score in pieces.items()
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    return [(left, right) for _, _, left, right in sorted(found)]


def _gguf_post_processor(
    reader: gguf.GGUFReader, tokens: list[str], ids: Mapping[str, int | None], file: Place
) -> processors.TemplateProcessing | None:
    """BOS and EOS as the file asks for them, with llama.cpp's defaults: BOS for SentencePiece, Llama 3 and Tekken."""
    own = metadata(reader, "tokenizer.ggml.model") == "llama" or metadata(reader, "tokenizer.ggml.pre") in SPLITS
    wanted = {
        "bos": metadata(reader, "tokenizer.ggml.add_bos_token", own),
        "eos": metadata(reader, "tokenizer.ggml.add_eos_token", False),
    }
    added: dict[str, tuple[str, int]] = {}
    for role, wish in wanted.items():
        index = ids[role]
        if wish and index is None:
            raise InputError(
                f"the GGUF file asks for {role.upper()} but names no such token",
                {"file": file, "missing": f"tokenizer.ggml.{role}_token_id"},
                "set data.tokenizer to the model's tokenizer.json",
            )
        if wish and index is not None:
            added[role] = (tokens[index], index)
    if not added:
        return None
    # `$A` stands for the text; the special tokens go by their role, since a token's own spelling may hold a `:`.
    parts = [*(["bos"] if "bos" in added else []), "$A", *(["eos"] if "eos" in added else [])]
    special = [{"id": role, "ids": [index], "tokens": [token]} for role, (token, index) in added.items()]
    return processors.TemplateProcessing(single=parts, special_tokens=special)
