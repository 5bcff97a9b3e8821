"""What a request asks for, told from its method and address, and how many there were."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import unquote

from aiohttp import web

Operation = Literal["read", "stat", "list", "write", "delete", "other"]


@dataclass(frozen=True)
class Asked:
    """An operation on a key of a bucket."""

    operation: Operation
    bucket: str = ""
    key: str = ""


def asked_of_gcs(request: web.Request) -> Asked:
    """Of the JSON API: /storage/v1/b/BUCKET/o/KEY, with /upload or /download before it."""
    parts = request.raw_path.partition("?")[0].split("/")
    if "b" not in parts or "o" not in parts:
        return Asked("other")
    bucket, place = parts[parts.index("b") + 1], parts.index("o") + 1
    key = unquote("/".join(parts[place:])) or request.query.get("name", "")
    if request.method == "GET":
        return Asked(_reading(key, media=request.query.get("alt") == "media" or "download" in parts), bucket, key)
    return Asked("delete" if request.method == "DELETE" else "write", bucket, key)


def asked_of_s3(request: web.Request) -> Asked:
    """Of addresses that begin with the bucket: /BUCKET/KEY."""
    bucket, _, key = unquote(request.raw_path.partition("?")[0]).lstrip("/").partition("/")
    if request.method in ("GET", "HEAD"):
        return Asked(_reading(key, media=request.method == "GET"), bucket, key)
    return Asked("delete" if request.method == "DELETE" else "write", bucket, key)


def _reading(key: str, *, media: bool) -> Operation:
    return "list" if not key else "read" if media else "stat"


@dataclass
class Requests:
    """Counts since the last `clear`: requests by (operation, key), bytes by operation, statuses, faults."""

    by_key: Counter[tuple[str, str]] = field(default_factory=Counter)
    body_bytes: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)

    def add(self, asked: Asked, status: int, body_bytes: int) -> None:
        self.by_key[asked.operation, f"{asked.bucket}/{asked.key}"] += 1
        self.body_bytes[asked.operation] += body_bytes
        self.statuses[status] += 1

    def clear(self) -> None:
        for counter in (self.by_key, self.body_bytes, self.statuses, self.faults):
            counter.clear()

    def as_json(self) -> dict[str, object]:
        return {
            "by_key": [[operation, key, count] for (operation, key), count in sorted(self.by_key.items())],
            "body_bytes": self.body_bytes,
            "statuses": self.statuses,
            "faults": self.faults,
        }
