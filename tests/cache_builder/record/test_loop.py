"""The order of work in the recording loop: a batch is copied while the next one is computed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distillcache.cache_builder.record import loop, work_units
from distillcache.cache_builder.record.loop import Work, record_batches
from distillcache.cache_builder.record.pipeline import ShardWriter
from distillcache.schemas.cache.segment import open_cache
from distillcache.schemas.errors import Interrupted
from distillcache.schemas.runtime.signals import StopRequest
from distillcache.schemas.store.store import Store


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Batches by their first row, as they are given to the teacher and as they are handed on."""
    found: list[str] = []

    def record(parameters: Any, tokens: Any, *rest: Any) -> Any:
        found.append("record")
        return None

    def keep(plan: Any, writer: Any, bar: Any, first: int, *rest: Any) -> None:
        found.append(f"keep {first}")

    monkeypatch.setattr(loop, "make_recorder", lambda *args: (record, None))
    monkeypatch.setattr(loop, "keep_batch", keep)
    return found


@pytest.fixture
def work(cache: Path, tmp_path: Path) -> Work:
    (segment,) = open_cache(Store(str(cache)))
    rows: Any = SimpleNamespace(slice=lambda start, stop: [segment.row(row) for row in range(start, stop)])
    decoder: Any = None
    return Work(store=Store(str(tmp_path)), plan=segment.plan, rows=rows, stop=StopRequest(), decoder=decoder)


def new_writer(work: Work) -> ShardWriter:
    return ShardWriter(work.store, work.plan, max_bytes=1 << 30, numerics=None, on_commit=lambda shard: None)


def test_the_next_work_unit_is_begun_before_the_last_batch_is_copied(work: Work, events: list[str]) -> None:
    size, bar = work.plan.batch_rows, SimpleNamespace(advance=lambda tokens: None)
    firsts = [unit * work.plan.unit_rows - size for unit in (1, 2, 3)]  # the last batches of three work units
    batches = ((first, work.rows.slice(first, first + size)) for first in firsts)
    record_batches(work, batches, new_writer(work), bar)  # type: ignore[arg-type]
    one, two, three = (f"keep {first}" for first in firsts)
    assert events == ["record", "record", one, "record", two, three]


def test_a_build_that_is_stopped_hands_over_the_work_unit_before(work: Work) -> None:
    writer, handed = new_writer(work), []
    writer.before_wait = lambda: handed.append("unit")
    work_units._stop_between_units(work, writer)
    assert handed == []
    work.stop.requested = True
    with pytest.raises(Interrupted):
        work_units._stop_between_units(work, writer)
    assert handed == ["unit"]
    writer.close()
