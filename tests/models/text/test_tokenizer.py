"""Tokenizers: BOS and EOS rules, where EOS is looked for, GGUF vocabularies, and damage that is named."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from distillcache.models.checkpoint import save_pretrained
from distillcache.models.decoder import Decoder
from distillcache.models.files.gguf.tokenizer import merges_from_scores
from distillcache.models.text.tokenizer import load_tokenizer, tokenizer_from_json
from distillcache.schemas.errors import InputError

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "t"), ("1", "2")]
TOKENS = ["<|end|>", "<|start|>", *ALPHABET, *("".join(pair) for pair in MERGES), "<think>"]


def byte_level(*, start: bool = False, end: bool = False) -> Tokenizer:
    """A byte-level BPE with digits apart, as SmolLM2's."""
    tokenizer = Tokenizer(BPE(vocab={t: i for i, t in enumerate(TOKENS)}, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in TOKENS[:2]])
    tokenizer.add_tokens([AddedToken(TOKENS[-1], normalized=False)])
    if start or end:
        parts = ["<|start|>"] * start + ["$A"] + ["<|end|>"] * end
        special = [(t, i) for i, t in enumerate(TOKENS[:2])]
        tokenizer.post_processor = processors.TemplateProcessing(single=parts, special_tokens=special)
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path, **files: Any) -> Path:
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def write_gguf(target: Path, **keys: Any) -> Path:
    """A GGUF file with nothing but a tokenizer."""
    values = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": TOKENS,
        "token_type": [3, 3, *[1] * (len(TOKENS) - 3), 4],
        "merges": [" ".join(pair) for pair in MERGES],
        "bos_token_id": 1,
        "eos_token_id": 0,
    } | keys
    writer = gguf.GGUFWriter(target, "llama")
    add = {int: writer.add_uint32, str: writer.add_string, bool: writer.add_bool, list: writer.add_array}
    for key, value in values.items():
        if value is not None:
            add[type(value)](f"tokenizer.ggml.{key}", value)
    writer.add_chat_template("{{ messages }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def refused(path: Path, *named: str, eos_token: str | None = None) -> None:
    with pytest.raises(InputError) as caught:
        load_tokenizer(path, eos_token)
    for text in (*named, "next"):
        assert text in str(caught.value)


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("end", [False, True])
def test_a_document_has_one_eos_and_bos_by_the_tokenizers_rule(start: bool, end: bool, tmp_path: Path):
    path = save(byte_level(start=start, end=end), tmp_path, tokenizer_config={"eos_token": "<|end|>"})
    tokenizer = load_tokenizer(path)
    hello = tokenizer.backend.token_to_id("hello")
    assert tokenizer.adds_eos is end
    assert tokenizer.encode("hello") == [1] * start + [hello] + [0] * end
    assert tokenizer.encode_documents(["hello"])[0] == [1] * start + [hello, 0]
    assert tokenizer.encode_documents(["hello", ""]) == [[1] * start + [hello, 0], [1] * start + [0]]
    # EOS spelled out in the text is the text's, and the document's end is still marked.
    assert tokenizer.encode_documents(["hello<|end|>"])[0] == [1] * start + [hello, 0, 0]


@pytest.mark.parametrize(
    ("files", "eos"),
    [
        ({"tokenizer_config": {"eos_token": "<|end|>"}, "config": {"eos_token_id": 1}}, 0),
        ({"tokenizer_config": {"eos_token": {"content": "<|start|>"}}}, 1),
        ({"tokenizer_config": {"eos_token": None}, "generation_config": {"eos_token_id": [1, 0]}}, 1),
        ({"config": {"eos_token_id": 0}}, 0),
    ],
)
def test_where_eos_is_found(files: dict[str, Any], eos: int, tmp_path: Path):
    path = save(byte_level(), tmp_path, **files)
    assert load_tokenizer(path).eos_id == eos
    assert load_tokenizer(path / "tokenizer.json").eos_id == eos
    assert load_tokenizer(path, eos_token="<think>").eos_id == len(TOKENS) - 1


def test_eos_that_is_missing_or_foreign(tmp_path: Path):
    path = save(byte_level(), tmp_path)
    refused(path, "data.eos_token")
    refused(path, "</s>", eos_token="</s>")
    refused(save(byte_level(), tmp_path, config={"eos_token_id": 99999}), "99999")
    refused(save(byte_level(), tmp_path, tokenizer_config={"eos_token": "</s>"}), "</s>")


def test_truncation_and_padding_are_turned_off(tmp_path: Path):
    plain = byte_level()
    plain.enable_truncation(2)
    plain.enable_padding(length=20)
    assert len(load_tokenizer(save(plain, tmp_path), "<|end|>").encode("abcdef")) == 6


def test_json_and_digest_say_what_the_tokenizer_is(tmp_path: Path):
    path = save(byte_level(), tmp_path, tokenizer_config={"eos_token": "<|end|>"})
    first = load_tokenizer(path)
    again = tokenizer_from_json(first.to_json(), first.eos_id, first.bos_id)
    assert (again.to_json(), again.digest) == (first.to_json(), first.digest)
    (path / "tokenizer.json").write_text(json.dumps(json.loads(first.to_json()), indent=4))
    assert load_tokenizer(path).digest == first.digest
    assert load_tokenizer(path, "<|start|>").digest != first.digest
    assert first.vocab_size == len(TOKENS)


def test_damage_is_named(tmp_path: Path):
    refused(tmp_path / "nothing", "no such tokenizer")
    refused(tmp_path, "no tokenizer.json")
    file = save(byte_level(), tmp_path) / "tokenizer.json"
    content = file.read_text()
    for text in ("", "{}", "[1]", content[: len(content) // 2]):
        file.write_text(text)
        refused(file, "tokenizer.json")
    (tmp_path / "model.gguf").write_bytes(b"GGUF\3\0\0")
    refused(tmp_path / "model.gguf", "truncated")
    (tmp_path / "model.gguf").write_bytes(b"PK")
    refused(tmp_path / "model.gguf", "not a GGUF")


@given(text=st.text())
def test_gguf_byte_level_equals_its_tokenizer_json(text: str, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.getbasetemp() / "byte_level.gguf"
    tokenizer = load_tokenizer(path if path.exists() else write_gguf(path))
    assert tokenizer.encode(text) == byte_level().encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_gguf_special_tokens_and_flags(tmp_path: Path):
    plain = load_tokenizer(write_gguf(tmp_path / "a.gguf"))
    assert (plain.eos_id, plain.bos_id, plain.vocab_size) == (0, 1, len(TOKENS))
    assert plain.encode("<|end|>12<think>") == [0, *plain.encode("1"), *plain.encode("2"), len(TOKENS) - 1]
    both = load_tokenizer(write_gguf(tmp_path / "b.gguf", add_bos_token=True, add_eos_token=True))
    assert both.encode_documents(["t"])[0] == [1, *plain.encode("t"), 0]
    assert load_tokenizer(tmp_path / "a.gguf", "<think>").eos_id == len(TOKENS) - 1


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "a 1234\n\nb", ["a", "Ġ", "1", "2", "3", "4", "Ċ", "Ċ", "b"]),
        ("gpt-2", "a 1234\n\nb", ["a", "Ġ1234", "Ċ", "Ċ", "b"]),
        ("llama-bpe", "a 1234\n\nb", ["a", "Ġ", "123", "4", "ĊĊ", "b"]),
        ("tekken", "aB 12", ["a", "B", "Ġ", "1", "2"]),
        ("qwen2", "a's 12\n\nb", ["a", "'s", "Ġ", "1", "2", "ĊĊ", "b"]),
        ("deepseek-r1-qwen", "a 12", ["a", "Ġ", "1", "2"]),
    ],
)
def test_how_text_is_cut(pre: str, text: str, pieces: list[str], tmp_path: Path):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "a.gguf", pre=pre))
    assert [piece for piece, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)] == pieces
    assert (tokenizer.encode("")[:1] == [1]) is (pre in ("llama-bpe", "tekken"))  # llama.cpp adds BOS to these two


