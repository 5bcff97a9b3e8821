"""ArrayRecord files of others (and ours): `tf.train.Example` records with text or tokens, or safetensors token records.

A record is an Example where it decodes as one; else a safetensors byte string. In either:

    text_field               bytes: a text, which the tokenizer encodes; numbers: tokens
    tokens, input_ids, inputs                                tokens, where there is no `text_field`
    segment_ids, inputs_segmentation, tokens_segmentation    optional: documents in the record; 0 is padding, left out
    loss_mask, completion_mask, assistant_masks              optional: which tokens are targets (not 0)

Tokens are taken as they are. Rows that were packed before are cut into their documents and packed anew.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordReader

from distillcache.cache_builder.text.document import Document, FoundDocument, TokenDocument
from distillcache.cache_builder.text.files.inputs import InputFile, InputReader, foreign, on_disk
from distillcache.cache_builder.text.files.plain import check_unicode
from distillcache.cache_builder.text.files.tf_example import TwoFeatures, decode_example
from distillcache.cache_builder.text.skipped import skipped_record
from distillcache.schemas.config import DataConfig
from distillcache.schemas.errors import RecordError

BATCH_RECORDS = 256  # in memory at once
NEXT = "leave the file out, or convert it"

_TOKENS = ("tokens", "input_ids", "inputs")
_SEGMENTS = ("segment_ids", "inputs_segmentation", "tokens_segmentation")
_MASKS = ("loss_mask", "completion_mask", "assistant_masks")


def record_documents(file: InputFile, reader: InputReader, data: DataConfig) -> Iterator[FoundDocument]:
    """The documents of an ArrayRecord file, in order.

    Raises:
        InputError: no ArrayRecord file, or a record with neither text nor tokens.
    """
    with on_disk(file, reader) as path:
        for number, record in enumerate(foreign(file, _stored_records(file, path))):
            where = f"{file} record {number}"
            try:
                found: list[FoundDocument] = [*_of_record(record, data.text_field, where)]
            except RecordError as error:
                found = [skipped_record(error, where, data.on_error)]
            yield from found


def _stored_records(file: InputFile, path: Path) -> Iterator[bytes]:
    # No read-ahead: its buffers and threads hold megabytes for every open file.
    records = ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
    try:
        count = records.num_records()
        if count == 0 and file.size:  # how it answers to what is no such file
            raise ValueError("no records in it: not an ArrayRecord file, or an empty one")
        for start in range(0, count, BATCH_RECORDS):
            yield from records.read(start, min(start + BATCH_RECORDS, count))
    finally:
        records.close()


def _of_record(record: bytes, text_field: str, where: str) -> Iterator[Document | TokenDocument]:
    features = _features(record, where)
    if text_field in features and isinstance(features[text_field], list):
        for text in features[text_field]:
            yield Document(_decoded(text, where), where)
        return
    name = next((name for name in (text_field, *_TOKENS) if name in features), None)
    if name is None:
        raise RecordError(
            "a record holds neither text nor tokens",
            {
                "record": where,
                "found": ", ".join(features) or "nothing",
                "expected": ", ".join((text_field, *_TOKENS)),
            },
            "set data.text_field to the feature's name",
        )
    tokens = _numbers(features, name, where)
    if tokens.size and (tokens.min() < 0 or tokens.max() >= 2**31):
        raise RecordError(
            "a record's tokens are not token ids",
            {"record": where, "feature": name, "found": f"{tokens.min()} to {tokens.max()}"},
            "set data.text_field to the feature's name",
        )
    yield from _cut(features, tokens.astype(np.int32), where)


def _cut(features: Mapping[str, Any], tokens: np.ndarray, where: str) -> Iterator[TokenDocument]:
    """The documents of a record: runs of one segment."""
    masks, segments = (
        next((_numbers(features, name, where, tokens.size) for name in names if name in features), None)
        for names in (_MASKS, _SEGMENTS)
    )
    counted = np.ones(tokens.size, bool) if masks is None else masks != 0
    if segments is None:
        yield TokenDocument(tokens, counted, where)
        return
    cuts = [0, *(np.flatnonzero(np.diff(segments)) + 1).tolist(), tokens.size]
    for start, stop in pairwise(cuts):
        if stop > start and segments[start]:
            yield TokenDocument(tokens[start:stop], counted[start:stop], where)


def _numbers(features: Mapping[str, Any], name: str, where: str, size: int | None = None) -> np.ndarray:
    """The feature as whole numbers in one line, of the given length."""
    values = features[name]
    fits = isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "iub"
    if not fits or (size is not None and values.size != size):
        found = f"{values.dtype}{list(values.shape)}" if isinstance(values, np.ndarray) else "bytes"
        raise RecordError(
            "a record's feature is not what it should be",
            {"record": where, "feature": name, "found": found, "expected": f"whole numbers [{size or 'n'}]"},
            "write the records again, or leave the file out",
        )
    return values.astype(np.int64)


def _features(record: bytes, where: str) -> dict[str, Any]:
    try:
        features = decode_example(record)
    except TwoFeatures as error:
        raise RecordError("a record gives a feature twice", {"record": where, "cause": error}, NEXT) from error
    except ValueError:  # UnicodeDecodeError among them
        features = None
    if features:
        return dict(features)
    try:
        return dict(safetensors.numpy.load(record))
    except Exception as error:  # SafetensorError, KeyError of a dtype, ValueError of a shape
        raise RecordError(
            "a record is neither a tf.train.Example nor a safetensors byte string",
            {"record": where, "cause": error},
            NEXT,
        ) from error


def _decoded(text: bytes, where: str) -> str:
    try:
        decoded = text.decode()
    except UnicodeDecodeError as error:
        raise RecordError(
            "a record's text is not UTF-8", {"record": where, "cause": error.reason}, "convert it, or leave it out"
        ) from error
    check_unicode(decoded, where)
    return decoded
