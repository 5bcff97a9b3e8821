"""Lines of text files: which they are, and that blank ones cost next to nothing."""

import gzip
import random
import time
from pathlib import Path

import pytest

from distillcache.cache_builder.text.files import plain
from distillcache.cache_builder.text.files.inputs import InputFile, InputReader
from distillcache.cache_builder.text.files.plain import line_records
from distillcache.schemas.errors import RecordError

LIMIT = 1 << 20


def records(path: Path, data: bytes) -> list[tuple[int, str]]:
    """Line numbers and texts of a .jsonl file of these bytes, packed if its name says so."""
    kind = "".join(path.suffixes)
    path.write_bytes(gzip.compress(data, 1) if kind.endswith(".gz") else data)
    file = InputFile(path, path.stat().st_size, kind)
    with InputReader(file) as reader:
        found = list(line_records(file, reader, ("text",), LIMIT, "stop"))
    return [(int(where.rpartition(":")[2]), record["text"]) for where, record in found if isinstance(record, dict)]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("seed", range(4))
def test_lines_keep_their_numbers_over_blank_ones(
    suffix: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against Python's own lines; buffers of 64 bytes end anywhere in a run."""
    monkeypatch.setattr(plain, "READ_BYTES", 64)
    chance, lines = random.Random(seed), []
    for number in range(12):
        blank = chance.choice([b"\n", b"\r\n", b" \t\n", b"\r\r\n", b" " + b"\n"])
        lines += [blank] * chance.choice([0, 1, 63, 64, 65, 200])
        lines += [b" " * chance.choice([0, 100]) + b'{"text": "%d"}' % number + chance.choice([b"\n", b"  \r\n"])]
    lines += [b"\n"] * chance.choice([0, 500]) + [b"   "]
    expected = [
        (number, line.split(b'"')[3].decode())
        for number, line in enumerate(b"".join(lines).split(b"\n"), 1)
        if b"text" in line
    ]
    assert records(tmp_path / f"a{suffix}", b"".join(lines)) == expected


def test_a_wrong_byte_behind_blank_lines_is_where_it_is_said(tmp_path: Path) -> None:
    data = b"\n" * 100_000 + b'{"text": "\xff"}\n'
    with pytest.raises(RecordError) as caught:
        records(tmp_path / "a.jsonl", data)
    assert caught.value.facts["byte"] == data.index(b"\xff")
    assert str(caught.value.facts["line"]).endswith(":100001")


@pytest.mark.parametrize("blank", [b"\n", b" \r\n"])
def test_blank_lines_cost_next_to_nothing(tmp_path: Path, blank: bytes) -> None:
    """A file of 20 kB held four million; they took seven seconds of a processor, now a fiftieth of one."""
    begun = time.process_time()
    assert records(tmp_path / "a.jsonl.gz", blank * (4 << 20) + b'{"text": "x"}\n') == [((4 << 20) + 1, "x")]
    assert time.process_time() - begun < 2
