"""Documents to marked tokens, in batches that keep all cores busy."""

from collections.abc import Generator, Iterable, Iterator
from itertools import groupby

import numpy as np

from cache_builder.documents import Document, TokenDocument
from cache_builder.packing import mark_document
from models.tokenizer import TextTokenizer
from schemas.errors import InputError

BATCH_DOCUMENTS = 256  # tokenised at once, on all cores
BATCH_CHARACTERS = 1 << 22  # and no more than these, or one document: bounds the memory


def token_arrays(found: Iterable[Document | TokenDocument], tokenizer: TextTokenizer) -> Generator[np.ndarray]:
    """The marked tokens of every document, of dtype MARKED; a plain text is closed by EOS.

    Raises:
        InputError: the tokenizer cannot encode a document, or does not know its tokens.
    """
    for batch in _batches(found):
        for kind, group in groupby(batch, key=_kind):
            for marked in _ENCODERS[kind](list(group), tokenizer):
                if marked.size:
                    yield marked


def _kind(document: Document | TokenDocument) -> str:
    return "tokens" if isinstance(document, TokenDocument) else "text" if document.spans is None else "chat"


def _batches(found: Iterable[Document | TokenDocument]) -> Iterator[list[Document | TokenDocument]]:
    batch: list[Document | TokenDocument] = []
    size = 0
    for document in found:
        batch.append(document)
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
            raise InputError(
                "a document holds tokens that the tokenizer does not have",
                {"record": document.where, "found": highest, "expected": f"below {tokenizer.vocab_size}"},
                "name the tokenizer that made them with data.tokenizer",
            )
        yield mark_document(document.tokens, document.counted)


_ENCODERS = {"text": _encode_texts, "chat": _encode_chats, "tokens": _take_tokens}


def _cannot_encode(batch: list, error: Exception) -> InputError:
    return InputError(
        "the tokenizer cannot encode a document",
        {"from": batch[0].where, "to": batch[-1].where, "cause": error},
        "use a tokenizer that knows every character (byte fallback or an unknown token)",
    )
