"""A build that is played through: the closed form where nothing happens, and never faster where something does."""

from dataclasses import replace

import pytest

from distillcache.schemas.errors import ConfigError
from distillcache.tools.plan.fleet import Fleet, Work, play, quiet_seconds

WORK = Work(units=3000, unit_tokens=16_384, bytes=3000 * 10**9, puts=3000 * 7)
FLEET = Fleet(
    hosts=1, tokens_per_s=8192.0, write_bytes_per_s=1e9, startup_s=100.0, restart_s=300.0, claim_expiry_s=60.0
)


@pytest.mark.parametrize(("tokens_per_s", "write", "each", "rest"), [(8192.0, 1e9, 2, 1), (16384.0, 0.25e9, 4, 1)])
def test_one_undisturbed_host_takes_what_the_closed_form_says(tokens_per_s, write, each, rest):
    fleet = replace(FLEET, tokens_per_s=tokens_per_s, write_bytes_per_s=write)
    expected = 100 + 3000 * each + rest
    assert play(WORK, fleet).wall_s == pytest.approx(expected)
    assert quiet_seconds(WORK, fleet) == pytest.approx(expected)


def test_everything_is_built_once_whatever_happens():
    for hosts in (1, 7, 64):
        for rate in (0.0, 1 / 3600, 1 / 300):
            played = play(WORK, replace(FLEET, hosts=hosts, preemptions_per_s=rate, retry_share=0.1))
            assert (played.units, played.bytes, played.puts) == (WORK.units, WORK.bytes, WORK.puts)
            assert played.retries == pytest.approx(0.1 * WORK.puts, rel=0.1)
            assert bool(played.preemptions) == bool(rate)


@pytest.mark.parametrize("hosts", [1, 16])
def test_more_preemption_never_makes_it_faster(hosts):
    for seed in range(12):
        fleet = replace(FLEET, hosts=hosts, seed=seed)
        rates = (0.0, 0.5, 2.0, 8.0, 24.0)
        walls = [play(WORK, replace(fleet, preemptions_per_s=rate / 3600)).wall_s for rate in rates]
        assert walls == sorted(walls)
        assert walls[0] >= quiet_seconds(WORK, fleet)


def test_more_hosts_are_faster_until_there_are_no_more_units():
    walls = [play(WORK, replace(FLEET, hosts=hosts)).wall_s for hosts in (1, 10, 100, 3000, 6000)]
    assert walls[:4] == sorted(walls[:4], reverse=True)
    assert walls[3] == walls[4] == 100 + 2 + 1
    assert walls[1] == pytest.approx(100 + 600 + 1, rel=0.02)


def test_a_preempted_host_is_back_after_its_restart():
    """Two work units on one host, preempted once: it loses what was in flight, and goes on 100 s later."""
    work = Work(units=2, unit_tokens=16_384, bytes=2 * 10**9, puts=14)
    fleet = replace(FLEET, startup_s=0.0, preemptions_per_s=1 / 200, restart_s=100.0, claim_expiry_s=60.0)
    played = [play(work, replace(fleet, seed=seed)) for seed in range(300)]
    once = [each for each in played if each.preemptions == 1]
    assert once
    assert all(100 < each.wall_s <= 100 + 5 + 5 for each in once)
    assert all(0 < each.lost_s <= 5 for each in once)
    assert all(each.wall_s == 5 for each in played if not each.preemptions)


def test_a_dead_host_s_work_is_free_after_its_lease_s_expiry():
    """Two hosts with a work unit each: the one that is left takes the other's over, 60 s after that one's end."""
    work = Work(units=2, unit_tokens=16_384, bytes=2 * 10**9, puts=14)
    fleet = replace(FLEET, hosts=2, startup_s=0.0, preemptions_per_s=1 / 400, restart_s=1000.0, claim_expiry_s=60.0)
    once = [each for seed in range(300) if (each := play(work, replace(fleet, seed=seed))).preemptions == 1]
    assert once
    assert all(60 < each.wall_s <= 3 + 60 + 3 for each in once)


def test_a_long_build_is_played_in_part_and_scaled_up():
    fleet = replace(FLEET, hosts=200, preemptions_per_s=1 / 7200)
    work = replace(WORK, units=10**8, bytes=10**17, puts=7 * 10**8)
    played = play(work, fleet)
    assert (played.units, played.bytes, played.puts) == (work.units, work.bytes, work.puts)
    away = 300 / (7200 + 300)  # share of the time
    assert played.wall_s == pytest.approx(quiet_seconds(work, fleet) / (1 - away), rel=0.03)


def test_the_same_seed_gives_the_same_build():
    fleet = replace(FLEET, hosts=16, preemptions_per_s=1 / 1800, retry_share=0.01)
    assert play(WORK, fleet) == play(WORK, fleet)
    assert play(WORK, fleet) != play(WORK, replace(fleet, seed=1))


def test_hosts_that_never_live_as_long_as_a_work_unit_are_told():
    with pytest.raises(ConfigError, match="a host is preempted every 1 second, and needs 303"):
        play(WORK, replace(FLEET, preemptions_per_s=1.0))
