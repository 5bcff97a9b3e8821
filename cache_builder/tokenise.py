"""Documents to marked tokens, in batches that keep all cores busy."""

from collections.abc import Generator, Iterable, Iterator
from itertools import groupby

import numpy as np

from cache_builder.documents import FoundDocument, TokenDocument
from cache_builder.packing import mark_document
from cache_builder.skipped import Skipped, skipped_record
from models.tokenizer import TextTokenizer
from schemas.config import OnError
from schemas.errors import RecordError

BATCH_DOCUMENTS = 256  # tokenised at once, on all cores
BATCH_CHARACTERS = 1 << 22  # and no more than these, or one document: bounds the memory


def token_arrays(
    found: Iterable[FoundDocument], tokenizer: TextTokenizer, on_error: OnError = "stop"
) -> Generator[np.ndarray | Skipped]:
    """The marked tokens of every document, of dtype MARKED, and the notes of what was skipped, in order.

    A plain text is closed by EOS.

    Raises:
        RecordError: the tokenizer cannot encode a document, or does not know its tokens.
    """
    for batch in _batches(found):
        for kind, group in groupby(batch, key=_kind):
            for marked in _encoded(kind, list(group), tokenizer, on_error):
                if isinstance(marked, Skipped) or marked.size:
                    yield marked


def _encoded(kind: str, batch: list, tokenizer: TextTokenizer, on_error: OnError) -> Iterator[np.ndarray | Skipped]:
    """The batch's tokens; where a batch fails, each document is tried alone."""
    if kind == "skipped":
        yield from batch
        return
    try:
        made = list(_ENCODERS[kind](batch, tokenizer))
    except RecordError as error:
        if on_error == "stop" or len(batch) == 1:
            yield skipped_record(error, batch[0].where, on_error)
            return
        for document in batch:
            yield from _encoded(kind, [document], tokenizer, on_error)
        return
    yield from made


def _kind(document: FoundDocument) -> str:
    if isinstance(document, Skipped):
        return "skipped"
    return "tokens" if isinstance(document, TokenDocument) else "text" if document.spans is None else "chat"


def _batches(found: Iterable[FoundDocument]) -> Iterator[list[FoundDocument]]:
    batch: list[FoundDocument] = []
    size = 0
    for document in found:
        batch.append(document)
        if not isinstance(document, Skipped):
            size += document.tokens.size if isinstance(document, TokenDocument) else len(document.text)
        if len(batch) == BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_texts(batch: list, tokenizer: TextTokenizer) -> Iterator[np.ndarray]:
    try:
        encoded = tokenizer.encode_documents([document.text for document in batch])
    except Exception as error:  # tokenizers raises plain Exception
        raise _cannot_encode(batch, error) from error
    return (mark_document(np.asarray(ids, np.int32)) for ids in encoded)


def _encode_chats(batch: list, tokenizer: TextTokenizer) -> Iterator[np.ndarray]:
    """A template writes all special tokens itself, so nothing is added, EOS neither."""
    try:
        encoded = tokenizer.encode_spans([document.text for document in batch], [document.spans for document in batch])
    except Exception as error:  # likewise
        raise _cannot_encode(batch, error) from error
    return (mark_document(np.asarray(ids, np.int32), np.asarray(said, bool)) for ids, said in encoded)


def _take_tokens(batch: list, tokenizer: TextTokenizer) -> Iterator[np.ndarray]:
    for document in batch:
        highest = int(document.tokens.max())
        if highest >= tokenizer.vocab_size:
            raise RecordError(
                "a document holds tokens that the tokenizer does not have",
                {"record": document.where, "found": highest, "expected": f"below {tokenizer.vocab_size}"},
                "name the tokenizer that made them with data.tokenizer",
            )
        yield mark_document(document.tokens, document.counted)


_ENCODERS = {"text": _encode_texts, "chat": _encode_chats, "tokens": _take_tokens}


def _cannot_encode(batch: list, error: Exception) -> RecordError:
    return RecordError(
        "the tokenizer cannot encode a document",
        {"from": batch[0].where, "to": batch[-1].where, "cause": error},
        "use a tokenizer that knows every character (byte fallback or an unknown token)",
    )
