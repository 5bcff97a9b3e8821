"""Input files in buckets: listed and read as streams through fsspec, whose libraries bring their own credentials.

    gs://bucket/corpus/*.jsonl.gz      needs the extra `gcs` (gcsfs): application default credentials
    s3://bucket/corpus/                needs the extra `s3` (s3fs): AWS_PROFILE, environment, instance role

Whatever else fsspec knows (`memory://`, `http://`, ...) is read too, where its library is installed.
"""

import io
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from distillcache.schemas.errors import InputError, install_advice
from distillcache.schemas.store.store import current

BLOCK_BYTES = 8 << 20  # a request's overhead (tens of milliseconds) is small beside its bytes
READ_AHEAD = 4  # blocks in flight: one stream alone fills about a tenth of a 100 Gbit/s link, and 32 MiB of memory
ATTEMPTS = 5  # beside the retries of the libraries, which miss cut bodies and some resets
FIRST_PAUSE_S = 0.5  # doubled after every attempt: 7.5 s in all

_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}  # scheme -> extra of ours
_ROLES = {
    "gcs": "run `gcloud auth application-default login`, or give the service account roles/storage.objectViewer",
    "s3": "check AWS_PROFILE or AWS_ACCESS_KEY_ID, and that the role may s3:ListBucket and s3:GetObject",
}


@dataclass(frozen=True)
class RemoteObject:
    """An object as its listing names it.

    version: the store's own mark of these very bytes (generation, ETag); empty where there is none.
    """

    url: str
    size: int
    version: str


def remote_objects(url: str) -> tuple[list[RemoteObject], bool]:
    """The objects that a URL, a folder's URL or a pattern names, and whether it is an object's own name.

    Hidden ones below a folder are left out.

    Raises:
        InputError: no such bucket, no permission, a library that is not installed.
    """
    scheme, path = url.split("://", 1)
    fs = filesystem(url)
    try:
        info = _info(fs, url)
        if info is not None and info["type"] == "file":
            return [_object(scheme, fs, info)], True
        found = _below(fs, url) if info is not None else {}
        if info is None and any(letter in path for letter in "*?["):
            found = _matching(fs, url)
        if not found:
            _check_bucket(fs, url)
    except InputError:
        raise
    except Exception as error:  # each library raises its own
        raise remote_failure(url, error) from error
    return [_object(scheme, fs, entry) for entry in found.values()], False


def open_remote(remote: RemoteObject) -> "BlockReader":
    """The object as a stream, read front to back.

    Raises: InputError when read: a permanent fault, or one that lasts.
    """
    fs = filesystem(remote.url)
    return BlockReader(lambda start, stop: _fetch(fs, remote.url, start, stop), remote.size)


def check_unchanged(remote: RemoteObject) -> None:
    """Raise `InputError` where the store holds another version by now: blocks may have come from both."""
    fs = filesystem(remote.url)
    try:
        now = _version(fs.info(remote.url))
    except Exception as error:
        raise remote_failure(remote.url, error) from error
    if now != remote.version:
        raise InputError(
            "an input file changed while it was read",
            {"file": remote.url, "version then": remote.version, "version now": now},
            "run the same command again, once nobody writes there any more",
        )


def filesystem(url: str) -> Any:
    """The fsspec file system of a URL, which remembers no listings. One for each process and endpoint.

    S3's endpoint and region are the storage config's where it names them, else the library's own environment's.

    Raises:
        InputError: there is none, or its library is not installed.
    """
    scheme, storage = url.split("://", 1)[0], current()
    where = tuple(os.environ.get(name, "") for name in ("STORAGE_EMULATOR_HOST", "AWS_ENDPOINT_URL"))
    names = {"endpoint_url": storage.s3_endpoint, "region_name": storage.s3_region}
    client = tuple((name, value) for name, value in names.items() if value and _EXTRAS.get(scheme) == "s3")
    try:
        return _filesystem(scheme, client, where)
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        advice = install_advice(extra) if extra else f"install what fsspec needs for {scheme}://"
        raise InputError(
            "a library is missing that reads this place", {"place": url, "cause": error}, advice
        ) from error
    except ValueError as error:
        raise InputError(
            "text cannot be read from such a place",
            {"place": url, "cause": error},
            "use a local path, gs:// or s3://",
        ) from error


@lru_cache
def _filesystem(scheme: str, client: tuple[tuple[str, str], ...], _where: tuple[str, ...]) -> Any:
    import fsspec  # here, since it comes with the extras

    options = {"client_kwargs": dict(client)} if client else {}
    return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True, **options)


def _info(fs: Any, url: str) -> dict[str, Any] | None:
    try:
        return fs.info(url)
    except FileNotFoundError:
        return None


def _below(fs: Any, folder: str) -> dict[str, dict[str, Any]]:
    """The files below a folder; hidden ones are left out, as in a local one."""
    depth = len(_parts(fs._strip_protocol(folder)))
    found = fs.find(folder, detail=True)
    return {name: entry for name, entry in found.items() if not name.endswith("/") and not _is_hidden(name, depth)}