def test_empty_tokens_of_a_gguf_are_no_text(tmp_path: Path) -> None:
    """Named as llama.cpp names them; every id stays a token of its own."""
    tokens, types = [*TOKENS, "", ""], [3, 3, *[1] * (len(TOKENS) - 3), 4, 1, 5]
    tokenizer = load_tokenizer(write_gguf(tmp_path / "a.gguf", tokens=tokens, token_type=types))
    assert tokenizer.vocab_size == len(tokens)
    spelled = [tokenizer.backend.id_to_token(index) for index in range(len(TOKENS), len(tokens))]
    assert spelled == [f"[EMPTY_{index}]" for index in range(len(TOKENS), len(tokens))]
    assert tokenizer.encode(f"hello{spelled[0]}") == byte_level().encode(f"hello{spelled[0]}").ids


def test_qwens_tokenizer_composes_characters(tmp_path: Path):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "a.gguf", pre="qwen2"))
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9") != tokenizer.encode("e")
    other = load_tokenizer(write_gguf(tmp_path / "b.gguf", pre="llama-bpe"))
    assert other.encode("e\u0301") != other.encode("\u00e9")


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"pre": "new-pre"}, "tokenizer.ggml.pre"),
        ({"pre": None}, "tokenizer.ggml.pre"),
        ({"model": "bert"}, "tokenizer.ggml.model"),
        ({"merges": ["no piece"]}, "merges"),
        ({"model": "llama"}, "scores"),
        ({"tokens": None}, "no tokenizer"),
        ({"token_type": [1]}, "token types"),
        ({"eos_token_id": None}, "data.eos_token"),
        ({"eos_token_id": 99999}, "99999"),
        *(
            ({"token_type": [3, 3, *[1] * (len(TOKENS) - 3), kind]}, f"token type  {kind}")
            for kind in (0, 7, -1, 2**31 - 1)
        ),
        ({"tokens": [*TOKENS[:-1], "hello"]}, f"{len(TOKENS) - 1}: 'hello'"),
        ({"tokens": [*TOKENS[:-2], f"[EMPTY_{len(TOKENS) - 1}]", ""]}, "every token once"),
        ({"bos_token_id": None, "add_bos_token": True}, "bos_token_id"),
    ],
)
def test_gguf_refusals(keys: dict[str, Any], named: str, tmp_path: Path):
    refused(write_gguf(tmp_path / "a.gguf", **keys), named)


