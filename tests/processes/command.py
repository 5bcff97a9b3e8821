"""`Command`: a command line in a forked process, with what tests use of `subprocess.Popen`."""

import atexit
import functools
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from distillcache.tools.cli import main


def fork_server() -> ForkServerContext:
    """The one fork server of this test process, with everything imported; started by the first child."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.processes.preloaded"])
    return context


@functools.cache
def _outputs_folder() -> str:
    """A folder that goes when this process ends."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class Command:
    """A command in a process of its own.

    Args:
        begin: a function of a module, such as a `main`: it reads `sys.argv` and returns an exit code.
        environment: the child's; None: this process's.
    """

    def __init__(self, begin: Callable[[], Any], words: Sequence[str], environment: Mapping[str, str] | None = None):
        folder = tempfile.mkdtemp(dir=_outputs_folder())
        self._outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        for path in self._outputs:
            path.touch()
        values = dict(os.environ if environment is None else environment)
        self._process = fork_server().Process(
            target=_run, args=(begin, list(words), values, *map(str, self._outputs)), daemon=True
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, negative where a signal ended the process; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return `returncode`."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it, unless the process has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code once there is one; `subprocess.TimeoutExpired` where it does not come in time."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; what was printed on standard output and standard error."""
        self.wait(timeout)
        out, err = (path.read_text() for path in self._outputs)
        return out, err


def start(*words: str) -> Command:
    """`distillcache` with these words."""
    return Command(main, words)


def run(*words: str) -> None:
    """`distillcache` with these words, which must succeed."""
    command = start(*words)
    assert command.wait() == 0, command.communicate()


def _run(begin: Callable[[], Any], words: list[str], environment: dict[str, str], *outputs: str) -> None:
    """In the child: become the command."""
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["distillcache", *words]
    try:
        sys.exit(begin())
    finally:
        atexit._run_exitfuncs()  # a child of multiprocessing ends without them