def _matching(fs: Any, pattern: str) -> dict[str, dict[str, Any]]:
    """The files that a pattern names, and those below folders that it names; hidden ones where it names the dot."""
    parts = _parts(fs._strip_protocol(pattern))
    depth = next(place for place, part in enumerate(parts) if any(letter in part for letter in "*?["))
    names_dots = any(part.startswith(".") for part in parts[depth:])
    found: dict[str, dict[str, Any]] = {}
    try:
        matches = fs.glob(pattern, detail=True)
    except FileNotFoundError:  # gcsfs: no such bucket
        return found
    for name, entry in matches.items():
        if names_dots or not _is_hidden(name, depth):
            found |= {name: entry} if entry["type"] == "file" else _below(fs, name)
    return found


def _parts(name: str) -> list[str]:
    return name.strip("/").split("/")


def _is_hidden(name: str, depth: int) -> bool:
    """Return whether a part of the name behind its first `depth` ones begins with a dot."""
    return any(part.startswith(".") for part in _parts(name)[depth:])


def _check_bucket(fs: Any, url: str) -> None:
    """A bucket that is not there lists as an empty one."""
    scheme, path = url.split("://", 1)
    if scheme in _EXTRAS and _info(fs, f"{scheme}://{path.split('/')[0]}") is None:
        raise InputError(
            "there is no such bucket", {"data.path": url, "bucket": path.split("/")[0]}, "check the bucket's name"
        )


def _object(scheme: str, fs: Any, info: dict[str, Any]) -> RemoteObject:
    url = f"{scheme}://{info['name'].removeprefix(f'{scheme}://').lstrip('/')}"
    if scheme not in _EXTRAS:
        url = fs.unstrip_protocol(info["name"])
    return RemoteObject(url, int(info["size"] or 0), _version(info))


def _version(info: dict[str, Any]) -> str:
    return str(info.get("generation") or info.get("ETag") or info.get("etag") or "").strip('"')


def _fetch(fs: Any, url: str, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop - 1`, tried again where a fault may pass."""
    cause: Exception = OSError("no answer")
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
        try:
            data = fs.cat_file(url, start=start, end=stop)
        except Exception as error:
            if _is_permanent(error):
                raise remote_failure(url, error) from error
            cause = error
        else:
            if len(data) == stop - start:
                return data
            cause = OSError(f"{len(data)} bytes came instead of {stop - start}")
    raise remote_failure(url, cause) from cause


def _status(error: BaseException) -> str:
    """The HTTP status that a library's error carries; empty where it has none."""
    code = getattr(error, "code", None) or getattr(error, "status", None)
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        code = response.get("ResponseMetadata", {}).get("HTTPStatusCode", code)
    return str(code or "")


def _is_refusal(error: BaseException) -> bool:
    """No permission, or no credentials. gcsfs says the first as a plain OSError (`Forbidden: ...`)."""
    names = {kind.__name__ for kind in type(error).__mro__}
    known = {"PermissionError", "NoCredentialsError", "DefaultCredentialsError", "RefreshError", "TokenRetrievalError"}
    return bool(names & known) or _status(error) in ("401", "403") or str(error).startswith("Forbidden")


def _is_permanent(error: BaseException) -> bool:
    return _is_refusal(error) or isinstance(error, FileNotFoundError)


def remote_failure(url: str, error: BaseException) -> InputError:
    """Translate a library's error for users."""
    facts = {"file": url, "cause": f"{type(error).__name__}: {error}".strip().split("\n")[0]}
    if _is_refusal(error):
        advice = _ROLES.get(_EXTRAS.get(url.split("://", 1)[0], ""), "check the credentials")
        return InputError("text may not be read there", facts, advice)
    if isinstance(error, FileNotFoundError):
        return InputError("there is no such file or bucket", facts, "check the name")
    return InputError(
        "text cannot be read there", facts, "check the place and the network, then run the same command again"
    )


class BlockReader(io.RawIOBase):
    """A stream of a known length, fetched by blocks of which some are on their way ahead of the reader."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        super().__init__()
        self._fetch, self._size = fetch, size
        self._asked, self._block = 0, memoryview(b"")
        self._waiting: deque[Future[bytes]] = deque()
        self._pool = ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="input-block")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not len(self._block):
            self._ask()
            if not self._waiting:
                return 0
            self._block = memoryview(self._waiting.popleft().result())
            self._ask()
        count = min(len(buffer), len(self._block))
        buffer[:count] = self._block[:count]
        self._block = self._block[count:]
        return count

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._waiting.clear()
        super().close()

    def _ask(self) -> None:
        while len(self._waiting) < READ_AHEAD and self._asked < self._size:
            stop = min(self._asked + BLOCK_BYTES, self._size)
            self._waiting.append(self._pool.submit(self._fetch, self._asked, stop))
            self._asked = stop
