"""`tf.train.Example` without TensorFlow: the subset of protobuf's wire format that it uses.

Source: tensorflow/core/example/{example,feature}.proto, and protobuf.dev "Encoding":

    Example  { Features features = 1 }        Features { map<string, Feature> feature = 1 }
    Feature  { BytesList 1 | FloatList 2 | Int64List 3 }, each with `repeated value = 1`, numbers packed or not
"""

from collections.abc import Iterator

import numpy as np

Feature = list[bytes] | np.ndarray

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


class TwoFeatures(ValueError):
    """Two features of one name, of which protobuf's readers take the last one silently."""


def decode_example(record: bytes) -> dict[str, Feature]:
    """Feature name -> list of byte strings, float32 array or int64 array.

    Raises:
        TwoFeatures: a name stands there twice.
        ValueError: the bytes are no Example.
    """
    features: dict[str, Feature] = {}
    for number, wire, value in _fields(memoryview(record)):
        if (number, wire) != (1, _BYTES):
            raise ValueError(f"field {number} of an Example")
        for entry_number, entry_wire, entry in _fields(_view(value)):
            if (entry_number, entry_wire) != (1, _BYTES):
                raise ValueError(f"field {entry_number} of Features")
            name, feature = _entry(_view(entry))
            if name in features:
                raise TwoFeatures(name)
            features[name] = feature
    return features


def _entry(entry: memoryview) -> tuple[str, Feature]:
    """One entry of the map: 1 is its key, 2 its value; either may be left out when empty."""
    name, feature = b"", memoryview(b"")
    for number, wire, value in _fields(entry):
        if wire != _BYTES or number not in (1, 2):
            raise ValueError(f"field {number} of an entry of Features")
        if number == 1:
            name = bytes(_view(value))
        else:
            feature = _view(value)
    return name.decode(), _feature(feature)


def _feature(feature: memoryview) -> Feature:
    decoded: Feature = []
    for number, wire, value in _fields(feature):
        if wire != _BYTES or number not in (1, 2, 3):
            raise ValueError(f"field {number} of a Feature")
        decoded = (_bytes_list, _float_list, _int64_list)[number - 1](_view(value))
    return decoded


def _bytes_list(values: memoryview) -> list[bytes]:
    return [bytes(_view(value)) for _, _, value in _repeated(values)]


def _float_list(values: memoryview) -> np.ndarray:
    parts = []
    for _, wire, value in _repeated(values):
        if wire not in (_BYTES, _FIXED32):
            raise ValueError("a FloatList with other values than floats")
        parts.append(np.frombuffer(_view(value), "<f4"))
    return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, "<f4")])  # of one, without a copy


def _int64_list(values: memoryview) -> np.ndarray:
    parts = []
    for _, wire, value in _repeated(values):
        if wire == _BYTES:
            parts.append(_packed_varints(_view(value)))
        elif isinstance(value, int):
            parts.append(np.array([value], np.uint64))
        else:
            raise ValueError("an Int64List with other values than integers")
    return np.concatenate([*parts, np.empty(0, np.uint64)]).view(np.int64)


def _repeated(values: memoryview) -> Iterator[tuple[int, int, memoryview | int]]:
    """The fields of a list, all of number 1."""
    for field in _fields(values):
        if field[0] != 1:
            raise ValueError(f"field {field[0]} of a list")
        yield field


def _packed_varints(packed: memoryview) -> np.ndarray:
    """All numbers of a packed list at once: seven bits a byte, lowest first; the last byte of each has no high bit."""
    data = np.frombuffer(packed, np.uint8)
    ends = np.flatnonzero(data < 0x80)
    if data.size and (not ends.size or ends[-1] != data.size - 1):
        raise ValueError("a cut number")
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64) if ends.size else np.empty(0, np.int64)
    lengths = ends - starts + 1 if ends.size else starts
    if lengths.size and lengths.max() > 10:
        raise ValueError("a number of more than ten bytes")
    values = np.zeros(ends.size, np.uint64)
    for place in range(int(lengths.max()) if lengths.size else 0):
        has = lengths > place
        bits = (data[starts[has] + place] & 0x7F).astype(np.uint64)
        values[has] |= bits << np.uint64(7 * place)
    return values


def _fields(message: memoryview) -> Iterator[tuple[int, int, memoryview | int]]:
    """(field number, wire type, value) of every field; a length-delimited or fixed value as its bytes."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        wire = key & 7
        if wire == _VARINT:
            value, place = _varint(message, place)
            yield key >> 3, wire, value
            continue
        if wire == _BYTES:
            size, place = _varint(message, place)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire}")
        if place + size > len(message):
            raise ValueError("a cut field")
        yield key >> 3, wire, message[place : place + size]
        place += size


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """The number that begins at `place`, and the place behind it."""
    value = shift = 0
    while place < len(message) and shift < 70:
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, place
    raise ValueError("a cut number")


def _view(value: memoryview | int) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where bytes should be")
    return value
