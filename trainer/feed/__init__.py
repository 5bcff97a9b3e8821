"""Batches of rows and taps.

source.py        Source: rows of one split, indexed by row
cache_source.py  CacheSource, and make_feed: Grain pipelines over cached rows
slots.py         which stored slots a batch needs
block_groups.py  one source for each group of devices on the mesh axis `block`
readers/         stored arrays into a batch
disk_cache.py    local copies of what was read from buckets
buffers.py       reusable batch memory
teacher.py       the teacher in the loop: checkpoint and compiled forward
online.py        a source that computes taps instead of reading them
planned.py       rows whose taps the teacher computes
open.py          chooses the source for a run
"""

from distillcache.trainer.feed.cache_source import CacheSource, Feed, make_feed

__all__ = [
    "CacheSource",
    "Feed",
    "make_feed",
]
