"""A short form of `make chaos`."""

import pytest

from tests.chaos.builders import run
from tests.servers.fixtures import Bucket

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_builders_that_are_killed_over_a_failing_store_build_the_quiet_cache(gcs: Bucket) -> None:
    chaos = run(gcs.server, 6, processes=3, words=80, seed=1, pause_s=1.0)
    assert chaos.problems == [], chaos
    assert chaos.kills + chaos.stops > 0
    assert chaos.faults > 20
