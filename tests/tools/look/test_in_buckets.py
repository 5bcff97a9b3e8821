"""The commands that look at data, on a cache in a bucket: the same answers as on a local disk."""

import json
from pathlib import Path
from typing import Any

import pytest

from distillcache.schemas.store.store import Store
from distillcache.tools.cli import main
from tests.servers.fixtures import Bucket

pytestmark = pytest.mark.slow  # a server

COMMANDS = (
    ("inspect",),
    ("show", "--row", "9"),
    ("stats", "--rows", "3"),
    ("fidelity", "--rows", "3"),
)


def upload(folder: Path, url: str) -> None:
    store = Store(url)
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            store.write(str(file.relative_to(folder)), file.read_bytes())


def answer(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], cache: str) -> dict[str, Any]:
    main([words[0], cache, *words[1:], "--json"])
    found = json.loads(capsys.readouterr().out)
    return {key: value for key, value in found.items() if key not in ("cache", "a", "b")}


@pytest.mark.parametrize("kind", ["gcs", "s3"])
def test_the_answers_are_those_of_the_local_disk(
    cache: Path, kind: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket: Bucket = request.getfixturevalue(kind)
    url = f"{bucket.url}/cache"
    upload(cache, url)
    for words in COMMANDS:
        assert answer(capsys, words, url) == answer(capsys, words, str(cache)), words
    assert main(["diff", url, str(cache), "--rows", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["same"]
    assert not main(["export-samples", url, f"{bucket.url}/out/x.npz", "--count", "2", "--json"])
    assert Store(bucket.url).read("out/x.npz")
    assert not main(["show", url, "--image", f"{bucket.url}/out/row.svg", "--json"])
    assert (Store(bucket.url).read("out/row.svg") or b"").startswith(b"<?xml")


def test_inspect_reads_no_data_and_show_one_row(cache: Path, gcs: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"{gcs.url}/cache"
    upload(cache, url)
    Store(url).delete_keys("segments/0000/taps/attn_out/c/")
    assert not main(["inspect", url])
    capsys.readouterr()
    assert main(["show", url, "--row", "1", "--json"]) == 2  # its attn_out is gone
    found = json.loads(capsys.readouterr().out)
    assert list(found["taps"]) == ["resid"]
    assert "is not what was committed" in found["warnings"][0]
