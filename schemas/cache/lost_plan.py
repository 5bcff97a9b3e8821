"""Advice for a cache that has lost a plan: a plan is never guessed, so the rest of its segment is of no use."""

import re

from distillcache.schemas.format.layout import MANIFEST, plan_key, segment_prefix
from distillcache.schemas.store.store import Store

_FOLDER = re.compile(r"(segments/(\d{4,8})(?:-[0-9a-f]{16})?)/")


def step_without_plan(store: Store, segment: str) -> str:
    """Say what to do where a segment's plan is lost or damaged, and no copy of it exists.

    The segments before it stay: once the manifest and the folders of this and of all later segments are deleted, a
    repair writes the manifest of what is left. Of the first segment nothing can be kept.

    Raises:
        StorageError: the plan is not lost: a folder or a pipe is in its place.
    """
    store.check_readable(plan_key(segment))
    back = f"copy {plan_key(segment)} back if there is a copy of the cache; a repair cannot make it again"
    number = int(segment.partition("-")[0])
    if number == 0:
        return f"{back}: else delete {store.url}, and build (or copy) the cache again"
    found = {match[1] for key in store.keys("segments/") if (match := _FOLDER.match(key)) and int(match[2]) >= number}
    folders = ", ".join(sorted({segment_prefix(segment), *found}))
    return (
        f"{back}: else delete {MANIFEST}, {folders} (in {store.url}), then `distillcache build --repair` makes the "
        "manifest of the other segments, and `distillcache build --extend` adds this one again"
    )


def step_for_file(store: Store, key: str, otherwise: str) -> str:
    """The next step for a damaged small file: `otherwise`, except for a plan."""
    prefix, _, name = key.rpartition("/")
    return step_without_plan(store, prefix.rpartition("/")[2]) if name == "plan.json" else otherwise
