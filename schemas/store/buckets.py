"""Buckets: what TensorStore is told to reach `gs://` and `s3://`, and what its errors mean to a person.

Measured with TensorStore 0.1.86 behind a proxy that spoils requests: it makes requests again by itself after 408, 429,
5xx, resets, connections cut within a body, and stalls (once told how long to wait). It does not notice a body that is
short and says so, retry a range that came short, or tell an error page from a listing. A conditional write whose
answer was lost comes back as lost.
"""

import os
import re
import threading
from typing import Any

import tensorstore as ts

from distillcache.schemas.config.storage import StorageConfig
from distillcache.schemas.errors import ConfigError, StorageError
from distillcache.schemas.runtime.library_log import without_library_log
from distillcache.schemas.store.url_secrets import refuse_secret

SCHEMES = {"gs": "gcs", "s3": "s3"}  # of a URL, and TensorStore's name for it
FAILURES = (ValueError, OSError, RuntimeError)  # what TensorStore raises, NotImplementedError included

_RANGE_CUT = re.compile(r"Requested byte range \[(\d+), (\d*)\).* and total size (\d+)")
_ESCAPED = re.compile(r"(?:\\x[0-9a-f]{2})+")  # in TensorStore's messages: bytes of a path
_STATUS, _PAYLOAD = re.compile(r"http_response_code='(\d+)'"), re.compile(r" \[[a-z_]+=")
_LISTING_CUT = ("Failed to parse response metadata", "Malformed List response")
_OBJECT_CUT = re.compile(r"(Failed to parse object metadata).*", re.DOTALL)  # then the response, which names no fault


def check_scheme(url: str) -> None:
    """Raise `StorageError` for a URL of something else than a bucket; TensorStore would ask some of them, read-only."""
    scheme = url.partition("://")[0]
    if scheme not in (*SCHEMES, "memory"):
        raise StorageError(
            "the store cannot be opened",
            {"url": url, "expected": "a path, file://, gs:// or s3://"},
            "download its content, or copy it to a bucket, and name that path",
        )


def refuse_nameless(url: str) -> None:
    """Raise `ConfigError` for `gs://` and `s3:///key`: an unset variable is there, and no bucket (`gs://$BUCKET/key`)."""
    scheme, _, rest = url.partition("://")
    if scheme in SCHEMES and not rest.partition("/")[0].strip():
        raise ConfigError(
            "a URL names no bucket", {"url": url, "expected": f"{scheme}://bucket/folder"}, "name the bucket"
        )


def bucket_spec(url: str, config: StorageConfig) -> dict[str, Any] | None:
    """TensorStore's JSON spec of the folder at a bucket's URL, without its context; None where it is no bucket."""
    scheme, _, rest = url.partition("://")
    if scheme not in SCHEMES:
        return None
    bucket, _, prefix = rest.partition("/")
    driver = SCHEMES[scheme]
    spec: dict[str, Any] = {"driver": driver, "bucket": bucket, "path": f"{prefix.rstrip('/')}/".lstrip("/")}
    if config.read_rate is not None or config.write_rate is not None:
        spec[f"experimental_{driver}_rate_limiter"] = f"experimental_{driver}_rate_limiter"
    if scheme == "s3":
        spec |= _s3_place(config)
    return spec


def _s3_place(config: StorageConfig) -> dict[str, str]:
    environment = os.environ
    endpoint = config.s3_endpoint or environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    region = config.s3_region or environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    refuse_secret(endpoint or "", "endpoint of S3")
    if not endpoint:
        return {}  # TensorStore asks Amazon where the bucket lies
    return {"endpoint": endpoint.rstrip("/"), "aws_region": region or "us-east-1"}  # a region is part of the signature


def context_spec(config: StorageConfig) -> dict[str, Any]:
    """The Context of all stores of this process: they share its queues, so that the limits are the process's."""
    unlimited = 1e9
    spec: dict[str, Any] = {}
    for driver in SCHEMES.values():
        spec[f"{driver}_request_concurrency"] = {"limit": config.request_concurrency}
        spec[f"{driver}_request_retries"] = retries(config.max_retries, config.first_delay_s, config.max_delay_s)
        if config.read_rate is not None or config.write_rate is not None:
            spec[f"experimental_{driver}_rate_limiter"] = {
                "read_rate": config.read_rate or unlimited,  # TensorStore 0.1.86 needs both
                "write_rate": config.write_rate or unlimited,
                "doubling_time": f"{config.rate_doubling_s}s",
            }
    if "AWS_ACCESS_KEY_ID" in os.environ:  # else it looks for files first, and complains where there are none
        spec["aws_credentials"] = {"type": "environment"}
    return spec


