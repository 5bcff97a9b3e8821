"""Simulation of a build by many hosts: leases, preemptions, writes and their retries.

A discrete-event simulation. A host takes *work units* (cache_builder/record/work_units.py) from one pool and computes
one while it writes the previous one. A preempted host loses what is in flight; the rest of what it had leased is free
again after the lease's expiry, and the host returns after its restart. Several work units are handed out at a time,
fewer towards the end, so that a build of a hundred million work units takes some ten thousand events; a preemption
still loses only the work units in flight. If a build would see more than `MAX_PREEMPTIONS`, a fraction is simulated and
its time is scaled up.
"""

import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np

from distillcache.schemas.counted import counted
from distillcache.schemas.errors import ConfigError

SHARES = 4  # a host takes a fourth of what would be its part of the pool
SMALLEST = 200  # but no less than one in so many of all its work units: its last ones are half a percent of its time
MAX_PREEMPTIONS = 1000
MOST_PREEMPTIONS_A_UNIT = 5  # one attempt in e^5 = 150 succeeds
LEAST_RATE = 2.0**-20  # a second and host: about one in twelve days
DRAWN = 64  # random numbers at a time


@dataclass(frozen=True)
class Work:
    """Work of a build. unit_tokens: computed for one work unit. bytes, puts: of all work units together."""

    units: int
    unit_tokens: int
    bytes: int
    puts: int


@dataclass(frozen=True)
class Fleet:
    """The builders. tokens_per_s, write_bytes_per_s: of one host. retry_share: of all writes."""

    hosts: int
    tokens_per_s: float
    write_bytes_per_s: float
    startup_s: float = 0.0
    restart_s: float = 0.0
    preemptions_per_s: float = 0.0
    claim_expiry_s: float = 0.0
    retry_share: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Played:
    """Results of the simulation. wall_s: until the last work unit is durable. lost_s: host seconds of repeated work.

    bytes, puts: of committed work units. retries: writes that were sent again. preemptions: of the whole build.
    """

    wall_s: float
    units: int
    bytes: int
    puts: int
    retries: int
    preemptions: int
    lost_s: float


def unit_seconds(work: Work, fleet: Fleet) -> tuple[float, float]:
    """(computing, writing) one work unit on one host."""
    return work.unit_tokens / fleet.tokens_per_s, work.bytes / work.units / fleet.write_bytes_per_s


def quiet_seconds(work: Work, fleet: Fleet) -> float:
    """Return the seconds of the busiest host if nothing is preempted and no write is retried."""
    compute, write = unit_seconds(work, fleet)
    return fleet.startup_s + math.ceil(work.units / fleet.hosts) * max(compute, write) + min(compute, write)


def play(work: Work, fleet: Fleet) -> Played:
    """Play a build through.

    Raises:
        ConfigError: hosts are preempted so often that the build would hardly end.
    """
    needed_s = fleet.restart_s + sum(unit_seconds(work, fleet))
    if fleet.preemptions_per_s * needed_s > MOST_PREEMPTIONS_A_UNIT:
        raise ConfigError(
            f"a host is preempted every {counted(round(1 / fleet.preemptions_per_s), 'second')}, and needs "
            f"{needed_s:,.0f} to restart and to finish a work unit",
            {},
            "make preemptions rarer, or build.restart_s or shard_mib smaller",
        )
    expected = fleet.preemptions_per_s * fleet.hosts * quiet_seconds(work, fleet)
    part = min(1.0, MAX_PREEMPTIONS / expected) if expected else 1.0
    units = max(1, round(work.units * part))
    game = _Game(work, fleet, units)
    wall = game.play()
    scale = work.units / units
    return Played(
        wall_s=fleet.startup_s + (wall - fleet.startup_s) * scale,
        units=round(game.committed * scale),
        bytes=round(work.bytes * game.committed / units),
        puts=round(work.puts * game.committed / units),
        retries=round(game.retries * scale),
        preemptions=round(game.preemptions * scale),
        lost_s=game.lost_s * scale,
    )


@dataclass
class _Host:
    """A host's unit: begun at `since`, `units` of `each` seconds, with `again` writes sent twice.

    turn: an event of an earlier turn is void.
    """

    turn: int = 0
    since: float = 0.0
    units: int = 0
    each: float = 0.0
    again: int = 0
    idle: bool = False


