"""Errors that a user can cause: each ends a command with one message, no traceback, exit code 2 (3: a training that
diverged).

Every message says what is wrong, where it was found, what was found and expected, and what to do next.
The command line prints `str(error)`; anything that is not a `DistillcacheError` is a bug of ours and keeps
its traceback.
"""

from collections.abc import Mapping

from distillcache.schemas.store.redaction import redacted, shown

# What to do about a damaged file of a cache.
MEND_NEXT = "run `distillcache verify` to see all damage, and `distillcache build --repair` to repair it"


class DistillcacheError(Exception):
    """A mistake in the input, the config or the environment, with what to do about it.

    Args:
        what: one line, no full stop: what is wrong.
        facts: label -> value, in reading order: where it is, what was found, what was expected.
        next: what the user can do now.
    """

    exit_code = 2

    def __init__(self, what: str, facts: Mapping[str, object] | None = None, next: str = "") -> None:
        self.what, self.facts, self.next = redacted(what), shown(_without_repeats(facts or {})), redacted(next)
        super().__init__(what)

    def __str__(self) -> str:
        rows = {**self.facts, **({"next": self.next} if self.next else {})}
        width = max((len(label) for label in rows), default=0)
        lines = [f"  {label.ljust(width)}  {redacted(str(value))}" for label, value in rows.items()]
        title = "stopped" if isinstance(self, Interrupted) else "error"
        return "\n".join([f"{title}: {self.what}", *lines])


def _without_repeats(facts: Mapping[str, object]) -> dict[str, object]:
    """The facts, with an `OSError` in its own words: no error number, and no path that another fact names."""
    return {
        label: _os_words(value, [other for key, other in facts.items() if key != label])
        if isinstance(value, OSError)
        else _in_a_line(value)
        for label, value in facts.items()
    }


def _in_a_line(value: object) -> object:
    """An exception of a library in one line; other values as they are."""
    return " ".join(str(value).split()) if isinstance(value, Exception) and "\n" in str(value) else value


def _os_words(error: OSError, others: list[object]) -> object:
    if error.strerror is None:
        return error
    named = error.filename is None or any(str(error.filename) in str(other) for other in others)
    return error.strerror if named else f"{error.strerror}: {error.filename}"


class Interrupted(DistillcacheError):
    """SIGTERM or SIGINT: work in flight was finished or dropped, and the same command resumes from here."""

    exit_code = 143


class ConfigError(DistillcacheError):
    """A config file, a flag or their combination that cannot be used."""


class InputError(DistillcacheError):
    """Text, rows or a tokenizer that cannot be used."""


class RecordError(InputError):
    """One record of an input file that cannot be used, while the next ones may be; `line` or `record` says which."""


class CheckpointError(DistillcacheError):
    """A teacher or student checkpoint that is missing, damaged or not supported."""


class PlanMismatchError(DistillcacheError):
    """A directory that already holds the work of another config."""


class FolderTakenError(PlanMismatchError):
    """Work whose place was deleted or taken over while it was paused: it must not write there any more."""


class StorageError(DistillcacheError):
    """A read or write that the store refused or failed."""


class DamageError(DistillcacheError):
    """Stored bytes that differ from what was committed."""


class NonFiniteError(DistillcacheError):
    """NaN or infinity where numbers must be finite."""


class DivergedError(NonFiniteError):
    """A training whose losses are not finite any more, or whose student ended worse than it began.

    Args:
        best: the step of the best checkpoint that is kept.
    """

    exit_code = 3

    def __init__(self, what: str, facts: Mapping[str, object], next: str, best: int | None = None) -> None:
        super().__init__(what, facts, next)
        self.best = best


def install_advice(extra: str) -> str:
    """The command that installs one of our optional dependencies, for the next step of an error.

    It is the one of a checkout: the project's name belongs to nobody on the package index, so that
    `pip install 'distillcache[...]'` would fetch nothing or a stranger's package.
    """
    return f"in the project's folder: pip install -e '.[{extra}]'"
