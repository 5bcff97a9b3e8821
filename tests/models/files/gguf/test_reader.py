"""GGUF headers that lie about counts, lengths, types and UTF-8: an error of ours, before memory is taken."""

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import pytest

from distillcache.models.checkpoint import load_pretrained
from distillcache.models.files.gguf.file import metadata, open_gguf
from distillcache.models.files.gguf.reader import CheckedGguf
from distillcache.models.text.tokenizer import load_tokenizer
from distillcache.schemas.errors import CheckpointError, DistillcacheError
from distillcache.schemas.store.store import Store
from tests.models.conftest import GOLDEN
from tests.models.files.gguf.test_file import write_gguf
from tests.models.text.test_tokenizer import write_gguf as write_tokenizer_gguf
from tests.servers.fixtures import Bucket

U32, I32, STRING, ARRAY = 4, 5, 8, 9


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(fields: int, tensors: int = 0, body: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + body


def array(kind: int, count: int, body: bytes = b"") -> bytes:
    return text(b"a") + struct.pack("<IIQ", ARRAY, kind, count) + body


def tensor(sizes: list[int], kind: int = 0, offset: int = 0, name: bytes = b"x") -> bytes:
    axes = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return text(name) + axes + struct.pack("<IQ", kind, offset)


NESTED = b"".join(struct.pack("<IQ", ARRAY, 1) for _ in range(3000))
LIES = {
    "fields": header(2**40),
    "fields beyond the file": header(60_000),
    "tensors": header(0, 2**40),
    "tensors beyond the file": header(0, 2**20),
    "array": header(1, 0, array(0, 2**40)),
    "array beyond the file": header(1, 0, array(U32, 2**20)),
    "array of strings": header(1, 0, array(STRING, 2**40)),
    "array of arrays": header(1, 0, array(ARRAY, 2**40)),
    "nested arrays": header(1, 0, array(ARRAY, 1, NESTED)),
    "key": header(1, 0, struct.pack("<Q", 2**40) + b"a"),
    "string": header(1, 0, text(b"a") + struct.pack("<IQ", STRING, 2**63)),
    "type": header(1, 0, text(b"a") + struct.pack("<I", 99)),
    "key no UTF-8": header(1, 0, text(b"\xff") + struct.pack("<II", U32, 1)),
    "numbers": header(0, 1, tensor([2**40])),
    "numbers that overflow": header(0, 1, tensor([2**32, 2**32])),
    "none": header(0, 1, tensor([2**40, 0])),
    "no axes": header(0, 1, tensor([])),
    "offset": header(0, 1, tensor([2], offset=2**62)),
    "tensors in one place": header(0, 2, tensor([8]) + tensor([8], name=b"y")),
    "offset between two places": header(0, 1, tensor([1], offset=4)),
    "tensor type": header(0, 1, tensor([2], kind=999)),
    "tensor no UTF-8": header(0, 1, tensor([2], name=b"\xff")),
    "axes": header(0, 1, text(b"x") + struct.pack("<I", 2**31)),
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie(lie: str, tmp_path: Path):
    (tmp_path / "a.gguf").write_bytes(LIES[lie] + bytes(64))
    check_refused(tmp_path / "a.gguf")


def test_headers_that_lie_in_a_bucket(gcs: Bucket):
    """Every fourth: the reader is that of local files, and each lie takes a third of a second here."""
    for lie, data in list(LIES.items())[::4]:
        Store(gcs.url).write(f"{lie}.gguf", data + bytes(64))
        check_refused(f"{gcs.url}/{lie}.gguf")


def check_refused(path: Path | str) -> None:
    tracemalloc.start()
    try:
        for load in (load_pretrained, load_tokenizer):
            with pytest.raises(DistillcacheError, match="truncated or damaged"):
                load(path)
        assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    finally:
        tracemalloc.stop()


def test_strings_that_are_no_utf8(tmp_path: Path):
    (tmp_path / "a.gguf").write_bytes(
        header(1, 0, text(b"general.name") + struct.pack("<I", STRING) + text(b"\xff\xfe"))
    )
    with pytest.raises(CheckpointError, match=r"(?s)general.name.*UTF-8"):
        metadata(open_gguf(tmp_path / "a.gguf"), "general.name")


@pytest.mark.parametrize(
    "key", ["model", "pre", "tokens", "token_type", "scores", "merges", "bos_token_id", "eos_token_id"]
)
@pytest.mark.parametrize("value", [7, "x", True, [1], ["x"], [1.5]], ids=str)
def test_metadata_of_wrong_types(key: str, value: Any, tmp_path: Path):
    path = write_tokenizer_gguf(tmp_path / "a.gguf", **{key: value})
    try:
        load_tokenizer(path)
    except DistillcacheError:
        return
    assert (key, type(value)) in {("bos_token_id", int), ("eos_token_id", int), ("scores", list)} or key == "scores"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", 10**9),
        ("block_count", "3"),
        ("expert_count", 10**9),
        ("attention.head_count", 2**31),
        ("attention.layer_norm_rms_epsilon", "x"),
        ("attention.layer_norm_rms_epsilon", float("nan")),
        ("rope.freq_base", "x"),
        ("rope.freq_base", float("inf")),
        ("rope.scaling.factor", "x"),
    ],
)
def test_values_that_no_model_has(key: str, value: Any, tmp_path: Path):
    path = write_gguf(GOLDEN / "llama_linear", tmp_path / "a.gguf", changes={key: value})
    with pytest.raises(CheckpointError, match=key):
        load_pretrained(path)


def test_arrays_are_read_as_the_package_reads_them(tmp_path: Path):
    """Strings and numbers of every kind, of a file in either byte order: the same parts, found in the same places."""
    for order in gguf.GGUFEndian:
        writer = gguf.GGUFWriter(tmp_path / f"{order.name}.gguf", "llama", endianess=order)
        writer.add_array("strings", ["", "one", "zwei \u00e4", "x" * 300])
        writer.add_array("integers", [-1, 0, 2**31 - 1])
        writer.add_array("numbers", [0.5, -2.0])
        writer.add_array("flags", [True, False])
        writer.add_array("none", [])
        writer.add_string("last", "behind them")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        ours, theirs = (kind(tmp_path / f"{order.name}.gguf").fields for kind in (CheckedGguf, gguf.GGUFReader))
        assert list(ours) == list(theirs)
        for name, field in theirs.items():
            found = ours[name]
            assert (found.offset, found.types, found.data) == (field.offset, field.types, field.data)
            assert [part.tobytes() for part in found.parts] == [part.tobytes() for part in field.parts]
            assert found.contents() == field.contents()
        assert ours["last"].contents() == "behind them"
