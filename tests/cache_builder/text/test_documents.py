"""Documents of every kind of file: which kind a file is of, and what is no such file."""

import json
from pathlib import Path

import pytest

from distillcache.cache_builder.text.document import TokenDocument
from distillcache.cache_builder.text.documents import documents
from distillcache.schemas.config import DataConfig
from distillcache.schemas.errors import InputError


def found_in(path: Path, **data: object) -> list[object]:
    """Texts as they are, tokens as (tokens, mask)."""
    return [
        (each.tokens.tolist(), each.counted.astype(int).tolist()) if isinstance(each, TokenDocument) else each.text
        for each in documents(DataConfig.model_validate({"path": str(path), **data}))
    ]


@pytest.mark.parametrize("suffix", [".array_record", ".parquet"])
def test_other_bytes_are_no_such_file(tmp_path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    for number, data in enumerate((b"no such file", bytes(100_000))):
        (tmp_path / f"{number}{suffix}").write_bytes(data)
        with pytest.raises(InputError, match="cannot be read") as caught:
            found_in(tmp_path / f"{number}{suffix}")
        assert f"{number}{suffix}" in str(caught.value)


def test_a_stated_format_goes_before_the_suffix(tmp_path: Path) -> None:
    (tmp_path / "c4.json").write_text(json.dumps({"text": "lines"}) + "\n")
    (tmp_path / "notes.md").write_text("a note")
    assert found_in(tmp_path / "*.json", format="jsonl") == ["lines"]
    assert found_in(tmp_path / "notes.md", format="text") == ["a note"]
    with pytest.raises(InputError, match="names no text file"):
        found_in(tmp_path, format="jsonl")  # of a folder, only files that say what they are
