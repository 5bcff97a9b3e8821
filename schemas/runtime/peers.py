"""Processes that work in lockstep: how they meet, agree to stop, and learn that one of them is gone.

Where there are several, the cluster's own environment (Cloud TPU, GKE, Slurm, Open MPI) says which one this is, or
`coordinator`, `num_processes` and `process_id` do; `jax.distributed` connects them. They compute in lockstep, so one
that fails or dies must end the others too:

- one that fails says so through JAX's coordination service before it ends; the others look there every second;
- one that is killed stops its heartbeats: after `timeout_s` JAX ends the others, and supervise.py says whom it missed.
"""

import contextlib
import glob
import importlib.util
import json
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from distillcache.schemas.errors import ConfigError, DistillcacheError, DivergedError, Interrupted
from distillcache.schemas.runtime.console import last_words
from distillcache.schemas.runtime.signals import StopRequest

SUPERVISED = "DISTILLCACHE_SUPERVISED"  # in the environment: where supervise.py listens
FAILED = "distillcache/failed"  # key of the coordination service: who failed first, and of what
POLL_S = 1.0
START_S = 300  # for all processes to come: hosts of a cluster do not start at the same moment
ASK_MS = 10_000  # one question to the coordination service; asked again until there is an answer
WAIT_MS = 7 * 24 * 3600 * 1000  # for slow processes; dead ones are noticed by their heartbeats
LINGER_S = 5.0  # the first process, where JAX's service runs, waits so long, so that the others can read why
# What the environment of a cluster that JAX knows looks like when a job of several processes runs in it.
CLUSTERS = ("SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri", "TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS")
ALONE_WORD = "none"  # as a coordinator
HOST_BYTES = 64  # of a host's name, as it is sent around


def tell(**facts: Any) -> None:
    """Report to the supervisor (supervise.py), if there is one, for its exit message."""
    if descriptor := os.environ.get(SUPERVISED):
        os.write(int(descriptor), (json.dumps(facts) + "\n").encode())


class PeerError(DistillcacheError):
    """Another process of the run failed or died. Its exit code is that process's where it says how the run ended."""


@dataclass(frozen=True)
class Peers:
    """This process among the run's. number: its own, from 0; count: how many there are; attempt: the same in all of
    them, and never the same again."""

    number: int
    count: int
    attempt: str
    _used: set[str] = field(default_factory=set, repr=False, compare=False)

    @property
    def first(self) -> bool:
        """Return whether this is the process that does the work that must happen once."""
        return self.number == 0

    def meet(self, name: str) -> None:
        """Return when all processes have come to the point of this name, however long the slowest takes.

        Args:
            name: not used for anything else among these processes.
        """
        if self.count > 1:
            self._use(name)
            _client().wait_at_barrier(f"distillcache/{self.attempt}/{name}", WAIT_MS)

    def _use(self, name: str) -> None:
        """See that a name means one thing: a second value under it would never reach the other processes."""
        if name in self._used:
            raise ValueError(f"{name!r} was met or shared before")
        self._used.add(name)

    def share(self, name: str, say: Callable[[], bytes]) -> bytes:
        """Return the value that `say` computes in the first process; the others wait for it without a time limit.

        Args:
            name: as in `meet`.
        """
        if self.count == 1:
            return say()
        self._use(name)
        key = f"distillcache/{self.attempt}/{name}"
        if self.first:
            said = say()
            _client().key_value_set_bytes(key, said)
            return said
        while True:
            try:
                return _client().blocking_key_value_get_bytes(key, ASK_MS)
            except Exception as error:  # its errors have no class of their own
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The sum over all processes, float64 like `values`; each adds in the same order."""
        if self.count == 1:
            return values
        bits = np.ascontiguousarray(values, np.float64).view(np.uint32)  # JAX would make float32 of them
        gathered = np.asarray(multihost_utils.process_allgather(bits))
        return gathered.view(np.float64).reshape(self.count, *np.shape(values)).sum(axis=0)

    def join_rows(self, tree: Any) -> Any:
        """Values by row, `[L, B, ...]`, of this process's rows: those of all processes."""
        if self.count == 1:
            return tree
        of_all = multihost_utils.process_allgather(tree)  # the processes come first
        return jax.tree.map(lambda x: np.concatenate(list(np.asarray(x)), axis=1), of_all)

    def should_stop(self, stop: StopRequest, step: int) -> bool:
        """Return whether to stop after this step: all processes get the same answer, even if only one received a
        signal.
        """
        if self.count == 1:
            return stop.requested
        return multihost_utils.reached_preemption_sync_point(step)


