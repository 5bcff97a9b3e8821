"""Processes that work on a segment now, by its leases."""

import time

from distillcache.schemas.cache.lease_file import live_claim
from distillcache.schemas.cache.segment import Segment
from distillcache.schemas.format.layout import claim_key, segment_prefix
from distillcache.tools.pages.html import paragraph, table

PIECES_SHOWN = 6
MOST_READ = 1000  # claims: each is a small file


def workers(segment: Segment) -> str:
    """Every process with the pieces that it has claimed and not committed; claims of done pieces are not read."""
    now, pieces = time.time(), dict[tuple[str, int], list[int]]()
    for piece in _open_pieces(segment)[:MOST_READ]:
        key = claim_key(segment.plan.segment, piece)
        data = segment.store.read(key)
        claim = None if data is None else live_claim(data, key, now)
        if claim is not None:
            pieces.setdefault((claim.host, claim.pid), []).append(piece)
    rows = [(host, str(pid), _listed(claimed)) for (host, pid), claimed in sorted(pieces.items())]
    return table("Who is at work", ("host", "process", "on pieces"), rows) or paragraph("Nobody is at work on it now.")


def _open_pieces(segment: Segment) -> list[int]:
    """Claimed pieces that are not wholly committed, ascending."""
    names = (key.rpartition("/")[2] for key in segment.store.keys(f"{segment_prefix(segment.plan.segment)}/claims/"))
    numbers = (name.removesuffix(".json") for name in names)
    pieces = sorted(int(number) for number in numbers if number.isascii() and number.isdigit())
    return [piece for piece in pieces if not set(_shards_of(segment, piece)) <= (segment.committed or frozenset())]


def _shards_of(segment: Segment, piece: int) -> range:
    """A piece is whole teacher calls and whole shards (docs/design.md)."""
    plan = segment.plan
    each = max(plan.shard_rows, plan.batch_rows) // plan.shard_rows
    return range(piece * each, min((piece + 1) * each, plan.num_shards))


def _listed(pieces: list[int]) -> str:
    words = ", ".join(map(str, pieces[:PIECES_SHOWN]))
    return words if len(pieces) <= PIECES_SHOWN else f"{words} and {len(pieces) - PIECES_SHOWN} more"
