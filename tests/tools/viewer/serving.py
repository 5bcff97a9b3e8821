"""What the viewer's tests ask it with: a client without a browser, its pages as they are read, a half-built cache."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("starlette", reason="the viewer needs the extra `serve`")

from starlette.testclient import TestClient

from distillcache.tools.viewer.app import make_app
from distillcache.trainer.feed.cache_source import CacheSource
from tests.conftest import build_config
from tests.tools.report.report_reading import ReadPage
from tests.trainer.feed.test_segments import half_built

HOST = "http://localhost:8321"


def viewer(target: object, kind: str = "cache") -> TestClient:
    """A client of a viewer in this process."""
    return TestClient(make_app(kind, str(target)), base_url=HOST)


@pytest.fixture(scope="module")
def client(cache: Path) -> TestClient:
    """Of the tiny cache's viewer."""
    return viewer(cache)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory, teacher: Path, corpus: Path) -> Path:
    """Two of five shards are committed. Read only."""
    config = build_config(tmp_path_factory.mktemp("half") / "cache", teacher, corpus)
    with pytest.MonkeyPatch.context() as patch:
        half_built(config, patch, 2)
    return Path(config.cache)


def read(client: TestClient, address: str, status: int = 200) -> ReadPage:
    """A page, which must be well formed and name no other place."""
    answer = client.get(address)
    assert answer.status_code == status, answer.text[-500:]
    page = ReadPage(answer.text)
    assert [level for level, _ in page.headings].count(1) == 1
    assert all(each.startswith(("/", "#", "data:")) for each in page.addresses)
    assert len(page.ids) == len(set(page.ids))
    return page


def numbers(cache: Path, row: int, tap: str) -> np.ndarray:
    """`[S, T, D]`, by the feed: bfloat16 is the upper half of float32."""
    return (CacheSource(str(cache))[[row]][tap]["codes"][:, 0].astype(np.uint32) << 16).view(np.float32)