class _Game:
    """One build, until all of its work units are committed."""

    def __init__(self, work: Work, fleet: Fleet, units: int) -> None:
        self._fleet, self._retries_rng = fleet, np.random.default_rng(fleet.seed)
        self._compute_s, self._write_s = unit_seconds(work, fleet)
        self._puts = work.puts / work.units
        self._least = max(1, units // (fleet.hosts * SMALLEST))
        self._free = self._left = units
        self._hosts = [_Host() for _ in range(fleet.hosts)]
        self._order, self._events = itertools.count(), list[tuple[float, int, _Event, int, int]]()
        self.committed = self.retries = self.preemptions = 0
        self.lost_s = self._end = 0.0

    def play(self) -> float:
        """The time at which the last work unit is durable."""
        preemptions = _preemptions(self._fleet)
        when, victim = next(preemptions)
        for host in range(self._fleet.hosts):
            self._push(self._fleet.startup_s, _Event.READY, host, 0)
        while self._left:
            if when < self._events[0][0]:
                self._preempt(when, victim)
                when, victim = next(preemptions)
                continue
            now, _, event, host, value = heapq.heappop(self._events)
            if event is _Event.FREED:
                self._free += value
                for waiting, each in enumerate(self._hosts):
                    if each.idle:
                        self._take(now, waiting)
            elif value == self._hosts[host].turn:
                self._commit(self._hosts[host], self._hosts[host].units, now)
                self._take(now, host)
        return self._end + min(
            self._compute_s, self._write_s
        )  # the last work unit is written while nothing is computed

    def _take(self, now: float, number: int) -> None:
        """Let a host lease a unit, if there is one."""
        host = self._hosts[number]
        taken = min(self._free, max(self._least, self._free // (self._fleet.hosts * SHARES)))
        self._free -= taken
        host.turn, host.since, host.units, host.idle = host.turn + 1, now, taken, not taken
        if taken:
            host.again = int(self._retries_rng.binomial(round(taken * self._puts), self._fleet.retry_share))
            host.each = max(self._compute_s, self._write_s * (1 + host.again / (taken * self._puts)))
            self._push(now + taken * host.each, _Event.READY, number, host.turn)

    def _commit(self, host: _Host, units: int, now: float) -> None:
        if units:
            self.retries += round(host.again * units / host.units)
            self._end = max(self._end, now)
        self.committed += units
        self._left -= units
        host.units = 0

    def _preempt(self, now: float, number: int) -> None:
        """A host goes, wherever it was, and comes back after its restart."""
        host = self._hosts[number]
        self.preemptions += 1
        if host.units:
            ran, leased = now - host.since, host.units
            # What was computed last was still being written.
            done = max(0, math.floor((ran - min(self._compute_s, self._write_s)) / host.each))
            self.lost_s += ran - done * host.each
            self._commit(host, done, host.since + done * host.each)
            self._push(now + self._fleet.claim_expiry_s, _Event.FREED, number, leased - done)
        host.turn, host.units, host.idle = host.turn + 1, 0, False
        self._push(max(now, self._fleet.startup_s) + self._fleet.restart_s, _Event.READY, number, host.turn)

    def _push(self, when: float, event: "_Event", host: int, value: int) -> None:
        heapq.heappush(self._events, (when, next(self._order), event, host, value))


class _Event(Enum):
    """READY: a host has done its unit, or has (re)started; its value is the host's turn. FREED: so many work units."""

    READY = 1
    FREED = 2


def _preemptions(fleet: Fleet) -> Iterator[tuple[float, int]]:
    """(time, host), ascending, for ever.

    Whatever happens at one rate happens at every higher one as well, of the same seed: the process is a sum of ones
    whose rates double, the last of them thinned. So a higher rate never gives better luck.
    """
    wanted = fleet.preemptions_per_s * fleet.hosts
    streams, below, rate = [], 0.0, LEAST_RATE * fleet.hosts
    for level in itertools.count():
        if below >= wanted:
            break
        streams.append(_stream((fleet.seed, 1 + level), rate, min(1.0, (wanted - below) / rate), fleet.hosts))
        below, rate = below + rate, below + rate  # the next one is as frequent as all before it
    return heapq.merge(*streams, iter([(math.inf, 0)]))


def _stream(seed: tuple[int, int], rate: float, share: float, hosts: int) -> Iterator[tuple[float, int]]:
    """Yield the events of a Poisson process of this rate whose mark is below `share`."""
    rng, now = np.random.default_rng(seed), 0.0
    while True:
        gaps, marks = rng.exponential(1 / rate, DRAWN), rng.random(DRAWN)
        for gap, mark, host in zip(gaps.tolist(), marks.tolist(), rng.integers(0, hosts, DRAWN).tolist(), strict=True):
            now += gap
            if mark < share:
                yield now, host
