"""Builders of one cache in a bucket that fails, killed and started again at random.

Rounds until the time is over: processes build a cache in a new folder, over a GCS server that spoils a tenth of all
requests, while a seeded hand kills one after the other (SIGKILL and SIGTERM) and starts it again. When the round's time
has come, or the cache is there, they finish in peace. The cache must then be the one that a quiet build on a local disk
gives, byte for byte, and `verify` must find nothing.
"""

import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from distillcache.cache_builder.build import build_cache
from distillcache.schemas.cache.segment import read_manifest
from distillcache.schemas.config import BuildConfig
from distillcache.schemas.errors import Interrupted
from distillcache.schemas.store.store import Store
from distillcache.tools.look.verify import verify_cache
from tests.conftest import build_config, save_teacher
from tests.processes.command import fork_server
from tests.servers.launch import Server

QUIET_S = 120.0  # more than a round's builders need when nobody disturbs them
STORAGE = {"first_delay_s": 0.02, "max_delay_s": 1.0}


@dataclass
class Chaos:
    """What happened. `problems`: what should not have."""

    rounds: int = 0
    kills: int = 0
    stops: int = 0
    failed_builders: int = 0
    faults: int = 0
    requests: int = 0
    problems: list[str] = field(default_factory=list)


def build(
    environment: dict[str, str], cache: str, teacher: str, corpus: str, process: int, processes: int, host: str
) -> None:
    """In the child: build. With a host's name of its own, its death shows only when its leases expire.

    Args:
        environment: where the server is; the fork server may have been started before it.
    """
    os.environ.update(environment)
    if host:
        socket.gethostname = lambda: host
    try:
        build_cache(config_of(cache, Path(teacher), Path(corpus), process, processes))
    except Interrupted:
        sys.exit(143)


def config_of(cache: str, teacher: Path, corpus: Path, process: int = 0, processes: int = 1) -> BuildConfig:
    """Small shards, so that there is much to lease, and leases that expire soon."""
    changes: dict[str, Any] = {"process_id": process, "num_processes": processes, "storage": STORAGE}
    return build_config(cache, teacher, corpus, shard_rows=4, claim_expiry_s=5.0, **changes)


UNLIKE = ("plan.json", "manifest.json", "times.json")


def contents(url: str) -> dict[str, bytes]:
    """Everything but plan, manifest and the shards' times, which name the time and the place."""
    store = Store(url)
    keys = store.keys()
    return {key: store.read(key) or b"" for key in keys if not key.endswith(UNLIKE)}


class Builders:
    """The processes of one round."""

    def __init__(
        self,
        context: ForkServerContext,
        arguments: tuple[dict[str, str], str, str, str],
        count: int,
        rng: random.Random,
    ):
        self._context, self._arguments, self._count, self._rng = context, arguments, count, rng
        self._started = 0
        self.running: list[ForkServerProcess] = [self._start(number) for number in range(count)]

    def _start(self, number: int) -> ForkServerProcess:
        self._started += 1
        host = self._rng.choice(["", f"host-{number}-{self._started}"])
        process = self._context.Process(target=build, args=(*self._arguments, number, self._count, host))
        process.start()
        return process

    def disturb(self, chaos: Chaos, until: float, pause_s: float) -> None:
        """Kill and start again, until the time, or until all have finished by themselves."""
        while time.monotonic() < until and any(process.is_alive() for process in self.running):
            time.sleep(self._rng.uniform(0.1, pause_s))
            number = self._rng.randrange(self._count)
            if self.running[number].is_alive():
                self._kill(self.running[number], chaos)
            elif self.running[number].exitcode not in (0, 143, -signal.SIGKILL):
                chaos.failed_builders += 1
            self.running[number].join()
            self.running[number] = self._start(number)

    def _kill(self, process: ForkServerProcess, chaos: Chaos) -> None:
        how = self._rng.choice([signal.SIGKILL, signal.SIGTERM])
        chaos.kills += how == signal.SIGKILL
        chaos.stops += how == signal.SIGTERM
        assert process.pid is not None
        os.kill(process.pid, how)
        process.join(20)
        if process.is_alive():
            chaos.problems.append("a builder did not stop within 20 s of SIGTERM")
            process.kill()

    def finish(self, chaos: Chaos) -> None:
        """Let all end by themselves; those that ended with an error are counted, and one builds alone at last."""
        deadline = time.monotonic() + QUIET_S
        for process in self.running:
            self._await(process, chaos, deadline)
        self._await(self._start(0), chaos, deadline)

    def _await(self, process: ForkServerProcess, chaos: Chaos, deadline: float) -> None:
        process.join(max(1.0, deadline - time.monotonic()))
        if process.is_alive():
            chaos.problems.append("a builder did not finish in peace")
            process.kill()
            process.join()
        chaos.failed_builders += process.exitcode not in (0, 143, -signal.SIGKILL)


def run(
    server: Server,
    seconds: float,
    *,
    processes: int = 4,
    faults: float = 0.1,
    seed: int = 0,
    words: int = 600,
    pause_s: float = 2.5,
) -> Chaos:
    """Rounds until the time is over. A builder that ends with an error is no problem if the cache gets right.

    Args:
        server: of GCS buckets. TensorStore looks once in a process for where it is, so a process has one at most.
        words: how many documents the text has: how long a round takes.
        pause_s: between two kills, at most.
    """
    chaos, rng = Chaos(), random.Random(seed)
    context = fork_server()
    os.environ.update(server.environment)
    with tempfile.TemporaryDirectory() as folder:
        teacher, corpus = save_teacher(Path(folder) / "teacher"), Path(folder) / "text.jsonl"
        corpus.write_text("".join(json.dumps({"text": f"text {n} " * (n % 7 + 1)}) + "\n" for n in range(words)))
        build_cache(config_of(f"{folder}/quiet", teacher, corpus))
        quiet = contents(f"{folder}/quiet")
        bucket = server.make_bucket()
        first = context.Process(target=len, args=([],))  # the fork server imports everything before it
        first.start()
        first.join()
        deadline = time.monotonic() + seconds
        while not chaos.rounds or time.monotonic() < deadline:
            url = f"{bucket}/round-{chaos.rounds}"
            with server.faults(faults, seed=rng.randrange(1 << 30)):
                builders = Builders(context, (server.environment, url, str(teacher), str(corpus)), processes, rng)
                builders.disturb(chaos, min(deadline, time.monotonic() + rng.uniform(20, 60)), pause_s)
                builders.finish(chaos)
            chaos.rounds += 1
            chaos.problems += problems_of(url, quiet)
        seen = server.requests()
        chaos.faults, chaos.requests = sum(seen["faults"].values()), sum(seen["statuses"].values())
    return chaos


def problems_of(url: str, quiet: dict[str, bytes]) -> list[str]:
    """What is wrong with a round's cache."""
    store = Store(url)
    if read_manifest(store) is None:
        return [f"{url} is not finished"]
    found = contents(url)
    wrong = [key for key in sorted(found.keys() | quiet.keys()) if found.get(key) != quiet.get(key)]
    findings = verify_cache(store)["findings"]
    return [f"{url} differs: {wrong}"] * bool(wrong) + [f"verify finds {findings}"] * bool(findings)
