"""The supervisor of one process of a run: it reports why the process ended when the process itself cannot.

When a process of a run is killed, JAX's runtime ends the others from C++, with a stack trace, in the middle of whatever
they do: no Python code of theirs runs any more. So a command whose processes work in lockstep starts a child that
works, passes on what that one prints, and turns such an end into one message and exit code 2.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from typing import IO, Any

from distillcache.schemas.runtime.child_python import python_environment, python_words
from distillcache.schemas.runtime.peers import SUPERVISED, PeerError

RUNTIME = re.compile(
    rb"^[EFW]\d{4} .*(coordination|client\.h|preemption|RPC)|^\*\*\* |^    @ +0x|^\[Gloo\]|^Additional GRPC"
    rb"|^The tasks have crashed|^RPC: /|^:UNKNOWN:|.*connected peer ranks is"  # its lines may come into each other
)
UNHEALTHY = re.compile(rb"unhealthy|stopped sending heartbeats|missing heartbeat|timed out", re.IGNORECASE)
FORWARDED = (signal.SIGTERM, signal.SIGINT)
LAST_WORDS_S = 10.0  # for what a child that has ended printed before
PR_SET_PDEATHSIG = 1  # prctl(2): die with the parent


def is_supervised() -> bool:
    """Return whether this process already has a supervisor."""
    return bool(os.environ.get(SUPERVISED))


def supervise(module: str, words: Sequence[str]) -> int:
    """`python -m module` with these words, in a child process; its exit code.

    Raises:
        PeerError: another process died, or this one was killed.
    """
    read, write = os.pipe()
    child = subprocess.Popen(
        python_words("-m", module, *words),
        env={**python_environment(), SUPERVISED: str(write)},
        pass_fds=[write],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=_die_with_parent,
    )
    os.close(write)
    before = {number: signal.signal(number, lambda n, _: child.send_signal(n)) for number in FORWARDED}
    try:
        told, hidden = _Told(read), deque[bytes](maxlen=200)
        outputs = ((child.stdout, sys.stdout.buffer), (child.stderr, sys.stderr.buffer))
        threads = [threading.Thread(target=_pass_on, args=(*pair, hidden), daemon=True) for pair in outputs]
        for thread in threads:
            thread.start()
        code = child.wait()
        for thread in threads:  # which would not end while a process that the child left behind keeps its outputs
            thread.join(LAST_WORDS_S)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code >= 0:
        return code
    raise _death(-code, told.last(), hidden)


class _Told:
    """The messages that a child reported to its supervisor."""

    def __init__(self, descriptor: int) -> None:
        self._facts: dict[str, Any] = {}
        self._stream = os.fdopen(descriptor, "r", encoding="utf-8")
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def last(self) -> dict[str, Any]:
        self._thread.join(LAST_WORDS_S)
        return self._facts

    def _listen(self) -> None:
        with self._stream:
            for line in self._stream:
                with contextlib.suppress(ValueError, TypeError):  # a line that the child's end cut off
                    self._facts |= json.loads(line)


def _pass_on(source: IO[bytes], target: IO[bytes], hidden: deque[bytes]) -> None:
    """Print what the child prints, but for the runtime's own reports, which are kept.

    Where nobody reads what is printed, or the disk that it goes to is full, all is read and dropped: a child whose
    output nobody takes would wait for ever.
    """
    printing = True
    with source:
        for line in source:
            # The numbers of processes that its service misses come one to a line; empty lines are part of its reports.
            if RUNTIME.match(line) or (hidden and re.fullmatch(rb"\d*\s*", line)):
                hidden.append(line)
            elif printing:
                try:
                    target.write(line)
                    target.flush()
                except (OSError, ValueError):  # of a stream that is closed
                    printing = False


def _death(number: int, told: dict[str, Any], hidden: Sequence[bytes]) -> PeerError:
    me, hosts = told.get("number", 0), told.get("hosts", [])
    this = f"{me} of {max(len(hosts), 1)}, on {socket.gethostname()}"
    if number != signal.SIGABRT:
        return PeerError(
            f"this process was killed by {signal.Signals(number).name}",
            {"process": this},
            "check whether its memory was full, then start all processes again: they resume where they stopped",
        )
    dead = _missing(hidden, me, hosts)
    named = ", ".join(f"{at} on {hosts[at]}" for at in dead) or "one that does not answer"
    return PeerError(
        f"a process that works with this one is gone: {named}",
        {"this process": this, "runtime": _cause(hidden)},
        "read its own messages, then start all processes again: they resume where they stopped",
    )


def _missing(hidden: Sequence[bytes], me: int, hosts: list[str]) -> list[int]:
    """The processes that JAX's service missed; where the service itself is gone, the first one, which ran it."""
    named = [int(line) for line in hidden if re.fullmatch(rb"\d+\s*", line)]
    named += [int(found) for line in hidden for found in re.findall(rb"/task:(\d+)", line)]
    found = sorted({at for at in named if at < len(hosts) and at != me})
    return found if found or me == 0 or not hosts else [0]


def _cause(hidden: Sequence[bytes]) -> str:
    lines = [
        line.decode(errors="replace").strip() for line in hidden if UNHEALTHY.search(line) or b"UNAVAILABLE" in line
    ]
    return (lines[0].split("] ")[-1].split("all tasks: ")[-1] if lines else "no report")[:200]


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
