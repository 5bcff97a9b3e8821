"""A finding: a damaged object of a cache, and the rows that cannot be trusted because of it.

Its kinds:

    missing     it is not there
    truncated   it is shorter than what was committed
    swapped     it is another object of this cache, in the wrong place
    stale       it is whole, but of another build
    damaged     anything else that differs
    unreadable  the store failed to give it
    foreign     it does not belong here
"""

from typing import Literal

from distillcache.schemas.config import Config
from distillcache.schemas.errors import DamageError

What = Literal["missing", "truncated", "swapped", "stale", "damaged", "unreadable", "foreign"]


def told_in_a_line(error: DamageError) -> str:
    """Describe the fault of a file in a line, with the field if it is one's."""
    facts = {name: error.facts[name] for name in ("field", "found", "expected") if name in error.facts}
    words = ", ".join(f"{name} {value}" for name, value in facts.items()) if "field" in facts else ""
    return f"{error.what} ({words})" if words else error.what


class Finding(Config):
    """One object that is not as it should be.

    object: its key below the cache. detail: what was found and what was expected.
    rows: the rows `[start, stop)` of the cache that it affects; None: no row's content depends on it.
    tap, slots: whose numbers cannot be trusted, slots as in `TapPlan.slots`; None and empty where it is no tap's.
    """

    what: What
    object: str
    detail: str
    segment: str | None = None
    shard: int | None = None
    rows: tuple[int, int] | None = None
    tap: str | None = None
    slots: tuple[int, ...] = ()
