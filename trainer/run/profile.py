"""A profile of some of a run's steps, for TensorBoard or Perfetto."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from distillcache.schemas.errors import ConfigError, StorageError
from distillcache.schemas.store.store import Store

TRACES = "traces"


class Trace:
    """Writes a profile of the steps that `profile` names (`steps=10:13`: 10, 11 and 12) to the run's folder."""

    def __init__(self, profile: str | None, store: Store) -> None:
        first, _, stop = (profile or "steps=0:0").removeprefix("steps=").partition(":")
        self._first, self._stop, self._store, self._folder = int(first), int(stop), store, ""

    def before(self, number: int) -> None:
        """Called before each step."""
        if number == self._stop:
            self.__exit__()
        if self._first <= number < self._stop and not self._folder:
            local = self._store.local
            self._store.check_inside(TRACES)
            self._folder = str(local / TRACES) if local is not None else tempfile.mkdtemp(prefix="distillcache-trace-")
            with self._told():
                jax.profiler.start_trace(self._folder)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:
            raise StorageError(
                "the trace of the profiler cannot be written",
                {"run": self._store.where(TRACES), "cause": str(error).split("\n")[0][:200]},
                "make room, or leave out --profile; the same command resumes from the last checkpoint",
            ) from error

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._folder:
            return
        folder, self._folder = Path(self._folder), ""
        with self._told():
            jax.profiler.stop_trace()
        if self._store.local is None:
            for file in sorted(path for path in folder.rglob("*") if path.is_file()):
                self._store.write(f"{TRACES}/{file.relative_to(folder).as_posix()}", file.read_bytes())
            shutil.rmtree(folder)


def check_profile(profile: str | None, steps: int) -> None:
    """Raise `ConfigError` unless these are steps of the run."""
    if profile is None:
        return
    first, stop = (int(number) for number in profile.removeprefix("steps=").split(":"))
    if not 1 <= first < stop <= steps + 1:
        raise ConfigError(
            "these steps cannot be profiled",
            {"profile": profile, "expected": f"steps=FIRST:STOP within 1 and {steps + 1}, STOP left out"},
            "name steps of this run",
        )
