"""Requests to stop, and who sees them."""

import signal

import pytest

from distillcache.schemas.runtime.signals import watch_for_stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_after_the_last_look_of_inner_work_stops_the_outer(number: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with watch_for_stop() as build:
        with watch_for_stop() as preparation:
            assert not preparation.requested
            signal.raise_signal(number)
        assert build.requested
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_request_before_inner_work_stops_it_too() -> None:
    with watch_for_stop() as build:
        signal.raise_signal(signal.SIGTERM)
        with watch_for_stop() as preparation:
            assert preparation.requested
        assert build.requested
    with watch_for_stop() as next_command:
        assert not next_command.requested
