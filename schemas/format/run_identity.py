"""A run's `run.json`: what its numbers depend on, and the digests of the files that it began with.

    {"cache": <digest>, <each field of the config that numbers depend on>, "files": {<key>: {length, digest}}, "digest"}

`files` is null until the student is made, which is complete in one step; from then on it covers the student's folder
and the records of its surgery. `digest` covers all that stands before it, and names the run: checkpoints and the
summary carry it. Versions before this wrote neither: there is nothing to compare with then.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import xxhash
from pydantic import TypeAdapter

from distillcache.schemas.base import Config, Count, Hex
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import DamageError
from distillcache.schemas.format.canonical import from_plain
from distillcache.schemas.format.digest import digest_bytes
from distillcache.schemas.store.store import Store

IDENTITY, STUDENT = "run.json", "student"
FILES, DIGEST = "files", "digest"
WEIGHTS = ".safetensors"
READ_FROM_FOLDERS = (WEIGHTS, ".json", ".jinja", ".model")  # by readers of a checkpoint, if they are there
CHUNK_BYTES = 1 << 20  # in one read of a disk: measured on 540 MB, 0.26 s; of 64 MiB, into fresh memory, 1.9 s
BUCKET_CHUNK_BYTES = 32 << 20  # a request's latency must not count


class FileDigest(Config):
    """Length and xxh3-128 of a file."""

    length: Count
    digest: Hex


@dataclass(frozen=True)
class RunIdentity:
    """The content of a `run.json`. spec: the fields that are compared when work resumes.

    files: None before the student is made, and in runs of earlier versions. digest: the run's name in its other files;
    None in runs of earlier versions.
    """

    spec: dict[str, Any]
    files: dict[str, FileDigest] | None
    digest: str | None


def to_sealed(value: Mapping[str, Any]) -> bytes:
    """JSON for people that ends in a digest of its own."""
    digest = digest_bytes(json.dumps(value).encode())
    return (json.dumps({**value, DIGEST: digest}, indent=1) + "\n").encode()


def from_sealed(data: bytes, where: str, step: str) -> tuple[dict[str, Any], str | None]:
    """The value that `to_sealed` wrote, and its digest; None for a file of an earlier version, which has none.

    Raises:
        DamageError: it is something else.
    """
    value = from_plain(TypeAdapter(dict[str, Any]), data, where, step)
    if DIGEST not in value:
        return value, None
    body = {key: entry for key, entry in value.items() if key != DIGEST}
    if to_sealed(body) != data:
        found = f"{counted(len(data), 'byte')}, digest {value[DIGEST]}"
        expected = f"digest {digest_bytes(json.dumps(body).encode())}"
        raise DamageError(
            "a JSON file is not what was written", {"object": where, "found": found, "expected": expected}, step
        )
    return body, str(value[DIGEST])


def spell_identity(spec: Mapping[str, Any], files: Mapping[str, FileDigest] | None) -> bytes:
    """The bytes of a `run.json`."""
    found = None if files is None else {key: entry.model_dump() for key, entry in sorted(files.items())}
    return to_sealed({**spec, FILES: found})


def read_identity(run: Store) -> RunIdentity | None:
    """The content of a run's `run.json`; None where there is none.

    Raises:
        DamageError: it is not what was written.
    """
    data = run.read(IDENTITY)
    if data is None:
        return None
    where = run.where(IDENTITY)
    value, digest = from_sealed(data, where, f"copy {IDENTITY} back, or delete it: {without_identity(run)}")
    files = value.pop(FILES, None)
    if digest is None:
        return RunIdentity(value, None, None)
    entries = TypeAdapter(dict[str, FileDigest] | None).validate_python(files)
    return RunIdentity(value, entries, digest)


def without_identity(run: Store) -> str:
    """Say what can be done with a run whose `run.json` is lost."""
    return (
        "without it the run cannot resume, but its checkpoints can be exported, and a new run can begin with the "
        f"newest: --student.init {run.url}"
    )


def file_digest(run: Store, key: str) -> FileDigest | None:
    """The digest of a file as it is now; None where there is none."""
    length, digest = 0, xxhash.xxh3_128()
    chunk = BUCKET_CHUNK_BYTES if run.is_bucket else CHUNK_BYTES
    while True:
        part, _ = run.read_range(key, length, length + chunk)
        if part is None:
            part = run.read_range(key, length, None)[0] or b""
        digest.update(part)
        length += len(part)
        if len(part) < chunk:
            break
    if not length and run.read(key) is None:
        return None
    return FileDigest(length=length, digest=digest.hexdigest())


def check_student_files(run: Store, *, whole: bool = True) -> None:
    """Compare the files of the student that a run began with with what `run.json` says of them.

    Args:
        whole: all of them, every byte; otherwise those without weights, and nothing is said of additional ones.

    Raises:
        DamageError: one is missing, is not what was written, or is there in addition.
    """
    identity = read_identity(run)
    if identity is None or identity.files is None:
        return
    mine = f"{STUDENT}/"
    known = [key for key in identity.files if key.startswith(mine) and (whole or not key.endswith(WEIGHTS))]
    for key in sorted(known):
        _compare(run, key, identity.files[key])
    for key in run.keys(mine) if whole else ():
        if key.endswith(READ_FROM_FOLDERS) and key not in identity.files:
            _compare(run, key, None)


def check_file(run: Store, key: str) -> None:
    """Compare one of the files that a run began with with what `run.json` says of it.

    Raises:
        DamageError: it is missing, or is not what was written.
    """
    identity = read_identity(run)
    if identity is not None and identity.files is not None:
        _compare(run, key, identity.files.get(key))


def _compare(run: Store, key: str, expected: FileDigest | None) -> None:
    found = file_digest(run, key)
    if found != expected:
        raise _damage(run, key, found, expected)


def changed_records(run: Store) -> list[str]:
    """Say which of the other files that the run began with changed: what surgery kept, and the measured importance.

    A resumed run needs none of them, unless it makes projectors (trainer/run/student.py).
    """
    identity = read_identity(run)
    told = []
    for key, expected in sorted((identity.files or {}).items()) if identity is not None else ():
        if not key.startswith(f"{STUDENT}/") and (found := file_digest(run, key)) != expected:
            told.append(f"{run.where(key)} is {'missing' if found is None else 'not what was written'}")
    return told


def _damage(run: Store, key: str, found: FileDigest | None, expected: FileDigest | None) -> DamageError:
    return DamageError(
        "a file that the run began with is " + ("missing" if found is None else "not what was written"),
        {"object": run.where(key), "found": _told(found), "expected": _told(expected)},
        "remove it"
        if expected is None
        else "copy it back from where the run was copied to or from; without it, begin a new run with another --run",
    )


def _told(entry: FileDigest | None) -> str:
    return "nothing" if entry is None else f"{counted(entry.length, 'byte')}, digest {entry.digest}"
