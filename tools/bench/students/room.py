"""Disk space that a bench needs: hours of training must not end with a full disk."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import jax

from distillcache.cache_builder.record.plan import chosen_taps
from distillcache.models.checkpoint import read_config
from distillcache.models.decoder import abstract_decoder
from distillcache.schemas.config import BuildConfig
from distillcache.schemas.errors import StorageError

# Of a run, in bytes for each of the teacher's weights: the student in float32, and at most three checkpoints with the
# two moments of Adam. Attention alone has at most a third of the weights.
OF_ALL_WEIGHTS, OF_ATTENTION = 4 + 3 * 12, 4 + 3 * 12 // 3


def check_room(
    folder: Path, teacher: str, caches: Iterable[BuildConfig], tokens: int, run_bytes_per_weight: int
) -> None:
    """Raise `StorageError` if a folder has no room for these caches and a run beside them.

    Args:
        caches: those that are there at once.
        tokens: in each.
        run_bytes_per_weight: OF_ALL_WEIGHTS or OF_ATTENTION.
    """
    model = read_config(teacher)
    token_bytes = sum(
        part.bytes_per_token for build in caches for tap in chosen_taps(build, model) for part in tap.parts
    )
    weights = sum(leaf.size for leaf in jax.tree.leaves(abstract_decoder(model)[1]))
    needed, free = token_bytes * tokens + run_bytes_per_weight * weights, shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            "there is too little room for the bench's caches and a run",
            {"folder": folder, "free": f"{free / 1e9:,.1f} GB", "needed": f"{needed / 1e9:,.1f} GB"},
            "make room, or name a folder on a larger disk: --dir FOLDER",
        )
