"""Where a run writes its metrics, and how they are read.

On a disk lines are added to `metrics.jsonl`. An object in a bucket cannot grow, and should not be written again and
again: there the lines go into `metrics/<first step>.jsonl`, a new object for every half minute, checkpoint or
evaluation, so that a killed process loses no line that a checkpoint counts on. TensorBoard's event files are made in a
temporary folder and brought there alike.
"""

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from tensorboardX import SummaryWriter

from schemas.storage import Store

LINES = "metrics"
LOADS = "router"  # every expert's share of the tokens, at checkpoints and evaluations
TENSORBOARD = "tensorboard"
PIXELS = 8  # of an expert in an image, on each side
FLUSH_S = 30.0


class MetricsLog:
    """A run's metrics. Lines past `last_step` are cut first: the steps that a killed run repeats."""

    def __init__(self, store: Store, last_step: int) -> None:
        self._lines, self._loads = _Lines(store, LINES, last_step), _Lines(store, LOADS, last_step)
        self._tensorboard = _Tensorboard(store, last_step + 1)
        self._flushed = time.monotonic()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add the metrics after `step` steps."""
        self._lines.add({"step": step, **values})
        for name, value in values.items():
            self._tensorboard.writer.add_scalar(name, value, step)
        if time.monotonic() - self._flushed > FLUSH_S:
            self.flush()

    def log_load(self, step: int, blocks: Sequence[int], load: Float[np.ndarray, "Lm E"]) -> None:
        """Add every expert's share of the tokens after `step` steps, as a line and as an image.

        In the image a row is a block and a column an expert; black has no token, grey the mean, white twice it or more.
        """
        share = load / np.maximum(load.sum(axis=1, keepdims=True), 1.0)
        rows = [[round(float(value), 6) for value in row] for row in share]
        self._loads.add({"step": step, "blocks": list(blocks), "share": rows})
        grey = np.clip(share * load.shape[1] / 2, 0, 1)
        image = np.kron(grey, np.ones((PIXELS, PIXELS)))[None]
        self._tensorboard.writer.add_image("router/load", image, step)

    def flush(self) -> None:
        """Make everything that was logged durable, and readable by others."""
        for each in (self._lines, self._loads, self._tensorboard):
            each.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush and close."""
        for each in (self._lines, self._loads, self._tensorboard):
            each.close()


class _Lines:
    """A file of JSON lines, each with a step, that grows."""

    def __init__(self, store: Store, name: str, last_step: int) -> None:
        self._store, self._name, self._new = store, name, []
        self._file = None
        self._cut(last_step)

    def add(self, line: dict[str, Any]) -> None:
        self._new.append(line)
        if self._store.local is not None:
            self.flush()

    def flush(self) -> None:
        if not self._new:
            return
        text = "".join(map(_spell, self._new))
        if self._store.local is not None:
            if self._file is None:
                self._file = (self._store.local / f"{self._name}.jsonl").open("a", encoding="utf-8")
            self._file.write(text)
            self._file.flush()
        else:
            self._store.write(_part(self._name, self._new[0]["step"]), text.encode())
        self._new = []

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()

    def _cut(self, last_step: int) -> None:
        """Forget the lines past `last_step`, and one that a killed process left unfinished."""
        if self._store.local is not None:
            path = self._store.local / f"{self._name}.jsonl"
            if path.exists():
                kept = [line for line in _read(self._store, self._name) if line["step"] <= last_step]
                path.write_text("".join(map(_spell, kept)))
            return
        for key in self._store.keys(f"{self._name}/"):
            lines = _lines(self._store.read(key) or b"")
            kept = [line for line in lines if line["step"] <= last_step]
            if not kept:
                self._store.delete(key)
            elif len(kept) < len(lines):
                self._store.write(key, "".join(map(_spell, kept)).encode())


class _Tensorboard:
    """Event files. TensorBoard drops what an earlier process wrote from the purged step on."""

    def __init__(self, store: Store, purge_step: int) -> None:
        self._store, self._purge = store, purge_step
        self._files = 0
        self._folder = tempfile.mkdtemp(prefix="distillcache-events-") if store.local is None else None
        self.writer = SummaryWriter(
            self._folder or str(store.local / TENSORBOARD),  # type: ignore[operator]
            purge_step=purge_step,
            filename_suffix=f".{purge_step}",  # a run that goes on within the same second writes a file of its own
        )

    def flush(self) -> None:
        """In a bucket: bring what was written there as a file of its own, and begin another."""
        if self._folder is None:
            self.writer.flush()
            return
        self.writer.close()
        for file in sorted(Path(self._folder).iterdir()):
            self._files += 1
            self._store.write(f"{TENSORBOARD}/{file.name}.{self._files:06d}", file.read_bytes())
            file.unlink()
        self.writer = SummaryWriter(self._folder)

    def close(self) -> None:
        if self._folder is not None:
            self.flush()
        self.writer.close()
        if self._folder is not None:
            with contextlib.suppress(OSError):
                shutil.rmtree(self._folder)


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of a run, in order; a last line that a killed run left unfinished is not one."""
    return _read(Store(str(run)), LINES)


def read_loads(run: str | Path) -> list[dict[str, Any]]:
    """Every expert's share of the tokens, in order: `step`, `blocks`, `share` `[Lm][E]`."""
    return _read(Store(str(run)), LOADS)


def _read(store: Store, name: str) -> list[dict[str, Any]]:
    keys = [f"{name}.jsonl"] if store.local is not None else store.keys(f"{name}/")
    return [line for key in keys for line in _lines(store.read(key) or b"")]


def _part(name: str, step: int) -> str:
    return f"{name}/{step:08d}.jsonl"


def _lines(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.decode().splitlines(keepends=True) if line.endswith("\n")]


def _spell(line: dict[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"
