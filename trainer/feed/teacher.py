"""The teacher in the loop: its choice, its rows, and its compiled forward pass (online.py runs it).

Where the rows are a cache's, the teacher must be the one that built it, and what pins its bits is as it was then.
"""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distillcache.models.checkpoint import load_pretrained, read_config, weights_digest
from distillcache.models.config import Kernel
from distillcache.models.decoder import Decoder, with_attention
from distillcache.models.describe import FORWARD, NUMERIC_LIBRARIES, describe_numerics, describe_teacher
from distillcache.models.layers.kernels import chosen_kernel
from distillcache.models.recorder import RecordFunction, make_recorder
from distillcache.schemas.cache.addressing import RowGroup, row_groups
from distillcache.schemas.cache.segment import Segment, open_cache
from distillcache.schemas.config import TapsConfig
from distillcache.schemas.errors import CheckpointError, ConfigError
from distillcache.schemas.format.digest import digest_bytes
from distillcache.schemas.format.layout import MANIFEST
from distillcache.schemas.format.manifest import Plan, TapPlan
from distillcache.schemas.format.rows import INDEX_KEY, RowReader
from distillcache.schemas.store.store import Store
from distillcache.trainer.feed.cache_source import cache_identity
from distillcache.trainer.feed.planned import PlannedSegment, check_vocabulary, planned_groups, prepared_group

log = logging.getLogger(__name__)

BATCH_ROWS = 16  # of prepared rows, as a build has it
FILES_KEPT = 64  # of prepared rows, in memory: random rows of some 270 million tokens without reading a file twice


@dataclass(eq=False)
class Recorder:
    """The compiled teacher for one set of taps. checked: whether a call was compared with the cache's digests."""

    record: RecordFunction
    parameters: Any
    taps: tuple[TapPlan, ...]
    batch_rows: int
    checked: bool


class OnlineTeacher:
    """Rows, and the teacher (`decoder`) that gives their taps. Several sources share one; `open_teacher` makes it.

    exact: run every row in the batch in which a build runs it. lock: held while the device works for a batch.
    """

    def __init__(self, url: str, groups: Sequence[RowGroup], decoder: Decoder, digest: str, exact: bool) -> None:
        self.url, self.groups, self.digest, self.exact = url, tuple(groups), digest, exact
        self.lock = threading.Lock()
        self.decoder = decoder
        self._recorders: dict[Any, Recorder] = {}

    def recorder(self, segment: Segment) -> Recorder:
        """The recorder of a segment's taps; segments that record the same share it."""
        plan, signs = segment.plan, segment.signs() if any(tap.rotate for tap in segment.plan.taps) else {}
        taps = tuple(tap.model_copy(update={"parts": ()}) for tap in plan.taps)
        key = (taps, plan.batch_rows, tuple((name, value.tobytes()) for name, value in sorted(signs.items())))
        if key not in self._recorders:
            record, parameters = make_recorder(self.decoder, plan.taps, signs)
            planned = isinstance(segment, PlannedSegment)
            self._recorders[key] = Recorder(record, parameters, plan.taps, plan.batch_rows, checked=planned)
        return self._recorders[key]


def open_teacher(
    rows: str,
    *,
    path: str | None = None,
    taps: TapsConfig | None = None,
    dtype: str | None = None,
    batch_rows: int | None = None,
    exact: bool = False,
) -> OnlineTeacher:
    """The teacher of some rows, its weights loaded.

    Args:
        rows: a finished cache, whose taps are not read, or a folder of prepared rows.
        path: the teacher's checkpoint; default: where the cache's was. Prepared rows need one.
        taps: default: as in the cache's plans; of prepared rows, without loss.
        dtype: what the teacher computes in; default: as the cache's did; for prepared rows, its checkpoint's own.
        batch_rows: rows in a call; default: as the cache was built; for prepared rows, 16.
        exact: run every row in the batch in which a build runs it: up to `batch_rows` times the work.

    Raises:
        InputError: there are no rows here.
        CheckpointError: the checkpoint is missing, or not the one that the cache was built with.
        ConfigError: no teacher is named, or it does not fit the rows.
    """
    store = Store(rows)
    if store.read(MANIFEST) is None and store.read(INDEX_KEY) is not None:
        return _teacher_of_prepared(store, path, taps, dtype, batch_rows or BATCH_ROWS, exact)
    return _teacher_of_cache(store, path, taps, dtype, batch_rows, exact)


