"""Records that `data.on_error: skip` leaves out, and their list beside the rows.

Which records are skipped depends on the text, the tokenizer and the config alone, never on who reads them: so the rows
and the list are the same for one process and for many.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from distillcache.schemas.config import Config, OnError
from distillcache.schemas.errors import RecordError
from distillcache.schemas.format.rows import SKIPPED_KEY
from distillcache.schemas.store.store import Store

_PLACES = ("line", "row", "record", "file", "from", "to")  # facts that say where


@dataclass(frozen=True)
class Skipped:
    """A record that was left out.

    where: how messages name its place.
    error: what is wrong with it, on one line.
    """

    where: str
    error: str


class SkippedRecord(Config):
    """The same in a receipt; tokens: of the same input file, before it."""

    where: str
    error: str
    tokens: int


def skipped_record(error: RecordError, where: str, on_error: OnError) -> Skipped:
    """The note of a record that cannot be used.

    Raises:
        RecordError: the config says that such a record ends the command.
    """
    if on_error == "stop":
        raise error
    facts = [f"{name}: {value}" for name, value in error.facts.items() if name not in _PLACES]
    return Skipped(where, "; ".join([error.what, *facts]))


def write_skipped(store: Store, skipped: Sequence[Skipped]) -> None:
    """Write `skipped.jsonl`, one line a record in reading order; nothing where none was skipped."""
    if skipped:
        lines = (json.dumps({"where": each.where, "error": each.error}, ensure_ascii=False) for each in skipped)
        store.write(SKIPPED_KEY, "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))
