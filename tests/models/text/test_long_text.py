"""Tokens of a long text by windows are those of the whole text, or none are given."""

import random
from collections.abc import Callable

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from distillcache.models.text.long_text import NoCommonTokens, token_runs
from distillcache.models.text.tokenizer import TextTokenizer
from tests.conftest import byte_tokenizer

WORDS = ["the", "quick", "", "brown", "fox\n\n\tjumps", "über", "漢字", "😀👩\u200d👩\u200d👧", "123456", "don't"]
WORDS += ["ééé", "a" * 12, "e\u0301"]


def words(count: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=500, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator([words(2000)], trainer)
    return made


def over_the_whole_text() -> Tokenizer:
    """As Llama 2's: no word is cut before merges are applied."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False, max_token_length=16)
    made.train_from_iterator([words(500)], trainer)
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    made.train_from_iterator([words(2000)], trainer)
    return made


TEXTS = {
    "words": words(4000),
    "one letter": "a" * 20000,
    "spaces": " " * 20000,
    "emoji": "👩‍👩‍👧" * 3000,
    "combining": "e\u0301" * 8000,
    "digits": "1234567890" * 2000,
    "any": "".join(map(chr, random.Random(1).choices(range(32, 0x2FFF), k=15000))),
}


@pytest.mark.parametrize("make", [byte_tokenizer, byte_level, over_the_whole_text, unigram])
def test_windows_give_the_tokens_of_the_whole(make: Callable[[], Tokenizer]) -> None:
    backend, done = make(), 0
    for text in TEXTS.values():
        whole = backend.encode(text, add_special_tokens=False)
        try:
            runs = list(token_runs(backend, text, 2048, 1024))
        except NoCommonTokens:
            continue
        done += 1
        assert len(runs) > 3
        assert np.concatenate([run.ids for run in runs]).tolist() == whole.ids
        places = np.concatenate([np.stack([run.begins, run.ends], 1) for run in runs])
        assert np.array_equal(places, whole.offsets)
    assert done >= len(TEXTS) - 2  # what cannot be done is refused, and is rare


def test_a_word_without_end_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(NoCommonTokens, match="no token begins"):
        list(token_runs(backend, "a" * 10000, 2048, 1024))


@pytest.mark.parametrize("add_eos", [False, True])
def test_a_long_document_is_encoded_as_a_short_one(monkeypatch: pytest.MonkeyPatch, add_eos: bool) -> None:
    from tokenizers import processors

    backend, text = byte_level(), words(4000)
    backend.add_special_tokens(["<bos>", "<eos>"])
    bos, eos = backend.token_to_id("<bos>"), backend.token_to_id("<eos>")
    single = ["<bos>", "$A", *(["<eos>"] if add_eos else [])]
    backend.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<bos>", bos), ("<eos>", eos)]
    )
    tokenizer = TextTokenizer(backend, eos, bos)
    monkeypatch.setattr("distillcache.models.text.tokenizer.token_runs", lambda *found: token_runs(*found, 2048, 1024))
    chunks = list(tokenizer.encode_long_document(text))
    assert len(chunks) > 5
    assert np.concatenate(chunks).tolist() == tokenizer.encode_documents([text])[0]
    spans = [(0, 10), (11, 11), (5000, 5003), (9000, 30000), (len(text) - 4, len(text))]
    ((ids, said),) = tokenizer.encode_spans([text], [spans])
    long = list(tokenizer.encode_long_spans(text, spans))
    assert np.concatenate([each for each, _ in long]).tolist() == ids
    assert np.concatenate([each for _, each in long]).tolist() == said
