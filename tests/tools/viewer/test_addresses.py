"""Addresses that climb out of the cache, in every spelling: refused, and no file is opened for them."""

import itertools
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the viewer needs the extra `serve`")

from starlette.testclient import TestClient

from tests.tools.viewer.serving import viewer

PLACES = ["/{}", "/row/{}", "/row/17/token/{}", "/slot/{}/0", "/slot/resid/{}", "/rows/{}", "/build/{}"]
PLACES += ["/rows?split={}", "/rows?start={}", "/row?number={}", "/row/17?tap={}", "/row/17?block={}"]
PLACES += ["/slot?tap={}&slot=0", "/slot?tap=resid&slot={}", "/search?ids={}"]


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file beside the cache's folder."""
    file = tmp_path_factory.mktemp("beside") / "precious"
    file.write_text("nobody reads this")
    return file


@pytest.fixture(scope="module")
def reader(outside: Path, cache: Path) -> TestClient:
    return viewer(shutil.copytree(cache, outside.parent / "c"))


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Paths that Python opens or lists while a test runs."""
    found: list[str] = []
    listening = [True]

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if listening[0] and event in ("open", "os.listdir", "os.scandir"):
            found.append(str(arguments[0]))

    sys.addaudithook(note)  # there is no way to remove one
    yield found
    listening[0] = False


@pytest.mark.parametrize("place", PLACES)
def test_no_address_leads_to_a_file_outside(reader: TestClient, outside: Path, opened: list[str], place: str) -> None:
    climbs = ["../precious", "../../../precious", str(outside), f"file://{outside}", "..\\precious", "../precious\0"]
    for climb, slash in itertools.product(climbs, ("/", "%2f", "%2F", "%252f")):
        spelled = climb.replace("\0", "%00").replace("\\", "%5c").replace("/", slash)
        for address in (place.format(spelled), place.format(spelled.replace("..", "%2e%2e"))):
            answer = reader.get(address)
            assert answer.status_code in (400, 404), address
            assert "nobody reads this" not in answer.text
    assert not [path for path in opened if "precious" in path]