def retries(count: int, first_delay_s: float, max_delay_s: float) -> dict[str, Any]:
    """TensorStore's resource: exponential back-off with a random part."""
    return {"max_retries": count, "initial_delay": f"{first_delay_s}s", "max_delay": f"{max_delay_s}s"}


def set_timeouts(config: StorageConfig) -> None:
    """For TensorStore's HTTP client, which reads them once, before its first request. What the user set, stays."""
    for name, value in {
        "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": config.stall_timeout_s,
        "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": 1,
        "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": 10,
    }.items():
        os.environ.setdefault(name, str(value))


_met: set[tuple[str, str, str]] = set()
_meeting = threading.Lock()


def meet(spec: dict[str, Any], config: StorageConfig) -> None:
    """Probe a bucket once, so that permanent errors fail fast.

    Once for each bucket and process. To TensorStore, a bucket of GCS that does not exist is empty: only a write tells.

    Raises:
        ValueError, OSError, TimeoutError: TensorStore's; `advice` explains them.
    """
    server = spec["endpoint"] if "endpoint" in spec else os.environ.get("TENSORSTORE_GCS_HTTP_URL", "")
    place = (spec["driver"], spec["bucket"], server)
    with _meeting:
        if place in _met:
            return
    context = ts.Context(
        {
            **context_spec(config),
            f"{spec['driver']}_request_retries": retries(6, 0.1, 2.0),
            f"experimental_{spec['driver']}_rate_limiter": {"read_rate": 100, "write_rate": 100},
        }
    )
    absent = "distillcache-is-asking"
    with without_library_log():  # credentials are looked for now, and kept
        kv = ts.KvStore.open(spec, context=context).result()
        asked = kv.read(absent) if spec["driver"] == "gcs" else kv.list(ts.KvStore.KeyRange(absent, absent + "0"))
        asked.result(timeout=config.contact_timeout_s)
    with _meeting:
        _met.add(place)


def is_garbled(text: str) -> bool:
    """Return whether an error means a response corrupted in transit, which TensorStore does not retry."""
    if any(sign in text for sign in _LISTING_CUT) or _OBJECT_CUT.search(text):
        return True
    cut = _RANGE_CUT.search(text)
    return cut is not None and bool(cut[2]) and int(cut[2]) <= int(cut[3])


def cause(error: BaseException) -> str:
    """An error of TensorStore's in one line: without the pages that servers send, but with their status."""
    text = _OBJECT_CUT.sub(r"\1: the response was cut short", str(error))
    status = _STATUS.search(text)
    line = _ESCAPED.sub(_unescaped, _PAYLOAD.split(text)[0].removesuffix(": Unknown").partition("\n")[0])
    return f"{line} (HTTP {status[1]})" if status else line


def _unescaped(found: re.Match[str]) -> str:
    """Bytes of a path as letters; TensorStore ends the names of folders that it could not create with NUL."""
    return bytes.fromhex(found[0].replace("\\x", "")).decode("utf-8", "backslashreplace").replace("\0", "/")


def advice(url: str, error: BaseException) -> str | None:
    """Return what to check after this error of a bucket; None if nothing is known about it."""
    text, google = str(error), url.startswith("gs://")
    bucket = url.partition("://")[2].partition("/")[0]
    if "PERMISSION_DENIED" in text or "UNAUTHENTICATED" in text or "credentials" in text.lower():
        return (
            f"check that this account may list, read and write in {bucket} (roles/storage.objectUser), and who it is: "
            "`gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS"
            if google
            else f"check that these credentials may list, read and write in {bucket}: AWS_PROFILE, or "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if "NOT_FOUND" in text or any(sign in text for sign in _LISTING_CUT):
        return f"check the bucket's name, {bucket}: it must be there already"
    if isinstance(error, TimeoutError) or "CURL error" in text:
        where = "TENSORSTORE_GCS_HTTP_URL, if it is set" if google else "--storage.s3-endpoint or AWS_ENDPOINT_URL"
        return f"check the network, and the address of the store: {where}"
    if "retry attempts failed" in text or _OBJECT_CUT.search(text):
        return "the store kept failing: run the same command again later; what is committed stays"
    return None
