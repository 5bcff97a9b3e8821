"""Identity of a corpus: the digest of its files' bytes, independent of their location.

A digest needs every byte. Where all files lie in buckets that mark the versions of their objects (generation, ETag),
a rows folder keeps `inputs.json`: as long as a listing shows the same versions, the text need not be read again.
"""

import json
from collections.abc import Iterable, Sequence

import xxhash
from pydantic import Field

from distillcache.cache_builder.text.chat import named_chat_template
from distillcache.cache_builder.text.files.inputs import InputFile, InputReader, input_files
from distillcache.models.text.tokenizer import TextTokenizer
from distillcache.schemas.config import Config, DataConfig
from distillcache.schemas.format.canonical import from_canonical, to_canonical
from distillcache.schemas.format.digest import digest_bytes
from distillcache.schemas.store.store import Store

INPUTS_KEY = "inputs.json"


def inputs_digest(data: DataConfig, tokenizer: TextTokenizer | None = None) -> str:
    """`total_digest` of the files that `data.path` names: reads all of them."""
    return total_digest(map(_file_line, input_files(data)), data, tokenizer)


def total_digest(lines: Iterable[str], data: DataConfig, tokenizer: TextTokenizer | None = None) -> str:
    """The XXH3 digest (128 bits) of the input files: kinds, lengths and bytes, in reading order; no names, no times.

    Args:
        lines: `InputReader.finish` of every file.
        tokenizer: of chats, whose template writes them: it is part of what they are.
    """
    total = xxhash.xxh3_128()
    for line in lines:
        total.update(line.encode())
    if data.format == "chat":
        total.update(f"chat_template {named_chat_template(tokenizer).digest}\n".encode())
    return total.hexdigest()


class InputsRecord(Config):
    """`inputs.json`: the versions of the files that a rows folder was made from, and the digest of their bytes."""

    versions: str = Field(description="digest of the files' URLs, kinds, lengths and versions")
    text_digest: str


def remember_inputs(store: Store, files: Sequence[InputFile], text_digest: str) -> None:
    """Write `inputs.json`, where the files have versions."""
    versions = _versions(files)
    if versions is not None:
        store.write(INPUTS_KEY, to_canonical(InputsRecord(versions=versions, text_digest=text_digest)))


def known_digest(store: Store, data: DataConfig, tokenizer: TextTokenizer) -> str:
    """`inputs_digest`, read from the files only where the folder cannot know it."""
    files = input_files(data)
    versions, stored = _versions(files), store.read(INPUTS_KEY)
    if versions is not None and stored is not None and data.format != "chat":
        record = from_canonical(InputsRecord, stored, store.where(INPUTS_KEY))
        if record.versions == versions:
            return record.text_digest
    return total_digest(map(_file_line, files), data, tokenizer)


def _versions(files: Sequence[InputFile]) -> str | None:
    if not all(file.version for file in files):
        return None
    content = [[str(file.place), file.kind, file.size, file.version] for file in files]
    return digest_bytes(json.dumps(content).encode())


def _file_line(file: InputFile) -> str:
    with InputReader(file) as reader:
        return reader.finish()
