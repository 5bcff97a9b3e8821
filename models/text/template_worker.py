"""The process that renders chat templates, seen from here: started on demand, one for each process, asked in turn.

Whatever a template does, this process keeps its memory and its time: a render that passes `CPU_S` or `MEMORY_BYTES`
ends the other process, and is one error here. Limits count processor time, so a busy machine changes nothing.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

CPU_S = 10  # a chat takes about a tenth of a millisecond
CPU_BYTES = 1 << 20  # of the request, for one second more: long chats take longer
MEMORY_BYTES = 1 << 29  # of address space; the interpreter with Jinja takes about 60 MB
MEMORY_FACTOR = 32  # and so much for each byte of the request
CHARACTERS = 1 << 26  # of text, 64 Mi
CHARACTERS_FACTOR = 8

_PROGRAM = Path(__file__).with_name("template_process.py")
# The interpreter starts isolated, then sees this process's own import path: no file of the working folder is imported.
_START = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv[1]); runpy.run_path(sys.argv[2], run_name='__main__')"
)


class TemplateProcess:
    """A running process, or none yet. Threads take turns; a fork starts its own."""

    def __init__(self) -> None:
        self._lock, self._owner = threading.Lock(), 0
        self._process: Any = None  # a subprocess.Popen with both streams
        atexit.register(self.close)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply of `template_process.answer`, or `{"error": "time" | "memory" | "died"}`.

        Values that JSON lacks (bytes, dates) are shown to the template as `<type>`, as transformers does.
        """
        try:
            content = json.dumps(request, default=_placeholder)
        except RecursionError:
            return {"error": "failure", "message": "the chat is nested too deep"}
        limits = {
            "cpu_s": CPU_S + len(content) // CPU_BYTES,
            "memory_bytes": MEMORY_BYTES + MEMORY_FACTOR * len(content),
            "characters": CHARACTERS + CHARACTERS_FACTOR * len(content),
        }
        line = f"{content[:-1]}, {json.dumps(limits)[1:]}\n".encode()
        with self._lock:
            return self._exchanged(line)

    def close(self) -> None:
        """End the process; the next request starts another."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                stream.close()

    def _exchanged(self, line: bytes) -> dict[str, Any]:
        process = self._running()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            reply = process.stdout.readline()
        except BrokenPipeError:
            reply = b""
        except BaseException:  # interrupted between request and reply: the next one must not read this reply
            self.close()
            raise
        if reply.endswith(b"\n"):
            return json.loads(reply)
        status = process.wait()
        self.close()
        return {"error": "time"} if status == -signal.SIGXCPU else {"error": "died", "message": f"exit status {status}"}

    def _running(self) -> Any:
        if self._process is None or self._owner != os.getpid():
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _START, json.dumps([str(Path(p).absolute()) for p in sys.path]), _PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            self._owner = os.getpid()
        return self._process


def _placeholder(value: object) -> str:
    return f"<{type(value).__name__}>"


PROCESS = TemplateProcess()
