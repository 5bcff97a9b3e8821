"""`distillcache build --abandon`: delete an extension that was begun and that will not be finished.

A finished segment is never touched: the manifest lists it.
"""

import logging
import re
from collections.abc import Sequence

from distillcache.schemas.cache.lease_file import is_anothers_lease
from distillcache.schemas.cache.segment import NAME_DIGITS
from distillcache.schemas.errors import ConfigError, InputError
from distillcache.schemas.format import layout
from distillcache.schemas.format.manifest import Manifest
from distillcache.schemas.store.store import Store

log = logging.getLogger(__name__)


def abandon_extension(store: Store, manifest: Manifest | None, expiry_s: float) -> None:
    """Delete the unfinished segment of a finished cache, if there is one.

    Safe to repeat after a crash: receipts go before the objects that they commit, and the plan goes last.

    Args:
        expiry_s: of a lease that does not say how long it holds.

    Raises:
        InputError: the cache is not finished: there is nothing that was added to it.
        ConfigError: a process is at work on the segment.
    """
    if manifest is None:
        raise InputError(
            "there is no finished cache from which an extension could be deleted",
            {"cache": store.url, "missing": layout.MANIFEST},
            "finish it: the same command without --abandon",
        )
    number = len(manifest.segments)
    name = re.compile(
        rf"segments/({number:04d}(?:-[0-9a-f]{{{NAME_DIGITS}}}|\.prepared)?)(?:/|$)"
    )  # a folder that is a link is a key
    keys = [key for key in store.keys(f"segments/{number:04d}") if name.match(key)]
    if not keys:
        return
    folders = sorted({match[0].rstrip("/") for key in keys if (match := name.match(key))})
    _refuse_live_builders(store, folders, [key for key in keys if "/claims/" in key], expiry_s)
    for link in (key for key in keys if key in folders):  # a folder that is a link is a key
        store.delete(link)  # nothing of its target
    for folder in (folder for folder in folders if folder not in keys):
        _delete_segment(store, folder, [key for key in keys if key.startswith(f"{folder}/")])
    store.remove_stale_locks()
    for folder in folders:
        store.delete_folder(folder)
    log.info(f"deleted: {', '.join(map(store.where, folders))}, an unfinished extension")


def _delete_segment(store: Store, folder: str, keys: Sequence[str]) -> None:
    """Delete the keys of a folder, the plan last: as long as it is there the folder is known to be an extension."""
    plan = f"{folder}/plan.json"
    receipts = [key for key in keys if key.startswith(f"{folder}/receipts/")]
    for key in [*receipts, *(key for key in keys if key not in {plan, *receipts}), plan]:
        store.delete(key)


def _refuse_live_builders(store: Store, folders: Sequence[str], leases: Sequence[str], expiry_s: float) -> None:
    live = [key for key in leases if is_anothers_lease(store, key, expiry_s)]
    if live:
        raise ConfigError(
            "a process is working on the extension",
            {"segment": ", ".join(map(store.where, folders)), "its leases": ", ".join(live[:3])},
            "stop it first, or wait until its lease has expired",
        )