# A SentencePiece vocabulary: unknown, BOS, EOS, the bytes, then pieces; a lower score was learned later.
PIECES = ["▁", "a", "b", "c", "ab", "▁a", "bc", "abc", "▁ab", "▁abc", "cc"]
SPM_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *PIECES]
SPM = {
    "model": "llama",
    "pre": None,
    "tokens": SPM_TOKENS,
    "token_type": [2, 3, 3, *[6] * 256, *[1] * len(PIECES)],
    "scores": [0.0] * 259 + [-10.0] * 4 + [-float(i) for i in range(len(PIECES) - 4)],
    "merges": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def spm_encode(text: str) -> list[int]:
    """SentencePiece's rule, done literally: of all neighbours join the pair with the best score, leftmost first."""
    ids = {token: index for index, token in enumerate(SPM_TOKENS)}
    symbols = list(("▁" + text if text else "").replace(" ", "▁"))
    while True:
        pairs = [(-SPM["scores"][ids[a + b]], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in ids]
        if not pairs:
            break
        place = min(pairs)[1]
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    return [i for s in symbols for i in ([ids[s]] if s in ids else [3 + byte for byte in s.encode()])]


@given(text=st.text(st.sampled_from("abc é"), max_size=12))
def test_gguf_sentencepiece_equals_the_literal_algorithm(text: str, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.getbasetemp() / "sentencepiece.gguf"
    tokenizer = load_tokenizer(path if path.exists() else write_gguf(path, **SPM))
    assert tokenizer.encode(text) == [1, *spm_encode(text)]
    assert tokenizer.backend.decode(tokenizer.encode(text)) == text  # special tokens left out


def test_merges_leave_out_tokens_that_are_not_pieces():
    tokens, types = ["a", "b", "ab", "<s>", "<"], [1, 1, 1, 3, 1]
    assert merges_from_scores(tokens, types, [0.0, 0.0, -1.0, 0.0, 0.0]) == [("a", "b")]


@pytest.mark.parametrize("kind", [2, 3, 4])
def test_gguf_tokens_that_go_through_the_text_whole(kind: int, tmp_path: Path):
    """llama.cpp caches unknown, control and user-defined tokens, in either kind of vocabulary."""
    types = [kind, *SPM["token_type"][1:]]
    tokenizer = load_tokenizer(write_gguf(tmp_path / "a.gguf", **SPM | {"token_type": types}))
    ids = {token: index for index, token in enumerate(SPM_TOKENS)}
    assert tokenizer.encode("<unk>a") == [1, 0, ids["▁a"]]
    assert tokenizer.encode("a<unk><unk>") == [1, ids["▁a"], 0, 0]
    assert tokenizer.backend.decode([ids["▁a"], 0]) == ("a<unk>" if kind == 4 else "a")
    tokens = ["<unk>", *TOKENS[1:]]
    types = [kind, 3, *[1] * (len(TOKENS) - 2)]
    tokenizer = load_tokenizer(write_gguf(tmp_path / "b.gguf", tokens=tokens, token_type=types))
    assert tokenizer.encode("hello<unk>") == [tokens.index("hello"), 0]


@pytest.mark.parametrize("kind", [1, 5, 6])
def test_gguf_tokens_that_are_spelled_out(kind: int, tmp_path: Path):
    tokens, types = ["<odd>", *TOKENS[1:]], [kind, 3, *[1] * (len(TOKENS) - 2)]
    tokenizer = load_tokenizer(write_gguf(tmp_path / "b.gguf", tokens=tokens, token_type=types))
    assert 0 not in tokenizer.encode("hello<odd>")


def test_gguf_tokens_that_look_like_control_are(tmp_path: Path):
    tokens, types = ["<|im_end|>", *TOKENS[1:]], [1, 3, *[1] * (len(TOKENS) - 2)]
    tokenizer = load_tokenizer(write_gguf(tmp_path / "b.gguf", tokens=tokens, token_type=types))
    assert tokenizer.encode("hello<|im_end|>") == [tokens.index("hello"), 0]


def test_exports_carry_the_tokenizer(tiny: Decoder, tmp_path: Path):
    source = write_gguf(tmp_path / "a.gguf")
    save_pretrained(tiny, tmp_path / "out", tokenizer_from=source)
    assert load_tokenizer(tmp_path / "out").digest == load_tokenizer(source).digest
    written = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert written["eos_token"] == "<|end|>"
    assert written["chat_template"] == "{{ messages }}"
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == 0
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 0}
    # From a directory the files are copied; from a tokenizer they are made.
    save_pretrained(tiny, tmp_path / "copy", tokenizer_from=tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    save_pretrained(tiny, tmp_path / "copy", tokenizer_from=load_tokenizer(source))
    assert load_tokenizer(tmp_path / "copy").digest == load_tokenizer(source).digest


def test_a_tokenizer_without_eos_is_still_copied(tiny: Decoder, tmp_path: Path):
    source = save(byte_level(), tmp_path / "source")
    save_pretrained(tiny, tmp_path / "out", tokenizer_from=source)
    shutil.rmtree(source)
    assert load_tokenizer(tmp_path / "out", "<|end|>").eos_id == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] is None


@pytest.mark.parametrize("place", ["added_tokens", "vocab"])
def test_an_id_beyond_what_the_file_could_list_is_refused_before_memory_is_taken(place: str, tmp_path: Path):
    file = save(byte_level(), tmp_path) / "tokenizer.json"
    content = json.loads(file.read_text())
    if place == "vocab":
        content["model"]["vocab"]["he"] = 2**31 - 1
    else:
        content["added_tokens"][0]["id"] = 2**31 - 1
    file.write_text(json.dumps(content))
    refused(file, "2147483647", "bytes")


@pytest.mark.parametrize("value", [2**31, 2**40, -1])
def test_an_eos_id_that_no_token_can_have_is_refused(value: int, tmp_path: Path):
    refused(save(byte_level(), tmp_path, generation_config={"eos_token_id": value}), str(value))


TEKKEN = json.dumps({"config": {"pattern": "."}, "vocab": [{"rank": 0, "token_bytes": "AA=="}]}).encode()
RANKS, PIECES = b"IQ== 0\nIg== 1\n", b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tekken.json", TEKKEN, "Mistral's own tokenizer"),
        ("tiktoken.model", RANKS, "a tiktoken vocabulary"),
        ("qwen.tiktoken", RANKS, "a tiktoken vocabulary"),
        ("tokenizer.model", PIECES, "a SentencePiece model"),
        ("vocab.json", b'{"a": 0}', "a vocabulary alone"),
        ("tokenizer_config.json", b'{"eos_token": "</s>"}', "a tokenizer's settings"),
    ],
)
def test_other_kinds_of_tokenizers_are_recognised(name: str, content: bytes, said: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, said)
    if name not in ("vocab.json", "tokenizer_config.json"):
        refused(tmp_path, said)
    (tmp_path / "tokenizer.json").write_bytes(content)  # under the name that is read
    refused(tmp_path, said)