def _teacher_of_cache(
    store: Store, path: str | None, taps: TapsConfig | None, dtype: str | None, batch_rows: int | None, exact: bool
) -> OnlineTeacher:
    segments = open_cache(store)
    plans = [segment.plan for segment in segments]
    path = path or plans[0].teacher.path
    check_teacher(path, store.url, plans, "set online.teacher.path to the path of the teacher's checkpoint")
    dtypes = {plan.numerics.dtype for plan in plans}
    if dtype is None and len(dtypes) > 1:
        raise ConfigError(
            "the segments of the cache were built in different dtypes",
            {"cache": store.url, **{f"segment {plan.segment}": plan.numerics.dtype for plan in plans}},
            "name one of them: online.dtype",
        )
    groups, digest = row_groups(segments), cache_identity(store, segments)
    decoder = load_pretrained(path, dtype=dtype or dtypes.pop())
    decoder = with_attention(decoder, _kernel_of(plans[0], decoder))
    if taps or dtype or batch_rows:
        groups = planned_groups(groups, taps, dtype, batch_rows)
        digest = _identity(digest, [segment.plan for group in groups for segment in group.segments])
    else:
        _warn_of_platform(store.url, plans, decoder.config.attention)
    return OnlineTeacher(store.url, groups, decoder, digest, exact)


def load_recorded(path: str, plan: Plan) -> Decoder:
    """The teacher at this path as it was when the plan was settled: in its dtype, with its kernel."""
    decoder = load_pretrained(path, dtype=plan.numerics.dtype)
    return with_attention(decoder, _kernel_of(plan, decoder))


def _kernel_of(plan: Plan, decoder: Decoder) -> Kernel:
    """The cache's attention kernel, or XLA's where it does not run here."""
    try:
        return chosen_kernel(plan.numerics.attention, decoder.config, str(decoder.dtype))
    except ConfigError:
        return "xla"


def _teacher_of_prepared(
    store: Store, path: str | None, taps: TapsConfig | None, dtype: str | None, batch_rows: int, exact: bool
) -> OnlineTeacher:
    rows = RowReader(store, files_kept=FILES_KEPT)
    if path is None:
        raise ConfigError(
            "no teacher is named",
            {"rows": store.url, "online.teacher": None},
            "set online.teacher.path to a checkpoint",
        )
    model = read_config(path)
    check_vocabulary(rows, store.url, path, model)
    decoder = load_pretrained(path, dtype=dtype)
    group = prepared_group(store, rows, describe_teacher(path, model), decoder, taps, batch_rows)
    digest = _identity(f"{rows.index.content_digest} {rows.index.eval_indices}", [group.base.plan])
    return OnlineTeacher(store.url, [group], decoder, digest, exact)


def _identity(rows: str, plans: Sequence[Plan]) -> str:
    """Return the identity of a planned cache's batches."""
    facts = [
        (plan.teacher.weights_digest, plan.batch_rows, plan.numerics.dtype, [tap.model_dump() for tap in plan.taps])
        for plan in plans
    ]
    return digest_bytes(f"{rows} {facts}".encode())


def check_teacher(path: str, url: str, plans: Sequence[Plan], advice: str) -> None:
    """Raise `CheckpointError`, with this advice, unless the very teacher of the cache's plans is at this path."""
    try:
        found = weights_digest(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"the cache's teacher cannot be opened: {error.what}", {"cache": url, **error.facts}, advice
        ) from error
    for expected in (plan.teacher.weights_digest for plan in plans):
        if found != expected:
            raise CheckpointError(
                "the checkpoint at the teacher's path is not the one that the cache was built with",
                {"path": path, "found": f"digest {found}", "expected": f"digest {expected}"},
                advice,
            )


def _warn_of_platform(url: str, plans: Sequence[Plan], attention: Kernel) -> None:
    """Say on standard error where this machine may compute other bits than the one that built the cache."""
    facts = ("attention", "mesh", "platform")
    differing = {}
    for plan in plans:
        here, there = describe_numerics(plan.numerics.dtype, (), attention=attention), plan.numerics
        pairs = {name: (getattr(there, name), getattr(here, name)) for name in facts}
        pairs |= {name: (there.versions.get(name), here.versions.get(name)) for name in (*NUMERIC_LIBRARIES, FORWARD)}
        differing |= {name: f"{name} {a} there, {b} here" for name, (a, b) in pairs.items() if a != b}
    if differing:
        log.warning(
            f"the teacher may compute different bits here than when {url} was built: {'; '.join(differing.values())}"
        )
