"""The test servers themselves: preconditions hold, faults come as told and from the seed, nothing outlives a test."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.servers.faults import Faults
from tests.servers.fixtures import Bucket
from tests.servers.launch import ROOT, Server


def upload(bucket: Bucket, value: bytes, condition: str = "") -> int:
    """The status of a media upload to the object `key`, as TensorStore makes them."""
    name = bucket.url.removeprefix("gs://")
    address = f"{bucket.server.address}/upload/storage/v1/b/{name}/o?uploadType=media&name=key{condition}"
    try:
        with urllib.request.urlopen(urllib.request.Request(address, value, method="POST"), timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_an_upload_with_another_generation_is_refused(gcs: Bucket) -> None:
    assert upload(gcs, b"1", "&ifGenerationMatch=0") == 200
    assert upload(gcs, b"2", "&ifGenerationMatch=0") == 412
    assert upload(gcs, b"3", "&ifGenerationMatch=1") == 412
    assert upload(gcs, b"4") == 200


def test_faults_are_those_of_the_seed(gcs: Bucket) -> None:
    with gcs.server.faults(share=0.5, kinds=["503"]):
        first = [upload(gcs, b"1") for _ in range(20)]
    with gcs.server.faults(share=0.5, kinds=["503"]):
        assert [upload(gcs, b"1") for _ in range(20)] == first
    assert set(first) == {200, 503}
    assert upload(gcs, b"1") == 200


def test_the_share_is_the_share() -> None:
    faults = Faults(share=0.1, kinds=("503", "cut"))
    drawn = [faults.draw("read", f"GET /{number}") for number in range(5000)]
    assert drawn.count("503") == pytest.approx(250, abs=60)
    assert drawn.count("cut") == pytest.approx(250, abs=60)


def test_counts_name_operations_and_keys(gcs: Bucket) -> None:
    gcs.server.clear_requests()
    upload(gcs, b"12345")
    assert gcs.server.count("write", "/key") == 1
    assert gcs.server.requests()["body_bytes"]["write"] == 5


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere an upstream may outlive a server that was killed")
def test_a_killed_server_leaves_no_process(gcs_server: Server) -> None:
    started = subprocess.Popen(
        [sys.executable, "-m", "tests.servers", "gcs"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with started:
        assert started.stdout is not None
        assert b"export TENSORSTORE_GCS_HTTP_URL" in started.stdout.readline()
        (upstream,) = children(started.pid)
        os.kill(started.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while lives(upstream):
        assert time.monotonic() < deadline, f"fake-gcs-server {upstream} lives on"
        time.sleep(0.02)


def lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"  # Z: dead, not reaped yet
    except FileNotFoundError:
        return False


def children(process: int) -> list[int]:
    """The processes that this one started."""
    with open(f"/proc/{process}/task/{process}/children") as listing:
        return [int(number) for number in listing.read().split()]
