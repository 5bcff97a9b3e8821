"""A cache that is watched for hours, perhaps while it is built: opened once, and reopened when it has changed.

Also when each shard was committed: on a disk as its receipt's time says, in a bucket when the viewer first saw it.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from distillcache.models.text.cache_tokenizer import cache_tokenizer
from distillcache.models.text.tokenizer import TextTokenizer
from distillcache.schemas.cache.segment import Segment, read_receipt
from distillcache.schemas.errors import DistillcacheError
from distillcache.schemas.format import layout
from distillcache.schemas.format.manifest import TOPK_LOGITS, ShardReceipt
from distillcache.schemas.store.single_flight import Remembered
from distillcache.schemas.store.store import Store
from distillcache.tools.fidelity.rows import padding_ids
from distillcache.tools.look.inspect import describe_cache
from distillcache.tools.look.stored_rows import TAP_ORDER, StoredRows

Value = TypeVar("Value")

RECENT = 8  # figures of a row: some megabytes each for long rows
RECEIPTS = 64  # more than a page names
FRESH_S = 1.0  # a page asks for several things at once


@dataclass
class Committed:
    """times: of each shard, in seconds since the epoch, ascending by shard; None: before the viewer was begun."""

    times: dict[int, float | None] = field(default_factory=dict)
    looked: bool = False

    def look(self, segment: Segment) -> None:
        """Take note of the shards that are new."""
        first, self.looked = not self.looked, True
        for shard in sorted((segment.committed or frozenset()) - self.times.keys()):
            self.times[shard] = _receipt_time(segment, shard) or (None if first else time.time())


class WatchedCache:
    """One cache. Used by one thread at a time."""

    def __init__(self, url: str) -> None:
        """
        Raises:
            InputError: there is no cache here.
        """
        self.store = Store(url)
        self._rows, self._looked = StoredRows(url), time.monotonic()
        self._made: dict[str, tuple[object, Any]] = {}
        self._recent: OrderedDict[Hashable, Any] = OrderedDict()
        self._receipts: Remembered[tuple[str, int], ShardReceipt | None] = Remembered(RECEIPTS)
        self._committed: dict[str, Committed] = {}
        self.note_commits()

    def rows(self) -> StoredRows:
        """The cache as it is by now."""
        if time.monotonic() - self._looked > FRESH_S:
            self.reopen()
        return self._rows

    def reopen(self) -> bool:
        """Look at the cache again; return whether it has changed. Decoders that were compiled stay where they fit."""
        before, fresh = self.state(), StoredRows(self.store.url)
        if [segment.identity for segment in fresh.segments] == [segment.identity for segment in self._rows.segments]:
            for known, new in zip(self._rows.segments, fresh.segments, strict=True):
                known.committed = new.committed
        else:
            self._rows = fresh
            self.__dict__.pop("_tokenizer", None)
        self._looked = time.monotonic()
        self.note_commits()
        return before != self.state()

    def state(self) -> tuple[object, ...]:
        """Differs where the cache does."""
        return tuple(
            (segment.identity, None if segment.committed is None else len(segment.committed))
            for segment in self._rows.segments
        )

    def described(self) -> dict[str, Any]:
        """Return the report of `inspect`, made again when the cache has changed."""
        self.rows()
        return self.once("described", lambda: describe_cache(self.store))

    def decode(self, ids: list[int]) -> str:
        """The text of some tokens; where the cache has lost its tokenizer, their ids."""
        tokenizer, _ = self._tokenizer
        return " ".join(map(str, ids)) + " " if tokenizer is None else tokenizer.decode(ids)

    @cached_property
    def padding(self) -> list[int]:
        """The ids that fill rows up; where the cache has lost its tokenizer, its EOS."""
        tokenizer, _ = self._tokenizer
        return [self._rows.plan.rows.eos_id] if tokenizer is None else sorted(padding_ids(tokenizer))

    @property
    def textless(self) -> str | None:
        """Why there is no text, if so."""
        return self._tokenizer[1]

    @cached_property
    def _tokenizer(self) -> tuple[TextTokenizer | None, str | None]:
        """Load the tokenizer that made the cache's tokens, or return its fault."""
        try:
            return cache_tokenizer(self.store, self._rows.plan), None
        except DistillcacheError as error:
            return None, f"{error.what}, so tokens are shown by their ids" + (f": {error.next}" if error.next else "")

    def unfinished(self) -> list[Segment]:
        """The segment that is being built, if any."""
        return [segment for segment in self.rows().segments if segment.committed is not None]

    def committed(self, segment: Segment) -> Committed:
        """When its shards were committed."""
        return self._committed.setdefault(segment.plan.segment, Committed())

    def receipt(self, segment: Segment, shard: int) -> ShardReceipt | None:
        """Read the receipt of a committed shard; None if the build was finished meanwhile."""
        store, plan = segment.store, segment.plan
        return self._receipts.get((segment.identity, shard), lambda: read_receipt(store, plan, shard))

    def note_commits(self) -> None:
        """Take note of new shards; where the viewer is not asked for long, buckets' are all taken for new then."""
        for segment in self._rows.segments:
            if segment.committed is not None:
                self.committed(segment).look(segment)

    def taps(self) -> dict[str, tuple[int, ...]]:
        """The taps of blocks that are planned, each with its slots, in the order in which a block computes them."""
        slots: dict[str, set[int]] = {}
        for segment in self.rows().segments:
            for tap in (tap for tap in segment.plan.taps if tap.name != TOPK_LOGITS):
                slots.setdefault(tap.name, set()).update(tap.slots)
        order = {name: place for place, name in enumerate(TAP_ORDER)}
        return {
            name: tuple(sorted(slots[name])) for name in sorted(slots, key=lambda name: order.get(name, len(order)))
        }

    def once(self, name: str, make: Callable[[], Value]) -> Value:
        """Return the result of `make`, recomputed when the cache has changed."""
        state = self.state()
        if self._made.get(name, (None, None))[0] != state:
            self._made[name] = (state, make())
        return self._made[name][1]

    def recent(self, name: Hashable, make: Callable[[], Value]) -> Value:
        """Return the result of `make`, kept for the most recent keys: neighbours of a token, for example."""
        key = (self.state(), name)
        if key not in self._recent:
            self._recent[key] = make()
        self._recent.move_to_end(key)
        while len(self._recent) > RECENT:
            self._recent.popitem(last=False)
        return self._recent[key]


def _receipt_time(segment: Segment, shard: int) -> float | None:
    """When the receipt was written, on a local disk."""
    if segment.store.local is None:
        return None
    try:
        return (segment.store.local / layout.receipt_key(segment.plan.segment, shard)).stat().st_mtime
    except FileNotFoundError:  # the build was finished meanwhile
        return None
