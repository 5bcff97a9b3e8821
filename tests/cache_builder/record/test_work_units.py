"""How processes share a segment's work units: in which order, how often they look, and who finishes."""

import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from distillcache.cache_builder.record import work_units
from distillcache.cache_builder.record.work_units import by_one_process
from distillcache.models.recorder import raise_if_too_large
from distillcache.schemas.cache.lease import Leases
from distillcache.schemas.cache.segment import open_cache, read_manifest
from distillcache.schemas.errors import Interrupted, NonFiniteError
from distillcache.schemas.format import layout
from distillcache.schemas.runtime.signals import StopRequest
from distillcache.schemas.store.store import Store
from tests.conftest import build_config


@pytest.mark.parametrize(("count", "processes"), [(10, 1), (10, 3), (2, 5), (0, 2)])
def test_every_process_goes_through_all_units_its_own_first(count: int, processes: int) -> None:
    for process in range(processes):
        order = work_units._order(count, process, processes)
        assert sorted(order) == list(range(count))
        own = [unit for unit in range(count) if unit % processes == process]
        assert order[: len(own)] == own


def test_idle_processes_do_not_all_want_the_same_unit() -> None:
    first = [work_units._order(64, process, 8)[8] for process in range(8)]
    assert len(set(first)) == 8


def test_a_bucket_is_asked_less_and_less_often(tmp_path: Path) -> None:
    config = build_config(tmp_path, tmp_path, tmp_path, claim_expiry_s=60)
    near = list(islice(work_units._pauses(Store(str(tmp_path)), config.claim_expiry_s), 8))
    far = list(islice(work_units._pauses(Store("gs://never-asked"), config.claim_expiry_s), 8))
    assert max(near) < 1.5
    assert 10 < max(far) < 20
    assert far[0] < 1.5


def test_one_finishes_and_the_others_wait_for_it(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_units, "POLL_S", 0.05)
    (segment,) = open_cache(Store(str(cache)))
    manifest = (cache / "manifest.json").read_bytes()
    store = Store(str(tmp_path))
    config = build_config(tmp_path, tmp_path, tmp_path, num_processes=2)
    finisher = Leases(store, segment.plan.segment, 60, key=layout.finish_lease_key)
    assert finisher.take(0)
    threading.Timer(0.3, lambda: store.write("manifest.json", manifest)).start()
    started = time.monotonic()
    found = by_one_process(store, segment.plan, config, StopRequest(), lambda: pytest.fail("two have finished"))
    assert time.monotonic() - started > 0.2
    assert found == read_manifest(store)
    finisher.close()


def test_waiting_for_the_one_that_finishes_ends_when_asked_to_stop(cache: Path, tmp_path: Path) -> None:
    (segment,) = open_cache(Store(str(cache)))
    store, stop = Store(str(tmp_path)), StopRequest()
    finisher = Leases(store, segment.plan.segment, 60, key=layout.finish_lease_key)
    assert finisher.take(0)
    stop.requested = True
    config = build_config(tmp_path, tmp_path, tmp_path, num_processes=2)
    with pytest.raises(Interrupted):
        by_one_process(store, segment.plan, config, stop, lambda: pytest.fail("two have finished"))
    finisher.close()


def test_activations_whose_squares_overflow_are_an_error() -> None:
    largest = np.array([[1.0, 3e18], [2.0, 2e19]], np.float32)
    with np.errstate(over="ignore"):
        squares = np.square(largest) * 4
    raise_if_too_large("resid", (0, 3), squares[:1], largest[:1], [16])
    with pytest.raises(NonFiniteError, match="overflow") as caught:
        raise_if_too_large("resid", (0, 3), squares, largest, [16, 17])
    assert (caught.value.facts["row"], caught.value.facts["block"]) == (17, 3)
    assert caught.value.facts["found"] == "numbers up to 2e+19"