ALONE = Peers(0, 1, "")


def alone() -> Peers:
    """The only process of a run."""
    return Peers(0, 1, secrets.token_hex(8))


def in_cluster() -> bool:
    """Return whether a launcher that JAX knows started this process as one of several."""
    return any(os.environ.get(name) for name in CLUSTERS) or _on_tpu()


def has_peers(coordinator: str | None) -> bool:
    """Return whether the run has other processes, as far as this is known before they meet."""
    return in_cluster() if coordinator is None else coordinator != ALONE_WORD


def _on_tpu() -> bool:
    """Return whether this machine has TPUs: JAX asks their own service for the other hosts."""
    chips = [*glob.glob("/dev/accel*"), *glob.glob("/dev/vfio/[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


@contextlib.contextmanager
def join_peers(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout_s: int
) -> Iterator[Peers]:
    """Meet the other processes of the run; at the end, leave together.

    Args:
        coordinator: host:port of process 0; None: as the cluster's environment says, or alone where there is none;
            `none`: alone, whatever the environment says.
        num_processes, process_id: None: likewise.
        timeout_s: how long the others may be silent.

    Raises:
        ConfigError: the processes' numbers do not fit together.
        PeerError: they do not come, or one of them failed.
    """
    if not has_peers(coordinator):
        if coordinator is None and (num_processes or 1) > 1:
            raise ConfigError(
                "several processes need an address to meet",
                {"num_processes": num_processes, "coordinator": "not given"},
                "give --coordinator HOST:PORT, the same for all: the address of process 0",
            )
        yield alone()
        return
    _check_numbers(coordinator, num_processes, process_id)
    if have_met():  # a second run in one process
        yield _greet()
        return
    _initialize(coordinator, num_processes, process_id, timeout_s)
    watch = _Watch()
    try:
        yield _greet()
    except Interrupted:
        raise  # all of them were
    except BaseException as error:
        _say_why(error, watch, timeout_s)
        raise
    finally:
        watch.close()
    # Who leaves early would be missed by the others.
    jax.distributed.shutdown()


def have_met() -> bool:
    """Return whether this process has met those of its job; it can do so once."""
    return jax.distributed.is_initialized()


def _check_numbers(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    if coordinator is not None and None in (num_processes, process_id) and not in_cluster():
        raise ConfigError(
            "processes that work together need their count and numbers",
            {name: "not given" if value is None else value for name, value in given.items()},
            "give --num-processes, the same for all, and --process-id, from 0, another for each",
        )
    if num_processes is not None and process_id is not None and process_id >= num_processes:
        raise ConfigError("a process's number is too high", given, f"it is 0 to {num_processes - 1}")
    if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
        raise ConfigError("the coordinator's address has no port", given, "give --coordinator HOST:PORT")


def _initialize(coordinator: str | None, num_processes: int | None, process_id: int | None, timeout_s: int) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # counts where CPUs are the devices
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=max(timeout_s, START_S),
            cluster_detection_method="deactivate" if None not in (coordinator, num_processes, process_id) else None,
            heartbeat_timeout_seconds=timeout_s,
            shutdown_timeout_seconds=timeout_s,
        )
    except (RuntimeError, ValueError) as error:
        raise PeerError(
            "the processes do not find each other",
            {
                "coordinator": coordinator or "as the cluster says",
                "this process": f"{process_id} of {num_processes}",
                "waited": f"{max(timeout_s, START_S)} s at most",
                "cause": str(error).split("\n")[0][:200],
            },
            "start all processes, with the same --coordinator: host and port of process 0, which the others can reach",
        ) from error


def _greet() -> Peers:
    seed = np.frombuffer(secrets.token_bytes(8), np.uint32)
    attempt = multihost_utils.broadcast_one_to_all(seed)
    name = np.frombuffer(socket.gethostname().encode()[:HOST_BYTES].ljust(HOST_BYTES), np.uint8)
    hosts = [bytes(each).decode(errors="replace").strip() for each in multihost_utils.process_allgather(name)]
    tell(number=jax.process_index(), hosts=hosts)
    return Peers(jax.process_index(), jax.process_count(), np.asarray(attempt).tobytes().hex())


class _Watch:
    """Looks for the failure of another process; ends this one when there is one, wherever it hangs."""

    def __init__(self) -> None:
        self.ours = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="peers-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(POLL_S):
            found = read_failure()
            if found is not None and not self.ours.is_set():
                # A collective that waits for the dead cannot be interrupted: nothing but the process's end helps.
                error = _peer_error(found)
                last_words(error)
                os._exit(error.exit_code)


def _client() -> Any:
    # JAX has no public way to its key-value service; Orbax and others take it from here.
    from jax._src import distributed

    return distributed.global_state.client


def read_failure() -> str | None:
    """Return the message of the first process that failed; None if none has."""
    try:
        return _client().key_value_try_get(FAILED)
    except Exception:  # its errors have no class of their own: nobody failed, or the service is gone
        return None  # and then JAX ends this process itself


def _say_why(error: BaseException, watch: _Watch, timeout_s: int) -> None:
    """Tell the others what ended this process, unless one of them told first: then that is the reason.

    Under a supervisor the process ends here: what is left of JAX's runtime would wait for the others, and then abort.

    Raises:
        PeerError: another process failed before, or a collective broke off because another is gone.
    """
    if not isinstance(error, DistillcacheError) and _is_broken_link(error):
        # JAX notices within timeout_s who is missing, and ends this process; one that could still speak has spoken.
        deadline = time.monotonic() + timeout_s + LINGER_S
        while time.monotonic() < deadline:
            time.sleep(POLL_S)
        raise PeerError(
            "the connection to another process of the run was lost",
            {"process": f"{jax.process_index()} of {jax.process_count()}", "cause": str(error).split("\n")[0][:200]},
            "read the other processes' own messages, then start all of them again",
        ) from error
    watch.ours.set()
    what = str(error) if isinstance(error, DistillcacheError) else f"error: {type(error).__name__}: {error}"
    with contextlib.suppress(Exception):  # somebody else was first, or the service is gone
        code = getattr(error, "exit_code", 1)
        _client().key_value_set(FAILED, f"{jax.process_index()}|{socket.gethostname()}|{code}|{what}")
    if os.environ.get(SUPERVISED):
        is_ours = isinstance(error, DistillcacheError)
        last_words(error if is_ours else "".join(traceback.format_exception(error)).rstrip())
    if jax.process_index() == 0:
        time.sleep(LINGER_S)
    if os.environ.get(SUPERVISED):
        sys.stdout.flush()
        os._exit(getattr(error, "exit_code", 1))


def _is_broken_link(error: BaseException) -> bool:
    return any(name in str(error) for name in ("Gloo", "gloo", "NCCL", "collective", "Socket", "UNAVAILABLE"))


def _peer_error(said: str) -> PeerError:
    number, host, code, what = said.split("|", 3)
    first, *rest = what.split("\n")
    error = PeerError(
        f"process {number}, on {host}, has ended: {first.removeprefix('error: ')}",
        {"there": " ".join(" ".join(rest).split())} if rest else {},
        "fix what it names, then start all processes again: they resume where they stopped",
    )
    if int(code) == DivergedError.exit_code:  # all processes of a run that diverged end alike
        error.exit_code = DivergedError.exit_code
    return error