def replacing(*contents: str) -> dict[str, Any]:
    steps = [{"type": "Replace", "pattern": {"String": "a"}, "content": content} for content in contents]
    return {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": steps}]}}


def adding(*pieces: str, id: int = 1) -> dict[str, Any]:
    named = {"A": {"Sequence": {"id": "A", "type_id": 0}}, "S": {"SpecialToken": {"id": "<|start|>", "type_id": 0}}}
    special = {"<|start|>": {"id": "<|start|>", "ids": [id], "tokens": ["<|start|>"]}}
    rule = {"type": "TemplateProcessing", "single": [named[piece] for piece in pieces], "pair": []}
    return {"post_processor": {**rule, "special_tokens": special}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (replacing("a" * 100, "a" * 100, "a" * 100, "a" * 100), "many times as long"),
        (adding("S"), "does not write a text once"),
        (adding("A", "A"), "does not write a text once"),
        (adding("S", "A", id=len(TOKENS)), "that its vocabulary lacks"),
        (adding("S", "A", id=2**32 - 1), "that its vocabulary lacks"),
        ({"post_processor": {"type": "Sequence", "processors": [adding("A", "A")["post_processor"]]}}, "text once"),
        ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}}, "one id"),
    ],
)
def test_a_file_that_would_make_endless_or_foreign_tokens_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = save(byte_level(start=True), tmp_path / "t", tokenizer_config={"eos_token": "<|end|>"})
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**content, **changes}))
    with pytest.raises(InputError, match=message):
        load_tokenizer(folder)


