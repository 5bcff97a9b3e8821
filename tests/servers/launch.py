"""A server as the tests use it: started as a process, told what to spoil, asked what it saw, ended for sure."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

Kind = Literal["gcs", "s3"]
ROOT = Path(__file__).parents[2]


class Server:
    """One object store. `environment` is what a process needs in order to use it."""

    def __init__(self, kind: Kind) -> None:
        command = [sys.executable, "-m", "tests.servers", kind, "--parent"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()  # comes when it serves; empty where it failed, after its traceback
        if not line:
            self.close()
            raise RuntimeError(f"`{' '.join(command)}` did not start: its standard error says why")
        self.kind, self.environment = kind, dict(json.loads(line))
        self.address = self.environment["TENSORSTORE_GCS_HTTP_URL" if kind == "gcs" else "AWS_ENDPOINT_URL"]
        self._numbers = itertools.count()

    def make_bucket(self) -> str:
        """A new bucket's URL."""
        name = f"bucket-{next(self._numbers)}"
        if self.kind == "gcs":
            self._ask("POST", "/storage/v1/b?project=test", {"name": name})
            return f"gs://{name}"
        self._ask("PUT", f"/{name}")
        return f"s3://{name}"

    @contextlib.contextmanager
    def faults(self, share: float = 0.1, **values: Any) -> Iterator[None]:
        """Requests go wrong (`faults.Faults`) inside the `with`."""
        self._ask("PUT", "/_control/faults", {"share": share, **values})
        try:
            yield
        finally:
            self._ask("PUT", "/_control/faults", {})

    def clear_requests(self) -> None:
        """Count from here."""
        self._ask("DELETE", "/_control/requests")

    def requests(self) -> dict[str, Any]:
        """`by_key` [[operation, bucket/key, count], ...], and `body_bytes`, `statuses`, `faults` by name."""
        return json.loads(self._ask("GET", "/_control/requests"))

    def count(self, operation: str | None = None, part: str = "") -> int:
        """How many requests there were, of an operation, of keys that contain `part`."""
        found = self.requests()["by_key"]
        return sum(count for asked, key, count in found if operation in (None, asked) and part in key)

    def close(self) -> None:
        """End the process and its upstream."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()  # the first tells it to end
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()  # its upstream is killed by the kernel then
            self._process.wait()

    def _ask(self, method: str, path: str, value: Any = None) -> bytes:
        data = None if value is None else json.dumps(value).encode()
        request = urllib.request.Request(self.address + path, data, method=method)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()
