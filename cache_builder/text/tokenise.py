"""Documents to marked tokens, in batches that keep all cores busy."""

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby

import numpy as np

from distillcache.cache_builder.text.document import Document, FoundDocument, TokenDocument
from distillcache.cache_builder.text.files.inputs import InputReader
from distillcache.cache_builder.text.packing import mark_document
from distillcache.cache_builder.text.skipped import Skipped, skipped_record
from distillcache.models.text.long_text import WINDOW, NoCommonTokens
from distillcache.models.text.tokenizer import TextTokenizer
from distillcache.schemas.config import OnError
from distillcache.schemas.errors import RecordError
from distillcache.schemas.runtime.library_log import is_panic, without_library_log

BATCH_DOCUMENTS = 256  # tokenised at once, on all cores
BATCH_CHARACTERS = 1 << 20  # and about as many, at most some 250 MB; a longer document is tokenised in chunks
WHOLE_CHARACTERS = 1 << 22  # what cannot be tokenised in chunks may be as long, at some 600 MB


class Pace:
    """Bytes of an input file whose documents are tokenised, while the reader is further on."""

    def __init__(self, reader: InputReader) -> None:
        self._reader, self._before, self._now, self.share = reader, 0, 0, 1.0

    def begin(self) -> None:
        """Note that the bytes read since the last call are being tokenised now; `share` is the fraction that is
        done.
        """
        self._before, self._now, self.share = self._now, self._reader.consumed, 0.0

    @property
    def done(self) -> int:
        return self._before + int((self._now - self._before) * self.share)


def token_arrays(
    found: Iterable[FoundDocument], tokenizer: TextTokenizer, on_error: OnError = "stop", pace: Pace | None = None
) -> Generator[np.ndarray | Skipped]:
    """The marked tokens of every document, of dtype MARKED, and the notes of what was skipped, in order.

    A plain text is closed by EOS. A long document comes in chunks.

    Args:
        pace: receives progress.

    Raises:
        RecordError: the tokenizer cannot encode a document, or does not know its tokens.
    """
    for batch in _batches(found):
        if pace is not None:
            pace.begin()
        size, done = sum(map(_length, batch)), 0
        for kind, group in groupby(batch, key=_kind):
            for marked, length in _encoded(kind, list(group), tokenizer, on_error):
                done += length
                if pace is not None:
                    pace.share = min(1.0, done / max(1, size))
                if isinstance(marked, Skipped) or marked.size:
                    yield marked


def _encoded(
    kind: str, batch: list, tokenizer: TextTokenizer, on_error: OnError
) -> Iterator[tuple[np.ndarray | Skipped, int]]:
    """The batch's tokens, and for how many characters they stand; where a batch fails, each document is tried alone."""
    if kind == "skipped":
        yield from ((note, 0) for note in batch)
        return
    made = 0
    try:
        for each in _ENCODERS[kind](batch, tokenizer):
            made += 1
            yield each
    except RecordError as error:
        if on_error == "stop" or (len(batch) == 1 and not made):
            yield skipped_record(error, batch[0].where, on_error), 0
            return
        if kind == "long":
            raise  # some of its tokens are in the stream already
        for document in batch[made:]:
            yield from _encoded(kind, [document], tokenizer, on_error)


def _kind(document: FoundDocument) -> str:
    if isinstance(document, Skipped):
        return "skipped"
    if isinstance(document, TokenDocument):
        return "tokens"
    if len(document.text) > BATCH_CHARACTERS:
        return "long"
    return "text" if document.spans is None else "chat"


def _length(document: FoundDocument) -> int:
    if isinstance(document, Skipped):
        return 0
    return document.tokens.size if isinstance(document, TokenDocument) else len(document.text)


def _batches(found: Iterable[FoundDocument]) -> Iterator[list[FoundDocument]]:
    batch: list[FoundDocument] = []
    size = 0
    for document in found:
        batch.append(document)
        size += _length(document)
        if len(batch) == BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_long(batch: list, tokenizer: TextTokenizer) -> Iterator[tuple[np.ndarray, int]]:
    for document in batch:
        begins = True
        chunks = _chunks(document, tokenizer)
        try:
            while True:
                with _translated([document]):
                    chunk = next(chunks, None)
                if chunk is None:
                    break
                ids, counted, reached = chunk
                yield mark_document(ids, counted, begins=begins), reached
                begins = begins and not ids.size
        except NoCommonTokens as error:
            if not begins or len(document.text) > WHOLE_CHARACTERS:
                raise _not_in_chunks(document, error) from error
            whole = _encode_texts if document.spans is None else _encode_chats
            yield from whole([document], tokenizer)


def _not_in_chunks(document: Document, error: Exception) -> RecordError:
    return RecordError(
        "a document cannot be tokenised in chunks, and is too long to be tokenised as a whole",
        {"document": document.where, "characters": f"{len(document.text):,}", "cause": error},
        f"cut it into documents of {BATCH_CHARACTERS:,} characters or less",
    )


def _chunks(document: Document, tokenizer: TextTokenizer) -> Iterator[tuple[np.ndarray, np.ndarray | None, int]]:
    """Tokens, which of them are targets (None: all), and for how many characters they stand, about."""
    if document.spans is None:
        for ids in tokenizer.encode_long_document(document.text):
            yield ids, None, WINDOW
    else:
        for ids, counted in tokenizer.encode_long_spans(document.text, document.spans):
            yield ids, counted, WINDOW


def _encode_texts(batch: list, tokenizer: TextTokenizer) -> Iterator[tuple[np.ndarray, int]]:
    with _translated(batch):
        encoded = tokenizer.encode_documents([document.text for document in batch])
    for document, ids in zip(batch, encoded, strict=True):
        yield mark_document(np.asarray(ids, np.int32)), len(document.text)


def _encode_chats(batch: list, tokenizer: TextTokenizer) -> Iterator[tuple[np.ndarray, int]]:
    """A template writes all special tokens itself, so nothing is added, EOS neither."""
    with _translated(batch):
        encoded = tokenizer.encode_spans([document.text for document in batch], [document.spans for document in batch])
    for document, (ids, said) in zip(batch, encoded, strict=True):
        yield mark_document(np.asarray(ids, np.int32), np.asarray(said, bool)), len(document.text)


def _take_tokens(batch: list, tokenizer: TextTokenizer) -> Iterator[tuple[np.ndarray, int]]:
    for document in batch:
        highest = int(document.tokens.max())
        if highest >= tokenizer.vocab_size:
            raise RecordError(
                "a document holds tokens that the tokenizer does not have",
                {"record": document.where, "found": highest, "expected": f"below {tokenizer.vocab_size}"},
                "name the tokenizer that made them with data.tokenizer",
            )
        yield mark_document(document.tokens, document.counted), document.tokens.size


_ENCODERS = {"text": _encode_texts, "chat": _encode_chats, "long": _encode_long, "tokens": _take_tokens}


@contextmanager
def _translated(batch: list) -> Iterator[None]:
    """Whatever the tokenizers library raises, as the error for these documents.

    It raises plain Exception, and where its Rust code panics (a pattern that backtracks without end) what pyo3 makes of
    that, which is no Exception.
    """
    try:
        with without_library_log():
            yield
    except NoCommonTokens:
        raise
    except BaseException as error:
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise RecordError(
            "the tokenizer cannot encode a document",
            {"from": batch[0].where, "to": batch[-1].where, "cause": error},
            "use a tokenizer that knows every character (byte fallback or an unknown token)",
        ) from error
