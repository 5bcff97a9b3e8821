"""`distillcache build --abandon`: delete an extension that was begun and that nobody wants to finish.

A finished segment is never touched: the manifest lists it.
"""

import sys

from schemas import layout
from schemas.claim import is_anothers_claim
from schemas.errors import ConfigError, InputError
from schemas.manifest import Manifest
from schemas.segment import segment_name
from schemas.storage import Store


def abandon_extension(store: Store, manifest: Manifest | None) -> None:
    """Delete the unfinished segment of a finished cache, if there is one.

    Safe to repeat after a crash: receipts go before the objects that they commit, and the plan goes last.

    Raises:
        InputError: the cache is not finished: there is nothing that was added to it.
        ConfigError: a process is at work on the segment.
    """
    if manifest is None:
        raise InputError(
            "there is no finished cache that an extension could be deleted from",
            {"cache": store.url, "missing": layout.MANIFEST},
            "finish it: the same command without --abandon",
        )
    segment = segment_name(len(manifest.segments))
    folder = layout.segment_prefix(segment)
    keys = store.keys(f"{folder}/")
    if not keys:
        return
    _refuse_live_builders(store, folder, [key for key in keys if key.startswith(f"{folder}/claims/")])
    plan = layout.plan_key(segment)
    receipts = [key for key in keys if key.startswith(f"{folder}/receipts/")]
    for key in [*receipts, *(key for key in keys if key not in {plan, *receipts}), plan]:
        store.delete(key)
    store.remove_stale_locks()
    store.delete_folder(folder)
    print(f"deleted: {store.where(folder)}, an extension that was not finished", file=sys.stderr)


def _refuse_live_builders(store: Store, folder: str, claims: list[str]) -> None:
    live = [key for key in claims if is_anothers_claim(store, key)]
    if live:
        raise ConfigError(
            "a process is at work on the extension",
            {"segment": store.where(folder), "its claims": ", ".join(live[:3])},
            "stop it first, or wait until its claim has expired",
        )
