"""Ownership of a rows folder while rows are made in it.

    <out>/preparing.json      the fingerprint of the rows that are being made; it goes when `rows.json` is there

A process that was paused while the folder was given to other rows, or finished, writes nothing more there. Processes
that make the same rows share one mark. The newest command is right about a folder that holds no finished rows.
"""

from pydantic import Field

from distillcache.schemas.config import Config
from distillcache.schemas.errors import FolderTakenError
from distillcache.schemas.format.canonical import to_canonical
from distillcache.schemas.format.rows import INDEX_KEY
from distillcache.schemas.store.store import Store

MARK = "preparing.json"


class _Mark(Config):
    fingerprint: str = Field(description="fingerprint of everything that determines the rows")


def write_mark(store: Store, fingerprint: str) -> None:
    """Mark the folder as that of the rows with this fingerprint."""
    store.put_once(MARK, to_canonical(_Mark(fingerprint=fingerprint)))


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
