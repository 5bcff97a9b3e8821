"""The tokenizer inside a GGUF file: its vocabulary, its merges and its pre-tokenizer.

Source: llama.cpp `llama-vocab.cpp`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from distillcache.models.files.gguf.file import metadata
from distillcache.schemas.errors import InputError
from distillcache.schemas.store.path import Location

# GGUF token types (llama.h, llama_token_type).
TYPES = range(1, 7)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = TYPES

# Control tokens whatever their type says.
# Source: llama.cpp `llama-vocab.cpp` ("control-looking token was not control-type").
CONTROL_TOKENS = frozenset(
    """<|eot_id|> <|eom_id|> <|im_end|> <|end|> <end_of_turn> <|endoftext|> <EOT> _<EOT> <end_of_utterance>
    <|fim_prefix|> <|fim_suffix|> <|fim_middle|> <|fim_pad|> <|repo_name|> <|file_sep|>""".split()  # noqa: SIM905
)

# How the text is cut before the merges, by `tokenizer.ggml.pre`.
# Source: llama.cpp `llama-vocab.cpp`; the same cuts as in the tokenizer.json of SmolLM2, StarCoder, Granite,
# GPT-2, Llama 3, LFM2, Mistral Nemo and Qwen2.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Llama 3's, but every digit is a piece.
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
# The same with combining marks among the letters.
QWEN35_SPLIT = QWEN2_SPLIT.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}")
# Their models take a whole piece that is in the vocabulary without asking the merges, and begin a text with BOS.
WHOLE_SPLITS = dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "lfm2"), LLAMA3_SPLIT) | {"tekken": TEKKEN_SPLIT}
# Of models whose tokenizer.json composes characters first (NFC); llama.cpp does not.
COMPOSED_SPLITS = {"qwen2": QWEN2_SPLIT, "deepseek-r1-qwen": QWEN2_SPLIT, "qwen35": QWEN35_SPLIT}
SPLITS = WHOLE_SPLITS | COMPOSED_SPLITS
DIGITS_APART = ("smollm", "starcoder", "refact")
KNOWN_PRE = ("gpt-2", *DIGITS_APART, *SPLITS)


class GgufTokenizer(NamedTuple):
    """The backend, the spelling of every token, and the ids of `bos`, `eos`, `padding` and `unknown`."""

    backend: Tokenizer
    tokens: list[str]
    ids: dict[str, int | None]


def gguf_tokenizer(reader: gguf.GGUFReader, file: Location) -> GgufTokenizer:
    """Build the tokenizer that the metadata of an open file describes.

    Raises:
        InputError: it has no tokenizer, one of another kind, or one that contradicts itself.
    """
    tokens, types = _vocabulary(reader, file)
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
    # A special token goes through the text whole, the unknown one among them; a user-defined one as well, but it is
    # text when decoded. Unused tokens and bytes are spelled out. Source: llama.cpp, `cache_special_tokens`.
    special = {t for t, k in zip(tokens, types, strict=True) if k in (CONTROL, UNKNOWN) or t in CONTROL_TOKENS}
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in tokens if t in special])
    own = [t for t, k in zip(tokens, types, strict=True) if k == USER_DEFINED and t not in special]
    backend.add_tokens([AddedToken(t, normalized=False) for t in own])
    ids = {role: _special(reader, tokens, role, file) for role in ("bos", "eos", "padding", "unknown")}
    backend.post_processor = _post_processor(reader, tokens, ids, file)  # pyright: ignore[reportAttributeAccessIssue]
    return GgufTokenizer(backend, tokens, ids)


def _vocabulary(reader: gguf.GGUFReader, file: Location) -> tuple[list[str], list[int]]:
    """The spelling and the type of every token. An empty one is called `[EMPTY_3]`, as in llama.cpp: no text has it."""
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
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    first: dict[str, int] = {}
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        found = None
        if kind not in TYPES:
            found = {"token type": kind, "expected": f"one of {NORMAL} to {BYTE}"}
        elif first.setdefault(token, index) != index:
            found = {"also": f"token {first[token]}", "expected": "every token once"}
        if found is not None:
            raise InputError(
                "a token of the GGUF file's vocabulary cannot be used",
                {"file": file, "token": f"{index}: {token!r}", **found},
                "set data.tokenizer to the model's tokenizer.json",
            )
    return tokens, types


def _special(reader: gguf.GGUFReader, tokens: list[str], role: str, file: Location) -> int | None:
    key = f"tokenizer.ggml.{role}_token_id"
    found = metadata(reader, key)
    if found is not None and not (type(found) is int and 0 <= found < len(tokens)):
        raise InputError(
            "a special token is not in the tokenizer's vocabulary",
            {"file": file, key: found, "vocabulary": len(tokens)},
            "set data.tokenizer to the model's tokenizer.json",
        )
    return found


def _byte_level(reader: gguf.GGUFReader, tokens: list[str], file: Location) -> Tokenizer:
    """Byte-level BPE: GPT-2's alphabet of 256 printable characters, cut as `tokenizer.ggml.pre` says."""
    pre = metadata(reader, "tokenizer.ggml.pre")
    if pre not in KNOWN_PRE:
        raise InputError(
            "the GGUF file's pre-tokenizer is not known",
            {"file": file, "tokenizer.ggml.pre": pre, "known": ", ".join(KNOWN_PRE)},
            "set data.tokenizer to the model's tokenizer.json",
        )
    merges = [_merge(text) for text in metadata(reader, "tokenizer.ggml.merges", [])]
    vocab = {token: index for index, token in enumerate(tokens)}
    try:
        backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in WHOLE_SPLITS))
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError(
            "the GGUF file's merges do not fit its vocabulary",
            {"file": file, "found": error},
            "set data.tokenizer to the model's tokenizer.json",
        ) from error
    if pre in COMPOSED_SPLITS:
        backend.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
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


def _sentencepiece(reader: gguf.GGUFReader, tokens: list[str], types: list[int], file: Location) -> Tokenizer:
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
    pieces = {t: s for t, k, s in zip(tokens, types, scores, strict=True) if k in (NORMAL, USER_DEFINED, UNUSED)}
    found = [
        (-score, -cut, piece[:cut], piece[cut:])
        for piece, score in pieces.items()
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    return [(left, right) for _, _, left, right in sorted(found)]


def _post_processor(
    reader: gguf.GGUFReader, tokens: list[str], ids: Mapping[str, int | None], file: Location
) -> processors.TemplateProcessing | None:
    """BOS and EOS as the file asks for them, with llama.cpp's defaults: BOS for SentencePiece, Llama 3 and Tekken."""
    own = metadata(reader, "tokenizer.ggml.model") == "llama" or metadata(reader, "tokenizer.ggml.pre") in WHOLE_SPLITS
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
