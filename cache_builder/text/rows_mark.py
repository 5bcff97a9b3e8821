"""Ownership of a rows folder while rows are made in it.

    <out>/preparing.json      the fingerprint of the rows that are being made; it goes when `rows.json` is there

A process that was paused while the folder was given to other rows, or finished, writes nothing more there. Processes
that make the same rows share one mark. The newest command is right about a folder that holds no finished rows.
"""

import re

from pydantic import Field

from distillcache.schemas.config import Config
from distillcache.schemas.errors import ConfigError, FolderTakenError
from distillcache.schemas.format.canonical import to_canonical
from distillcache.schemas.format.rows import INDEX_KEY, TOKENIZER_KEY
from distillcache.schemas.store.store import LOCK_SUFFIX, Store

MARK = "preparing.json"
SHOWN = 8  # names in a message

# The keys that a preparation writes (token_stream.py, rows_files.py, digest.py), the mark and the index aside.
_WRITTEN = re.compile(r"tokenizer\.json|skipped\.jsonl|inputs\.json|rows/\d{5,}\.array_record|unfinished/.*", re.DOTALL)


class _Mark(Config):
    fingerprint: str = Field(description="fingerprint of everything that determines the rows")


def write_mark(store: Store, fingerprint: str) -> None:
    """Mark the folder as that of the rows with this fingerprint."""
    store.put_once(MARK, to_canonical(_Mark(fingerprint=fingerprint)))


def refuse_foreign_folder(store: Store) -> None:
    """Raise `ConfigError` where the folder holds what no preparation wrote: a tokenizer of that name would be lost.

    A folder with a mark or finished rows is one of ours, whatever lies beside them, and so is one that lost both.
    """
    keys = [key for key in store.keys("") if not key.endswith(LOCK_SUFFIX)]
    if not keys or MARK in keys or INDEX_KEY in keys:
        return
    if all(map(_WRITTEN.fullmatch, keys)) and keys != [TOKENIZER_KEY]:
        return
    names = sorted({key.split("/")[0] for key in keys})
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    raise ConfigError(
        "the folder for the rows contains something else",
        {"out": store.url, "found": ", ".join(names[:SHOWN]) + more},
        "name a new or empty folder with --out",
    )


def keeping_rows(store: Store, fingerprint: str) -> Store:
    """The store for writing rows with, until the folder is another's or finished; then it raises `FolderTakenError`."""
    return store.guarded(lambda: _check(store, fingerprint))


def is_marked(store: Store, fingerprint: str) -> bool:
    """Return whether the folder is marked for the rows with this fingerprint."""
    return store.holds(MARK, to_canonical(_Mark(fingerprint=fingerprint)))


def remove_mark(store: Store) -> None:
    """Remove the mark: the rows are finished."""
    if store.read(MARK) is not None:
        store.delete(MARK)


def _check(store: Store, fingerprint: str) -> None:
    finished = store.read(INDEX_KEY, slice(0, 0)) is not None
    if is_marked(store, fingerprint) and not finished:
        return
    raise FolderTakenError(
        "the folder no longer belongs to these rows: it was finished, deleted or reused meanwhile",
        {"rows": store.url, "finished": "yes" if finished else "no"},
        "nothing more was written; run the command again if its rows are still wanted, in a folder of their own",
    )
