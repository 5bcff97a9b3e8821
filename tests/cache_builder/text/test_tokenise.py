"""Documents to marked tokens: long ones in chunks, which together are what the whole would be."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from distillcache.cache_builder.text import tokenise
from distillcache.cache_builder.text.document import Document
from distillcache.cache_builder.text.files.inputs import InputReader, input_files
from distillcache.cache_builder.text.packing import count_begins
from distillcache.cache_builder.text.skipped import Skipped
from distillcache.cache_builder.text.tokenise import Pace, token_arrays
from distillcache.models.text.tokenizer import TextTokenizer
from distillcache.schemas.config import DataConfig
from distillcache.schemas.errors import RecordError
from tests.conftest import byte_tokenizer

TEXT = "some words, ünd more " * 40000  # three windows


@pytest.mark.parametrize("spans", [None, ((5, 9), (300_000, 700_000))])
def test_a_long_document_comes_in_chunks_with_one_beginning(
    monkeypatch: pytest.MonkeyPatch, spans: tuple[tuple[int, int], ...] | None
) -> None:
    tokenizer = TextTokenizer(byte_tokenizer(), 256)
    documents = [Document("a", "1", spans=None), Document(TEXT, "2", spans=spans), Document("b", "3", spans=None)]
    whole = np.concatenate(list(token_arrays(documents, tokenizer)))
    monkeypatch.setattr(tokenise, "BATCH_CHARACTERS", 1 << 18)
    chunks = list(token_arrays(documents, tokenizer))
    assert len(chunks) > 5
    assert max(chunk.size for chunk in chunks) < 1 << 19
    assert np.array_equal(np.concatenate(chunks), whole)
    assert count_begins(whole) == 3


def test_progress_goes_on_inside_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": TEXT}))
    monkeypatch.setattr(tokenise, "BATCH_CHARACTERS", 1 << 18)
    (file,) = input_files(DataConfig(path=str(path)))
    with InputReader(file) as reader:
        pace, seen = Pace(reader), []
        reader.read()
        for _ in token_arrays([Document(TEXT, "1")], TextTokenizer(byte_tokenizer(), 256), pace=pace):
            seen.append(pace.done)
    assert seen == sorted(seen)
    assert len({each for each in seen if 0 < each < file.size}) >= 3
    assert pace.done == file.size


BACKTRACKING = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize("length", [40, 200_000])
def test_what_the_library_raises_is_an_error_of_the_document(
    tmp_path: Path, length: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its Rust code panics where a pattern backtracks without end, which is no Exception in Python."""
    content = json.loads(byte_tokenizer().to_str()) | {"pre_tokenizer": BACKTRACKING}
    tokenizer = TextTokenizer(Tokenizer.from_str(json.dumps(content)), eos_id=0)
    found = [Document("a" * length + "b", "a.txt"), Document("b", "b.txt")]
    with pytest.raises(RecordError, match="cannot encode") as caught:
        list(token_arrays(iter(found), tokenizer))
    assert caught.value.facts["from"] == "a.txt"
    skipped, _ = token_arrays(iter(found), tokenizer, on_error="skip")
    assert isinstance(skipped, Skipped)
    assert capfd.readouterr().err == ""
