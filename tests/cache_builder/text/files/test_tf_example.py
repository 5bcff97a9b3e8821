"""`tf.train.Example` decoded: against bytes made by hand, and against protobuf itself."""

import contextlib

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from distillcache.cache_builder.text.files.tf_example import decode_example


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    found = bytearray()
    while True:
        value, low = value >> 7, value & 127
        found.append(low | (128 if value else 0))
        if not value:
            return bytes(found)


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def example(*, packed: bool = True, **features: list) -> bytes:
    """The bytes of a tf.train.Example, by protobuf's rules and not by our decoder's."""
    entries = b""
    for name, values in features.items():
        if values and isinstance(values[0], bytes):
            content = field(1, b"".join(field(1, value) for value in values))
        elif values and isinstance(values[0], float):
            numbers = [np.float32(value).tobytes() for value in values]
            content = field(2, field(1, b"".join(numbers)) if packed else b"".join(b"\x0d" + each for each in numbers))
        else:
            numbers = [varint(value) for value in values]
            content = field(3, field(1, b"".join(numbers)) if packed else b"".join(b"\x08" + each for each in numbers))
        entries += field(1, field(1, name.encode()) + field(2, content))
    return field(1, entries)


@given(
    numbers=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40),
    floats=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=9),
    texts=st.lists(st.binary(max_size=300), min_size=1, max_size=5),
    packed=st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_examples_are_decoded(numbers: list, floats: list, texts: list, packed: bool) -> None:
    found = decode_example(example(packed=packed, numbers=numbers, floats=floats, texts=texts))
    assert found["texts"] == texts
    np.testing.assert_array_equal(found["numbers"], np.array(numbers, np.int64), strict=True)
    np.testing.assert_array_equal(found["floats"], np.array(floats, np.float32), strict=True)


def test_examples_are_as_protobuf_writes_them() -> None:
    pytest.importorskip("google.protobuf")
    from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory

    def field_of(name: str, number: int, kind: int, of: str = "", label: int = 1, **more: object) -> dict:
        named = {"type_name": of} if of else {}
        return {"name": name, "number": number, "label": label, "type": kind, **named, **more}

    lists = {"BytesList": 12, "FloatList": 2, "Int64List": 3}
    entry = [field_of("key", 1, 9), field_of("value", 2, 11, ".t.Feature")]
    kinds = [field_of(f"f{n}", n, 11, f".t.{name}", oneof_index=0) for n, name in enumerate(lists, 1)]
    messages = [
        *({"name": name, "field": [field_of("value", 1, kind, label=3)]} for name, kind in lists.items()),
        {"name": "Feature", "oneof_decl": [{"name": "kind"}], "field": kinds},
        {
            "name": "Features",
            "field": [field_of("feature", 1, 11, ".t.Features.FeatureEntry", label=3)],
            "nested_type": [{"name": "FeatureEntry", "options": {"map_entry": True}, "field": entry}],
        },
        {"name": "Example", "field": [field_of("features", 1, 11, ".t.Features")]},
    ]
    file = {"name": "example.proto", "package": "t", "syntax": "proto3", "message_type": messages}
    pool = descriptor_pool.DescriptorPool()
    pool.Add(json_format.ParseDict(file, descriptor_pb2.FileDescriptorProto()))
    message = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))()
    message.features.feature["text"].f1.value.extend([b"one", b""])
    message.features.feature["ids"].f3.value.extend([1, 300, -5, 2**40])
    message.features.feature["weights"].f2.value.extend([0.5, -1.25])
    message.features.feature["none"].SetInParent()
    found = decode_example(message.SerializeToString())
    assert found["text"] == [b"one", b""]
    assert np.asarray(found["ids"]).tolist() == [1, 300, -5, 2**40]
    assert np.asarray(found["weights"]).tolist() == [0.5, -1.25]
    assert found["none"] == []


@given(data=st.binary(max_size=60))
@settings(deadline=None, max_examples=300)
def test_other_bytes_raise_nothing_else(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        decode_example(data)