def test_a_files_own_rules_of_the_usual_kind_are_taken(tmp_path: Path) -> None:
    folder = save(byte_level(start=True), tmp_path / "t", tokenizer_config={"eos_token": "<|end|>"})
    content = json.loads((folder / "tokenizer.json").read_text())
    for changes in (adding("S", "A"), adding("S", "S", "A"), replacing("e", "<n>"), {"post_processor": None}):
        (folder / "tokenizer.json").write_text(json.dumps({**content, **changes}))
        assert load_tokenizer(folder).decode(load_tokenizer(folder).encode("h")).endswith("h")


@pytest.mark.parametrize("bos", ["", "<nope>", None])
def test_a_bos_that_is_no_token_is_none(bos: str | None, tmp_path: Path) -> None:
    """transformers takes all three: an empty text for none, and adds what is missing."""
    folder = save(byte_level(), tmp_path / "t", tokenizer_config={"eos_token": "<|end|>", "bos_token": bos})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.bos_id is None
    assert tokenizer.eos_id == 0


def test_an_empty_eos_is_looked_for_elsewhere(tmp_path: Path) -> None:
    files = {"tokenizer_config": {"eos_token": ""}, "generation_config": {"eos_token_id": [0]}}
    assert load_tokenizer(save(byte_level(), tmp_path / "t", **files)).eos_id == 0
    refused(save(byte_level(), tmp_path / "u", tokenizer_config={"eos_token": ""}), "does not say which token ends")


def test_a_table_over_which_the_tokenizers_library_panics_is_an_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What pyo3 makes of a panic is no `Exception`."""
    folder = save(byte_level(), tmp_path / "t", tokenizer_config={"eos_token": "<|end|>"})
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "////f0FBQUE="}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    refused(folder, "not a tokenizer.json, or a damaged one")
    assert capfd.readouterr().err == ""
